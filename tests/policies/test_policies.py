"""Policies: each is a value that travels; the published ones land on their published figures; adaptive's prior is learnt right."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.conftest import make_problems
from tests.driving import make_driver
from tests.test_replay import make_pool, replay_driver
from ttc.budget import Budget
from ttc.cli.main import app
from ttc.costmodel.intervals import proportion
from ttc.costmodel.pools import read
from ttc.costmodel.records import Pool, PooledProblem
from ttc.costmodel.shapes import ModelShape
from ttc.engine.fake import FakeEngine, random_writer
from ttc.engine.replay import ReplayEngine
from ttc.errors import InputError
from ttc.ledger import Ledger
from ttc.policies import POLICIES, Adaptive, BudgetForcing, IterativeDeepening, Kinetics, describe, parse
from ttc.policies.adaptive import Ballot
from ttc.policies.planned import Situation
from ttc.policies.posterior import Prior, fit, outlook, value_table
from ttc.simulate import load, replay, simulate
from ttc.types import Branch, Brief, Completion, Generate, Reply, Request, Sampling

POOLS = Path(__file__).parents[3] / "shared" / "pools"
needs_pools = pytest.mark.skipif(not POOLS.is_dir(), reason="the recorded pools are not on this machine")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_travel_and_are_read_back_as_described(name: str) -> None:
    policy = parse(name)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert parse(describe(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "adaptive?price=2",
        "adaptive?width=0",
        "adaptive?patience=0",
        "adaptive?after=-3",
        "adaptive?early=-1",
        "adaptive?spread=0",
        "adaptive?level=nan",
        "adaptive-consistency?rule=flat",
        "early-stopping?window=99",
        "parallel-probe?n=0",
    ],
)
def test_options_without_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)


def test_the_prior_is_found_again() -> None:
    """Within three standard errors of a regression on 400 problems: 1.2 / (0.6 * 20) of the slope, and what that and the mean of
    1.2 / 20 leave of the level."""
    rng, true = np.random.default_rng(1), Prior(-2.0, -4.1, 1.2)
    x = rng.normal(-1.1, 0.6, 400)
    share = 1 / (1 + np.exp(-rng.normal(true.level + true.slope * x, true.spread)))
    finals = [[0] * k + list(range(1, 65 - k)) for k in np.maximum(rng.binomial(64, share), 1)]
    found = fit(finals, np.exp(x).tolist())
    assert found.slope == pytest.approx(true.slope, abs=0.3)
    assert found.level == pytest.approx(true.level, abs=0.38)
    assert found.spread == pytest.approx(true.spread, abs=0.2)


def test_long_and_late_branches_promise_less() -> None:
    prior = Prior(-2.0, -4.1, 1.2)
    short, long = outlook(prior, (-2.0,), 0, -0.4), outlook(prior, (-0.6,), 0, -0.4)
    late, later = outlook(prior, (), 1, -0.4), outlook(prior, (), 4, -0.4)
    assert short[0] > long[0] > late[0] > later[0]
    assert outlook(prior, (-0.6,) * 5, 0, -0.4)[1] < long[1], "more branches leave less doubt of the length"


def test_a_vote_is_worth_less_the_surer_the_leader_is() -> None:
    table = value_table(1.0, 1.5)
    assert table.price(1, 1, 2) > table.price(1, 0, 1) > table.price(2, 0, 2) > table.price(4, 0, 4)
    assert table.price(2, 1, 3) > table.price(3, 1, 4) > table.price(5, 1, 6)
    assert table.sure(3, 0, 3) > table.sure(2, 0, 2) > table.sure(1, 0, 1) > table.sure(1, 1, 2)
    assert table.price(1, 1, 8) < table.price(1, 1, 3), "scattered answers are given up"
    assert value_table(4.0, 1.0).price(1, 0, 1) < table.price(1, 0, 1), "where one answer is sure to dominate"


def test_a_price_is_what_stopping_and_drawing_on_are_equal_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vote before the horizon the index is a plain expectation; here by brute force over fresh draws of the same model."""
    from ttc.policies import posterior

    monkeypatch.setattr(posterior, "_PROBLEMS", 100_000)
    monkeypatch.setattr(posterior, "HORIZON", 6)
    draws = posterior._draws.__wrapped__()
    monkeypatch.setattr(posterior, "_draws", lambda: draws)
    value_table.cache_clear()

    rng, n = np.random.default_rng(7), posterior.HORIZON - 1
    logit = np.where(
        rng.random(60_000) < posterior.STRAY, rng.normal(0.5, 2.0, 60_000), rng.normal(0.0, 1.0, 60_000)
    )
    logit = logit[(logit > -5) & (logit < 8)]
    first = 1 / (1 + np.exp(-logit))
    broken = rng.beta(1.0, posterior.REST, (len(first), 31))
    left = np.cumprod(np.hstack([np.ones((len(first), 1)), 1 - broken]), axis=1)
    shares = np.hstack(
        [first[:, None], (1 - first)[:, None] * np.hstack([broken * left[:, :-1], left[:, -1:]])]
    )
    worth = 1 / (1 + np.exp(-(shares.max(axis=1) - posterior.HALF) / posterior.WIDTH))
    votes = np.array([rng.multinomial(n, row / row.sum()) for row in shares])
    tied = (np.sort(votes, axis=1)[:, -1] == 2) & (np.sort(votes, axis=1)[:, -2] == 2)
    leaders, mode = np.argsort(-votes[tied], axis=1)[:, :2], shares[tied].argmax(axis=1)
    stop = ((leaders[:, 0] == mode) * 0.5 + (leaders[:, 1] == mode) * 0.5) * worth[tied]
    odds = np.take_along_axis(shares[tied], leaders, axis=1)
    neither = 1 - odds.sum(axis=1)
    on = sum(worth[tied] * (leaders[:, k] == mode) * (odds[:, k] + neither / 2) for k in (0, 1))
    price = value_table(0.0, 1.0).price(2, 2, n)
    value_table.cache_clear()
    assert price == pytest.approx(float(np.mean(on - stop)), rel=0.25), "steps of 16 %"


