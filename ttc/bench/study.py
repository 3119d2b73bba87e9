"""``ttc bench study``: what steering and search buy on an embedded reasoner, at equal token budgets, whatever comes out.

Four parts, each one command: ``deepening`` (iterative deepening against plain chains and uniform triggers, by difficulty),
``forcing`` (s1's curve), ``anytime`` (the answer a chain would give after so many tokens), ``search`` (beam, DVTS and particles
against best-of-n and weighted votes with the same reward model). All arms of a part run on one engine in one process. Accuracy is
the mean over run seeds; intervals are 95 %, bootstrapped over problems, and differences are paired by problem.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttc.errors import InputError
from ttc.types import Brief, Generate, Outcome, Problem, Result, Routine

if TYPE_CHECKING:
    from ttc.engine.protocol import Engine

TASKS = (
    "rg:chain_sum?min_terms=3&max_terms=6&min_digits=2&max_digits=2",
    "rg:chain_sum?min_terms=6&max_terms=10&min_digits=2&max_digits=2",
    "rg:chain_sum?min_terms=4&max_terms=6&min_digits=3&max_digits=3",
)
"""From easy to hard for nano-s: its single chains answer three fifths, two fifths and a quarter of them."""
PLAIN, UNIFORM = "plain?n=16", "iterative-deepening?n=16&first=64&growth=1"
DEEPENING = {
    "plain": PLAIN,
    "uniform triggers, every 64": UNIFORM,
    "iterative deepening, 32 x 2": "iterative-deepening?n=16&first=32&growth=2",
    "the same, finished chains reopened": "iterative-deepening?n=16&first=32&growth=2&reopen=1",
    "budget forcing, once": "budget-forcing?n=16&trigger=Wait",
}
SEARCH = {
    "best-of-n, reward model": "best-of-n?n=4&score=reward",
    "self-consistency": "self-consistency?n=4",
    "weighted vote, reward model": "weighted-vote?n=4&weight=reward",
    "beam": "beam?n=4&width=2&step=;",
    "dvts": "dvts?n=4&width=2&step=;",
    "particles": "particles?n=4&step=;",
    "particles, entropic": "particles?n=4&step=;&entropic=1",
}
EXTENDS = (0, 1, 2, 3, 4)
CAPS = (8, 16, 32, 64, 128, 256)
PARTS = ("deepening", "forcing", "anytime", "search")


@dataclass(frozen=True, slots=True)
class Anytime:
    """One chain, asked every ``every`` tokens for the answer it would give."""

    every: int = 8
    name = "anytime"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        reply = yield Generate((brief.request(problem, 0, probe_every=self.every),), why="a chain, probed")
        branch = reply.branches[0]
        return Outcome(branch.vote, "samples", {branch.vote: 1.0} if branch.vote else {})


@dataclass(slots=True)
class Study:
    """The problems of ``tasks``, by task, and how every arm runs over them."""

    engine: Engine
    problems: dict[str, list[Problem]]
    seeds: int
    thinking: int
    reward: Any = None

    def results(self, task: str, policy: Any, budget: str) -> list[list[Result]]:
        """Results of a policy: one list a seed, in the problems' order."""
        from ttc.api import Run, Settings

        found = []
        for seed in range(self.seeds):
            settings = Settings(policy=policy, budget=budget, seed=seed, max_thinking_tokens=self.thinking)
            by_id = {
                r.problem_id: r
                for r in Run(self.problems[task], self.engine, settings, reward=self.reward).results()
            }
            found.append([by_id[p.id] for p in self.problems[task]])
        return found

    def arms(self, task: str, policies: dict[str, str], budget: str) -> list[dict[str, Any]]:
        """A row of figures per policy; differences are to the first."""
        import numpy as np

        first: Any = None
        rows = []
        for label, policy in policies.items():
            begun = time.perf_counter()
            results = self.results(task, policy, budget)
            right = np.array([[_right(r) for r in each] for each in results]).mean(0)
            first = right if first is None else first
            rows.append(
                {"task": task, "arm": label, "policy": policy, "accuracy": _interval(right)}
                | ({"over_first": _interval(right - first)} if first is not right else {})
                | _costs(results)
                | {"seconds": time.perf_counter() - begun}
            )
        return rows

    def anytime(self, task: str, every: int) -> list[dict[str, Any]]:
        """Accuracy of the answer after so many tokens of one chain; a chain that has ended keeps its answer."""
        import numpy as np

        results = self.results(task, Anytime(every), "100k tokens")
        gold = {problem.id: problem.gold for problem in self.problems[task]}
        longest = max(b.completion.output_tokens for each in results for r in each for b in r.branches)
        rows = []
        for at in range(every, longest + every, every):
            right = np.array([[_right_at(r, at, gold[r.problem_id]) for r in each] for each in results]).mean(
                0
            )
            going = np.mean(
                [b.completion.output_tokens > at for each in results for r in each for b in r.branches]
            )
            rows.append(
                {"task": task, "tokens": at, "accuracy": _interval(right), "still_thinking": float(going)}
            )
        return rows


