"""Frontiers: the Pareto set over points, where each model rules, how resources grow with cost, and what
FLOPs hide.

Sources: Kinetics section 3 and Figures 4-7 (frontier bands, the model-size threshold), Figure 24 (growth
when cost doubles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttc.costmodel.intervals import Estimate, resampled
from ttc.costmodel.points import Point, Tariff

GAIN = 0.01  # the least step in accuracy that starts a new stretch of a band
Axis = Callable[[Point], float]


@dataclass(frozen=True, slots=True)
class Band:
    """The stretch of the frontier on which a model rules."""

    model: str
    accuracy_low: float
    accuracy_high: float
    cost_low: float
    cost_high: float


@dataclass(frozen=True, slots=True)
class Growth:
    """How a resource grows along a frontier: x ∝ cost^exponent, so ``per_doubling`` = 2^exponent; None
    where it is moot. The interval is NaN where the points don't know their problems."""

    resource: str
    exponent: Estimate
    points: int

    @property
    def per_doubling(self) -> Estimate:
        mean, low, high, problems = self.exponent
        return Estimate(2.0**mean, 2.0**low, 2.0**high, problems)


@dataclass(frozen=True, slots=True)
class Overpay:
    """What choosing by FLOPs costs: at ``accuracy``, the FLOPs-cheapest point's cost over the truly
    cheapest one's."""

    accuracy: float
    ratio: float
    by_flops: Point
    by_cost: Point


def axis(tariff: Tariff, unit: str = "eflops", convention: str = "kinetics") -> Axis:
    """The cost of a point in a unit, as a function."""
    return lambda point: float(point.price.amount(unit, tariff, convention))


def accuracy_of(point: Point) -> float:
    """The point's mean accuracy; NaN where none is known."""
    return point.accuracy.mean if point.accuracy else math.nan


def pareto(points: Sequence[Point], cost: Axis, *, gain: float = 0.0) -> list[Point]:
    """The points that no cheaper (or equally dear) point matches in accuracy, by rising cost; with ``gain``,
    each at least that much more accurate than the one before (what lies below is noise of the data, not
    progress)."""
    known = [p for p in points if p.accuracy is not None]
    front: list[Point] = []
    for point in sorted(known, key=lambda p: (cost(p), -accuracy_of(p))):
        if not front or accuracy_of(point) > accuracy_of(front[-1]) + gain:
            front.append(point)
    return front


def bands(points: Sequence[Point], cost: Axis, *, steps: int = 400, least: float = 0.02) -> list[Band]:
    """Which model rules at which cost: the model whose own frontier is highest there.

    Each model's frontier is interpolated over log cost, because measured lengths lie on a grid and
    neighbouring models would else alternate by where their grid points fall. Bands narrower than ``least``
    of the cost range (in log) join the next.
    """
    fronts = {m: pareto([p for p in points if p.model == m], cost) for m in sorted({p.model for p in points})}
    curves = {
        m: (np.array([cost(p) for p in front]), np.array([accuracy_of(p) for p in front]))
        for m, front in fronts.items()
        if front
    }
    if not curves:
        return []
    low, high = min(c[0] for c, _ in curves.values()), max(c[-1] for c, _ in curves.values())
    grid = np.geomspace(low, max(high, low * (1 + 1e-9)), steps)
    names = sorted(curves, key=lambda m: min(p.params for p in fronts[m]))
    height = np.stack(
        [np.interp(np.log(grid), np.log(c), a, left=-1.0) for c, a in (curves[m] for m in names)]
    )
    ruler = height.argmax(axis=0)  # of equals the smallest model
    runs = [[int(ruler[0]), 0, 0]]
    for k, r in enumerate(ruler):
        if r == runs[-1][0]:
            runs[-1][2] = k
        else:
            runs.append([int(r), k, k])
    kept: list[list[int]] = []
    for run in runs:
        wide = run[2] - run[1] + 1 >= least * steps
        if kept and (kept[-1][0] == run[0] or not wide):
            kept[-1][2] = run[2]
        else:
            kept.append(run)
    top = height.max(axis=0)
    return [Band(names[m], float(top[i]), float(top[j]), float(grid[i]), float(grid[j])) for m, i, j in kept]


