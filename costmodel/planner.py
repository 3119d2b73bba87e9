"""The planner: for a budget, which model, how many samples, how long a thought, how sparse, at what effort.

Chooses among measured points (``points``); where no accuracy is known it says so and plans on cost alone.
Pure: sources and prices come in, a plan goes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttc.costmodel.frontier import GAIN, accuracy_of, axis, pareto
from ttc.costmodel.points import LENGTH_GRID, Point, Tariff
from ttc.costmodel.shapes import ModelShape
from ttc.errors import BudgetTooSmall, InputError

TOLERANCE = 0.005  # accuracies closer than this are equal: no source here resolves half a point
REFERENCE_TOKENS = 8000  # the chain that a plan on cost alone wants to afford
LADDER = (1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True, slots=True)
class FlopsOnly:
    """The choice by FLOPs alone: the point with the fewest FLOPs that is as accurate as the plan, and what
    it costs."""

    point: Point
    ratio: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to buy, why, and what else there was.

    ``fits`` says how the budget was read: "mean" (expected cost within it) or "worst" (the capped worst
    case within it). ``ladder`` holds the best point at multiples of the budget; ``notes`` every assumption
    made.
    """

    budget: float
    unit: str
    convention: str
    fits: str
    chosen: Point
    why: str
    runners_up: tuple[Point, ...]
    frontier: tuple[Point, ...]
    flops_only: FlopsOnly | None
    ladder: tuple[tuple[float, Point], ...]
    notes: tuple[str, ...] = field(default=())

    def to_json(self, tariff: Tariff) -> dict[str, Any]:
        """What ``ttc plan --json`` prints."""

        def show(point: Point) -> dict[str, Any]:
            return point.to_json(tariff)

        return {
            "budget": {"amount": self.budget, "unit": self.unit, "scope": "problem"},
            "convention": self.convention,
            "fits": self.fits,
            "intensity": tariff.intensity,
            "hardware": tariff.hardware.name,
            "batch": tariff.batch,
            "plan": show(self.chosen),
            "why": self.why,
            "runners_up": [show(p) for p in self.runners_up],
            "frontier": [show(p) for p in self.frontier],
            "flops_only": None
            if self.flops_only is None
            else {**show(self.flops_only.point), "cost_ratio": self.flops_only.ratio},
            "ladder": [{"budget": amount, **show(p)} for amount, p in self.ladder],
            "notes": list(self.notes),
        }


