"""Replay, steered branches and probes: budgets stay hard, every token is charged, nothing runs on, failures are contained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import make_driver
from ttc.budget import Budget
from ttc.costmodel.records import Pool, PooledProblem
from ttc.driver import Driver
from ttc.engine.fake import FakeEngine, random_writer
from ttc.engine.replay import RecordedJudge, ReplayEngine
from ttc.errors import BudgetTooSmall, InputError
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.pricing import Pricer
from ttc.simulate import replay, simulate
from ttc.types import Brief, Outcome, Probing, Problem, Reply, Request, Result, Routine, Sampling, Steer


def make_pool(
    problems: int = 4, branches: int = 12, *, every: int = 10, seed: int = 0, longest: int = 120
) -> Pool:
    """A small random pool: each problem has its own share of right answers; anytime answers are noise that settles."""
    rng = np.random.default_rng(seed)
    made = []
    for p in range(problems):
        right = rng.random()
        tokens = rng.integers(5, longest, branches).astype(float)
        final = np.where(rng.random(branches) < right, 0, rng.integers(-1, 4, branches))
        columns = max(1, longest // every) if every else 0
        probes = np.full((branches, columns), -1, dtype=np.int64)
        for b in range(branches):
            settled = rng.integers(0, columns + 1) if columns else 0
            probes[b] = [final[b] if k >= settled else rng.integers(-1, 4) for k in range(columns)]
        made.append(PooledProblem(f"q{p}", tokens, final.astype(np.int64), probes))
    return Pool("small", tuple(made), probe_every=every)


def one_branch(probes: list[int]) -> Pool:
    """One branch of 95 tokens, right in the end, with anytime answers every 10 tokens."""
    problem = PooledProblem("q", np.array([95.0]), np.array([0]), np.array([probes]))
    return Pool("one", (problem,), probe_every=10)


def replay_driver(
    engine: ReplayEngine, policy: object, budget: Budget, ledger: Ledger | None = None
) -> Driver:
    brief = Brief(seed=0, max_thinking_tokens=engine.info.context, sampling=Sampling())
    return Driver(
        engine, policy, budget, RecordedJudge(), ledger or Ledger(), Pricer(None, 1, False, usd_per_m_output=4.0),  # type: ignore[arg-type]
        brief=brief, clock=engine.clock,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Whim:
    """Steers at random: starts, cancels, closes, probes, and may return while branches run. Reproducible by ``seed``."""

    seed: int = 0
    moves: int = 12
    name = "whim"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        rng = random.Random(f"{self.seed}/{problem.id}")
        issued, running, votes = 0, set(), {}  # type: int, set[int], dict[str, float]
        for _ in range(self.moves):
            start: tuple[Request, ...] = ()
            if not running or rng.random() < 0.4:
                count = rng.randint(1, 3)
                every = rng.choice([0, 7, 20]) if brief.probe_tokens is not None else 0
                start = tuple(brief.request(problem, issued + i, probe_every=every) for i in range(count))
                running |= {r.index for r in start}
                issued += count
            some = sorted(running)
            cancel = tuple(i for i in some if rng.random() < 0.15)
            close = tuple(i for i in some if rng.random() < 0.1)
            probe = tuple(
                Probing(i, rng.randint(0, 40), rng.randint(3, 30)) for i in some if rng.random() < 0.2
            )
            reply: Reply = yield Steer(start, cancel, close, probe, why="a whim", value=rng.random())
            running -= {b.index for b in reply.branches}
            for branch in reply.branches:
                if branch.usable and branch.vote is not None:
                    votes[branch.vote] = votes.get(branch.vote, 0.0) + 1
            if any(b.finish == "denied" for b in reply.branches):
                break
        return Outcome(max(votes, key=lambda a: votes[a]) if votes else None, "samples", votes)


def check_books(
    engine: ReplayEngine | FakeEngine, driver: Driver, results: Sequence[Result], budget: Budget
) -> None:
    assert (
        sum(r.charge.tokens for r in results)
        == engine.counters().output_tokens
        == driver.status.charge.tokens
    )
    assert driver.overrun == 0
    if budget.unit == "tokens":
        amounts = [r.charge.tokens for r in results]
        assert (sum(amounts) if budget.scope == "run" else max(amounts, default=0)) <= budget.amount


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**20),
    scope=st.sampled_from(["problem", "run"]),
    amount=st.integers(16, 3000),
    concurrency=st.integers(1, 20),
    every=st.sampled_from([0, 10]),
    policy=st.sampled_from([
        "whim", "adaptive", "adaptive?width=3&probe_every=10&agree=1",
        "parallel-probe?n=6&every=10&stable=3&warmup=1&patience=2",
    ]),
)  # fmt: skip
def test_steered_branches_never_exceed_a_budget_and_every_token_is_charged(
    seed: int, scope: str, amount: int, concurrency: int, every: int, policy: str
) -> None:
    engine = ReplayEngine(make_pool(3, 40, every=every, seed=seed), seed, concurrency=concurrency)
    budget = Budget(amount * (3 if scope == "run" else 1), "tokens", scope)  # type: ignore[arg-type]
    driver = replay_driver(engine, Whim(seed) if policy == "whim" else parse(policy), budget)
    try:
        results = list(driver.run(engine.problems()))
    except BudgetTooSmall:
        return
    check_books(engine, driver, results, budget)
    assert sorted(r.problem_id for r in results) == ["q0", "q1", "q2"]
    assert not any(r.error for r in results)
    if policy != "whim":
        assert all(any(b.finish != "denied" for b in r.branches) for r in results), (
            "every problem gets a branch"
        )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**20),
    unit=st.sampled_from(["tokens", "eflops", "dollars"]),
    scope=st.sampled_from(["problem", "run"]),
    generous=st.floats(0.5, 20.0),
    p_fail=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_steering_on_the_fake_engine_is_hard_in_every_unit(
    seed: int, unit: str, scope: str, generous: float, p_fail: float
) -> None:
    engine = FakeEngine(
        writer=random_writer(mean_thinking=40, p_fail=p_fail, flaky=True), concurrency=1 + seed % 7
    )
    one = {"tokens": 60.0, "eflops": 3e10, "dollars": 60 * 4e-6}[unit]
    budget = Budget(one * generous * (3 if scope == "run" else 1), unit, scope)  # type: ignore[arg-type]
    driver = make_driver(engine, Whim(seed), budget)
    try:
        results = list(driver.run(make_problems(3)))
    except BudgetTooSmall:
        return
    assert len(results) == 3
    assert driver.overrun == 0
    assert sum(r.charge.tokens for r in results) == engine.counters().output_tokens


def test_probes_are_answered_where_recorded_and_charged() -> None:
    pool = one_branch([1, 1, -1, 0, 0, 0, 0, 0, 0])

    @dataclass(frozen=True, slots=True)
    class Listen:
        name = "listen"

        def run(self, problem: Problem, brief: Brief) -> Routine:
            heard: list[tuple[int, str | None]] = []
            reply = yield Steer((brief.request(problem, 0, probe_from=15, probe_every=10),), why="listen")
            while reply.running:
                heard += [(p.tokens, p.vote) for p in reply.probes]
                reply = yield Steer()
            assert heard == [(20, "other-1"), (30, "nothing"), *[(t, "gold") for t in range(40, 100, 10)]], (
                heard
            )
            return Outcome(reply.branches[0].vote, "samples")

    engine = ReplayEngine(pool)
    (result,) = replay_driver(engine, Listen(), Budget(1e6, "tokens")).run(engine.problems())
    assert result.error == ""
    assert (result.charge.tokens_generated, result.charge.tokens_probe) == (95, 8 * engine.probe_tokens)
    assert [p.tokens for p in result.branches[0].probes] == list(range(20, 100, 10))


def test_a_branch_cut_by_its_cap_answers_with_the_last_recorded_anytime_answer() -> None:
    pool = one_branch([1, 2, 3, 0, 0, 0, 0, 0, 0])
    engine = ReplayEngine(pool)
    (result,) = replay_driver(engine, parse("self-consistency?n=1"), Budget(44, "tokens")).run(
        engine.problems()
    )
    assert result.answer == "other-2", "29 tokens of thought and 15 to answer: the anytime answer after 20"
    assert result.charge.tokens == 44


class _Raises:
    name = "raises"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        yield Steer(tuple(brief.request(problem, i) for i in range(3)))
        if problem.id == "q1":
            raise ValueError("on purpose")
        return Outcome("gold", "samples")


def test_a_steering_policy_that_raises_or_returns_early_leaves_nothing_running() -> None:
    engine = ReplayEngine(make_pool(3))
    driver = replay_driver(engine, _Raises(), Budget(1e6, "tokens"))
    results = {r.problem_id: r for r in driver.run(engine.problems())}
    assert "on purpose" in results["q1"].error and not results["q0"].error
    assert [b.finish for b in results["q0"].branches].count("abort") == 2
    check_books(engine, driver, list(results.values()), Budget(1e6, "tokens"))


def test_decisions_say_what_was_bought_and_why_it_stopped() -> None:
    engine = ReplayEngine(make_pool(3, 40))
    results = list(replay_driver(engine, parse("adaptive"), Budget(1e6, "tokens")).run(engine.problems()))
    for result in results:
        whats = [d.what for d in result.decisions]
        assert whats[0] == "start 1" and whats[-1].startswith("stop: ")
        assert all(d.why for d in result.decisions)


@pytest.mark.parametrize("scope", ["problem", "run"])
def test_an_interrupted_steered_run_resumes_and_samples_nothing_twice(tmp_path: Path, scope: str) -> None:
    pool = make_pool(4, 40, longest=400)
    budget = Budget(1e6, "tokens", scope)  # type: ignore[arg-type]

    def session(stop_after: int | None) -> tuple[list[Result], int]:
        engine = ReplayEngine(pool)
        ledger = Ledger.open(tmp_path / scope, {"model": "pool"})
        driver = replay_driver(engine, parse("adaptive?probe_every=10"), budget, ledger)
        results = []
        steps = 0

        def count(_: object) -> None:
            nonlocal steps
            steps += 1
            if stop_after is not None and steps >= stop_after:
                driver.stop()

        driver.on_step = count
        results = list(driver.run(engine.problems()))
        ledger.close()
        return results, engine.counters().output_tokens

    _, early = session(6)
    second, late = session(None)
    assert {r.problem_id for r in second} == {"q0", "q1", "q2", "q3"}
    assert not any(r.error for r in second)
    assert sum(r.charge.tokens for r in second) == early + late


def test_problem_order_changes_nothing() -> None:
    pool = make_pool(5, 40, seed=3)
    turned = Pool(pool.name, pool.problems[::-1], probe_every=pool.probe_every)
    one, other = (replay(p, parse("adaptive"), shuffles=5, max_branches=0) for p in (pool, turned))
    assert np.array_equal(one.right, other.right[:, ::-1]) and np.array_equal(
        one.tokens, other.tokens[:, ::-1]
    )


def test_problem_order_changes_nothing_in_a_shared_budget_that_suffices() -> None:
    """While money is short the order in which problems come decides ties, and with them a token here or there."""
    pool = make_pool(6, 40, seed=3)
    turned = Pool(pool.name, pool.problems[::-1], probe_every=pool.probe_every)
    for amount, slack in ((100_000, 0.0), (1_200, 0.1)):
        budget = Budget(amount, "tokens", "run")
        one, other = (
            replay(p, parse("adaptive"), budget=budget, shuffles=8, max_branches=0) for p in (pool, turned)
        )
        assert abs(one.right.mean() - other.right.mean()) <= slack
        assert one.overrun == other.overrun == 0
        if slack == 0:
            assert np.array_equal(one.tokens, other.tokens[:, ::-1])


def test_more_budget_buys_no_less_accuracy_beyond_noise() -> None:
    pool = make_pool(40, 64, seed=5)
    runs = [
        replay(pool, parse("adaptive"), budget=Budget(b, "tokens"), shuffles=20) for b in (60, 200, 800, 4000)
    ]
    means = [r.right.mean() for r in runs]
    noise = 2 * np.sqrt(0.25 / (40 * 20))
    assert all(after >= before - noise for before, after in pairwise(means))
    assert all(r.overrun == 0 for r in runs)


def test_free_probes_leave_only_the_probes_out() -> None:
    pool = make_pool(6, 40, seed=1)
    policy = parse("parallel-probe?n=8&every=10")
    paid, free = (replay(pool, policy, shuffles=4, free_probes=f) for f in (False, True))
    assert np.array_equal(paid.right, free.right)
    assert np.array_equal(paid.tokens - paid.probes, free.tokens)
    assert free.probes.sum() == 0 < paid.probes.sum()


def test_simulate_refuses_what_it_cannot_replay(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        simulate(tmp_path / "absent.json", "adaptive")
    with pytest.raises(InputError, match="a pool tells tokens, not seconds"):
        simulate(tmp_path / "absent.json", "adaptive", budget="5 s")
    with pytest.raises(InputError, match="use 'problem' or 'run'"):
        simulate(tmp_path / "absent.json", "adaptive", scope="galaxy")
    with pytest.raises(InputError, match="self-certainty"):
        replay(make_pool(), parse("deepconf"))


def test_branches_beyond_the_pool_fail_alone() -> None:
    result = replay(make_pool(2, 4), parse("self-consistency?n=6"), shuffles=1)
    assert result.samples.max() == 4 and not result.errors


def test_unanswered_branches_vote_as_published_or_abstain() -> None:
    pool = Pool(
        "none",
        (
            PooledProblem(
                "q", np.array([5.0] * 5), np.array([-1, -1, -1, 0, 0]), np.empty((5, 0), dtype=np.int64)
            ),
        ),
    )
    voting, abstaining = (
        replay(pool, parse("self-consistency?n=5"), shuffles=1, abstain=a) for a in (False, True)
    )
    assert (voting.right.mean(), abstaining.right.mean()) == (0.0, 1.0)
