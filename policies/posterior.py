"""What one more vote is worth: a prior over how a model's answers to a problem scatter, and the value of sampling under it.

Prior: the logit of the most frequent answer's share among all that the model would give is Normal(level + slope · x, spread) over
problems, x = ln(typical branch / limit on thinking): problems over which a model thinks long scatter. x itself is learnt from the
branches at hand (``outlook``: ln length ~ Normal(x, ``WITHIN``); a branch that was dropped late says that it is longer, and by
repeating no vote that answers scatter: it would have said the most frequent one with ``REPEAT`` times its share). One problem in
ten is as if length said nothing (``STRAY``): a model whose lengths mean something else is found out by its votes. The
other answers share the rest by stick-breaking (GEM: Sethuraman 1994) with concentration ``REST``. Three numbers are learnt from a
pool (``fit``, maximum likelihood); given x, all that the votes say is in (votes of the leader, of the runner-up, all votes).

Reward: 1 for answering with the most frequent answer, times the chance that this is right given its share p:
1 / (1 + exp(-(p - HALF) / WIDTH)). A scattered problem is seldom right even when its mode is found, so that it is given up.

Value: optimal stopping by backward induction over simulated draws. ``ValueTable.price(v1, v2, n)`` is the highest price that a
vote may have, in P(right), at which drawing on is still worth it: an index in the sense of Gittins, comparable between problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HALF, WIDTH = 0.5, 0.12
"""The share at which the most frequent answer is right half of the time, and how fast that changes with the share."""
REST = 4.3
"""Concentration of the other answers: the largest of them has a third of what the first leaves."""
WITHIN, COMMON, VARIED = 0.3, -1.13, 0.6
"""Spread of ln length among a problem's branches; mean and spread of x over problems, before any branch is seen."""
REPEAT = 0.4
"""Of branches that are dropped late, those that say the most frequent answer then, over its share of all: .35 on AIME24, .45 on
AIME25."""
STRAY, STRAY_MEAN, STRAY_SPREAD = 0.1, 0.5, 2.0
HORIZON = 24
"""Votes to which the table looks ahead; beyond it sampling stops."""
_PRICES = np.exp(np.linspace(np.log(1e-4), np.log(0.6), 60))
_PROBLEMS, _ANSWERS, _SEEN = 8_000, 24, 6
_X = np.linspace(-4.5, 0.5, 101)
_LOGIT = np.linspace(-12.0, 12.0, 241)
_NORMAL = np.random.default_rng(1).standard_normal(4000)
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Prior(NamedTuple):
    """Of the logit of the most frequent answer's share: Normal(level + slope · ln(length / limit), spread)."""

    level: float
    slope: float
    spread: float


@dataclass(frozen=True, slots=True, eq=False)
class ValueTable:
    """``prices[n, v1, v2]`` and ``modes[n, v1, v2]``: see the module."""

    prices: Floats
    modes: Floats

    def price(self, first: int, second: int, drawn: int) -> float:
        """The highest price in P(right) at which another vote is worth buying."""
        return 0.0 if drawn >= len(self.prices) else float(self.prices[drawn, first, second])

    def sure(self, first: int, second: int, drawn: int) -> float:
        """P(the leader is the problem's most frequent answer)."""
        drawn = min(drawn, len(self.modes) - 1)
        return float(self.modes[drawn, min(first, drawn), min(second, drawn)])


class _Draws(NamedTuple):
    """Simulated problems, evenly spread in the logit of their first share: ``logit`` and ``top`` share (problems,). The states
    (n, v1, v2) that they came through are numbered in rising n: ``keys`` v1 and v2 as one number, ``first[n]`` the first of n
    votes, ``state`` (n, problems), ``hit`` (n, problems) whether the leader was the mode, ``often`` whether enough came through.
    A move is a pair of states that follow each other: ``moves`` (n, problems), from ``source`` to ``target``, those from n votes
    on at ``begin[n]``."""

    logit: Floats
    top: Floats
    keys: Ints
    first: list[int]
    state: Ints
    hit: NDArray[np.bool_]
    often: NDArray[np.bool_]
    moves: Ints
    source: Ints
    target: Ints
    begin: list[int]