def plan(
    points: Sequence[Point],
    budget: float,
    unit: str,
    tariff: Tariff,
    *,
    convention: str = "full",
    fits: str = "mean",
    runners: int = 5,
    silent: Sequence[str] = (),
) -> Plan:
    """The most accurate point within the budget (the cheapest of those within half a point), with its
    runners-up and the frontier. ``silent`` names models that were asked for and have no point, for the notes.

    Raises BudgetTooSmall, with the least budget that would do, where nothing is affordable; InputError for
    a bad budget.
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise InputError(f"budget is {budget}; give a positive amount, e.g. '40 TeFLOPs'")
    if fits not in ("mean", "worst"):
        raise InputError(f"fits is {fits!r}; use mean or worst")
    if not points:
        raise InputError("nothing to plan with; give --model and, for accuracies, --data POOL")

    def cost(point: Point) -> float:
        price = point.peak if fits == "worst" and point.peak is not None else point.price
        return float(price.amount(unit, tariff, convention))

    known = [p for p in points if p.accuracy is not None]
    candidates = known or list(points)
    affordable = [p for p in candidates if cost(p) <= budget]
    if not affordable:
        least = min(candidates, key=cost)
        raise BudgetTooSmall(
            f"budget {budget:.4g} {unit} buys nothing here; the least is {cost(least):.4g} ({least.label()})",
            cost(least),
        )
    best = _best(affordable, cost)
    flops = axis(tariff, "flops", convention)
    frontier = pareto(known, cost, gain=GAIN)
    notes = _notes(points, best, fits, silent)
    if tariff.profile is not None:
        notes.append(f"seconds: {tariff.profile.basis(best.model)}")
    return Plan(
        budget=budget,
        unit=unit,
        convention=convention,
        fits=fits,
        chosen=best,
        why=_why(best, cost(best), budget, len(affordable), len(candidates)),
        runners_up=tuple(_runners(affordable, best, cost)[:runners]),
        frontier=tuple(frontier),
        flops_only=_flops_only(known, best, cost, flops),
        ladder=tuple(_ladder(candidates, budget, cost)),
        notes=tuple(notes),
    )


def cost_only(
    shapes: Sequence[ModelShape],
    budget: float,
    unit: str,
    tariff: Tariff,
    *,
    convention: str = "full",
    kv_budget: int | None = None,
) -> list[Point]:
    """What a budget buys of each model where no accuracy is known: for every length, as many samples as
    fit."""
    points = []
    for shape in shapes:
        for length in (250, 500, *LENGTH_GRID):
            one = float(tariff.price(shape, length, 1, kv_budget).amount(unit, tariff, convention))
            two = float(tariff.price(shape, length, 2, kv_budget).amount(unit, tariff, convention))
            if one > budget:
                break
            samples = 1 + int((budget - one) / (two - one)) if two > one else 1
            price = tariff.price(shape, length, samples, kv_budget)
            points.append(
                Point(
                    model=shape.name,
                    params=shape.params,
                    sampler="vote",
                    samples=samples,
                    thinking_tokens=length,
                    kv_budget=kv_budget,
                    price=price,
                    peak=price,
                    accuracy=None,
                    source="cost alone",
                )
            )
    return points


def _best(points: Sequence[Point], cost: Any) -> Point:
    """By accuracy, then by price. On cost alone: the largest model that affords the reference chain, then
    more samples."""
    if points[0].accuracy is not None:
        top = max(accuracy_of(p) for p in points)
        return min((p for p in points if accuracy_of(p) >= top - TOLERANCE), key=cost)
    reach = max(min(p.thinking_tokens or 0.0, REFERENCE_TOKENS) for p in points)
    able = [p for p in points if (p.thinking_tokens or 0.0) >= reach]
    return min(able, key=lambda p: (-p.params, abs((p.thinking_tokens or 0.0) - reach)))


def _why(best: Point, price: float, budget: float, affordable: int, total: int) -> str:
    share = f"uses {price / budget:.0%} of the budget; {affordable} of {total} configurations fit it"
    if best.accuracy is None:
        return f"no accuracy is known: the largest model that affords one long chain, on cost alone; {share}"
    return f"the cheapest within half a point of the best that fits: {accuracy_of(best):.1%}; {share}"


def _runners(affordable: Sequence[Point], best: Point, cost: Any) -> list[Point]:
    """The best of every other (model, sampler, N, KV budget), most accurate first."""
    if best.accuracy is None:
        others = {p.model for p in affordable} - {best.model}
        return [_best([p for p in affordable if p.model == m], cost) for m in sorted(others)]
    groups: dict[tuple[Any, ...], Point] = {}
    taken = (best.model, best.sampler, best.samples, best.kv_budget, best.effort)
    for point in affordable:
        key = (point.model, point.sampler, point.samples, point.kv_budget, point.effort)
        if key == taken:
            continue
        groups[key] = _best([groups[key], point], cost) if key in groups else point
    return sorted(groups.values(), key=lambda p: (-accuracy_of(p), cost(p)))


def _flops_only(known: Sequence[Point], best: Point, cost: Any, flops: Any) -> FlopsOnly | None:
    if best.accuracy is None:
        return None
    good = [p for p in known if accuracy_of(p) >= accuracy_of(best) - TOLERANCE]
    by_flops = min(good, key=flops)
    return FlopsOnly(by_flops, cost(by_flops) / cost(best))


def _ladder(points: Sequence[Point], budget: float, cost: Any) -> list[tuple[float, Point]]:
    found: list[tuple[float, Point]] = []
    for factor in LADDER:
        affordable = [p for p in points if cost(p) <= factor * budget]
        if affordable and affordable[0].accuracy is not None:
            best = _best(affordable, cost)
            if not found or accuracy_of(best) > accuracy_of(found[-1][1]) + GAIN:
                found.append((factor * budget, best))
    return found


def _notes(points: Sequence[Point], best: Point, fits: str, asked: Sequence[str]) -> list[str]:
    notes = []
    known = {p.model for p in points if p.accuracy is not None}
    silent = sorted(({p.model for p in points} | set(asked)) - known)
    if silent and known:
        notes.append(f"no accuracy is known for {', '.join(silent)}: left out of the comparison")
    elif silent:
        notes.append(
            "no accuracy is known for any of the models: planned on cost alone; give --data for more"
        )
    if best.note:
        notes.append(f"assumed: {best.note}")
    if best.accuracy is not None and math.isnan(best.accuracy.low):
        notes.append("the accuracy has no interval: its source gives a curve, not problems")
    if best.peak is None and best.accuracy is not None:
        notes.append(
            "a mean-length point: a hard budget per problem cuts the chains that run longer than the mean"
        )
    elif fits == "mean":
        notes.append("the expected cost fits the budget; the worst case may not (--fits worst asks for that)")
    return notes
