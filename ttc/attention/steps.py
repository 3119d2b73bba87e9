"""What the layers of one engine step share: which rows decode sparsely, how many pages each KV head keeps, the tables that need no
query. Knows no attention kernel and no layout: the backends (``cpu``, ``flash_attn``, ``triton_attn``) do. Decides on the host from
lengths alone, so that nothing waits for a GPU.

The last page is always kept, so a row's reduced length is the same in all layers with the same budgets. A page's summary is made
when a row first needs it after the page became full; each row counts its own summarised pages, so a page that another request
wrote, or that was evicted, reused or loaded from elsewhere, needs no notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ttc.attention.choose import Ids, static_pages
from ttc.attention.rows import Batch, Row
from ttc.attention.settings import KvSetting, SparseOptions
from ttc.attention.worth import VECTORS, Overhead

Factors = tuple[float, ...]
KINDS = {"block-topk": "mean", "quest": "bounds"}


@dataclass(slots=True)
class LayerPlan:
    """What the layers with the same budgets share in a step. H KV heads, b rows."""

    kept: list[list[int]]  # [b][H] pages
    keep: Tensor  # [b, H], the same
    lengths: Tensor  # [b * H] tokens left
    longest: int
    table: Tensor  # [b * H, W]: rows that need no query are filled in
    rules: Tensor  # [b]: VECTORS of the rows to be scored by summaries, else 0
    scored: bool
    oracle: list[int]
    starts: Tensor  # [b * H + 1]
    backend: Any = None  # what the kernel wants beside: the backend's own
    narrow: Any = None  # likewise, made when a layer first needs it
    selection: Any = None  # likewise, the compiled selector's
    frame: Any = (
        None  # where these tensors lie, if that is fixed (``fixed``): then the table is filled in place
    )


@dataclass(slots=True)
class Step:
    """One engine step with sparse rows among its first ``rows`` rows, which all decode one token."""

    planner: Planner
    rows: int
    lengths: list[int]
    pages: list[int]
    tables: Tensor  # [rows, >= P] page ids
    settings: list[Row | None]
    kept: dict[Factors, list[list[int]]]
    counts: Tensor  # [rows] pages
    stale: dict[str, Tensor]
    rest: Any = None  # the backend's metadata for the rows that prefill
    plans: dict[Factors, LayerPlan] = field(default_factory=dict)
    chosen: dict[Any, Tensor] = field(default_factory=dict)
    again: bool = False  # the choices of an earlier step still hold

    @property
    def widest(self) -> int:
        """No row has more pages."""
        return max(self.pages)

    def plan(self, factors: Factors, ids: Ids) -> LayerPlan:
        found = self.plans.get(factors)
        if found is None:
            found = self.plans[factors] = self.planner.layer_plan(self, factors, ids)
        return found


def pages_kept(
    setting: KvSetting, pages: int, page: int, factors: Sequence[float], overhead: Overhead
) -> list[int]:
    """Pages that each KV head of a row reads, each at least one, together no more than the budget times the sum of ``factors``.
    All of them (dense) where choosing would cost as much as it saves."""
    if overhead.dense(setting, pages, page):
        return [pages] * len(factors)
    most = max(1, setting.budget // page)
    shares = [most * factor for factor in factors]
    kept = [max(1, int(share + 1e-9)) for share in shares]
    spare = int(sum(shares) + 1e-9) - sum(kept)
    for head in sorted(range(len(kept)), key=lambda h: kept[h] - shares[h])[: max(0, spare)]:
        kept[head] += 1
    return [min(pages, k) for k in kept]


class Planner:
    """Plans the steps of one group of layers. ``factors``: for each layer, in order, those on the budget by KV head (None: it stays
    dense). ``finish`` adds what the kernel wants to a plan; ``measure`` says what choosing costs, when first asked.
    ``pooled``: the fixed part of that falls on a step, not on a row, so rows that choose together share it."""

    def __init__(
        self, *, options: SparseOptions, batch: Batch, factors: Mapping[str, Factors | None], page: int, device: torch.device,
        finish: Callable[[LayerPlan], Any], measure: Callable[[], Overhead], pooled: bool = False,
    ) -> None:  # fmt: skip
        self.options, self.batch, self.page, self.device = options, batch, page, device
        self.factors, self.layers = dict(factors), list(factors.values())
        self.finish, self._measure, self.pooled = finish, measure, pooled
        self.name = next(iter(factors))
        groups = {name: i // options.share_layers for i, name in enumerate(factors)}
        self.anchors = {
            name: (groups[name], f) for name, f in factors.items() if f is not None
        }  # layers that choose together
        self.choosing = len(set(self.anchors.values())) / len(
            factors
        )  # the part of the layers that score pages
        self.alone = (
            options.share_layers == options.share_steps == 1
        )  # each layer and step chooses for itself, so in place
        self.shared: dict[Any, Tensor] = {}  # choices that later steps may take over
        self.below: dict[tuple[KvSetting, int], float] = {}  # see ``_below``
        self.mark: Any = None
        self.age = 0  # steps that they have served

    @cached_property
    def overhead(self) -> Overhead:
        return self._measure()

    def _overhead(self, setting: KvSetting, among: int = 1) -> Overhead:
        """What choosing costs one of ``among`` rows. The oracle reads every key to choose: it is there to be measured, and never
        judged by its time."""
        whole = self.overhead
        if setting.method == "oracle-topk":
            return Overhead(0.0, min(0.0, whole.fixed))
        if whole.fixed <= 0 or among == 1:
            return whole
        return Overhead(whole.vector, whole.fixed / among if among else 0.0)

    def dense_below(self, setting: KvSetting) -> float:
        """The context, in tokens, up to which a row reads everything."""
        return self._overhead(setting).dense_below(setting, self.page)

    def _kept(
        self, settings: Sequence[Row | None], lengths: Sequence[int], pages: Sequence[int]
    ) -> dict[Factors, list[list[int]]]:
        """Pages that each row keeps in each KV head, by the layers' factors."""
        among = self._among(settings, lengths)
        return {
            factors: [
                [count] * len(factors) if row is None
                else pages_kept(row.setting, count, self.page, factors, self._overhead(row.setting, among))
                for row, count in zip(settings, pages, strict=True)
            ]
            for factors in {f for f in self.layers if f is not None}
        }  # fmt: skip

    def _among(self, settings: Sequence[Row | None], lengths: Sequence[int]) -> int:
        """The rows that a step's fixed cost is shared among: those that would choose if it were nothing."""
        if not self.pooled or not any(settings):
            return 1
        return max(1, sum(
            row is not None and length > self._below(row.setting, 0)
            for row, length in zip(settings, lengths, strict=False)
        ))  # fmt: skip

    def _below(self, setting: KvSetting, among: int) -> float:
        """The context up to which a row reads everything where ``among`` rows share the fixed cost (0: there is none)."""
        found = self.below.get((setting, among))
        if found is None:
            found = self._overhead(setting, among).dense_below(setting, self.page)
            self.below[setting, among] = found
        return found

    def _all_dense(self, settings: Sequence[Row | None], lengths: Sequence[int]) -> bool:
        """Whether no row is long enough to read a part: known at once, so that staying dense costs nothing."""
        among = self._among(settings, lengths)
        return not any(
            row is not None and length > self._below(row.setting, among)
            for row, length in zip(settings, lengths, strict=False)
        )

    def step(
        self, lengths: Sequence[int], fresh: Sequence[int], prefilling: Sequence[bool], tables: Tensor
    ) -> Step | None:
        """Plan a step from the rows' lengths (with this step's tokens), new tokens and page ids [n, >= P]; rows that decode come
        first. None if all of it is dense."""
        rows = next((i for i, new in enumerate(fresh) if new != 1 or prefilling[i]), len(fresh))
        settings = [self.batch.rows.get(i) for i in range(rows)]
        if not any(settings) or (self.options.when != "always" and self._all_dense(settings, lengths)):
            self.mark = None
            return None
        pages = [-(-length // self.page) for length in lengths[:rows]]
        kept = self._kept(settings, lengths, pages)
        again = False
        if self.options.share_steps > 1:
            mark = (self.batch.version, pages)
            again = mark == self.mark and self.age < self.options.share_steps
            self.mark, self.age = mark, self.age + 1 if again else 1
        if not self._count(settings, pages, kept, again) and self.options.when != "always":
            self.mark = None
            return None
        counts = self._put(pages)
        step = Step(
            self, rows, list(lengths[:rows]), pages, tables[:rows], settings, kept, counts, {}, again=again
        )
        step.stale = self._stale(step)
        return step

    def _count(
        self, settings: list[Row | None], pages: list[int], kept: dict[Factors, list[list[int]]], again: bool
    ) -> bool:
        """Count for each row what it skips and scores. False if all stay dense."""
        sparse, layers = False, self.batch.layers or len(self.layers)
        shares = [(factors, self.layers.count(factors)) for factors in kept]
        for i, row in enumerate(settings):
            if row is None:
                continue
            skipped = sum(n * (pages[i] - sum(kept[f][i]) / len(f)) for f, n in shares) * self.page
            if skipped > 0:
                sparse = True
                vectors = 0 if again else VECTORS.get(row.setting.method, 0)
                row.count(skipped / layers, pages[i] * vectors * self.choosing * len(self.layers) / layers)
        return sparse

    def _stale(self, step: Step, ahead: int = 0) -> dict[str, Tensor]:
        """Pages of rows that choose by summaries, full and not yet summarised for that row, by kind; full without the last
        ``ahead`` tokens."""
        parts: dict[str, list[Tensor]] = {}
        for i, row in enumerate(step.settings):
            kind = KINDS.get(row.setting.method) if row is not None else None
            if row is None or kind is None or not any(min(k[i]) < step.pages[i] for k in step.kept.values()):
                continue
            done, full = row.done.get(self.name, 0), (step.lengths[i] - ahead) // self.page
            if full > done:
                parts.setdefault(kind, []).append(step.tables[i, done:full].long())
                row.done[self.name] = full
        made = {kind: torch.cat(ids) for kind, ids in parts.items()}
        return {kind: torch.unique(ids) if ids.is_cpu else ids for kind, ids in made.items()}

    def layer_plan(self, step: Step, factors: Factors, ids: Ids) -> LayerPlan:
        """The plan of the layers with these factors. Everything is worked out on the host and put on the device at once."""
        kept, heads = step.kept[factors], len(factors)
        rules, oracle, still = [0] * step.rows, [], []
        for i, row in enumerate(step.settings):
            method = row.setting.method if row else "streaming"
            if min(kept[i]) < step.pages[i] and method in VECTORS:
                rules[i] = VECTORS[method]
            elif min(kept[i]) < step.pages[i] and method == "oracle-topk":
                oracle.append(i)
            else:
                still.append((i, method))
        reduced = [
            length - (count - k) * self.page
            for length, count, row in zip(step.lengths, step.pages, kept, strict=True)
            for k in row
        ]
        width = max(map(max, kept))
        table = torch.zeros(step.rows * heads, width, dtype=torch.int32, device=self.device)
        if still:
            positions = torch.zeros(step.rows, heads, width, dtype=torch.int64)
            for i, method in still:
                for k in set(kept[i]):
                    at = torch.as_tensor(static_pages(method, step.pages[i], k))
                    positions[i, [h for h in range(heads) if kept[i][h] == k], :k] = at
            chosen = step.tables.gather(1, positions.view(step.rows, -1).to(self.device))
            head_ids = torch.arange(heads, dtype=torch.int32, device=self.device)[:, None] * ids.head
            table = (
                (chosen.view(step.rows, heads, width) * ids.block + head_ids).to(torch.int32).view(-1, width)
            )
        plan = LayerPlan(
            kept, self._put(kept), self._put(reduced), max(reduced), table, self._put(rules), any(rules), oracle,
            torch.arange(step.rows * heads + 1, dtype=torch.int32, device=self.device),
        )  # fmt: skip
        plan.backend = self.finish(plan)
        return plan

    def _put(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(self.device, non_blocking=True)
