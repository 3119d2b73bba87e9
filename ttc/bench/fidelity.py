"""``ttc bench fidelity``: what sparse decoding costs in accuracy, and what its savings buy, on an embedded reasoner.

The same problems and seeds under dense decoding and under every method and budget: accuracy of single samples and of votes, KV
tokens read, eFLOPs; differences are paired by problem. Then the question of Kinetics (arXiv 2506.05333) at equal cost: every arm
is a curve of accuracy over eFLOPs (more samples; with ``caps``, also longer thoughts), and arms are compared where they cost what
dense costs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ttc import nano
from ttc.attention.settings import KvSetting
from ttc.errors import InputError

VOTES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding: a setting (None: dense), the engine's options beside it, a shorter cap on thought."""

    name: str
    kv: KvSetting | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cap: int | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """``problems`` of each task, ``samples`` of each, thoughts closed at ``thinking`` tokens (a loop would cost more than all
    else), pages of ``page`` tokens."""

    model: str
    tasks: tuple[str, ...]
    problems: int
    samples: int
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    thinking: int = 1024
    caps: tuple[int, ...] = ()
    page: int = 32
    seed: int = 0
    extras: bool = True

    def arms(self, budgets_file: dict[str, str]) -> Iterator[Arm]:
        """Dense, every method at every budget, then the extras at the middle budget: dense first layer, choices shared by layers or
        steps, calibrated budgets; then dense and block-topk at each cap."""
        yield Arm("dense")
        for method in self.methods:
            for budget in self.budgets:
                yield Arm(f"{method} {budget}", KvSetting(budget, method))
        middle = KvSetting(self.budgets[len(self.budgets) // 2])
        extras: dict[str, dict[str, Any]] = {
            "first layer dense": {"dense_layers": 1}, "2 layers share": {"share_layers": 2}, "4 layers share": {"share_layers": 4},
            "4 steps share": {"share_steps": 4}, "16 steps share": {"share_steps": 16},
        } | {f"budgets by {by}": {"budgets": path} for by, path in budgets_file.items()}  # fmt: skip
        for name, options in extras.items() if self.extras else ():
            yield Arm(f"{middle.method} {middle.budget}, {name}", middle, options)
        for cap in self.caps:
            for kv in (None, *(KvSetting(budget) for budget in self.budgets)):
                yield Arm(f"{'dense' if kv is None else f'{kv.method} {kv.budget}'}, cap {cap}", kv, {}, cap)


def run(study: Study, say: Any = print, out: Path | None = None) -> list[dict[str, Any]]:
    """A row for each arm: accuracy of one sample and of votes, with costs; agreement with dense sample by sample. ``out`` is given
    each row as it ends, and the rows of the same study that it has already are not run again."""
    from ttc.api import Run, Settings
    from ttc.attention.budgets import calibrate, save
    from ttc.attention.settings import CONFIG_KEY
    from ttc.curves import vote_curve
    from ttc.engine.vllm import VLLMEngine
    from ttc.problems import from_task

    problems = [p for task in study.tasks for p in from_task(task, study.problems, study.seed)]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for by in ("heads", "layers") if study.extras else ():
            made = calibrate(
                study.model, study.tasks, problems=8, page=study.page, seed=study.seed + 1, by=by
            )
            files[by] = str(Path(folder) / f"{by}.json")
            save(made, Path(files[by]))
            say(f"calibrated by {by}: {made}")
        rows = _stored(study, out)
        done_before = {row["arm"] for row in rows}
        engine, opened = None, None
        for arm in study.arms(files):
            if arm.name in done_before:
                continue
            if opened != arm.options:
                if engine is not None:
                    engine.close()
                told = {"additional_config": {CONFIG_KEY: {"when": "cheaper"} | arm.options}}
                engine, opened = (
                    VLLMEngine(study.model, concurrency=64, kv_page=study.page, engine_args=told),
                    arm.options,
                )
            assert engine is not None
            settings = Settings(
                policy=f"self-consistency?n={study.samples}", budget="1G tokens", seed=study.seed,
                kv_budget=arm.kv.budget if arm.kv else None, kv_method=arm.kv.method if arm.kv else None,
                max_thinking_tokens=arm.cap or study.thinking,
            )  # fmt: skip
            done = Run(problems, engine, settings)
            results = sorted(done.results(), key=lambda r: r.problem_id)
            branches = [b for r in results for b in r.branches]
            tokens = sum(b.completion.output_tokens for b in branches)
            context = sum(
                b.completion.prompt_tokens + i for b in branches for i in range(1, b.completion.output_tokens)
            )
            charge = done.status.charge
            curve = vote_curve(results, VOTES, seed=study.seed)
            texts = [
                [_digest(b.completion.text) for b in sorted(r.branches, key=lambda b: b.index)]
                for r in results
            ]
            dense = rows[0]["texts"] if rows else texts
            same = [
                a == b
                for own, other in zip(texts, dense, strict=True)
                for a, b in zip(own, other, strict=True)
            ]
            rows.append(
                {
                    "arm": arm.name, "budget": arm.kv.budget if arm.kv else None, "method": arm.kv.method if arm.kv else None,
                    "options": {k: v for k, v in arm.options.items() if k != "budgets"}, "cap": arm.cap,
                    "tokens_per_sample": tokens / len(branches), "context_per_token": context / tokens,
                    "kv_read": charge.kv_tokens / context, "eflops_per_sample": charge.eflops / len(branches),
                    "same_as_dense": sum(same) / len(same), "texts": texts,
                    "right": [sum(b.usable and b.vote in r.right for b in r.branches) / len(r.branches) for r in results],
                    "votes": [{"votes": p.votes, "accuracy": p.accuracy, "low": p.low, "high": p.high} for p in curve],
                }
            )  # fmt: skip
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            say(f"{arm.name}: {curve[0].accuracy:.1%}, {charge.kv_tokens / context:.0%} of the KV read")
        if engine is not None:
            engine.close()
    return rows


def _stored(study: Study, out: Path | None) -> list[dict[str, Any]]:
    """The rows that ``out`` has, but for a torn last one; a new file is begun with what the study is. Raises InputError for a file
    of another study."""
    if out is None:
        return []
    mine = json.loads(json.dumps(asdict(study)))
    try:
        text = out.read_text() if out.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        head, *rows = [json.loads(line) for line in whole.splitlines()] or [{"study": mine}]
        if not whole or whole != text:
            out.write_text(whole or json.dumps(head) + "\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: can't be used ({error}); give another file") from None
    if not isinstance(head, dict) or head.get("study") != mine:
        raise InputError(f"--out {out}: holds another study; give another file")
    return rows


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def gains(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """What each arm's samples get right more often than dense's, paired by problem: mean and 95 % interval."""
    import numpy as np

    from ttc.costmodel import intervals

    dense = np.array(rows[0]["right"])
    others = [intervals.paired(np.array(row["right"]) - dense) for row in rows[1:]]
    return [(0.0, 0.0, 0.0), *((gain.mean, gain.low, gain.high) for gain in others)]


def at_equal_cost(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm and each cost of dense votes: the arm's accuracy there (linear in the logarithm of the cost between its own
    points; None outside them), beside dense's."""
    found = []
    dense = rows[0]
    for row in rows[1:]:
        for point in dense["votes"]:
            cost = point["votes"] * dense["eflops_per_sample"]
            here = _accuracy_at(row, cost)
            if here is not None:
                found.append({"arm": row["arm"], "dense_votes": point["votes"], "eflops": cost, "dense": point["accuracy"],
                              "accuracy": here, "gain": here - point["accuracy"]})  # fmt: skip
    return found


def _accuracy_at(row: dict[str, Any], cost: float) -> float | None:
    points = [(p["votes"] * row["eflops_per_sample"], p["accuracy"]) for p in row["votes"]]
    for (low, a), (high, b) in pairwise(points):
        if low <= cost <= high:
            return float(a + (b - a) * math.log(cost / low) / math.log(high / low))
    return None


def main(
    *, model: str, tasks: Sequence[str], problems: int, samples: int, budgets: Sequence[int], methods: Sequence[str],
    caps: Sequence[int], thinking: int, page: int, seed: int, extras: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run the study; print tables, or one JSON object."""
    from rich.console import Console

    known = {m.name: m for m in nano.catalog()}
    if model not in known and not tasks:
        raise InputError(
            f"task: {model} is no embedded reasoner, so its tasks are not known; name some with --task"
        )
    for method in methods:
        for budget in budgets:
            KvSetting(budget, method).check_page(page)
    study = Study(
        model, tuple(tasks) or known[model].tasks[:1], problems, samples, tuple(budgets), tuple(methods),
        thinking, tuple(caps), page, seed, extras,
    )  # fmt: skip
    rows = run(study, Console(stderr=True, highlight=False).print, out)
    rows = [row | {"gain": gain} for row, gain in zip(rows, gains(rows), strict=True)]
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    told = [{k: v for k, v in row.items() if k != "texts"} for row in rows]
    report = {"study": asdict(study), "rows": told, "equal_cost": at_equal_cost(rows), "machine": machine}
    if as_json:
        print(json.dumps(report))
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    study = report["study"]
    title = f"{study['model']}, {study['problems']} problems × {study['samples']} samples of {', '.join(study['tasks'])}"
    table = Table(title=title, title_justify="left")
    for heading in (
        "arm",
        "one sample",
        "against dense",
        "all vote",
        "KV read",
        "tokens",
        "MeFLOPs",
        "same text",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in report["rows"]:
        first, last = row["votes"][0], row["votes"][-1]
        table.add_row(
            row["arm"], f"{first['accuracy']:.1%}", "{:+.1%} [{:+.1%}, {:+.1%}]".format(*row["gain"]), f"{last['accuracy']:.1%}",
            f"{row['kv_read']:.0%}", f"{row['tokens_per_sample']:,.0f}", f"{row['eflops_per_sample'] / 1e6:,.0f}",
            f"{row['same_as_dense']:.0%}",
        )  # fmt: skip
    stdout.print(table)
    equal = Table(title="accuracy at the cost of dense votes", title_justify="left")
    for heading in ("arm", "dense votes", "dense", "arm at that cost", "gain"):
        equal.add_column(heading, justify="left" if heading == "arm" else "right")
    for each in report["equal_cost"]:
        equal.add_row(
            each["arm"], str(each["dense_votes"]), f"{each['dense']:.1%}", f"{each['accuracy']:.1%}", f"{each['gain']:+.1%}"
        )  # fmt: skip
    stdout.print(equal)
