"""A request that failed is made again when the budget pays for it: it waits for the money that others hold, and is given up only
when nothing is left that could free any. What the failed attempts cost is spent and on record, whatever becomes of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import make_problems
from tests.driving import make_driver, total
from ttc.budget import Budget
from ttc.engine.fake import FakeEngine, Script, Writer
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.types import Branch, Brief, Generate, Outcome, Problem, Reply, Request, Routine, Steer

MOST = 108
"""What a branch of the default cap, 100 tokens of thought, holds."""


def fails_once(key: str, at: int, *, fails: int = 40, other: int = 40, answer: int = 1) -> Writer:
    """The one request (problem and index) fails at its first attempt, ``at`` so many tokens; thoughts are of ``fails`` tokens there
    and of ``other`` elsewhere, with ``answer`` tokens behind."""

    def write(request: Request, issued: int) -> Script:
        mine = f"{request.problem.id}/{request.index}" == key
        return Script(fails if mine else other, "7", answer, fails_at=at if mine and not issued else None)

    return write


@pytest.mark.parametrize("unit", ["tokens", "eflops", "dollars"])
def test_it_waits_for_the_money_that_another_problem_holds(unit: str) -> None:
    engine = FakeEngine(fails_once("p0/0", 10, fails=90), concurrency=2, steerable=unit != "eflops")
    probe = make_driver(engine, parse("greedy"), Budget(1e18, unit))  # type: ignore[arg-type]
    request = Request(make_problems(1)[0].posed(), 0, 0, 100)
    most = probe.cashier.pricer.most(probe.budget.unit, request, 20, MOST)
    driver = make_driver(engine, parse("greedy"), Budget(2 * most, unit, "run"))  # type: ignore[arg-type]
    results = {r.problem_id: r for r in driver.run(make_problems(2))}
    assert [(r.answer, r.error) for r in results.values()] == [("7", "")] * 2
    assert results["p0"].charge.tokens == 10 + 90 + 2, "with its whole cap"
    assert (driver.overrun, driver.status.retried_samples, engine.counters().requests) == (0.0, 1, 3)
    assert total(list(results.values())).tokens == engine.counters().output_tokens


def test_it_is_given_up_when_nothing_could_free_money_any_more(tmp_path: Path) -> None:
    engine, ledger = (
        FakeEngine(fails_once("p0/0", 100, fails=500, other=500, answer=9), concurrency=2),
        Ledger.open(tmp_path, {}),
    )
    driver = make_driver(engine, parse("greedy"), Budget(2 * MOST, "tokens", "run"), ledger=ledger)
    results = {r.problem_id: r for r in driver.run(make_problems(2))}
    ledger.close()
    assert results["p1"].answer
    assert (results["p0"].answer, results["p0"].stop) == (None, "failed")
    assert "told to fail (and the budget pays for no other attempt)" in results["p0"].error
    assert (driver.status.samples, driver.status.failed_samples, driver.status.retried_samples) == (2, 1, 0)
    assert total(list(results.values())).tokens == engine.counters().output_tokens

    again = Ledger.open(tmp_path, {})
    engine = FakeEngine(fails_once("", 0))
    resumed = make_driver(engine, parse("greedy"), Budget(2 * MOST, "tokens", "run"), ledger=again)
    after = {r.problem_id: r for r in resumed.run(make_problems(2))}
    assert after["p0"].charge.tokens == 100, "what it has cost stays spent"
    assert engine.counters().requests == 0
    assert resumed.overrun == 0.0
    again.close()


def test_it_waits_for_what_is_kept_for_others_too() -> None:
    """In turn: p0 fails, and what is left is kept for p1's answer, which takes less."""
    engine = FakeEngine(fails_once("p0/0", 15, fails=13, other=2), concurrency=1)
    driver = make_driver(engine, parse("greedy"), Budget(30, "tokens", "run"))
    results = list(driver.run(make_problems(2)))
    assert [(r.problem_id, bool(r.answer), r.error) for r in results] == [("p1", True, ""), ("p0", True, "")]
    assert driver.overrun == 0.0


def test_problems_whose_requests_wait_for_one_another_all_end() -> None:
    engine = FakeEngine(lambda request, issued: Script(50, "7", 1, fails_at=3), concurrency=1)
    driver = make_driver(engine, parse("self-consistency?n=3"), Budget(60, "tokens", "run"))
    results = list(driver.run(make_problems(5)))
    assert len(results) == 5
    assert all(r.error for r in results)
    assert total(results).tokens == engine.counters().output_tokens <= 60


@dataclass(frozen=True, slots=True)
class Pair:
    """Two steered branches; with ``cancel`` the first is cancelled when the second has ended."""

    cancel: bool = False
    name = "pair"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        reply: Reply = yield Steer(tuple(brief.request(problem, i) for i in range(2)))
        seen: list[Branch] = list(reply.branches)
        while reply.running:
            reply = yield Steer(cancel=(0,) if self.cancel else ())
            seen += reply.branches
        return Outcome("7", "samples", {b.finish: float(b.index) for b in seen})


@pytest.mark.parametrize("cancel", [False, True])
def test_a_steered_one_waits_likewise_and_can_be_cancelled_there(cancel: bool) -> None:
    engine = FakeEngine(fails_once("p0/0", 10), concurrency=2)
    driver = make_driver(engine, Pair(cancel), Budget(2 * MOST, "tokens"))
    [result] = driver.run(make_problems(1))
    ends = {b.index: b.finish for b in result.branches}
    assert ends == {1: "stop", 0: "abort" if cancel else "stop"}
    assert driver.status.retried_samples == (not cancel)
    assert result.charge.tokens == engine.counters().output_tokens == 10 + 42 * (1 if cancel else 2)


def test_a_policy_that_has_seen_enough_has_what_waits_cancelled() -> None:
    @dataclass(frozen=True, slots=True)
    class One:
        name = "one"

        def run(self, problem: Problem, brief: Brief) -> Routine:
            def any_answer(done: Sequence[Branch]) -> bool:
                return any(branch.usable for branch in done)

            for first in (0, 2):  # the second work has slots of the same numbers
                reply = yield Generate(tuple(brief.request(problem, first + i) for i in range(2)), any_answer)
            return Outcome(reply.branches[1].vote, "samples", {})

    engine = FakeEngine(fails_once("p0/0", 10), concurrency=2)
    driver = make_driver(engine, One(), Budget(2 * MOST, "tokens"))
    [result] = driver.run(make_problems(1))
    assert driver.status.retried_samples == 0
    assert result.charge.tokens == engine.counters().output_tokens


def test_every_attempt_is_on_record_when_it_ends(tmp_path: Path) -> None:
    """A process that is killed while a request is made again has paid for the attempts before."""
    ledger = Ledger.open(tmp_path, {})
    engine = FakeEngine(lambda request, issued: Script(20, "7", 1, fails_at=5 if issued < 2 else None))
    seen = []

    def look(status: object) -> None:
        found = Ledger(tmp_path)
        found._load()
        seen.append(sum(charge.tokens for charge in found.interrupted.get("p0", ())))

    driver = make_driver(engine, parse("greedy"), Budget(500, "tokens"), ledger=ledger, on_step=look)
    [result] = driver.run(make_problems(1))
    ledger.close()
    assert seen == sorted(seen)
    assert set(seen) == {0, 5, 10}
    assert (result.answer, result.charge.tokens, driver.status.retried_samples) == ("7", 10 + 22, 2)
