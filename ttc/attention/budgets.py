"""Offline calibration: how many pages each layer and KV head needs, as a file of factors on the budget.

While a model thinks densely over a few problems, the attention mass of every page is measured (all layers, heads and rows, at some
steps), and with it the pages that hold 90 % of it. A head's factor is its need over the mean need, so that the whole reads no more
than without factors; a layer whose need is nearly all of the context can be left dense. (The idea of head-wise budgets by offline
calibration is TCA-Attention's; "layers" gives all heads of a layer one factor, the layer-wise case of Flux.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COVER = 0.9
EVERY = 7  # steps between two looks: pages fill up in between, so looks see new text


@dataclass
class Needs:
    """Mean part of a row's pages that holds ``COVER`` of its attention mass, by layer name: [H]."""

    sums: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    looks: int = 0

    def add(self, layer: str, mass: Any) -> None:
        """``mass`` [H, P]: one row's attention mass by page; short rows tell nothing."""
        if mass.shape[1] < 4:
            return
        ordered = mass.sort(dim=1, descending=True).values
        share = ordered.cumsum(1) / ordered.sum(1, keepdim=True)
        need = ((share < COVER).sum(1) + 1).clamp(max=mass.shape[1]) / mass.shape[1]
        self.sums[layer] = self.sums.get(layer, 0) + need
        self.counts[layer] = self.counts.get(layer, 0) + 1

    def factors(
        self, by: Literal["heads", "layers"] = "heads", dense_above: float = 0.8
    ) -> list[list[float] | None]:
        """Factors on the budget with a mean of 1 over the sparse layers' heads; None for a layer that needs more than
        ``dense_above`` of its pages. Raises ValueError if nothing long enough was seen."""
        if not self.sums:
            raise ValueError(
                "no sequence was longer than three pages; calibrate on longer ones, or with smaller pages"
            )
        needs = [self.sums[name] / self.counts[name] for name in sorted(self.sums, key=_position)]
        if by == "layers":
            needs = [need.mean().expand_as(need) for need in needs]
        sparse = [need for need in needs if float(need.mean()) <= dense_above] or needs
        mean = sum(float(need.sum()) for need in sparse) / sum(need.numel() for need in sparse)
        kept = {id(need) for need in sparse}
        return [
            [round(float(n) / mean - 5e-7, 6) for n in need] if id(need) in kept else None for need in needs
        ]


def _position(layer: str) -> int:
    return int(next(part for part in layer.split(".") if part.isdigit()))


@contextmanager
def observed() -> Iterator[Needs]:
    """While open, dense and sparse decoding on this process's engines is watched. The engine must decode sparsely "always", and
    its requests carry a budget that holds their whole context (any method)."""
    from ttc.attention import choose
    from ttc.attention.backend import SparseForward

    needs, table = Needs(), SparseForward._table
    last: list[Any] = [None]

    def watched(self: Any, name: str, query: Any, kv_cache: Any, step: Any, plan: Any, factors: Any) -> Any:
        made = table(self, name, query, kv_cache, step, plan, factors)
        if step is not last[0]:
            last[0] = step
            needs.looks += 1
        if needs.looks % EVERY:
            return made
        heads = len(factors)
        grouped = query[: step.rows].view(step.rows, heads, self.num_heads // heads, -1)
        for i in range(step.rows):
            ids = step.tables[i, : step.pages[i]].long()
            keys = self.cache.keys(kv_cache, ids)
            needs.add(name, choose.oracle_scores(grouped[i], keys, step.lengths[i], self.scale))
        return made

    SparseForward._table = watched  # type: ignore[method-assign]
    try:
        yield needs
    finally:
        SparseForward._table = table  # type: ignore[method-assign]


def calibrate(
    model: str, tasks: Sequence[str], *, problems: int, page: int, seed: int, by: Literal["heads", "layers"] = "heads"
) -> list[list[float] | None]:  # fmt: skip
    """Factors for a model from dense chains over ``problems`` problems of each task."""
    from ttc.api import Run, Settings
    from ttc.attention.settings import CONFIG_KEY
    from ttc.engine.vllm import VLLMEngine
    from ttc.errors import InputError
    from ttc.problems import from_task

    engine = VLLMEngine(
        model,
        concurrency=16,
        kv_page=page,
        engine_args={"additional_config": {CONFIG_KEY: {"when": "always"}}},
    )
    try:
        with observed() as needs:
            for task in tasks:
                settings = Settings(
                    policy="self-consistency?n=1", budget="1G tokens", seed=seed, kv_budget=engine.info.context,
                    kv_method="streaming",
                )  # fmt: skip
                for _ in Run(from_task(task, problems, seed), engine, settings).results():
                    pass
    finally:
        engine.close()
    try:
        return needs.factors(by)
    except ValueError as error:
        raise InputError(f"budgets: {error}") from None


def save(factors: Sequence[Sequence[float] | None], path: Path) -> None:
    """Write what ``SparseOptions.budgets`` reads."""
    path.write_text(json.dumps({"factors": [None if row is None else list(row) for row in factors]}) + "\n")
