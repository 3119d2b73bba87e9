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
from tests.driving import (
    ANY_POLICY,
    Reads,
    jobs_of,
    ledger_tokens,
    make_driver,
    policy_of,
    read_ledger,
    total,
)
from ttc import watch
from ttc.budget import Budget, Scope, Unit
from ttc.engine.fake import FakeEngine, Script, random_writer
from ttc.engine.protocol import StepReport
from ttc.errors import BudgetTooSmall, EngineError
from ttc.jobs import Status
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.pricing import spent_in
from ttc.types import Request
from ttc.watch import NOTE_SECONDS

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


@pytest.mark.parametrize("scope", ["problem", "run"])
@pytest.mark.parametrize("unit", ["tokens", "eflops"])
def test_what_ran_when_a_run_was_killed_is_counted_as_it_was_last_noted(
    unit: Unit, scope: Scope, tmp_path: Path
) -> None:
    """A run is killed at each of its steps in turn (its directory as it is then), and resumed: what the note says is spent, but for
    what a note's time and a step bring, and both sessions together stay within the budget but for that."""
    one, concurrency, problems = {"tokens": 200.0, "eflops": 1e12}[unit], 5, make_problems(6)
    budget = Budget(one * (6 if scope == "run" else 1), unit, scope)
    writer = random_writer(mean_thinking=25, p_fail=0.1, flaky=True)
    engine = FakeEngine(writer, concurrency=concurrency, step_seconds=NOTE_SECONDS / 4)
    ledger = Ledger.open(tmp_path / "run", {})
    driver = make_driver(engine, parse("self-consistency?n=3"), budget, ledger=ledger)
    copies: list[tuple[Path, int]] = []

    def copy(status: Status) -> None:
        copies.append((tmp_path / f"killed{len(copies)}", engine.counters().output_tokens))
        shutil.copytree(tmp_path / "run", copies[-1][0])

    driver.on_step = copy
    list(driver.run(problems))
    ledger.close()
    assert not (tmp_path / "run/running.json").exists()
    assert len(copies) > 20
    unseen = 4 * concurrency
    lost = 0
    for killed, written in copies:
        resumed = Ledger.open(killed, {})
        assert written - unseen <= ledger_tokens(resumed) <= written
        lost += sum(map(len, resumed.interrupted.values()))
        rest = FakeEngine(writer, concurrency=concurrency)
        kept = set(resumed._recorded)
        driver = make_driver(rest, parse("self-consistency?n=3"), budget, ledger=resumed)
        results = list(driver.run(problems))
        resumed.close()
        assert driver.overrun == 0
        assert {r.problem_id for r in results} == {p.id for p in problems}
        assert not set(rest._issued) & kept, "a finished branch was sampled again"
        both = written + rest.counters().output_tokens
        assert both - unseen <= sum(r.charge.tokens for r in results) <= both
        assert ledger_tokens(read_ledger(killed)) == sum(r.charge.tokens for r in results)
    assert lost > 20


def test_a_note_of_what_ran_counts_once(tmp_path: Path) -> None:
    """A process that is killed while it writes down what another had under way leaves the note: it is not counted again."""
    engine = FakeEngine(writer=lambda request, issued: Script(40, "7", 1), step_seconds=NOTE_SECONDS)
    ledger = Ledger.open(tmp_path / "run", {})
    driver = make_driver(engine, parse("self-consistency?n=3"), Budget(1000, "tokens"), ledger=ledger)

    def kill(status: Status) -> None:
        if engine.counters().steps == 10:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    driver.on_step = kill
    list(driver.run(make_problems(1)))
    ledger.close()
    note = (tmp_path / "killed/running.json").read_text()
    for _ in range(2):
        resumed = Ledger.open(tmp_path / "killed", {})
        assert [c.tokens for c in resumed.interrupted["p0"]] == [10, 10, 10]
        resumed.close()
        (tmp_path / "killed/running.json").write_text(note)
    assert "3 branches were under way when the run was killed" not in "".join(resumed.notices)
