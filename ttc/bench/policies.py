"""``ttc bench policies``: stopping rules live on one engine, the replay of each rule's own ledger, and what deciding costs.

Every rule runs alone over the same problems with the same seeds, one rule after another for each seed. The time inside a policy's
generator is taken apart from the rest of the run. Times are the wall's and, since the engine runs in this process, its CPU time: on
a machine with other work that is the one to compare.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttc.errors import InputError
from ttc.jobs import Policy, Traits, traits_of
from ttc.types import Brief, Outcome, Problem, Result, Routine

POLICIES = (
    "adaptive", "adaptive?price=0.02", "adaptive-consistency?n=16", "self-consistency?n=4", "self-consistency?n=8",
    "self-consistency?n=16", "best-of-n?n=16&score=self-certainty",
)  # fmt: skip
CLOSE = 0.01
"""Accuracies this close count as equal when the price of equal accuracy is looked up."""


@dataclass(slots=True)
class Timed:
    """A policy whose generator's own time is taken."""

    policy: Policy
    seconds: float = 0.0
    decisions: int = 0

    @property
    def traits(self) -> Traits:
        return traits_of(self.policy)

    @property
    def name(self) -> str:
        return self.policy.name

    def run(self, problem: Problem, brief: Brief) -> Routine:
        routine, reply = self.policy.run(problem, brief), None
        while True:
            begun = time.thread_time()
            try:
                work = next(routine) if reply is None else routine.send(reply)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            finally:
                self.seconds += time.thread_time() - begun
                self.decisions += 1
            reply = yield work


def measure(
    engine: Any, problems: Sequence[Problem], policy: str, *, budget: str, seed: int, out: Path
) -> dict[str, Any]:
    """One rule live, and the replay of its own ledger in the order in which it drew."""
    from ttc.api import Run, Settings
    from ttc.costmodel.ledgers import CONFIDENCES
    from ttc.policies import parse
    from ttc.simulate import load, replay

    timed = Timed(parse(policy))
    run = Run(problems, engine, Settings(policy=timed, budget=budget, seed=seed), out=out)
    begun, busy = time.perf_counter(), time.process_time()
    results = {r.problem_id: r for r in run.results()}
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    told = run.summary()
    right = [_right(results[p.id]) for p in problems]
    again: dict[str, Any] = {}
    if set(timed.traits.needs) <= set(CONFIDENCES):  # what a pool keeps
        repeat = replay(load(out), parse(policy), shuffles=1, max_branches=0, in_order=True, abstain=True)
        again = {"replayed_right": repeat.right[0].tolist(), "replayed_tokens": float(repeat.tokens.sum())}
    spent = told["spent"]
    return {
        "policy": policy, "right": right, "tokens": spent["tokens"], "eflops": spent["eflops"],
        "eflops_kinetics": spent["eflops_kinetics"], "samples": told["samples"], "seconds": seconds,
        "cpu_seconds": busy, "deciding": timed.seconds,
        "decisions": timed.decisions, **again,
    }  # fmt: skip


def pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One rule's runs with several seeds as one row."""
    from ttc.costmodel import intervals

    right = [r for run in runs for r in run["right"]]
    estimate, count = intervals.mean(_array(right)), len(right)
    total = {
        key: sum(run[key] for run in runs)
        for key in runs[0]
        if key not in ("policy", "right", "replayed_right")
    }
    again: dict[str, Any] = {}
    if "replayed_right" in runs[0]:
        again = {
            "replayed_accuracy": float(_array([r for run in runs for r in run["replayed_right"]]).mean()),
            "replayed_tokens": total["replayed_tokens"] / count,
        }
    return {
        "policy": runs[0]["policy"], "accuracy": estimate.mean, "accuracy_ci95": estimate.interval,
        "tokens_per_problem": total["tokens"] / count, "eflops_per_problem": total["eflops"] / count,
        "eflops_kinetics_per_problem": total["eflops_kinetics"] / count, "samples_per_problem": total["samples"] / count,
        "seconds": total["seconds"], "cpu_seconds": total["cpu_seconds"],
        "deciding_share": total["deciding"] / total["cpu_seconds"], "decisions": total["decisions"],
        **again, "right": right,
    }  # fmt: skip


