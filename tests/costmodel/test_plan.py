"""Points, allocation, frontier and plan: on a small made-up pool, and on the recorded ones where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttc.costmodel import Cost, Hardware, ModelShape
from ttc.costmodel.allocation import (
    PROCEDURES,
    Table,
    best_of_n,
    held_out,
    long_cot,
    one_for_all,
    oracle,
    table,
)
from ttc.costmodel.frontier import accuracy_of, axis, bands, growth, overpay, pareto, report, threshold
from ttc.costmodel.intervals import Estimate
from ttc.costmodel.planner import TOLERANCE, cost_only, plan
from ttc.costmodel.points import Point, Price, Tariff, all_points, pool_points
from ttc.costmodel.pools import read_all
from ttc.costmodel.records import Pool, PooledProblem
from ttc.errors import BudgetTooSmall, InputError

POOLS = Path(__file__).resolve().parents[2] / ".." / "shared" / "pools"
needs_pools = pytest.mark.skipif(not POOLS.is_dir(), reason="recorded pools (../shared/pools) are not here")
TARIFF = Tariff(Hardware.named("kinetics-b200"))
SMALL, LARGE = ModelShape.named("Qwen3-0.6B"), ModelShape.named("Qwen3-8B")


def _pool(problems: int = 12, samples: int = 16) -> Pool:
    rng = np.random.default_rng(0)
    made = []
    for k in range(problems):
        tokens = rng.integers(600, 6000, samples).astype(float)
        final = np.where(rng.random(samples) < k / problems, 0, rng.integers(1, 4, samples))
        made.append(PooledProblem(str(k), tokens, final, np.repeat(final[:, None], 12, axis=1)))
    return Pool("made up", tuple(made), "Qwen3-8B", "t", probe_every=500)


def _point(
    cost: float, accuracy: float, model: str = "m", flops: float | None = None, params: int = 1
) -> Point:
    price = Price(Cost(flops if flops is not None else cost, 0.0), Cost(flops or cost, 0.0), cost, cost)
    return Point(
        model, params, "single", 1, math.inf, None, price, price, Estimate(accuracy, math.nan, math.nan)
    )


@settings(max_examples=80)
@given(rows=st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_pareto_set_is_what_nothing_beats(rows: list[tuple[float, float]]) -> None:
    points = [_point(c, a) for c, a in rows]
    cost = axis(TARIFF, "tokens")
    front = pareto(points, cost)
    for point in points:
        beaten = any(
            cost(q) <= cost(point)
            and accuracy_of(q) >= accuracy_of(point)
            and (cost(q), accuracy_of(q)) != (cost(point), accuracy_of(point))
            for q in points
        )
        on = any(q.price.tokens == point.price.tokens and accuracy_of(q) == accuracy_of(point) for q in front)
        assert on != beaten


def test_bands_threshold_and_overpay() -> None:
    small = [
        _point(c, a, "small", flops=c / 10, params=1)
        for c, a in ((1, 0.1), (10, 0.3), (100, 0.4), (1000, 0.6))
    ]
    large = [_point(c, a, "large", flops=c, params=9) for c, a in ((20, 0.35), (50, 0.6), (200, 0.8))]
    points, cost, flops = small + large, axis(TARIFF, "tokens"), axis(TARIFF, "flops", "kinetics")
    ruled = bands(points, cost)
    assert [b.model for b in ruled] == ["small", "large"]
    assert ruled[0].accuracy_high == pytest.approx(0.3, abs=0.05)
    assert (ruled[-1].accuracy_high, ruled[-1].cost_high) == pytest.approx((0.8, 1000))
    params = {"small": 1, "large": 9}
    assert threshold(ruled, params) == "large"
    assert threshold(ruled, params, share=0.1) == "small"
    worst = max(overpay(points, cost, flops), key=lambda o: o.ratio)
    assert worst.ratio == pytest.approx(
        5.0
    )  # 0.4: the small model's FLOPs, 10, against the large one's price, 20
    assert threshold([], {}) is None
    assert bands([], cost) == []


def test_growth_recovers_a_power_law() -> None:
    points = [_point(float(c), 0.1 * k) for k, c in enumerate((1, 2, 4, 8, 16), 1)]
    (tokens, chain) = growth(points, axis(TARIFF, "tokens"))
    assert (tokens.resource, chain.resource) == ("tokens", "chain_tokens")
    assert tokens.exponent.mean == pytest.approx(1.0)
    assert tokens.per_doubling.mean == pytest.approx(2.0)
    assert tokens.exponent.interval is None  # a straight line says nothing of other problems
    pooled = pool_points(_pool(), LARGE, TARIFF)
    grown = {g.resource: g for g in growth(pooled, axis(TARIFF))}
    about = grown["tokens"].exponent
    assert about.low < about.mean < about.high
    assert about.problems == len(_pool().problems)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), limit=st.floats(0, 12))
def test_the_oracle_bounds_every_honest_choice(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    grid = Table((), rng.random((7, 5)), rng.uniform(0, 10, (7, 5)))
    best = oracle(grid, limit)
    for procedure in (one_for_all, held_out):
        found = procedure(grid, limit)
        assert found.accuracy <= best.accuracy + 1e-12
        assert all(k < 0 or grid.cost[t, k] <= limit for t, k in enumerate(found.chosen))
    by_hand = [
        max((a for a, c in zip(*row, strict=True) if c <= limit), default=0.0)
        for row in zip(grid.accuracy, grid.cost, strict=True)
    ]
    assert best.accuracy == pytest.approx(float(np.mean(by_hand)))


def test_both_algorithms_on_a_pool() -> None:
    points = pool_points(_pool(), LARGE, TARIFF, rule="coverage")
    assert {p.samples for p in long_cot(points)} == {1}
    assert all(math.isinf(p.thinking_tokens or 0) for p in best_of_n(points))
    grid = table(best_of_n(points), TARIFF)
    assert grid.accuracy.shape == (12, 5)
    rich = [procedure(grid, 1e30).accuracy for procedure in PROCEDURES]
    assert rich[0] == pytest.approx(rich[1])
    assert oracle(grid, 0.0).accuracy == 0.0


def test_points_price_the_mean_and_the_worst() -> None:
    for point in pool_points(_pool(), SMALL, TARIFF):
        assert point.peak is not None
        assert point.price.tokens <= point.peak.tokens
        assert point.price.full.flops <= point.peak.full.flops * (1 + 1e-9)
        assert point.accuracy is not None
        assert point.accuracy.low <= point.accuracy.mean <= point.accuracy.high
    assert "vote of 4" in next(p for p in pool_points(_pool(), SMALL, TARIFF) if p.samples == 4).label()


@pytest.mark.parametrize("unit", ["eflops", "tokens", "seconds"])
@pytest.mark.parametrize("fits", ["mean", "worst"])
def test_a_plan_fits_its_budget_and_nothing_better_does(unit: str, fits: str) -> None:
    points = pool_points(_pool(), LARGE, TARIFF)
    prices = sorted(float(p.price.amount(unit, TARIFF)) for p in points)
    for budget in (prices[len(prices) // 2], prices[-1] * 2):
        made = plan(points, budget, unit, TARIFF, fits=fits)
        spent = made.chosen.peak if fits == "worst" else made.chosen.price
        assert spent is not None
        assert spent.amount(unit, TARIFF) <= budget
        assert all(accuracy_of(p) <= accuracy_of(made.chosen) + TOLERANCE for p in made.runners_up)
        assert made.flops_only is not None
        assert made.flops_only.ratio >= 1 or unit != "eflops"
        shown = made.to_json(TARIFF)
        assert shown["plan"]["accuracy"] == accuracy_of(made.chosen)


def test_a_plan_without_accuracy_says_so() -> None:
    points = cost_only([SMALL, LARGE], 4e15, "eflops", TARIFF)
    made = plan(points, 4e15, "eflops", TARIFF)
    assert made.chosen.accuracy is None
    assert made.chosen.model == "Qwen3-8B"
    assert "cost alone" in made.why
    assert any("no accuracy is known" in note for note in made.notes)
    assert made.chosen.price.amount("eflops", TARIFF) <= 4e15
    both = plan(points + pool_points(_pool(), LARGE, TARIFF), 1e18, "eflops", TARIFF)
    assert both.chosen.accuracy is not None
    assert any("Qwen3-0.6B" in note for note in both.notes)


def test_a_replayed_policy_competes_with_the_pool(tmp_path: Path) -> None:
    """What ``ttc simulate --json`` printed is a point of the plan, priced at its mean tokens over its mean number of chains."""
    said = {
        "policy": "adaptive", "model": "Qwen3-8B", "task": "aime24", "accuracy": 0.81, "accuracy_ci95": [0.7, 0.9],
        "tokens_per_problem": 36_000, "samples_per_problem": 4.5, "problems": 30, "shuffles": 100,
    }  # fmt: skip
    path = tmp_path / "adaptive.json"
    path.write_text(json.dumps(said))
    _, replayed = read_all([path])
    [point] = all_points([], replayed, TARIFF)
    assert point.price.tokens == pytest.approx(36_000)
    assert point.price.full.flops == pytest.approx(
        4.5 * TARIFF.price(ModelShape.of("Qwen3-8B"), 8000, 1, None).full.flops
    )
    made = plan([point], 40_000, "tokens", TARIFF)
    assert made.chosen.accuracy == Estimate(0.81, 0.7, 0.9, problems=30)
    assert made.chosen.label() == "Qwen3-8B, adaptive, mean 36k tokens"
    for broken in ({"accuracy": 1.2}, {"tokens_per_problem": 0}, {"samples_per_problem": None}):
        path.write_text(json.dumps(said | broken))
        with pytest.raises(InputError, match="replay"):
            read_all([path])


def test_bad_budgets_get_one_line() -> None:
    points = pool_points(_pool(), LARGE, TARIFF)
    with pytest.raises(BudgetTooSmall, match="the least is") as caught:
        plan(points, 1.0, "eflops", TARIFF)
    assert plan(points, caught.value.least, "eflops", TARIFF).chosen is not None
    for bad in (-1.0, math.nan):
        with pytest.raises(InputError, match="positive amount"):
            plan(points, bad, "eflops", TARIFF)
    with pytest.raises(InputError, match="usd-per-hour"):
        plan(points, 1.0, "dollars", TARIFF)
    with pytest.raises(InputError, match="nothing to plan with"):
        plan([], 1.0, "eflops", TARIFF)
    with pytest.raises(InputError, match="pools of the same problems"):
        table([], TARIFF)


@needs_pools
def test_findings_of_the_paper_on_the_recorded_data() -> None:
    """docs/frontier.md tells these; here they are pinned."""
    files = ["accuracy_vs_tokens.json", "accuracy_vs_kv_budget.json", "qwen3-8b_aime24.json"]
    pools, curves = read_all([POOLS / f for f in files])
    points = all_points(pools, curves, TARIFF, task="aime24")
    result = report(points, TARIFF)
    assert 2.5 < result["flops_only"]["worst_ratio"] < 6  # the paper: up to 3x
    assert result["bands"][-1]["model"] == "Qwen3-8B"  # votes exist for this model alone
    qwen = [
        p for p in points if p.model == "Qwen3-8B" and p.sampler == "single" and p.thinking_tokens == math.inf
    ]
    dense = next(p for p in qwen if p.kv_budget is None)
    sparse = next(p for p in qwen if p.kv_budget == 4096)
    saved = dense.price.kinetics.eflops() / sparse.price.kinetics.eflops()
    assert saved > 2
    assert accuracy_of(dense) - accuracy_of(sparse) < 0.04