def test_a_higher_price_buys_fewer_tokens() -> None:
    pool = make_pool(20, 40, seed=2)
    spent = [replay(pool, Adaptive(price=p), shuffles=5).tokens.mean() for p in (0.001, 0.01, 0.05, 0.5)]
    assert spent == sorted(spent, reverse=True) and spent[0] > 1.5 * spent[-1]


def test_width_shortens_the_chain() -> None:
    pool = make_pool(20, 40, seed=2)
    narrow, wide = (replay(pool, Adaptive(width=w), shuffles=5) for w in (1, 4))
    assert wide.chain.mean() < 0.8 * narrow.chain.mean()


def test_late_branches_are_cut_where_probes_exist_and_policies_work_without() -> None:
    tokens, final = np.full(8, 1000.0), np.zeros(8, dtype=np.int64)
    probed = Pool(
        "p", (PooledProblem("q", tokens, final, np.zeros((8, 100), dtype=np.int64)),), probe_every=10
    )
    bare = Pool("p", (PooledProblem("q", tokens, final, np.empty((8, 0), dtype=np.int64)),))
    policy = parse("adaptive?probe_every=10&price=0&max_samples=4&after=0.3&patience=1")
    cut, whole = (replay(pool, policy, shuffles=1) for pool in (probed, bare))
    assert cut.right.all() and whole.right.all()
    assert cut.samples.sum() == whole.samples.sum()
    assert cut.tokens.sum() < 0.8 * whole.tokens.sum()


def test_a_run_of_ours_is_a_pool_and_its_replay_agrees(tmp_path: Path) -> None:
    """What a live run says and what the replay of its own ledger says are the same, up to the order of branches."""
    engine = ReplayEngine(make_pool(6, 40, every=0, seed=4))
    ledger = Ledger.open(tmp_path, {"model": "pool"})
    results = list(
        replay_driver(engine, parse("self-consistency?n=8"), Budget(1e6, "tokens"), ledger).run(
            engine.problems()
        )
    )
    ledger.close()
    again = simulate(tmp_path, "self-consistency?n=8", shuffles=1)
    assert again["tokens_per_problem"] == pytest.approx(np.mean([r.charge.tokens for r in results]))
    assert again["accuracy"] == np.mean([r.verdict is not None and r.verdict.correct for r in results])


