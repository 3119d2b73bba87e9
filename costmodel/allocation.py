"""Who gets what: the paper's per-task oracle, and two choices that a person could really have made.

Source: Kinetics, Algorithm 1 (Best-of-N: KV budget x N at a fixed cap) and Algorithm 2 (long CoT: KV
budget x cap at N = 1). Both choose PER TASK with that task's own accuracies at hand, so they bound what
allocation can reach; they are no policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttc.costmodel.points import Point, Tariff
from ttc.costmodel.records import Floats
from ttc.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Accuracy and cost of K configurations on P tasks: ``accuracy`` (P, K) in [0, 1], ``cost`` (P, K) in
    any one unit."""

    points: tuple[Point, ...]
    accuracy: Floats
    cost: Floats

    def __post_init__(self) -> None:
        if self.accuracy.shape != self.cost.shape or self.accuracy.ndim != 2:
            raise InputError(
                f"allocation: accuracy {self.accuracy.shape} and cost {self.cost.shape} must be one table"
            )
        if not (np.all(np.isfinite(self.accuracy)) and np.all(self.cost >= 0)):
            raise InputError("allocation: NaN or negative entries; every task needs every configuration")


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a procedure reached under a cost limit: mean accuracy, mean cost, and the chosen configuration
    of each task (-1: none was affordable, which counts as wrong)."""

    procedure: str
    accuracy: float
    cost: float
    chosen: tuple[int, ...]


def table(
    points: Sequence[Point], tariff: Tariff, unit: str = "eflops", convention: str = "kinetics"
) -> Table:
    """The table of pooled points (only they know their problems); raises InputError when there is none."""
    pooled = [p for p in points if p.per_problem is not None and p.problem_price is not None]
    sizes = {p.per_problem.size for p in pooled if p.per_problem is not None}
    if len(sizes) != 1:
        raise InputError(
            f"allocation over tasks needs pools of the same problems; found sizes {sorted(sizes) or 'none'}"
        )
    accuracy = np.stack([p.per_problem for p in pooled if p.per_problem is not None], axis=1)
    prices = [p.problem_price.amount(unit, tariff, convention) for p in pooled if p.problem_price is not None]
    return Table(tuple(pooled), accuracy, np.stack(prices, axis=1))


def best_of_n(points: Sequence[Point]) -> list[Point]:
    """The configurations of Algorithm 1: every N and KV budget, chains uncut."""
    return [p for p in points if p.thinking_tokens is not None and math.isinf(p.thinking_tokens)]


def long_cot(points: Sequence[Point]) -> list[Point]:
    """The configurations of Algorithm 2: one chain, every cap and KV budget."""
    return [p for p in points if p.samples == 1]


def oracle(grid: Table, limit: float) -> Allocation:
    """Algorithms 1 and 2 as published: for each task the most accurate affordable configuration, by its
    known accuracy.

    A task that can afford none scores 0. An upper bound: it looks at the answers it is judged by.
    """
    affordable = grid.cost <= limit
    best = np.where(affordable, grid.accuracy, -1.0).argmax(axis=1)
    return _score(grid, [int(b) for b in best], limit, "oracle per task (as published)")


def one_for_all(grid: Table, limit: float) -> Allocation:
    """The honest form: the one configuration that does best over all tasks, under the same limit for every
    task.

    A task on which it would exceed the limit scores 0, as a hard budget has it; the oracle is never below
    this.
    """
    pick = _pick(grid.accuracy, grid.cost, limit)
    return _score(grid, [pick] * grid.accuracy.shape[0], limit, "one choice for all tasks")


def held_out(grid: Table, limit: float, *, folds: int = 5, seed: int = 0) -> Allocation:
    """The honest form without looking at the tasks that are scored: choose on the other folds."""
    tasks = grid.accuracy.shape[0]
    fold = np.random.default_rng(seed).permutation(tasks) % min(folds, tasks)
    chosen = [-1] * tasks
    for f in range(int(fold.max()) + 1):
        train = fold != f
        pick = _pick(grid.accuracy[train], grid.cost[train], limit) if train.any() else -1
        for t in np.flatnonzero(~train):
            chosen[t] = pick
    return _score(grid, chosen, limit, "one choice, chosen on other tasks")


def _pick(accuracy: Floats, cost: Floats, limit: float) -> int:
    """The configuration with the best mean accuracy under the limit (a task beyond it scores 0); the cheaper
    of equals."""
    scored = np.where(cost <= limit, accuracy, 0.0).mean(axis=0)
    if not np.any(cost <= limit):
        return -1
    best = np.flatnonzero(scored >= scored.max() - 1e-12)
    return int(best[cost.mean(axis=0)[best].argmin()])


def _score(grid: Table, chosen: Sequence[int], limit: float, procedure: str) -> Allocation:
    kept = [k if k >= 0 and grid.cost[t, k] <= limit else -1 for t, k in enumerate(chosen)]
    accuracy = [float(grid.accuracy[t, k]) if k >= 0 else 0.0 for t, k in enumerate(kept)]
    cost = [float(grid.cost[t, k]) if k >= 0 else 0.0 for t, k in enumerate(kept)]
    return Allocation(procedure, float(np.mean(accuracy)), float(np.mean(cost)), tuple(kept))


PROCEDURES = (oracle, one_for_all, held_out)
