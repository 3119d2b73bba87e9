"""Policies, verifiers and requests that fail, hang or dawdle: each costs its own problem and no other."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import PlainJudge, make_problems
from tests.driving import make_driver
from tests.waiting import LIMIT_S
from ttc.budget import Budget, Scope
from ttc.engine.fake import FakeEngine, Script
from ttc.jobs import Status
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.types import Brief, Generate, Outcome, Problem, Request, Routine, Verdict


@dataclass(frozen=True, slots=True)
class Raising:
    name = "raising"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        yield Generate((brief.request(problem, 0),), why="one")
        if problem.id == "p1":
            raise RuntimeError("a bug in a policy")
        return Outcome("7", "samples", {"7": 1.0})


def test_a_policy_that_raises_is_contained_to_its_problem() -> None:
    engine = FakeEngine()
    results = {
        r.problem_id: r for r in make_driver(engine, Raising(), Budget(500, "tokens")).run(make_problems(3))
    }
    assert "a bug in a policy" in results["p1"].error
    assert results["p1"].charge.tokens > 0, "what it spent is still charged"
    assert results["p0"].answer == results["p2"].answer == "7"


class BreakingJudge(PlainJudge):
    def verdict(self, problem: Problem, answer: str | None) -> None:
        raise RuntimeError("the verifier broke")


def test_a_verifier_that_breaks_costs_the_verdict_only() -> None:
    engine = FakeEngine()
    driver = make_driver(engine, parse("self-consistency?n=3"), Budget(500, "tokens"))
    driver.closing.judge = BreakingJudge()
    results = list(driver.run(make_problems(3)))
    assert all(
        r.answer is not None and r.verdict is None and "the verifier broke" in r.error for r in results
    )


class WaitingJudge(PlainJudge):
    """Its verdicts on the first problem wait for ``gate``."""

    slow = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.in_time = True

    def verdict(self, problem: Problem, answer: str | None) -> Verdict | None:
        if problem.id == "p0":
            self.in_time &= self.gate.wait(LIMIT_S)
        return super().verdict(problem, answer)


def test_slow_verdicts_hold_up_neither_the_engine_nor_the_order_of_results() -> None:
    judge, problems = WaitingJudge(), make_problems(6)
    engine = FakeEngine(concurrency=2)
    driver = make_driver(engine, parse("self-consistency?n=3"), Budget(500, "tokens"))
    driver.closing.judge = judge

    def when_all_have_run(status: Status) -> None:
        if status.samples == 18:
            judge.gate.set()

    driver.on_step = when_all_have_run
    results = list(driver.run(problems))
    assert judge.in_time, "the engine worked on while the first problem was judged"
    assert results[0].problem_id == "p0" and len(results) == 6
    assert all(r.verdict is not None for r in results)


def test_what_has_ended_is_in_the_ledger_even_if_the_caller_walks_away(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "run", {})
    driver = make_driver(FakeEngine(), parse("greedy"), Budget(500, "tokens"), ledger=ledger)
    driver.closing.judge = judge = WaitingJudge()

    def when_all_have_run(status: Status) -> None:
        if status.samples == 3:
            judge.gate.set()

    driver.on_step = when_all_have_run
    stream = driver.run(make_problems(3))
    next(stream)
    stream.close()
    ledger.close()
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem"] for line in lines} >= {"p0"}


def test_failed_requests_are_issued_again_and_every_attempt_is_charged() -> None:
    def writer(request: Request, issued: int) -> Script:
        return Script(10, "7", 1, fails_at=6 if issued == 0 else None)

    engine = FakeEngine(writer=writer)
    [result] = make_driver(engine, parse("self-consistency?n=4"), Budget(5000, "tokens")).run(
        make_problems(1)
    )
    assert [b.finish for b in result.branches] == ["stop"] * 4
    assert engine.counters().requests == 8
    assert result.charge.tokens == engine.counters().output_tokens == 4 * (6 + 12)


@pytest.mark.parametrize("scope", ["problem", "run"])
def test_a_failed_request_waits_for_the_money_that_others_hold(scope: Scope, tmp_path: Path) -> None:
    """Two branches hold the budget; one fails at its sixth token, and is issued again once the other has ended."""

    def writer(request: Request, issued: int) -> Script:
        return Script(10, "7", 1, fails_at=6 if (request.index, issued) == (0, 0) else None)

    engine = FakeEngine(writer=writer)
    ledger = Ledger.open(tmp_path / "run", {})
    budget = Budget(57, "tokens", scope)
    driver = make_driver(engine, parse("self-consistency?n=2"), budget, cap=20, ledger=ledger)
    [result] = driver.run(make_problems(1))
    assert [b.finish for b in result.branches] == ["stop", "stop"]
    assert result.charge.tokens == engine.counters().output_tokens == 6 + 12 + 12
    assert (driver.status.samples, driver.status.retried_samples, driver.status.failed_samples) == (2, 1, 0)
    ledger.close()
    rows = [json.loads(line) for line in (tmp_path / "run/branches.jsonl").read_text().splitlines()]
    assert [row.get("interrupted", False) for row in rows] == [True, False, False]
    ledger = Ledger.open(tmp_path / "run", {})
    again = make_driver(engine, parse("self-consistency?n=2"), budget, cap=20, ledger=ledger)
    [result] = again.run(make_problems(1))
    ledger.close()
    assert (result.charge.tokens, engine.counters().output_tokens) == (30, 30), "nothing is sampled again"


@pytest.mark.parametrize("policy", ["self-consistency?n=2", "adaptive?max_samples=2&width=2&price=0"])
def test_a_failed_request_is_lost_if_the_money_for_another_never_comes(policy: str) -> None:
    def writer(request: Request, issued: int) -> Script:
        return Script(18, "7", 1, fails_at=12 if request.index == 0 else None)

    engine = FakeEngine(writer=writer)
    driver = make_driver(engine, parse(policy), Budget(57, "tokens"), cap=20)
    [result] = driver.run(make_problems(1))
    assert sorted(b.finish for b in result.branches) == ["error", "stop"]
    assert (result.answer, result.error) == ("7", "")
    assert result.charge.tokens == engine.counters().output_tokens == 12 + 20
    assert (driver.status.samples, driver.status.failed_samples) == (2, 1)


def test_a_failed_first_answer_is_tried_again_as_long_as_the_rest_allows() -> None:
    """What is left pays for no second thought of the same length, but for a shorter one."""
    engine = FakeEngine(writer=lambda request, issued: Script(20, "7", 1, fails_at=None if issued else 6))
    [result] = make_driver(engine, parse("greedy"), Budget(30, "tokens"), cap=20).run(make_problems(1))
    assert result.answer == "7"
    assert result.charge.tokens == engine.counters().output_tokens <= 30


def test_a_problem_whose_requests_all_fail_is_an_error_not_a_crash() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(10, "7", 1, fails_at=3))
    results = list(
        make_driver(engine, parse("self-consistency?n=2"), Budget(5000, "tokens")).run(make_problems(2))
    )
    assert all(r.answer is None and "told to fail" in r.error for r in results)


def test_hanging_requests_are_cancelled() -> None:
    engine = FakeEngine(
        writer=lambda request, issued: Script(10, "7", 1, hangs_at=4 if request.index == 0 else None)
    )
    [result] = make_driver(
        engine, parse("self-consistency?n=3"), Budget(5000, "tokens"), stall_seconds=2.0
    ).run(make_problems(1))
    assert sorted(b.finish for b in result.branches) == ["abort", "stop", "stop"]
    assert result.answer == "7"
    assert result.charge.tokens == engine.counters().output_tokens
