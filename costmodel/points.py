"""Configurations with their accuracy and their price: what the planner chooses from and the frontier is
drawn of.

A point is model x sampler x N x thinking length x KV budget x effort. Its accuracy comes from recorded
branches or from a published curve, and says which; its price from both conventions. Nothing here is
extrapolated beyond the data, except what ``Point.note`` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ttc.costmodel import intervals
from ttc.costmodel.accuracy import pool_accuracy
from ttc.costmodel.costs import KINETICS_INTENSITY, Cost, full, kinetics
from ttc.costmodel.hardware import Hardware
from ttc.costmodel.intervals import Estimate
from ttc.costmodel.records import Curve, Floats, Pool, Replayed
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel.profile import Profile

SAMPLE_GRID = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTH_GRID = (1000, 2000, 3000, 4000, 6000, 8000, 10000, 12000, 16000, 20000, 24000, 28000, 32000)


@dataclass(frozen=True, slots=True)
class Tariff:
    """Under what circumstances things cost: the card, the batch that shares a step, the prompt, the sparse
    method.

    ``intensity`` (FLOP/byte) turns bytes into eFLOPs; ``hardware`` gives seconds (a roofline bound, or the
    calibrated ``profile``'s prediction); ``usd_per_hour`` dollars.
    """

    hardware: Hardware
    intensity: float = KINETICS_INTENSITY
    prompt_tokens: float = 150.0
    batch: float = 64.0
    answer_tokens: float = 15.0
    kv_method: str | None = None
    kv_block: int | None = None
    profile: Profile | None = None
    usd_per_hour: float | None = None

    def price(self, shape: ModelShape, tokens: Any, samples: int, kv_budget: float | None) -> Price:
        """The price of ``samples`` chains of ``tokens`` each (numbers or arrays)."""
        sparse: dict[str, Any] = {}
        if kv_budget is not None and not math.isinf(kv_budget):
            sparse = {"kv_budget": kv_budget, "kv_method": self.kv_method, "kv_block": self.kv_block}
            sparse["method"] = sparse.pop("kv_method")
        chains: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": tokens,
            "samples": samples,
        }
        paper = kinetics(shape, **chains, **sparse)
        ours = full(shape, **chains, **sparse, batch=self.batch)
        if self.profile is not None:
            seconds = self.profile.chain_s(shape, batch=self.batch, **chains, **sparse)
        else:
            seconds = self.hardware.roofline_s(ours)
        return Price(paper, ours, seconds, samples * tokens)


@dataclass(frozen=True, slots=True)
class Price:
    """Both conventions, device seconds (this problem's share of the card) and generated tokens; numbers or
    arrays."""

    kinetics: Cost
    full: Cost
    seconds: Any
    tokens: Any

    def mean(self) -> Price:
        """The expectation over an array of chains."""

        def over(cost: Cost) -> Cost:
            return Cost(float(np.mean(cost.flops)), float(np.mean(cost.bytes)))

        mean_s, mean_tokens = float(np.mean(self.seconds)), float(np.mean(self.tokens))
        return Price(over(self.kinetics), over(self.full), mean_s, mean_tokens)

    def of(self, problem: int) -> Price:
        """One entry of arrays."""

        def one(cost: Cost) -> Cost:
            return Cost(float(cost.flops[problem]), float(cost.bytes[problem]))

        return Price(
            one(self.kinetics), one(self.full), float(self.seconds[problem]), float(self.tokens[problem])
        )

    def amount(self, unit: str, tariff: Tariff, convention: str = "full") -> Any:
        """In a budget's unit: tokens, eflops, flops, seconds or dollars. Raises InputError for an unpriced
        dollar."""
        if unit == "tokens":
            return self.tokens
        if unit in ("eflops", "flops"):
            if convention not in ("full", "kinetics"):
                raise InputError(f"convention {convention!r} is not known; use full or kinetics")
            cost = self.full if convention == "full" else self.kinetics
            return cost.flops if unit == "flops" else cost.eflops(tariff.intensity)
        if unit == "seconds":
            return self.seconds
        if unit == "dollars":
            price = tariff.usd_per_hour if tariff.usd_per_hour is not None else tariff.hardware.usd_per_hour
            if price is None:
                raise InputError(
                    f"a budget in dollars needs a price of {tariff.hardware.name}; give --usd-per-hour"
                )
            return self.seconds * (price / 3600.0)
        raise InputError(f"unit {unit!r} is not known; use tokens, eflops, flops, seconds or dollars")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One configuration: what it is, how often it is right, what it costs on average and at most.

    ``thinking_tokens`` is the cap of each chain (None: a mean-length point, whose cap is not known);
    ``per_problem`` the accuracies behind the mean where branches are recorded. ``note`` says what was
    assumed.
    """

    model: str
    params: int
    sampler: str
    samples: int
    thinking_tokens: float | None
    kv_budget: int | None
    price: Price
    peak: Price | None
    accuracy: Estimate | None
    task: str | None = None
    effort: float | None = None
    source: str = ""
    note: str = ""
    policy: str = ""
    per_problem: Floats | None = field(default=None, repr=False)
    problem_price: Price | None = field(default=None, repr=False)

    def label(self) -> str:
        """``Qwen3-8B, vote of 8, 16k tokens, KV 4k``."""
        parts = [self.model, "1 chain" if self.samples == 1 else f"{self.sampler} of {self.samples}"]
        if self.policy:
            parts = [self.model, self.policy, f"mean {_k(self.price.tokens)} tokens"]
        elif self.thinking_tokens is not None:
            uncut = math.isinf(self.thinking_tokens)
            parts.append("uncut" if uncut else f"thinking ≤ {_k(self.thinking_tokens)}")
        else:
            parts.append(f"mean {_k(self.price.tokens / self.samples)} tokens")
        if self.kv_budget is not None:
            parts.append(f"KV {self.kv_budget}")
        if self.effort is not None:
            parts.append(f"effort {self.effort:g}")
        return ", ".join(parts)

    def to_json(self, tariff: Tariff) -> dict[str, Any]:
        """The point as plain JSON, priced by ``tariff``."""
        cap = self.thinking_tokens
        return {
            "model": self.model,
            "task": self.task,
            "sampler": self.sampler,
            "samples": self.samples,
            "thinking_tokens": None if cap is None or math.isinf(cap) else cap,
            "kv_budget": self.kv_budget,
            "effort": self.effort,
            "policy": self.policy or None,
            "accuracy": self.accuracy.mean if self.accuracy else None,
            "accuracy_ci95": self.accuracy.interval if self.accuracy else None,
            "problems": self.accuracy.problems if self.accuracy else 0,
            "tokens": float(self.price.tokens),
            "eflops": float(self.price.full.eflops(tariff.intensity)),
            "eflops_kinetics": float(self.price.kinetics.eflops(tariff.intensity)),
            "flops": float(self.price.full.flops),
            "bytes": float(self.price.full.bytes),
            "seconds": float(self.price.seconds),
            "source": self.source,
            "note": self.note,
            "label": self.label(),
        }


def _k(tokens: float) -> str:
    return f"{tokens / 1000:.3g}k" if tokens >= 1000 else f"{tokens:.0f}"


def pool_points(
    pool: Pool,
    shape: ModelShape,
    tariff: Tariff,
    *,
    rule: str = "vote",
    samples: Sequence[int] = SAMPLE_GRID,
    lengths: Sequence[float] = (*LENGTH_GRID, math.inf),
) -> list[Point]:
    """Every (N, thinking length) that the pool's branches can answer for, with intervals over its
    problems."""
    if pool.probe_every == 0:
        lengths = (math.inf,)  # a cut branch would have no answer: that is not this pool's to say
    tokens = pool.tokens
    owner = np.repeat(np.arange(len(pool.problems)), [p.samples for p in pool.problems])
    points = []
    for cap in lengths:
        if not math.isinf(cap) and cap < pool.probe_every:
            continue
        cut = np.where(tokens > cap, cap + tariff.answer_tokens, tokens)
        longest = float(tokens.max()) if math.isinf(cap) else cap + tariff.answer_tokens
        for n in samples:
            if n > pool.samples:
                continue
            per_problem = pool_accuracy(pool, samples=n, thinking_tokens=cap, rule=rule)
            each = _by_owner(tariff.price(shape, cut, n, pool.kv_budget), owner)
            points.append(
                Point(
                    model=shape.name,
                    params=shape.params,
                    sampler=rule,
                    samples=n,
                    thinking_tokens=cap,
                    kv_budget=pool.kv_budget,
                    price=each.mean(),
                    peak=tariff.price(shape, longest, n, pool.kv_budget),
                    accuracy=intervals.mean(per_problem),
                    task=pool.task,
                    effort=pool.effort,
                    source=f"{pool.name}: {len(pool.problems)} problems x {pool.samples} branches",
                    note="lengths estimated from characters" if pool.lengths_estimated else "",
                    per_problem=per_problem,
                    problem_price=each,
                )
            )
    return points


def _by_owner(price: Price, owner: Any) -> Price:
    """Means per problem of arrays over all branches."""
    count = np.bincount(owner)

    def mean(values: Any) -> Floats:
        return np.asarray(np.bincount(owner, weights=np.broadcast_to(values, owner.shape)) / count)

    def over(cost: Cost) -> Cost:
        return Cost(mean(cost.flops), mean(cost.bytes))

    return Price(over(price.kinetics), over(price.full), mean(price.seconds), mean(price.tokens))


Spread = Callable[[float], float]


def spread_of(pools: Iterable[Pool], task: str | None) -> Spread | None:
    """E[L²]/E[L]² as a function of mean length, as pools on ``task`` show it when cut at every length;
    None if none does."""
    for pool in pools:
        if task is None or pool.task == task:
            cut = [np.minimum(pool.tokens, cap) for cap in (500, *LENGTH_GRID, math.inf)]
            means = np.array([c.mean() for c in cut])
            spreads = np.array([(c**2).mean() / c.mean() ** 2 for c in cut])
            return lambda mean: float(np.interp(mean, means, spreads))
    return None


def _two_lengths(mean: float, spread: float) -> Floats:
    """Two equally likely lengths with this mean and E[L²]/E[L]²: prices a mean-length point with its
    second moment."""
    half = mean * math.sqrt(max(0.0, min(spread, 2.0) - 1.0))
    return np.array([mean - half, mean + half])


def curve_points(
    curve: Curve, shape: ModelShape, tariff: Tariff, spread: Spread | None = None
) -> list[Point]:
    """One chain at each mean length of a published accuracy curve. No intervals: such curves hold no
    problems."""
    points = []
    for mean, accuracy in zip(curve.x, curve.accuracy, strict=True):
        if mean <= 0:
            continue
        ratio = spread(float(mean)) if spread else 1.0
        lengths = _two_lengths(float(mean), ratio)
        note = (
            f"E[L²]/E[L]² {ratio:.2f} as in a pool of this task"
            if spread
            else "all chains taken as equally long"
        )
        points.append(
            Point(
                model=shape.name,
                params=shape.params,
                sampler="single",
                samples=1,
                thinking_tokens=None,
                kv_budget=None,
                price=tariff.price(shape, lengths, 1, None).mean(),
                peak=None,
                accuracy=Estimate(float(accuracy), math.nan, math.nan),
                task=curve.task,
                source=curve.source,
                note=note,
            )
        )
    return points


def replayed_point(
    replayed: Replayed, shape: ModelShape, tariff: Tariff, spread: Spread | None = None
) -> Point:
    """A policy as ``ttc simulate`` found it: its mean tokens, over its mean number of chains."""
    length = replayed.tokens / replayed.samples
    ratio = spread(length) if spread else 1.0
    price = tariff.price(shape, _two_lengths(length, ratio), 1, None).mean()
    n = replayed.samples
    shared = Price(price.kinetics * n, price.full * n, price.seconds * n, price.tokens * n)
    return Point(
        model=shape.name,
        params=shape.params,
        sampler="policy",
        samples=max(1, round(n)),
        thinking_tokens=None,
        kv_budget=None,
        price=shared,
        peak=None,
        accuracy=Estimate(replayed.accuracy, replayed.low, replayed.high, replayed.problems),
        task=replayed.task,
        source=replayed.source,
        note=f"E[L²]/E[L]² {ratio:.2f} as in a pool of this task"
        if spread
        else "all chains taken as equally long",
        policy=replayed.policy,
    )


def kv_points(curve: Curve, shape: ModelShape, tariff: Tariff, lengths: Floats, origin: str) -> list[Point]:
    """One uncut chain at each KV budget of a published table, with the lengths that ``origin`` shows for
    this task."""
    points = []
    for budget, accuracy in zip(curve.x, curve.accuracy, strict=True):
        points.append(
            Point(
                model=shape.name,
                params=shape.params,
                sampler="single",
                samples=1,
                thinking_tokens=math.inf,
                kv_budget=None if math.isinf(budget) else int(budget),
                price=tariff.price(shape, lengths, 1, float(budget)).mean(),
                peak=tariff.price(shape, float(lengths.max()), 1, float(budget)),
                accuracy=Estimate(float(accuracy), math.nan, math.nan),
                task=curve.task,
                source=curve.source,
                note=f"lengths of {origin}, the same at every KV budget",
            )
        )
    return points


def all_points(
    pools: Sequence[Pool],
    curves: Sequence[Curve | Replayed],
    tariff: Tariff,
    *,
    shapes: Mapping[str, ModelShape] | None = None,
    task: str | None = None,
    rule: str = "vote",
    samples: Sequence[int] = SAMPLE_GRID,
) -> list[Point]:
    """Points from every source on ``task`` (None: all). A name that no shape is known for raises
    InputError."""
    known = dict(shapes or {})

    def shape_of(model: str | None, name: str) -> ModelShape:
        if model is None:
            raise InputError(f"{name}: which model made it is not said; give --model")
        return known.setdefault(model, ModelShape.of(model)) if model not in known else known[model]

    wanted_pools = [p for p in pools if task is None or p.task in (None, task)]
    points: list[Point] = []
    for pool in wanted_pools:
        points += pool_points(pool, shape_of(pool.model, pool.name), tariff, rule=rule, samples=samples)
    for curve in (c for c in curves if task is None or c.task == task):
        shape = shape_of(curve.model, curve.source)
        if isinstance(curve, Replayed):
            points.append(replayed_point(curve, shape, tariff, spread_of(wanted_pools, curve.task)))
            continue
        if curve.axis == "tokens":
            points += curve_points(curve, shape, tariff, spread_of(wanted_pools, curve.task))
        else:
            near = next((p for p in wanted_pools if p.task == curve.task), None)
            if near is not None:
                points += kv_points(curve, shape, tariff, near.tokens, near.name)
    return points