def test_a_run_that_cuts_branches_replays_to_the_token(tmp_path: Path) -> None:
    """Its anytime answers, its limit on thinking and the branches that it cut are in its pool; estimates leave the cut ones out."""
    engine = ReplayEngine(make_pool(12, 40, every=10, seed=6), unanswered=None)
    policy = parse("adaptive?probe_every=10&agree=1&patience=0.5")
    limit = engine.info.context - engine.room_tokens
    ledger = Ledger.open(tmp_path, {"model": "pool", "thinking_limit": limit})
    results = list(replay_driver(engine, policy, Budget(1e6, "tokens"), ledger).run(engine.problems()))
    ledger.close()
    assert any(b.finish == "abort" for r in results for b in r.branches)
    pool = load(tmp_path)
    assert (pool.probe_every, pool.thinking_tokens) == (10, limit)
    again = replay(pool, policy, shuffles=1, max_branches=0, in_order=True, abstain=True)
    told = {r.problem_id: r for r in results}
    for place, problem in enumerate(pool.problems):
        result = told[problem.id]
        assert again.tokens[0, place] == result.charge.tokens
        assert again.right[0, place] == (result.verdict is not None and result.verdict.correct)
    (finished,) = read(tmp_path)
    assert isinstance(finished, Pool) and len(finished.tokens) < len(pool.tokens)


def test_agreement_with_a_branch_that_was_dropped_counts_once_a_finished_one_agrees() -> None:
    ballot = Ballot()
    for index, answer in enumerate(("a", "b", "b")):
        ballot.unheard.setdefault(answer, []).append(index)
        ballot.add(index, None, 90)
    assert (ballot.leader, ballot.top(), ballot.drawn) == ("b", (0, 0), 3)
    ballot.add(3, "a", 40)
    assert (ballot.leader, ballot.top(), ballot.drawn) == ("a", (2, 0), 4)
    assert ballot.voters == {0, 3} and list(ballot.unheard) == ["b"]


def test_the_commands_speak_json_and_words(tmp_path: Path) -> None:
    engine = ReplayEngine(make_pool(3, 40, seed=4))
    ledger = Ledger.open(tmp_path / "run", {"model": "pool"})
    list(
        replay_driver(engine, parse("adaptive?probe_every=10"), Budget(1e6, "tokens"), ledger).run(
            engine.problems()
        )
    )
    ledger.close()
    runner = CliRunner()
    told = runner.invoke(app, ["report", str(tmp_path / "run"), "--json"], catch_exceptions=False)
    problems = json.loads(told.stdout)["problems"]
    right = sum(p["correct"] for p in problems)
    assert json.loads(told.stdout)["accuracy_ci95"] == proportion(right, 3).interval
    words = runner.invoke(app, ["report", str(tmp_path / "run")], catch_exceptions=False).stdout
    assert f"accuracy {right / 3:.1%} of 3 judged problems" in words
    assert {p["problem"] for p in problems} == {"q0", "q1", "q2"}
    assert all(p["decisions"][-1]["what"].startswith("stop") and p["branches"] for p in problems)
    shown = runner.invoke(
        app, ["report", str(tmp_path / "run"), "--problem", "q1"], catch_exceptions=False
    ).stdout
    assert "q1" in shown and "branches" in shown and "stop: " in shown
    args = ["simulate", "--pool", str(tmp_path / "run"), "--policy", "adaptive", "--shuffles", "2", "--json"]
    found = json.loads(runner.invoke(app, args, catch_exceptions=False).stdout)
    for key in (
        "accuracy",
        "accuracy_ci95",
        "tokens_per_problem",
        "sequential_tokens_per_problem",
        "probe_tokens_per_problem",
    ):
        assert key in found
    assert found["overrun"] == 0


@needs_pools
def test_the_defaults_are_as_good_as_self_consistency_at_a_twentieth_of_its_tokens() -> None:
    pool = load(POOLS / "qwen3-8b_aime24.json")
    found = replay(pool, Adaptive(), shuffles=30)
    assert found.right.mean() > 0.795
    assert found.tokens.mean() < 911e3 / 20


