"""What one more vote is worth: a prior over how a model's answers to a problem scatter, and the value of sampling under it.

Prior: the answers of a problem are draws from a stick-breaking distribution with concentration alpha (p_1 = b_1,
p_2 = (1 - b_1) b_2, …, b_k ~ Beta(1, alpha): Ewens 1972, Sethuraman 1994); ln alpha ~ Normal(mean, spread) over problems.
Small alpha: one answer dominates; large: every branch says something else. Two numbers, learnt from any pool (``fit``), and the
posterior is exchangeable: all that the votes say is in (votes of the leader, of the runner-up, branches drawn).

Reward: 1 for answering with the most frequent answer, times the chance that this is right given its share p:
1 / (1 + exp(-(p - HALF) / WIDTH)). A scattered problem is seldom right even when its mode is found, so that it is given up.

Value: optimal stopping by backward induction over simulated draws. ``ValueTable.price(v1, v2, n)`` is the highest price that a
branch may have, in P(right), at which drawing on is still worth it: an index in the sense of Gittins, comparable between problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma

import numpy as np

HALF, WIDTH = 0.47, 0.12
"""The share at which the most frequent answer is right half of the time, and how fast that changes with the share."""
HORIZON = 24
"""Votes to which the table looks ahead; beyond it sampling stops."""
_PRICES = np.exp(np.linspace(np.log(1e-4), np.log(0.5), 60))
_PROBLEMS, _ANSWERS = 12_000, 48


@dataclass(frozen=True, slots=True)
class ValueTable:
    """``prices[n][v1][v2]`` and ``modes[n][v1][v2]``: see the module."""

    prices: tuple[tuple[tuple[float, ...], ...], ...]
    modes: tuple[tuple[tuple[float, ...], ...], ...]

    def price(self, first: int, second: int, drawn: int) -> float:
        """The highest price in P(right) at which another branch is worth buying; inf before the first vote."""
        if drawn >= len(self.prices):
            return 0.0
        return float("inf") if first == 0 else self.prices[drawn][first][second]

    def sure(self, first: int, second: int, drawn: int) -> float:
        """P(the leader is the problem's most frequent answer)."""
        drawn = min(drawn, len(self.modes) - 1)
        return self.modes[drawn][min(first, drawn)][min(second, drawn)]


@lru_cache(maxsize=16)
def value_table(mean: float, spread: float, horizon: int = HORIZON) -> ValueTable:
    """The table for ln alpha ~ Normal(mean, spread). Seeded: the same numbers everywhere; about a second."""
    rng = np.random.default_rng(0)
    alpha = np.exp(mean + spread * rng.standard_normal(_PROBLEMS))
    broken = rng.beta(1.0, alpha[:, None], (_PROBLEMS, _ANSWERS))
    broken[:, -1] = 1.0
    left = np.cumprod(np.concatenate([np.ones((_PROBLEMS, 1)), 1 - broken[:, :-1]], axis=1), axis=1)
    shares = broken * left
    ends, rows = np.cumsum(shares, axis=1), np.arange(_PROBLEMS)
    mode, top = shares.argmax(axis=1), shares.max(axis=1)
    worth = 1 / (1 + np.exp(-(top - HALF) / WIDTH))
    counts = np.zeros((_PROBLEMS, _ANSWERS), dtype=np.int64)
    since = np.full((_PROBLEMS, _ANSWERS), 999)
    size, states, hits = horizon + 1, [np.zeros(_PROBLEMS, dtype=np.int64)], [np.zeros(_PROBLEMS, dtype=bool)]
    for drawn in range(horizon):
        answer = np.minimum((rng.random(_PROBLEMS)[:, None] > ends).sum(axis=1), _ANSWERS - 1)
        counts[rows, answer] += 1
        since[rows, answer] = np.minimum(since[rows, answer], drawn)
        leading = (counts * 1000 - since).argmax(axis=1)
        ranked = np.partition(counts, -2, axis=1)
        states.append(ranked[:, -1] * size + ranked[:, -2])
        hits.append(leading == mode)
    seen = [np.maximum(np.bincount(s, minlength=size * size), 1e-9) for s in states]
    modes = [np.bincount(s, h, minlength=size * size) / c for s, h, c in zip(states, hits, seen, strict=True)]
    stop = [
        np.bincount(s, h * worth, minlength=size * size) / c
        for s, h, c in zip(states, hits, seen, strict=True)
    ]
    prices = np.zeros((horizon, size * size))
    for price in _PRICES:
        value = stop[horizon][states[horizon]]
        for n in range(horizon - 1, 0, -1):
            on = np.bincount(states[n], value, minlength=size * size) / seen[n] - price
            go = (on > stop[n]) & (seen[n] > 12)
            prices[n][go] = price
            value = np.where(go, on, stop[n])[states[n]]
    return ValueTable(
        tuple(tuple(tuple(row) for row in table.reshape(size, size).tolist()) for table in prices),
        tuple(tuple(tuple(row) for row in table.reshape(size, size).tolist()) for table in modes),
    )


def concentration(distinct: int, drawn: int) -> float:
    """ln alpha of one problem from the number of distinct answers in its draws: the maximum of alpha^k Gamma(alpha) /
    Gamma(alpha + n) (Ewens) under a wide prior, Normal(-1, 3), that keeps it finite where all draws agree."""
    grid = np.linspace(-6, 6, 1201)
    score = [distinct * a + lgamma(exp(a)) - lgamma(exp(a) + drawn) - 0.5 * ((a + 1) / 3) ** 2 for a in grid]
    return float(grid[int(np.argmax(score))])


def fit(finals: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(mean, spread) of ln alpha over problems; one row of answer codes a problem, each -1 (no answer) a class of its own."""
    logs = [
        concentration(len({c for c in row if c >= 0}) + sum(c < 0 for c in row), len(row)) for row in finals
    ]
    return float(np.mean(logs)), float(np.std(logs))


__all__ = ["HORIZON", "ValueTable", "concentration", "fit", "value_table"]
