"""Runs that are killed or stopped, or whose engine dies, at any moment, and again when they are resumed: whatever the policy,
nothing is lost, nothing that has ended is sampled twice, and all sessions together spend no more than the budget, but for what was
generated after the last note."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import ANY_POLICY, Reads, jobs_of, make_driver, policy_of, total
from ttc import watch
from ttc.budget import Budget, Scope, Unit
from ttc.engine.fake import FakeEngine, random_writer
from ttc.engine.protocol import StepReport
from ttc.errors import BudgetTooSmall, EngineError
from ttc.ledger import Ledger
from ttc.pricing import spent_in
from ttc.types import Request

T = TypeVar("T")
SESSIONS = 4


class Strikes(FakeEngine):
    """At its ``at``-th moment (before and after each of its verbs) it does what ``strike`` does."""

    def __init__(self, at: int, **options: Any) -> None:
        super().__init__(**options)
        self.at = at
        self.strike: Callable[[], None] = lambda: None
        self.asked: set[str] = set()
        self.problems: set[str] = set()
        self.written = 0
        """Output tokens, up to the last step but one."""

    def _moment(self, verb: Callable[[], T]) -> T:
        self._strike()
        done = verb()
        self._strike()
        return done

    def _strike(self) -> None:
        self.at -= 1
        if self.at == 0:
            self.strike()

    def submit(self, ticket: int, request: Request) -> None:
        self.asked.add(request.digest())
        self.problems.add(request.problem.id)
        self._moment(lambda: super(Strikes, self).submit(ticket, request))

    def step(self) -> StepReport:
        self.written = self.counters().output_tokens
        return self._moment(lambda: super(Strikes, self).step())

    def abort(self, tickets: Sequence[int]) -> None:
        self._moment(lambda: super(Strikes, self).abort(tickets))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.sampled_from([*ANY_POLICY, "early-stop", "self-consistency?n=5"]),
    unit=st.sampled_from(["tokens", "eflops", "dollars"]),
    scope=st.sampled_from(["problem", "run"]),
    seed=st.integers(0, 2**20),
)
def test_a_run_that_is_killed_again_and_again(
    text: str, unit: Unit, scope: Scope, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    problems = make_problems(3, (20, 31))
    writer = random_writer(
        mean_thinking=rng.uniform(1, 90), p_fail=rng.choice([0.0, 0.2, 0.6]), p_hang=rng.choice([0.0, 0.0, 0.1]),
        flaky=rng.random() < 0.7, stubborn=rng.random() < 0.3,
    )  # fmt: skip
    engines: dict[str, Any] = {
        "writer": writer, "steerable": rng.random() < 0.7,
        "probes": rng.random() < 0.7 or text == "odd", "effort_tokens": rng.randint(0, 3),
    }  # fmt: skip
    room = rng.randint(1, 6)
    plain = FakeEngine(concurrency=room, **engines)
    more: dict[str, Any] = {
        "stall_seconds": 0.6, "cap": rng.randint(2, 90), "effort": rng.choice([None, 0.5, 0.125]),
        "reward": Reads(plain.info.shape),
    }  # fmt: skip
    with pytest.raises(BudgetTooSmall) as caught:
        jobs_of(make_driver(plain, policy_of(text), Budget(1e-30, unit, scope), **more), problems)
    budget = Budget(
        caught.value.least * rng.choice([1.0, rng.uniform(1, 3), rng.uniform(1, 60)]), unit, scope
    )

    root = tmp_path_factory.mktemp("killed")
    written, unseen = 0, 0
    for session in range(SESSIONS):
        here = root / str(session)
        at = rng.randint(1, 120) if session < SESSIONS - 1 else -1
        if unit != "eflops" or engines["steerable"]:  # else it is in the price
            room = rng.randint(1, 6)
        engine = Strikes(at, concurrency=room, **engines)
        ledger = Ledger.open(here, {})
        ended, kept = set(ledger.results), {r.digest for rows in ledger._recorded.values() for r in rows}
        driver = make_driver(engine, policy_of(text), budget, ledger=ledger, **more)
        following, how = root / str(session + 1), rng.choice(["killed", "killed", "dies", "stopped"])

        def strike(
            how: str = how, stop: Callable[[], None] = driver.stop, here: Path = here, copy: Path = following
        ) -> None:
            if how == "stopped":
                stop()
                return
            if how == "killed":  # the directory as it is now; the run itself is of no interest any more
                shutil.copytree(here, copy)
            raise EngineError(how)

        engine.strike = strike
        results = []
        try:
            with mock.patch.object(watch, "NOTE_SECONDS", 0.0):
                results = list(driver.run(problems))
        except EngineError:
            unseen += engine.counters().output_tokens - engine.written
        ledger.close()
        if not following.exists():
            shutil.copytree(here, following)
        written += engine.counters().output_tokens
        assert not engine.asked & kept, "what has ended is not sampled again"
        assert not engine.problems & ended
        assert driver.overrun == 0
        if len(results) == len(problems):
            break
    assert sorted(r.problem_id for r in results) == sorted(p.id for p in problems)
    spent = total(results)
    assert written - unseen <= spent.tokens - spent.tokens_judge
    if not engines["probes"]:
        assert spent.tokens - spent.tokens_judge <= written
    assert _on_record(here) == spent.tokens - spent.tokens_judge
    amounts = [spent_in(unit, result.charge) for result in results]
    assert (sum(amounts) if scope == "run" else max(amounts)) <= budget.amount * (1 + 1e-9)
    shutil.rmtree(root)


def _on_record(directory: Path) -> int:
    """All that the branches of a run directory were charged, those that were cut too."""
    return sum(
        row["charge"].get(f"tokens_{kind}", 0)
        for row in Ledger(directory)._rows("branches")
        for kind in ("generated", "forced", "probe")
    )