def test_adaptive_over_iterative_deepening_is_a_line() -> None:
    policy = Adaptive(max_samples=8, over=IterativeDeepening(first=16, growth=2.0))
    assert parse(describe(policy)) == policy
    assert parse("adaptive?over=iterative-deepening%3Ffirst%3D16") == Adaptive(
        over=IterativeDeepening(first=16)
    )
    assert "control" in policy.traits.needs
    seen: list[Request] = []

    class Watched(FakeEngine):
        def submit(self, ticket: int, request: Request) -> None:
            seen.append(request)
            FakeEngine.submit(self, ticket, request)

    engine = Watched(writer=random_writer(mean_thinking=40))
    results = list(make_driver(engine, policy, Budget(5_000, "tokens")).run(make_problems(3)))
    assert len(results) == 3 and not any(r.error for r in results)
    assert {r.control.at[:3] for r in seen if r.control is not None} == {(16, 32, 64)} and all(
        r.control for r in seen
    )


def test_kinetics_plans_what_the_budget_buys_and_replays_it() -> None:
    pool = dataclasses.replace(make_pool(12, 40, every=10, seed=3, longest=120), model="Qwen3-0.6B")
    situation = Situation("Qwen3-0.6B", ModelShape.of("Qwen3-0.6B"), Budget(2000, "tokens"), 64, 50.0, 4096)
    poor, rich = (
        Kinetics().planned(dataclasses.replace(situation, budget=Budget(b, "tokens"))) for b in (600, 60_000)
    )
    assert (poor.n, rich.n) != (0, 0) and poor.n * poor.thinking <= 600 < rich.n * rich.thinking <= 60_000
    assert Kinetics(n=3, thinking=77).planned(situation) == Kinetics(n=3, thinking=77)
    replayed = replay(pool, Kinetics(n=3), budget=Budget(1000, "tokens"), shuffles=2)
    assert replayed.overrun == 0 and replayed.samples.max() == 3
    with pytest.raises(
        InputError, match="policy: kinetics finds no plan that 9 tokens a problem would pay for"
    ):
        Kinetics().planned(dataclasses.replace(situation, budget=Budget(9, "tokens")))
    with pytest.raises(InputError, match="seconds"):
        Kinetics().planned(dataclasses.replace(situation, budget=Budget(9, "seconds")))
    with pytest.raises(InputError, match="shape"):
        Kinetics().planned(dataclasses.replace(situation, shape=None))


@needs_pools
def test_kinetics_reads_recorded_data_of_its_model_only() -> None:
    data = str(POOLS / "qwen3-8b_aime25.json")
    situation = Situation("Qwen3-8B", ModelShape.of("Qwen3-8B"), Budget(60_000, "tokens"), 64, 150.0, 41_000)
    planned = Kinetics(data=data).planned(situation)
    assert planned.n >= 2 and planned.thinking > 4000
    with pytest.raises(InputError, match="not of Qwen3-4B"):
        Kinetics(data=data).planned(dataclasses.replace(situation, model="Qwen3-4B"))


def test_effort_climbs_until_a_level_agrees() -> None:
    """Half effort never agrees with itself here, three quarters always does."""
    asked: list[float | None] = []
    routine = parse("effort?levels=0.5|0.75|1.0").run(make_problems(1)[0], Brief(0, 100, Sampling()))
    work = next(routine)
    outcome = None
    while outcome is None:
        assert isinstance(work, Generate)
        asked += [request.effort for request in work.requests]
        branches = tuple(
            Branch("p", r.index, r.seed, Completion("", "stop", 1, 5), "x", "right" if r.effort == 0.75 else f"wrong-{r.index}")
            for r in work.requests
        )  # fmt: skip
        try:
            work = routine.send(Reply(branches=branches))
        except StopIteration as end:
            outcome = end.value
    assert asked == [0.5, 0.5, 0.75, 0.75]
    assert (outcome.answer, outcome.stop) == ("right", "confident")


@pytest.mark.parametrize("words", ["Wait & see", "50%41 sure", "x+1", "a=b?", "Hm|So+", "#1; then", "\u00fc"])
def test_any_words_are_read_back_as_described(words: str) -> None:
    """run.json's line is one that can be given again."""
    policy = BudgetForcing(trigger=words)
    assert parse(describe(policy)) == policy
    outer = Adaptive(over=policy, price=1e-7)
    assert parse(describe(outer)) == outer


def test_a_plus_is_a_plus() -> None:
    assert parse("budget-forcing?trigger=x+1") == BudgetForcing(trigger="x+1")
    assert parse("budget-forcing?trigger=x%2B1 %26 y") == BudgetForcing(trigger="x+1 & y")
    assert parse("iterative-deepening?growth=1e+16") == IterativeDeepening(growth=1e16)