def main(
    *,
    model: str,
    task: str | None,
    problems: int,
    policies: Sequence[str],
    budget: str,
    seed: int,
    seeds: int,
    as_json: bool,
) -> None:
    from ttc.api import open_engine
    from ttc.costmodel import intervals
    from ttc.problems import from_task

    if problems < 2:
        raise InputError(f"problems: {problems}; give 2 or more, for an interval")
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    with open_engine(model) as engine, tempfile.TemporaryDirectory() as folder:
        chosen = task or _first_task(model)
        few = from_task(chosen, 8, seed=seed)
        measure(engine, few, "self-consistency?n=2", budget=budget, seed=seed, out=Path(folder) / "warm")
        for own in range(seed, seed + seeds):
            asked = from_task(chosen, problems, seed=own)
            for i, policy in enumerate(policies):
                out = Path(folder) / f"{own}-{i}"
                runs[policy].append(measure(engine, asked, policy, budget=budget, seed=own, out=out))
                print(f"seed {own}: {_line(pooled(runs[policy][-1:]))}", file=sys.stderr, flush=True)
    rows = [pooled(runs[policy]) for policy in policies]
    for row in rows[1:]:
        gap = intervals.paired(_array(row["right"]) - _array(rows[0]["right"]))
        row["over_first"] = list(gap[:3])
    for row in rows:
        del row["right"]
    if as_json:
        print(
            json.dumps(
                {
                    "model": model,
                    "task": chosen,
                    "problems": problems,
                    "seed": seed,
                    "seeds": seeds,
                    "rows": rows,
                }
            )
        )
        return
    print(
        f"{model} on {chosen}: {problems} problems with each of {seeds} seeds, {budget} each, every rule alone on the engine"
    )
    print(
        f"{'policy':40} accuracy (95 %)          tokens   GeFLOPs   kinetics  samples  seconds      CPU  deciding   replayed"
    )
    for row in rows:
        print(_line(row))
    print(_equal(rows))


def _first_task(model: str) -> str:
    from ttc import nano

    for known in nano.catalog():
        if known.name == model and known.tasks:
            return known.tasks[0]
    raise InputError(f"task: no task is known for {model}; give --task, such as 'rg:chain_sum'")


def _equal(rows: Sequence[dict[str, Any]]) -> str:
    """What each other rule's cheapest setting as accurate as the first row costs, over the first row's cost."""
    first, words = rows[0], []
    for rule in dict.fromkeys(r["policy"].partition("?")[0] for r in rows[1:]):
        if rule == first["policy"].partition("?")[0]:
            continue
        good = [
            r
            for r in rows
            if r["policy"].partition("?")[0] == rule and r["accuracy"] >= first["accuracy"] - CLOSE
        ]
        if not good:
            words.append(f"{rule} does not reach it")
            continue
        least = min(good, key=lambda r: float(r["tokens_per_problem"]))
        ratios = [
            least[key] / first[key] for key in ("tokens_per_problem", "eflops_per_problem", "cpu_seconds")
        ]
        words.append(
            f"{least['policy']} takes {ratios[0]:.2f}x the tokens, {ratios[1]:.2f}x the eFLOPs, {ratios[2]:.2f}x the CPU time"
        )
    return f"at the accuracy of {first['policy']} (within {CLOSE:.0%}): " + "; ".join(words)


def _line(row: dict[str, Any]) -> str:
    low, high = row["accuracy_ci95"]
    replayed = (
        f"{row['replayed_accuracy']:.1%} @ {row['replayed_tokens']:.0f}"
        if "replayed_accuracy" in row
        else "not recorded"
    )
    return (
        f"{row['policy']:40} {row['accuracy']:6.1%} ({low:.1%} to {high:.1%}) {row['tokens_per_problem']:8.0f} "
        f"{row['eflops_per_problem'] / 1e9:9.2f} {row['eflops_kinetics_per_problem'] / 1e9:10.3f} "
        f"{row['samples_per_problem']:8.2f} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} "
        f"{row['deciding_share']:9.2%}   {replayed}"
    )


def _right(result: Result) -> float:
    return float(result.verdict is not None and result.verdict.correct)


def _array(values: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=float)


__all__ = ["POLICIES", "Timed", "main", "measure", "pooled"]