@lru_cache(maxsize=1)
def _draws() -> _Draws:
    rng = np.random.default_rng(0)
    logit = rng.uniform(-5.0, 8.0, _PROBLEMS)
    first = 1 / (1 + np.exp(-logit))
    broken = rng.beta(1.0, REST, (_PROBLEMS, _ANSWERS))
    broken[:, -1] = 1.0
    left = np.cumprod(np.concatenate([np.ones((_PROBLEMS, 1)), 1 - broken[:, :-1]], axis=1), axis=1)
    shares = np.concatenate([first[:, None], (1 - first)[:, None] * broken * left], axis=1)
    ends, rows, mode = np.cumsum(shares, axis=1), np.arange(_PROBLEMS), shares.argmax(axis=1)
    counts = np.zeros((_PROBLEMS, _ANSWERS + 1), dtype=np.int64)
    since = np.full((_PROBLEMS, _ANSWERS + 1), 999)
    most, next_most, leader = (np.zeros(_PROBLEMS, np.int64) for _ in range(3))
    keys, hit = [np.zeros(_PROBLEMS, np.int64)], [np.zeros(_PROBLEMS, bool)]
    for drawn in range(HORIZON):
        answer = np.minimum((rng.random(_PROBLEMS)[:, None] > ends).sum(axis=1), _ANSWERS)
        counts[rows, answer] += 1
        since[rows, answer] = np.minimum(since[rows, answer], drawn)
        now, other = counts[rows, answer], answer != leader
        ahead = (now > most) | ((now == most) & other & (since[rows, answer] < since[rows, leader]))
        next_most = np.where(other, np.where(ahead, most, np.maximum(next_most, now)), next_most)
        leader, most = np.where(ahead, answer, leader), np.maximum(most, now)
        keys.append(most * (HORIZON + 1) + next_most)
        hit.append(leader == mode)
    size = (HORIZON + 1) ** 2
    every, state = np.unique(np.stack(keys) + size * np.arange(HORIZON + 1)[:, None], return_inverse=True)
    state = state.reshape(HORIZON + 1, _PROBLEMS)
    pairs, moves = np.unique(state[:-1] * len(every) + state[1:], return_inverse=True)
    source, target = np.divmod(pairs, len(every))
    starts = np.searchsorted(every, size * np.arange(HORIZON + 2))
    return _Draws(
        logit, shares.max(axis=1), every % size, starts.tolist(), state, np.stack(hit),
        np.bincount(state.ravel()) >= _SEEN, moves.ravel(), source, target, np.searchsorted(source, starts).tolist(),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def value_table(mean: float, spread: float) -> ValueTable:
    """The table where the logit of the first share is Normal(mean, spread), but for one problem in ten. Seeded: the same numbers
    everywhere; a few milliseconds, after a fifth of a second for the first one."""
    draws = _draws()

    def normal(mu: float, sd: float) -> Floats:
        return np.asarray(np.exp(-0.5 * ((draws.logit - mu) / sd) ** 2) / sd)

    weight = (1 - STRAY) * normal(min(mean, 7.0), spread) + STRAY * normal(STRAY_MEAN, STRAY_SPREAD)
    worth = weight / (1 + np.exp(-(draws.top - HALF) / WIDTH))
    state, size = draws.state.ravel(), HORIZON + 1
    seen = np.maximum(np.bincount(state, np.tile(weight, size)), 1e-300)
    stop = np.bincount(state, (worth * draws.hit).ravel()) / seen
    chance = np.bincount(draws.moves, np.tile(weight, HORIZON)) / seen[draws.source]
    modes, prices = np.zeros((size, size * size)), np.zeros((HORIZON, size * size))
    modes[np.repeat(np.arange(size), np.diff(draws.first)), draws.keys] = (
        np.bincount(state, (weight * draws.hit).ravel()) / seen
    )
    value = np.repeat(stop[draws.first[HORIZON] :][None], len(_PRICES), axis=0)
    for n in range(HORIZON - 1, -1, -1):
        here, there, end = draws.first[n : n + 3]
        own = slice(draws.begin[n], draws.begin[n + 1])
        moves = np.zeros((there - here, end - there))
        moves[draws.source[own] - here, draws.target[own] - there] = chance[own]
        on = value @ moves.T - _PRICES[:, None]
        go = (on > stop[here:there]) & draws.often[here:there]
        prices[n, draws.keys[here:there]] = np.where(go, _PRICES[:, None], 0.0).max(axis=0)
        value = np.where(go, on, stop[here:there])
    return ValueTable(prices.reshape(HORIZON, size, size), modes.reshape(size, size, size))


@lru_cache(maxsize=65536)
def outlook(prior: Prior, lengths: tuple[float, ...], late: int, late_at: float) -> tuple[float, float]:
    """Mean and spread of the logit of the first share, given ln(length / limit) of finished branches (in rising order) and that
    ``late`` others were longer than exp(late_at) of the limit and said something else. On grids, coarse enough to share tables."""
    weight = -0.5 * ((_X - COMMON) / VARIED) ** 2
    for length in lengths:
        weight = weight - 0.5 * ((length - _X) / WITHIN) ** 2
    if late:
        weight = weight + late * np.log([max(erfc((late_at - x) / WITHIN / sqrt(2)) / 2, 1e-12) for x in _X])
    share = np.exp(weight - weight.max())
    share /= share.sum()
    at = float(share @ _X)
    variance = float(share @ (_X - at) ** 2)
    spread = sqrt(prior.spread**2 + prior.slope**2 * variance)
    mean = prior.level + prior.slope * at
    if late:
        told = np.exp(-0.5 * ((_LOGIT - mean) / spread) ** 2) * (1 - REPEAT / (1 + np.exp(-_LOGIT))) ** late
        told /= told.sum()
        mean = float(told @ _LOGIT)
        spread = sqrt(float(told @ (_LOGIT - mean) ** 2))
    return round(2 * mean) / 2, round(4 * spread) / 4


@lru_cache(maxsize=1024)
def cap_for(share: float) -> float:
    """The cap on thinking, over the limit, at which branches as long as the prior expects take ``share`` of the limit on average
    (1: the limit itself, where they take no more)."""
    length = np.minimum(np.exp(COMMON + sqrt(VARIED**2 + WITHIN**2) * _NORMAL), 1.0)
    caps = np.linspace(0.0, 1.0, 401)
    return float(
        caps[int(np.searchsorted(np.minimum(length[:, None], caps).mean(axis=0), share).clip(0, 400))]
    )


def fit(finals: Sequence[Sequence[int]], lengths: Sequence[float]) -> Prior:
    """The prior of a pool by maximum likelihood: ``finals`` answer codes of each problem's branches (-1: none), ``lengths`` its
    mean branch over the limit. The count of the most frequent answer is Binomial(branches, share), the share logit-normal about
    a line in ln length (quadrature over the normal). A wide prior, slope Normal(-3, 3) and ln spread Normal(ln 1.2, 0.5), keeps
    small pools finite."""
    top = np.array([max((list(row).count(c) for c in set(row) if c >= 0), default=0) for row in finals])
    drawn, x = np.array([len(row) for row in finals]), np.log(np.asarray(lengths, dtype=float))
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    centre, reach = np.array([0.0, -3.0, log(1.2)]), np.array([8.0, 6.0, 1.2])
    for _ in range(12):  # a grid that closes in on its best point
        axes = [np.linspace(c - r, c + r, 7) for c, r in zip(centre, reach, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        level, slope, spread = (
            grid[:, 0, None, None],
            grid[:, 1, None, None],
            np.exp(grid[:, 2])[:, None, None],
        )
        logit = np.clip(level + slope * x[:, None] + spread * nodes, -25.0, 25.0)
        exact = -top[:, None] * np.log1p(np.exp(-logit)) - (drawn - top)[:, None] * np.log1p(np.exp(logit))
        most = exact.max(axis=2, keepdims=True)
        likely = (most[..., 0] + np.log((np.exp(exact - most) * weights).sum(axis=2))).sum(axis=1)
        wide = (((grid[:, 1] + 3) / 3) ** 2 + ((grid[:, 2] - log(1.2)) / 0.5) ** 2) / 2
        centre, reach = grid[int(np.argmax(likely - wide))], reach * 0.5
    return Prior(float(centre[0]), float(centre[1]), float(np.exp(centre[2])))


__all__ = ["HORIZON", "Prior", "ValueTable", "cap_for", "fit", "outlook", "value_table"]
