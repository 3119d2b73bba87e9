"""Budgets are hard on the fake engine: whatever its lengths, failures and cancellations, spent never exceeds budget and the ledger
never disagrees with the engine."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import ANY_POLICY, EarlyStop, Reads, jobs_of, make_driver, policy_of, total
from ttc import driver
from ttc.budget import Budget, Scope, Unit
from ttc.engine.fake import FakeEngine, Script, random_writer
from ttc.engine.protocol import StepReport
from ttc.errors import BudgetTooSmall
from ttc.policies import parse
from ttc.pricing import spent_in


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    unit=st.sampled_from(["tokens", "eflops", "dollars", "seconds"]),
    scope=st.sampled_from(["problem", "run"]),
    generous=st.floats(0.2, 30.0),
    count=st.integers(1, 5),
    n=st.integers(1, 6),
    cap=st.integers(1, 120),
    concurrency=st.integers(1, 9),
    steerable=st.booleans(),
    mean=st.floats(1.0, 120.0),
    p_fail=st.sampled_from([0.0, 0.2, 0.6]),
    stubborn=st.booleans(),
    p_hang=st.sampled_from([0.0, 0.1]),
    cancels=st.booleans(),
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_never_over_budget_and_ledger_equals_engine(
    unit: str, scope: str, generous: float, count: int, n: int, cap: int, concurrency: int, steerable: bool, mean: float,
    p_fail: float, stubborn: bool, p_hang: float, cancels: bool, prompts: list[int], seed: int,
) -> None:  # fmt: skip
    writer = random_writer(mean_thinking=mean, p_fail=p_fail, p_hang=p_hang, flaky=True, stubborn=stubborn)
    engine = FakeEngine(
        writer=lambda request, issued: writer(replace(request, seed=request.seed ^ seed), issued),
        concurrency=concurrency, steerable=steerable,
    )  # fmt: skip
    problems = make_problems(count, prompts)
    one = {"tokens": 60.0, "eflops": 3e10, "dollars": 60 * 4e-6, "seconds": 1.0}[unit]
    budget = Budget(one * generous * (count if scope == "run" else 1), unit, scope)  # type: ignore[arg-type]
    policy = EarlyStop(n) if cancels else parse(f"self-consistency?n={n}")
    driver = make_driver(engine, policy, budget, cap=cap, stall_seconds=5.0)
    try:
        results = list(driver.run(problems))
    except BudgetTooSmall as error:
        assert error.least > budget.amount
        assert engine.counters().requests == 0, "refused before any work"
        return
    spent = total(results)
    counted = engine.counters()
    assert (spent.tokens, spent.tokens_prompt) == (counted.output_tokens, counted.prompt_tokens)
    assert driver.status.charge.tokens == counted.output_tokens
    assert engine.peak <= concurrency
    assert [r.problem_id for r in results] and {r.problem_id for r in results} == {p.id for p in problems}
    slack = 1 + 1e-9
    if unit == "seconds":
        if scope == "run":
            assert engine.now <= budget.amount + engine.step_seconds * slack + (5.1 if p_hang else 0)
    else:
        assert driver.overrun == 0
        amounts = [spent_in(unit, r.charge) for r in results]  # type: ignore[arg-type]
        assert (sum(amounts) if scope == "run" else max(amounts)) <= budget.amount * slack
        if not p_fail and not p_hang:
            assert all(r.answer for r in results), "a hard budget is no excuse for an empty answer"


@pytest.mark.parametrize("unit", ["tokens", "eflops", "dollars"])
@pytest.mark.parametrize("text", ANY_POLICY)
def test_what_is_held_is_the_length_that_is_sent(text: str, unit: Unit) -> None:
    """Under just the least budget and above it: prompts by their own effort and beginning, steps, forks and scores."""
    for seed in range(16):
        rng = random.Random(f"{text} {unit} {seed}")
        p_fail, stubborn = rng.choice([0.0, 0.2, 0.6]), rng.random() < 0.5
        engine = FakeEngine(
            random_writer(mean_thinking=rng.uniform(1, 90), p_fail=p_fail, flaky=True, stubborn=stubborn),
            concurrency=rng.randint(1, 6),
            steerable=rng.random() < 0.7, probes=rng.random() < 0.7 or text == "odd", effort_tokens=rng.randint(0, 3),
        )  # fmt: skip
        policy = policy_of(text)
        problems = make_problems(3, (20, 31))
        scope: Scope = rng.choice(["problem", "run"])
        more: dict[str, Any] = {
            "cap": rng.randint(2, 90), "effort": rng.choice([None, 0.5, 0.125]), "reward": Reads(engine.info.shape),
        }  # fmt: skip
        with pytest.raises(BudgetTooSmall) as caught:
            jobs_of(make_driver(engine, policy, Budget(1e-30, unit, scope), **more), problems)
        amount = caught.value.least * rng.choice([1.0, 1.0, rng.uniform(1, 3), rng.uniform(1, 60)])
        driver = make_driver(engine, policy, Budget(amount, unit, scope), **more)
        results = list(driver.run(problems))
        assert driver.overrun == 0, seed
        spent, counted = total(results), engine.counters()
        assert spent.tokens - spent.tokens_judge == counted.output_tokens, seed
        assert spent.tokens_prompt == counted.prompt_tokens, seed
        amounts = [spent_in(unit, result.charge) for result in results]
        assert (sum(amounts) if scope == "run" else max(amounts)) <= amount * (1 + 1e-9), seed
        if not p_fail and text != "odd":
            assert all(result.answer for result in results), seed


@pytest.mark.parametrize("unit", ["tokens", "eflops"])
def test_caps_hold_to_the_token_in_ten_thousand_requests(unit: str) -> None:
    engine = FakeEngine(writer=random_writer(mean_thinking=60), concurrency=64)
    driver = make_driver(engine, parse("self-consistency?n=100"), Budget(1e15, unit), cap=37)  # type: ignore[arg-type]
    branches = [b for r in driver.run(make_problems(100)) for b in r.branches]
    assert len(branches) == 10_000
    assert max(b.completion.output_tokens for b in branches) <= 37 + engine.room_tokens
    assert all(b.answer for b in branches)
    assert any(b.completion.closed for b in branches)
    assert not all(b.completion.closed for b in branches)


def test_a_budget_for_less_than_all_branches_stops_at_the_budget() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(40, "7", 2))
    [result] = make_driver(engine, parse("self-consistency?n=50"), Budget(300, "tokens")).run(
        make_problems(1)
    )
    assert result.stop == "budget"
    assert 200 <= result.charge.tokens <= 300, "most of it is used, and no more"
    assert {b.finish for b in result.branches} == {"stop", "denied"}


def test_too_small_a_budget_says_what_would_do() -> None:
    engine = FakeEngine()
    with pytest.raises(BudgetTooSmall, match="give at least 9 tokens") as caught:
        list(make_driver(engine, parse("greedy"), Budget(5, "tokens")).run(make_problems(3)))
    enough = Budget(caught.value.least, "tokens")
    assert all(r.answer for r in make_driver(engine, parse("greedy"), enough).run(make_problems(3)))


def test_time_that_was_over_before_an_answer_is_told_with_what_would_do() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(40, "7", 2))
    [result] = make_driver(engine, parse("self-consistency?n=2"), Budget(0.03, "seconds")).run(
        make_problems(1)
    )
    assert result.answer is None
    assert result.error.startswith("budget: 0.03 s were over before an answer was written; give at least 0.")
    enough = Budget(float(result.error.split()[-2]), "seconds")
    [result] = make_driver(FakeEngine(), parse("greedy"), enough).run(make_problems(1))
    assert result.answer and not result.error


@pytest.mark.parametrize("look", [0.0, driver.LOOK_SECONDS])
def test_a_slow_first_step_closes_no_thought_early(look: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that reads the prompts takes a hundred times as long as those that follow: time for 400 tokens is left, and used."""

    class Reading(FakeEngine):
        def step(self) -> StepReport:
            self.step_seconds = 0.01 if self.counters().steps else 1.0
            return super().step()

    monkeypatch.setattr(driver, "LOOK_SECONDS", look)
    engine = Reading(writer=lambda request, issued: Script(2000, "7", 2))
    run = make_driver(engine, parse("self-consistency?n=4"), Budget(5.0, "seconds"), cap=3000)
    [result] = run.run(make_problems(1))
    assert [b.completion.closed for b in result.branches] == [True] * 4
    assert all(b.answer for b in result.branches)
    assert run.overrun == 0
    assert min(b.completion.output_tokens for b in result.branches) > 350


def test_run_scope_answers_every_problem_before_it_buys_second_samples() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(20, "7", 1), concurrency=4)
    budget = Budget(12 * 31, "tokens", "run")
    results = list(make_driver(engine, parse("self-consistency?n=8"), budget).run(make_problems(12)))
    assert all(r.answer == "7" for r in results)
    assert engine.counters().output_tokens <= budget.amount


def test_prompt_too_long_is_reported_and_the_rest_run() -> None:
    engine = FakeEngine(context=200)
    problems = make_problems(4, (20, 195))
    results = {
        r.problem_id: r for r in make_driver(engine, parse("greedy"), Budget(500, "tokens")).run(problems)
    }
    assert all("context of 200" in results[p].error for p in ("p1", "p3"))
    assert results["p0"].answer and results["p2"].answer
