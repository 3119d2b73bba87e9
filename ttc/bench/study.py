"""``ttc bench study``: what steering and search buy on an embedded reasoner, at equal token budgets, whatever comes out.

Four parts, each one command: ``deepening`` (iterative deepening against plain chains and uniform triggers, by difficulty),
``forcing`` (s1's curve), ``anytime`` (the answer a chain would give after so many tokens), ``search`` (beam, DVTS and particles
against best-of-n and weighted votes with the same reward model). Accuracy is the mean over run seeds; intervals are 95 %
over problems (``ttc.costmodel.intervals``), and differences are paired by problem.

With ``--out`` each arm's results of a task and seed are kept as they are done, and the same command goes on from there; none
depends on what ran before it, and none of other weights than the models have now (reasoner or reward model) is taken.

What ``search`` is held against: chains drawn once and scored once, and what best-of-n, the weighted vote and the plain one make of
the first n of them. The difference is to the same **at the search's own tokens**, what the reward model reads included: between
the n that costs less and the one that costs more, in proportion.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttc.errors import InputError, TTCError
from ttc.samplers import Parallel, best, leader, tally
from ttc.types import Brief, Generate, Outcome, Problem, Result, Routine, Score

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
    "iterative deepening, 96 x 2": "iterative-deepening?n=16&first=96&growth=2",
    "iterative deepening, 32 x 2, finished chains reopened": "iterative-deepening?n=16&first=32&growth=2&reopen=1",
    "budget forcing, once": "budget-forcing?n=16&trigger=Wait",
}
SEARCH = {
    "beam, width 2": "beam?n=4&width=2&step=;",
    "dvts, width 2": "dvts?n=4&width=2&step=;",
    "particles": "particles?n=4&step=;",
    "particles, entropic": "particles?n=4&step=;&entropic=1",
}
FIRST_N = (1, 2, 4, 8)
"""Chains that best-of-n and the votes choose among; of one problem, the first of the same eight."""
EXTENDS = (0, 1, 2, 3, 4)
CAPS = (8, 16, 32, 64, 128, 256)
RULES = ("best-of-n", "weighted vote", "self-consistency")
COSTS = ("tokens", "forced", "judge", "branches", "triggers")
EVERY = 8
PLENTY = "100k tokens"
PARTS = ("deepening", "forcing", "anytime", "search")


@dataclass(frozen=True, slots=True)
class Anytime:
    """One chain, asked every ``every`` tokens for the answer it would give."""

    every: int = EVERY
    name = "anytime"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        reply = yield Generate((brief.request(problem, 0, probe_every=self.every),), why="a chain, probed")
        branch = reply.branches[0]
        return Outcome(branch.vote, "samples", {branch.vote: 1.0} if branch.vote else {})


@dataclass(frozen=True, slots=True)
class Scored:
    """``n`` chains and the reward model's score of each, kept in ``scores`` by problem and the branch's index: a result holds its
    branches in the order in which they ended."""

    n: int = FIRST_N[-1]
    name = "scored"
    scores: dict[str, dict[int, float]] = field(default_factory=dict)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        branches = yield from Parallel(self.n).run(problem, brief)
        reply = yield Score(branches, why="reward model")
        self.scores[problem.id] = {b.index: s for b, s in zip(branches, reply.scores, strict=True)}
        return Outcome(leader(tally(branches), brief.seed, problem.id), "samples", tally(branches))


Cell = dict[str, Any]
"""What is kept of one policy on one task with one seed: lists over the problems, in their order."""


@dataclass(slots=True)
class Study:
    """The problems of ``tasks``, by task, and how every arm runs over them. ``out``: a file of finished cells, one a line."""

    engine: Engine
    problems: dict[str, list[Problem]]
    seeds: int
    thinking: int
    reward: str = ""  # the reward model's name; each cell loads it anew, for it keeps what it has read
    out: Path | None = None
    weights: tuple[str, ...] = ()  # fingerprints of the models that made a cell
    _done: dict[str, Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out is None:
            return
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lines = self.out.read_text().splitlines() if self.out.exists() else []
        except OSError as error:
            raise InputError(f"out: can't use {self.out} ({error.strerror}); name another file") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._done[row["key"]] = row["cell"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"out: line {number} of {self.out} is no cell of a study; name another file, or take the line out"
                ) from None

    def cells(self, task: str, policy: str, budget: str) -> list[Cell]:
        """One a seed."""
        return [self.cell(task, policy, budget, seed) for seed in range(self.seeds)]

    def cell(self, task: str, policy: str, budget: str, seed: int) -> Cell:
        key = json.dumps(
            [
                self.engine.info.model,
                self.reward,
                *self.weights,
                task,
                len(self.problems[task]),
                self.thinking,
                budget,
                policy,
                seed,
            ]
        )
        if key not in self._done:
            cell = self._done[key] = self._run(task, policy, budget, seed)
            if self.out is not None:
                with self.out.open("a") as file:
                    file.write(json.dumps({"key": key, "cell": cell}) + "\n")
        return self._done[key]

    def _run(self, task: str, policy: str, budget: str, seed: int) -> Cell:
        from ttc.api import Run, Settings

        problems = self.problems[task]
        chosen: Any = {"anytime": Anytime(), "scored": Scored()}.get(policy, policy)
        settings = Settings(policy=chosen, budget=budget, seed=seed, max_thinking_tokens=self.thinking)
        by_id = {
            r.problem_id: r
            for r in Run(problems, self.engine, settings, reward=self.reward or None).results()
        }
        results = [by_id[p.id] for p in problems]
        if failed := next((r for r in results if r.error), None):
            raise TTCError(f"study: {failed.problem_id} failed under {policy}: {failed.error}")
        cell: Cell = {"right": [_right(r) for r in results]} | _costs(results)
        if policy == "anytime":
            golds = [problem.gold for problem in problems]
            cell["length"] = [r.branches[0].completion.output_tokens for r in results]
            cell["curve"] = [
                [_right_at(r, at, gold) for at in range(EVERY, self.thinking + 1, EVERY)]
                for r, gold in zip(results, golds, strict=True)
            ]
        if policy == "scored":
            for n in FIRST_N:
                cell[str(n)] = [_first(r, chosen.scores[r.problem_id], n, seed) for r in results]
        return cell

    def arms(self, task: str, policies: dict[str, str], budget: str) -> list[dict[str, Any]]:
        """A row of figures per policy; differences are to the first."""
        import numpy as np

        first: Any = None
        rows = []
        for label, policy in policies.items():
            cells = self.cells(task, policy, budget)
            right = np.mean([cell["right"] for cell in cells], 0)
            first = right if first is None else first
            rows.append(
                {"task": task, "arm": label, "policy": policy, "accuracy": _mean(right)}
                | ({"over_first": _paired(right - first)} if first is not right else {})
                | {name: float(np.mean([cell[name] for cell in cells])) for name in COSTS}
            )
        return rows

    def anytime(self, task: str) -> list[dict[str, Any]]:
        """Accuracy of the answer after so many tokens of one chain; a chain that has ended keeps its answer."""
        import numpy as np

        cells = self.cells(task, "anytime", PLENTY)
        curve = np.mean([cell["curve"] for cell in cells], 0)
        lengths = np.array([cell["length"] for cell in cells])
        return [
            {"task": task, "tokens": at, "accuracy": _mean(curve[:, k]), "still_thinking": float((lengths > at).mean())}
            for k, at in enumerate(range(EVERY, self.thinking + 1, EVERY))
        ]  # fmt: skip

    def search(self, task: str) -> list[dict[str, Any]]:
        """Rows of what chooses among whole chains, at each n, and of the searches, each over the former at its own tokens."""
        import numpy as np

        chains = self.cells(task, "scored", PLENTY)
        rows: list[dict[str, Any]] = []
        bars: dict[str, list[tuple[Any, float]]] = {}
        for place, rule in enumerate(RULES):
            bars[rule] = []
            for n in FIRST_N:
                each = np.mean(
                    [cell[str(n)] for cell in chains], 0
                )  # (problems, rules + tokens + judge tokens)
                judge = each[:, -1] if rule != "self-consistency" else np.zeros(len(each))
                bars[rule].append((each[:, place], each[:, -2].mean() + judge.mean()))
                row = {"task": task, "arm": f"{rule}, n {n}", "accuracy": _mean(each[:, place])}
                rows.append(row | {"tokens": float(each[:, -2].mean()), "judge": float(judge.mean())})
        for label, policy in SEARCH.items():
            cells = self.cells(task, policy, PLENTY)
            right = np.mean([cell["right"] for cell in cells], 0)
            costs = {name: float(np.mean([cell[name] for cell in cells])) for name in COSTS}
            over = {
                rule: _paired(right - _at(bars[rule], costs["tokens"] + costs["judge"])) for rule in RULES
            }
            rows.append(
                {"task": task, "arm": label, "policy": policy, "accuracy": _mean(right), "over": over} | costs
            )
        return rows


def _first(result: Result, scores: dict[int, float], n: int, seed: int) -> list[float]:
    """Of the first ``n`` chains: whether each of ``RULES`` chooses a right answer, their tokens, and what a reward model reads of
    them."""
    every = sorted(result.branches, key=lambda branch: branch.index)
    branches = every[:n]
    weights = [scores[branch.index] for branch in branches]
    favourite = best(branches, weights, seed)
    answers = (
        favourite.vote if favourite is not None else None,
        leader(tally(branches, weights), seed, result.problem_id),
        leader(tally(branches), seed, result.problem_id),
    )
    unread = sum(b.completion.output_tokens for b in every[n:])
    tokens = sum(b.completion.output_tokens for b in branches)
    return [*(float(a in result.right) for a in answers), tokens, result.charge.tokens_judge - unread]


def _at(bars: Sequence[tuple[Any, float]], tokens: float) -> Any:
    """Per problem: how often the rule is right at ``tokens``, in proportion between the n that costs less and the one that costs
    more; the dearest where none does."""
    for (below, less), (above, more) in itertools.pairwise(bars):
        if tokens <= more:
            share = max(0.0, (tokens - less) / (more - less))
            return (1 - share) * below + share * above
    return bars[-1][0]


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


def _mean(row: Any) -> list[float]:
    from ttc.costmodel import intervals

    return list(intervals.mean(row)[:3])


def _paired(row: Any) -> list[float]:
    from ttc.costmodel import intervals

    return list(intervals.paired(row)[:3])


def _costs(results: Sequence[Result]) -> dict[str, list[float]]:
    """Tokens by kind, branches (steps are branches of their own), triggers begun: of each problem."""
    of: dict[str, Callable[[Result], float]] = {
        "tokens": lambda r: r.charge.tokens - r.charge.tokens_judge,
        "forced": lambda r: r.charge.tokens_forced,
        "judge": lambda r: r.charge.tokens_judge,
        "branches": lambda r: sum(b.finish != "denied" for b in r.branches),
        "triggers": lambda r: sum(b.completion.triggers for b in r.branches),
    }
    return {name: [measure(r) for r in results] for name, measure in of.items()}


def main(
    *, part: str, model: str, problems: int, seeds: int, budget: str, thinking: int, reward: str, tasks: Sequence[str],
    as_json: bool, out: Path | None = None,
) -> None:  # fmt: skip
    """Run one part; print a table, or one JSON object."""
    from ttc.api import open_engine
    from ttc.engine.model import fingerprint
    from ttc.problems import from_task

    if part not in PARTS:
        raise InputError(f"part: unknown part {part!r}; use one of {', '.join(PARTS)}")
    loaded = {task: from_task(task, problems, 0) for task in tasks or TASKS}
    judge = reward if part == "search" else ""
    weights: tuple[str, ...] = ()
    if part == "search":
        from ttc import nano

        nano.reward(reward)  # what is no reward model is refused before anything starts
        weights = (fingerprint(nano.reward_folder(reward)),)
    # An anytime answer needs a place in the batch at once: a late one is that of an earlier length.
    at_once = (
        {"concurrency": 32, "engine_args": {"max_num_seqs": 128}}
        if part == "anytime"
        else {"concurrency": 128}
    )
    with open_engine(model, "vllm", **at_once) as engine:
        weights = (engine.info.identity["weights"], *weights)
        study = Study(engine, loaded, seeds, thinking, judge, out, weights)
        first = {"search": ("scored", *SEARCH.values()), "anytime": ("anytime",)}.get(part, ())
        for seed in range(
            seeds
        ):  # on every task before the next: a study that is cut short has something of each
            for task in loaded:
                for policy in first:
                    study.cell(task, policy, PLENTY, seed)
        rows: list[dict[str, Any]] = []
        for task in loaded:
            if part == "deepening":
                rows += study.arms(task, DEEPENING, budget)
            elif part == "forcing":
                forcing = {f"{k} times": f"budget-forcing?extend={k}&trigger=Wait" for k in EXTENDS}
                capped = {f"cap {cap}": f"plain?cap={cap}" for cap in CAPS}
                rows += study.arms(task, forcing, PLENTY) + study.arms(task, capped, PLENTY)
            elif part == "anytime":
                rows += study.anytime(task)
            else:
                rows += study.search(task)
    report = {
        "part": part, "model": model, "problems": problems, "seeds": seeds, "budget": budget, "thinking": thinking,
        "reward": judge or None, "rows": rows,
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
        if report["part"] == "search":
            lines += [f"| arm | accuracy | tokens | judge tokens | over {' | over '.join(RULES)} |"]
            lines += ["| --- |" + " ---: |" * (3 + len(RULES))]
            for r in mine:
                over = [_percent(r["over"][rule], sign=True) if "over" in r else "" for rule in RULES]
                cells = [r["arm"], _percent(r["accuracy"]), f"{r['tokens']:.0f}", f"{r['judge']:.0f}"]
                lines.append(f"| {' | '.join([*cells, *over])} |")
            continue
        heads = ["arm", "accuracy", "over the first", "tokens", "forced", "triggers", "branches"]
        lines += [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
        for r in mine:
            cells = [
                r["arm"],
                _percent(r["accuracy"]),
                _percent(r["over_first"], sign=True) if "over_first" in r else "",
            ]
            cells += [f"{r['tokens']:.0f}", f"{r['forced']:.1f}", f"{r['triggers']:.1f}"]
            lines.append(f"| {' | '.join([*cells, format(r['branches'], '.1f')])} |")
    return "\n".join(lines)


def _percent(interval: Sequence[float], *, sign: bool = False) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{mean:.1f} ({low:.1f} to {high:.1f})"