def threshold(ruled: Sequence[Band], params: dict[str, int], *, share: float = 0.5) -> str | None:
    """The model-size threshold: the smallest model with a band that reaches beyond ``share`` of the best
    accuracy.

    Below it money is better spent on a larger model than on longer or more chains (Kinetics section 3).
    """
    if not ruled:
        return None
    useful = [b.model for b in ruled if b.accuracy_high > share * ruled[-1].accuracy_high]
    return min(useful, key=lambda m: params[m])


def overpay(points: Sequence[Point], cost: Axis, flops: Axis, *, levels: int = 40) -> list[Overpay]:
    """At accuracies from the least to the best: what the point with the fewest FLOPs costs over the
    cheapest point."""
    known = [p for p in points if p.accuracy is not None]
    if not known:
        return []
    best = max(accuracy_of(p) for p in known)
    found = []
    for level in np.linspace(0.0, best, levels + 1)[1:]:
        good = [p for p in known if accuracy_of(p) >= level - 1e-12]
        by_flops, by_cost = min(good, key=flops), min(good, key=cost)
        found.append(Overpay(float(level), cost(by_flops) / cost(by_cost), by_flops, by_cost))
    return found


RESOURCES: dict[str, Callable[[Point], float | None]] = {
    "tokens": lambda p: float(p.price.tokens),
    "samples": lambda p: float(p.samples),
    "chain_tokens": lambda p: float(p.price.tokens) / p.samples,
    "kv_budget": lambda p: None if p.kv_budget is None else float(p.kv_budget),
}


def growth(points: Sequence[Point], cost: Axis, *, rounds: int = 200, seed: int = 0) -> list[Growth]:
    """Exponents of tokens, samples, chain length and KV budget against cost along the frontier of ``points``.

    A least-squares line through log resource over log cost. Intervals (95 %) resample the problems, their
    accuracies and their costs, and draw the frontier anew; points that don't know their problems have none.
    Fit within one model: across models the line mixes sizes.
    """
    known = [p for p in points if p.accuracy is not None]
    front = pareto(known, cost)
    found = []
    for name, resource in RESOURCES.items():
        line = _line(front, cost, resource)
        if line is None:
            continue
        slope, used = line
        bounds = _bounds(known, cost, resource, rounds, seed)
        found.append(Growth(name, Estimate(slope, *(bounds or (math.nan, math.nan, 0))), used))
    return found


def _line(
    front: Sequence[Point], cost: Axis, resource: Callable[[Point], float | None]
) -> tuple[float, int] | None:
    pairs = [(cost(p), r) for p in front if (r := resource(p)) is not None]
    if len(pairs) < 3:
        return None
    x, y = np.log(np.array(pairs)).T
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        return None
    if np.ptp(y) == 0:
        return None  # constant by construction: nothing grew
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread), len(pairs)