def _right(result: Result) -> float:
    return float(result.verdict is not None and result.verdict.correct)


def _right_at(result: Result, at: int, gold: str | None) -> float:
    """Whether the chain would have answered rightly after ``at`` tokens. Sums have one spelling, so a probe's answer is right if it
    is the gold one letter by letter."""
    [branch] = result.branches
    if branch.completion.output_tokens <= at:
        return _right(result)
    vote = next((probe.vote for probe in reversed(branch.probes) if probe.tokens <= at), None)
    return float(vote is not None and vote.strip() == gold)


def _interval(row: Any) -> list[float]:
    from ttc.costmodel.accuracy import bootstrap

    return [float(value) for value in bootstrap(row)]


def _costs(results: Sequence[Sequence[Result]]) -> dict[str, float]:
    """Means a problem: tokens by kind, branches (steps are branches of their own), triggers begun."""
    flat = [r for each in results for r in each]

    def mean(of: Callable[[Result], float]) -> float:
        return sum(map(of, flat)) / len(flat)

    return {
        "tokens": mean(lambda r: r.charge.tokens - r.charge.tokens_judge),
        "forced": mean(lambda r: r.charge.tokens_forced),
        "judge": mean(lambda r: r.charge.tokens_judge),
        "branches": mean(lambda r: sum(b.finish != "denied" for b in r.branches)),
        "triggers": mean(lambda r: sum(b.completion.triggers for b in r.branches)),
    }


def main(
    *, part: str, model: str, problems: int, seeds: int, budget: str, thinking: int, reward: str, tasks: Sequence[str],
    as_json: bool,
) -> None:  # fmt: skip
    """Run one part; print a table, or one JSON object."""
    from ttc.api import open_engine
    from ttc.problems import from_task

    if part not in PARTS:
        raise InputError(f"part: unknown part {part!r}; use one of {', '.join(PARTS)}")
    loaded = {task: from_task(task, problems, 0) for task in tasks or TASKS}
    judge = None
    if part == "search":
        from ttc import nano

        judge = nano.reward(reward)
    with open_engine(model, "vllm", concurrency=128) as engine:
        study = Study(engine, loaded, seeds, thinking, judge)
        rows: list[dict[str, Any]] = []
        for task in loaded:
            if part == "deepening":
                rows += study.arms(task, DEEPENING, budget)
            elif part == "forcing":
                forcing = {f"{k} times": f"budget-forcing?extend={k}&trigger=Wait" for k in EXTENDS}
                capped = {f"cap {cap}": f"plain?cap={cap}" for cap in CAPS}
                rows += study.arms(task, forcing, "100k tokens") + study.arms(task, capped, "100k tokens")
            elif part == "anytime":
                rows += study.anytime(task, 8)
            else:
                rows += study.arms(task, SEARCH, "100k tokens")
    report = {
        "part": part, "model": model, "problems": problems, "seeds": seeds, "budget": budget, "thinking": thinking,
        "reward": reward if judge is not None else None, "rows": rows,
    }  # fmt: skip
    if as_json:
        print(json.dumps(report))
    else:
        print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as the tables of docs/steering.md."""
    rows = report["rows"]
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        lines += ["", f"`{task}`", ""]
        if report["part"] == "anytime":
            lines += ["| after tokens | accuracy | still thinking |", "| ---: | ---: | ---: |"]
            lines += [
                f"| {r['tokens']} | {_percent(r['accuracy'])} | {r['still_thinking']:.0%} |" for r in mine
            ]
            continue
        judged = any(r["judge"] for r in mine)
        heads = ["arm", "accuracy", "over the first", "tokens", "forced", "triggers"]
        heads += ["judge tokens", "requests"] if judged else ["branches"]
        lines += [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
        for r in mine:
            cells = [
                r["arm"],
                _percent(r["accuracy"]),
                _percent(r["over_first"], sign=True) if "over_first" in r else "",
            ]
            cells += [f"{r['tokens']:.0f}", f"{r['forced']:.1f}", f"{r['triggers']:.1f}"]
            cells += [f"{r['judge']:.0f}"] if judged else []
            lines.append(f"| {' | '.join([*cells, format(r['branches'], '.1f')])} |")
    return "\n".join(lines)


def _percent(interval: Sequence[float], *, sign: bool = False) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{mean:.1f} ({low:.1f} to {high:.1f})"