def _bounds(
    points: Sequence[Point], cost: Axis, resource: Callable[[Point], float | None], rounds: int, seed: int
) -> tuple[float, float, int] | None:
    """The slope's interval over resampled problems and their number; None if a point does not know its problems."""
    if (
        any(p.per_problem is None or p.problem_price is None for p in points)
        or len({p.task for p in points}) > 1
    ):
        return None
    accuracies = np.stack([p.per_problem for p in points if p.per_problem is not None])
    count = accuracies.shape[1]
    alone = [
        [replace(p, price=p.problem_price.of(i)) for i in range(count)] for p in points if p.problem_price
    ]
    costs = np.array([[cost(p) for p in row] for row in alone])
    values = np.array([[np.nan if (r := resource(p)) is None else r for p in row] for row in alone])

    def slope(picks: NDArray[np.int64]) -> float:
        means = (each[:, picks].mean(axis=1) for each in (costs, values, accuracies))
        spent, used, accuracy = means
        order = np.lexsort((-accuracy, spent))
        best = np.maximum.accumulate(accuracy[order])
        on_front = order[np.append(True, accuracy[order][1:] > best[:-1])]
        x, y = np.log(spent[on_front]), np.log(used[on_front])
        keep = np.isfinite(y)
        if keep.sum() < 3 or np.ptp(x[keep]) == 0:
            return math.nan
        return float(np.polyfit(x[keep], y[keep], 1)[0])

    found = resampled(slope, count, rounds=rounds, seed=seed)
    return found and (*found, count)


def kv_savings(points: Sequence[Point], cost: Axis) -> list[dict[str, Any]]:
    """What each KV budget buys: uncut single chains of a model against the same chains dense."""
    rows = []
    uncut = [p for p in points if p.samples == 1 and p.sampler == "single" and p.thinking_tokens is not None]
    for dense in (p for p in uncut if p.kv_budget is None):
        for sparse in uncut:
            if sparse.kv_budget is not None and (sparse.model, sparse.task) == (dense.model, dense.task):
                change = accuracy_of(sparse) - accuracy_of(dense)
                ratio = cost(dense) / cost(sparse)
                rows.append(
                    {
                        "model": dense.model,
                        "kv_budget": sparse.kv_budget,
                        "cheaper": ratio,
                        "accuracy_change": change,
                    }
                )
    return rows


def report(
    points: Sequence[Point], tariff: Tariff, *, unit: str = "eflops", convention: str = "kinetics"
) -> dict[str, Any]:
    """Everything ``ttc frontier --json`` prints."""
    cost, flops = axis(tariff, unit, convention), axis(tariff, "flops", convention)
    front = pareto(points, cost)
    paid = overpay(points, cost, flops)
    worst = max(paid, key=lambda o: o.ratio, default=None)
    ruled, ruled_by_flops = bands(points, cost), bands(points, flops)
    params = {p.model: p.params for p in points}
    models = sorted(params)
    exponents = {
        m: [
            {
                "resource": g.resource,
                "exponent": g.exponent.mean,
                "exponent_ci95": g.exponent.interval,
                "per_doubling": g.per_doubling.mean,
                "per_doubling_ci95": g.per_doubling.interval,
                "problems": g.exponent.problems,
                "points": g.points,
            }
            for g in growth([p for p in points if p.model == m and p.per_problem is not None], cost)
            or growth([p for p in points if p.model == m], cost)
        ]
        for m in models
    }
    return {
        "unit": unit,
        "convention": convention,
        "intensity": tariff.intensity,
        "hardware": tariff.hardware.name,
        "batch": tariff.batch,
        "points": [p.to_json(tariff) for p in points],
        "pareto": [p.to_json(tariff) for p in front],
        "bands": [_band_json(b) for b in ruled],
        "bands_by_flops": [_band_json(b) for b in ruled_by_flops],
        "threshold_model": threshold(ruled, params),
        "threshold_model_by_flops": threshold(ruled_by_flops, params),
        "exponents": exponents,
        "kv_budgets": kv_savings(points, cost),
        "flops_only": None
        if worst is None
        else {
            "worst_ratio": worst.ratio,
            "at_accuracy": worst.accuracy,
            "mean_ratio": float(np.mean([o.ratio for o in paid])),
            "chosen": worst.by_flops.label(),
            "cheapest": worst.by_cost.label(),
        },
    }


def _band_json(band: Band) -> dict[str, Any]:
    return {
        "model": band.model,
        "accuracy": [band.accuracy_low, band.accuracy_high],
        "cost": [band.cost_low, band.cost_high],
    }
