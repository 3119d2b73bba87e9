"""Runs that end early, share an engine, or go on from an earlier session: no token is lost, none is another run's."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import Dies, EarlyStop, jobs_of, ledger_tokens, make_driver, read_ledger
from ttc.api import Run, Settings, run
from ttc.budget import Budget
from ttc.engine.fake import FakeEngine, Script
from ttc.errors import EngineError, InputError, LedgerError
from ttc.jobs import Status
from ttc.ledger import COMPARED, Ledger
from ttc.policies import parse
from ttc.types import Brief, Generate, Outcome, Problem, Request, Routine


# -- one engine, several runs --------------------------------------------------------------------------------------------------
def test_an_abandoned_run_leaves_the_engine_empty_and_its_tokens_on_record(tmp_path: Path) -> None:
    def writer(request: Request, issued: int) -> Script:
        slow = request.problem.id in ("p1", "p2") and issued == 0
        return Script(60 if slow else 5, "old" if slow else request.problem.gold or "", 1)

    engine = FakeEngine(writer, concurrency=64)
    for result in run(
        make_problems(3), engine=engine, budget="100k tokens", policy="self-consistency?n=3", out=tmp_path
    ):
        assert result.problem_id == "p0"
        break
    assert not engine._live
    assert ledger_tokens(read_ledger(tmp_path)) == engine.counters().output_tokens

    results = list(run(make_problems(3), engine=engine, budget="100k tokens", policy="self-consistency?n=3"))
    assert {r.problem_id: r.answer for r in results} == {"p0": "0", "p1": "1", "p2": "2"}
    assert {r.charge.tokens for r in results} == {3 * 7}


def test_a_second_run_on_a_busy_engine_is_refused_and_does_not_disturb_the_first() -> None:
    engine = FakeEngine(concurrency=4)
    first = run(make_problems(6), engine=engine, policy="self-consistency?n=2")
    done = [next(first)]
    with pytest.raises(InputError, match="another run is under way on it"):
        next(run(make_problems(2), engine=engine, policy="greedy"))
    assert len(done + list(first)) == 6
    assert len(list(run(make_problems(2), engine=engine, policy="greedy"))) == 2


# -- engines and disks that fail -----------------------------------------------------------------------------------------------
class DiesOn(FakeEngine):
    """An engine that is gone at the ``verb``: at its first "abort", or its fifth "submit"."""

    def __init__(self, verb: str) -> None:
        super().__init__(lambda request, issued: Script(20 + 9 * request.index, "7", 1), concurrency=5)
        self.verb, self.calls = verb, 0

    def submit(self, ticket: int, request: Request) -> None:
        self.calls += 1
        if self.verb == "submit" and self.calls > 6:
            raise EngineError("the engine died")
        super().submit(ticket, request)

    def abort(self, tickets):  # type: ignore[no-untyped-def]
        if self.verb == "abort":
            raise EngineError("the engine died")
        super().abort(tickets)


@pytest.mark.parametrize("verb", ["submit", "abort"])
def test_an_engine_that_dies_at_any_verb_loses_no_flight(verb: str, tmp_path: Path) -> None:
    engine, ledger = DiesOn(verb), Ledger.open(tmp_path, {})
    policy = parse("self-consistency?n=4") if verb == "submit" else EarlyStop(6)
    driver = make_driver(engine, policy, Budget(10_000, "tokens"), ledger=ledger)
    with pytest.raises(EngineError, match="died"):
        list(driver.run(make_problems(3)))
    ledger.close()
    assert (
        ledger_tokens(read_ledger(tmp_path))
        == driver.status.charge.tokens
        == engine.counters().output_tokens
        > 0
    )
    assert not read_ledger(tmp_path).results, "a dead engine is no problem's own failure"


def test_an_engine_that_dies_as_the_run_is_stopped_loses_no_flight(tmp_path: Path) -> None:
    engine = Dies(10, concurrency=5, writer=lambda request, issued: Script(50, "7", 1))
    ledger = Ledger.open(tmp_path, {})
    driver = make_driver(engine, parse("self-consistency?n=4"), Budget(10_000, "tokens"), ledger=ledger)

    def stop_late(status: Status) -> None:
        if engine.steps_left == 0:
            driver.stop()

    driver.on_step = stop_late
    assert list(driver.run(make_problems(3))) == []
    ledger.close()
    assert (
        ledger_tokens(read_ledger(tmp_path))
        == driver.status.charge.tokens
        == engine.counters().output_tokens
        == 50
    )


def test_a_full_disk_ends_the_run_in_one_line_and_blames_no_problem(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...
        def fileno(self) -> int:
            return ledger._files["results"].fileno()

        def close(self) -> None: ...

    ledger = Ledger.open(tmp_path, {})
    engine = FakeEngine()
    driver = make_driver(engine, parse("self-consistency?n=4"), Budget(10_000, "tokens"), ledger=ledger)
    ledger._files["branches"].close()
    ledger._files["branches"] = Full()  # type: ignore[assignment]
    with pytest.raises(LedgerError, match=r"can't be written \(No space left on device\)"):
        list(driver.run(make_problems(3)))
    ledger.close()
    assert not engine._live
    again = Ledger.open(tmp_path, {})
    assert 0 < ledger_tokens(again) <= engine.counters().output_tokens, "what ran was noted before"
    again.close()


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_under_eflops_a_failed_request_is_issued_again_if_a_lease_of_it_fits(share: float) -> None:
    engine = FakeEngine(lambda request, issued: Script(20, "7", 1, fails_at=5 if issued == 0 else None))
    policy = parse("self-consistency?n=1")
    probe = make_driver(engine, policy, Budget(1e18, "eflops"), cap=4000)
    [job] = jobs_of(probe, make_problems(1))
    whole = probe.cashier.most(job, job.brief.request(job.problem, 0), 4000)
    driver = make_driver(engine, policy, Budget(share * whole, "eflops"), cap=4000)
    [result] = driver.run(make_problems(1))
    assert (result.answer, result.error, driver.overrun) == ("7", "", 0.0)


# -- resuming ------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.integers(0, 300), tear=st.integers(0, 60), n=st.integers(1, 6))
def test_resume_after_a_crash_samples_nothing_twice_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: int, tear: int, n: int
) -> None:
    directory = tmp_path_factory.mktemp("run")
    config = {"model": "fake", "seed": 0}
    policy, budget, problems = parse(f"self-consistency?n={n}"), Budget(100_000, "tokens"), make_problems(6)
    whole = {
        r.problem_id: (r.answer, r.charge.tokens)
        for r in make_driver(FakeEngine(), policy, budget).run(problems)
    }

    first = Ledger.open(directory, config)
    dying = Dies(steps, concurrency=5)
    with contextlib.suppress(EngineError):
        list(make_driver(dying, policy, budget, ledger=first).run(problems))
    first.close()
    branches = directory / "branches.jsonl"
    finished = branches.read_bytes()
    if tear and finished:  # a torn last line, as a crash of the machine leaves it
        branches.write_bytes(finished[: -min(tear, len(finished.splitlines()[-1]))])

    second = Ledger.open(directory, config)
    kept = {(p, i) for (p, i) in second._recorded}
    done = set(second.results)
    engine = FakeEngine(concurrency=5)
    results = list(make_driver(engine, policy, budget, ledger=second).run(problems))
    second.close()
    assert {r.problem_id: r.answer for r in results} == {p: a for p, (a, _) in whole.items()}
    again = set(engine._issued)
    assert not again & kept, "a finished branch was sampled again"
    assert not {p for p, _ in again} & done
    third = Ledger.open(directory, config)
    missing = {(f"p{p}", i) for p in range(6) for i in range(n)} - set(third._recorded)
    assert {p for p, _ in missing} <= done, (
        "only a torn branch of a finished problem may be gone: its result stands"
    )
    assert set(third.results) == {p.id for p in problems}
    third.close()


def test_stop_saves_what_runs_and_the_rest_is_resumed(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, {"seed": 0})
    engine = FakeEngine(concurrency=4)
    driver = make_driver(engine, parse("self-consistency?n=4"), Budget(100_000, "tokens"), ledger=ledger)

    def stop_late(status: object) -> None:
        if engine.now > 1.0:
            driver.stop()

    driver.on_step = stop_late
    early = list(driver.run(make_problems(10)))
    ledger.close()
    assert driver.interrupted
    assert driver.status.charge.tokens == engine.counters().output_tokens, (
        "cancelled branches are charged too"
    )
    assert len(early) < 10

    again = Ledger.open(tmp_path, {"seed": 0})
    assert sum(len(c) for c in again.interrupted.values()) > 0
    fresh = FakeEngine()
    resumed = make_driver(fresh, parse("self-consistency?n=4"), Budget(100_000, "tokens"), ledger=again)
    results = list(resumed.run(make_problems(10)))
    again.close()
    status = resumed.status
    assert status.replayed_tokens == driver.status.charge.tokens
    assert status.charge.tokens - status.replayed_tokens == fresh.counters().output_tokens
    assert status.samples == 40
    assert len(results) == 10
    assert all(r.answer for r in results)


def test_a_long_policy_that_asks_one_at_a_time_resumes(tmp_path: Path) -> None:
    text = "adaptive-consistency?n=400&confidence=1.0"

    def engine() -> FakeEngine:
        return FakeEngine(lambda request, issued: Script(2, str(request.index % 7), 1))

    settings = Settings(policy=text, budget="1M tokens")
    first = Run(make_problems(1), engine(), settings, out=tmp_path)

    def stop_late(status: Status) -> None:
        if status.samples >= 300:
            first.stop()

    first.driver.on_step = stop_late
    assert list(first.results()) == []
    second = engine()
    [result] = Run(make_problems(1), second, settings, out=tmp_path).results()
    assert (result.error, len(result.branches)) == ("", 400)
    assert 100 <= second.counters().requests <= 101


CHANGED = {
    "policy": "greedy", "budget": "2k tokens", "scope": "run", "seed": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
    "max_thinking_tokens": 9, "effort": 0.5, "kv_budget": None, "kv_method": None, "intensity": 1.0,
    "price": {"usd_per_m_output": 2.0},
}  # fmt: skip
"""Another value of each setting (None: the fake engine takes none; both are in COMPARED)."""


@pytest.mark.parametrize("name", [each.name for each in fields(Settings)])
def test_a_run_is_not_resumed_under_another_setting(name: str, tmp_path: Path) -> None:
    """A new setting has no entry in CHANGED, and fails here until it is compared."""
    value = CHANGED[name]
    if value is None:
        assert name in COMPARED
        return
    list(Run(make_problems(1), FakeEngine(), Settings(budget="1k tokens"), out=tmp_path).results())
    with pytest.raises(InputError, match="this run was started with"):
        Run(make_problems(1), FakeEngine(), Settings(**{"budget": "1k tokens", name: value}), out=tmp_path)  # type: ignore[arg-type]


# -- what an earlier session failed at -----------------------------------------------------------------------------------------
def test_what_had_failed_is_tried_again_and_what_it_cost_stays_spent(tmp_path: Path) -> None:
    """The server was down, say, and the same command is given again when it is back."""
    problems, budget, policy = make_problems(4), Budget(5000, "tokens"), parse("self-consistency?n=3")

    def failing(request: Request, issued: int) -> Script:
        return Script(10, "7", 1, fails_at=4 if request.problem.id in ("p1", "p2") else None)

    first, ledger = FakeEngine(writer=failing), Ledger.open(tmp_path, {})
    before = list(make_driver(first, policy, budget, ledger=ledger).run(problems))
    ledger.close()
    assert sorted(r.problem_id for r in before if r.error) == ["p1", "p2"]

    again, ledger = FakeEngine(writer=lambda request, issued: Script(10, "7", 1)), Ledger.open(tmp_path, {})
    assert any("2 problems" in notice for notice in ledger.notices)
    after = list(make_driver(again, policy, budget, ledger=ledger).run(problems))
    ledger.close()
    assert [r.answer for r in after] == ["7"] * 4 and not any(r.error for r in after)
    assert again.counters().requests == 2 * 3
    spent = sum(r.charge.tokens for r in after)
    assert spent == first.counters().output_tokens + again.counters().output_tokens

    last, ledger = FakeEngine(), Ledger.open(tmp_path, {})
    assert len(list(make_driver(last, policy, budget, ledger=ledger).run(problems))) == 4
    ledger.close()
    assert last.counters().requests == 0


def test_a_problem_whose_policy_failed_counts_as_wrong() -> None:
    def failing(request: Request, issued: int) -> Script:
        return Script(10, request.problem.gold or "", 1)

    class Raises:
        name = "raises"

        def run(self, problem: Problem, brief: Brief) -> Routine:
            reply = yield Generate((brief.request(problem, 0),), why="one")
            if problem.id in ("p1", "p3"):
                raise RuntimeError("boom")
            return Outcome(reply.branches[0].vote, "samples", {})

    this = Run(make_problems(4), FakeEngine(writer=failing), Settings(policy=Raises(), budget="1k tokens"))
    list(this.results())
    told = this.summary()
    assert (told["scored"], told["correct"], told["failed"]) == (4, 2, 2)


def test_what_failed_or_was_tried_again_is_counted_and_a_failed_problem_says_so(tmp_path: Path) -> None:
    """p1 loses every sample, p2 one of three, p0 one attempt."""

    def failing(request: Request, issued: int) -> Script:
        which = request.problem.id
        lost = which == "p1" or (which == "p2" and request.index == 1)
        return Script(10, "7", 1, fails_at=4 if lost or (which == "p0" and issued == 0) else None)

    settings = Settings(policy="self-consistency?n=3", budget="1M tokens")
    for session in range(2):  # resumed, what is counted of p0 and p2 is read from the directory
        this = Run(make_problems(3), FakeEngine(writer=failing), settings, out=tmp_path)
        stops = {result.problem_id: result.stop for result in this.results()}
        told = this.summary()
        assert stops == {"p0": "samples", "p1": "failed", "p2": "samples"}
        assert (told["failed"], told["stopped"]) == (1, {"samples": 2, "failed": 1})
        assert (told["samples"], told["failed_samples"], told["steps"]) == (9, 4, 0)
        assert told["retried_samples"] == (11, 6)[session]


def test_a_search_counts_chains_and_tells_its_steps_apart() -> None:
    def length(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [1 / (1 + len(text)) for text in texts]

    settings = Settings(policy="particles?n=2&tokens=4", budget="5k tokens")
    this = Run(make_problems(2), FakeEngine(), settings, reward=length)
    branches = [branch for result in this.results() for branch in result.branches]
    paused = sum(branch.completion.partial for branch in branches)
    told = this.summary()
    assert told["steps"] == paused > 0
    assert told["samples"] == len(branches) - paused


def test_a_directory_is_one_runs_at_a_time(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "run", {})
    with pytest.raises(InputError, match="another run is writing there"):
        Ledger.open(tmp_path / "run", {})
    ledger.close()
    Ledger.open(tmp_path / "run", {}).close()


# -- a run directory, read by others -------------------------------------------------------------------------------------------
def test_any_separator_in_a_text_leaves_a_run_readable(tmp_path: Path) -> None:
    from ttc.cli.report import read
    from ttc.costmodel.ledgers import pool_of_run

    def odd(request: Request, issued: int) -> Script:
        return Script(10, "7\u2028\x85 \x0b8", 1)

    list(run(make_problems(2), engine=FakeEngine(writer=odd), policy="self-consistency?n=2", out=tmp_path))
    assert len(read(tmp_path)) == len(pool_of_run(tmp_path).problems) == 2


def test_the_steps_of_a_search_are_no_samples_of_a_pool(tmp_path: Path) -> None:
    from ttc.costmodel.ledgers import pool_of_run

    def length(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [1 / (1 + len(text)) for text in texts]

    list(
        run(
            make_problems(2), engine=FakeEngine(), policy="particles?n=2&tokens=4", reward=length,
            budget="5k tokens", out=tmp_path,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="steps are no samples"):
        pool_of_run(tmp_path)


# -- what a refused resume says ------------------------------------------------------------------------------------------------
def test_the_order_of_a_policys_options_is_no_other_setting(tmp_path: Path) -> None:
    """A version of ttc may list them in another order."""
    one = "adaptive?over=iterative-deepening%3Ffirst%3D6%26growth%3D2&width=2"
    Ledger.open(tmp_path, {"policy": one}).close()
    Ledger.open(
        tmp_path, {"policy": "adaptive?width=2&over=iterative-deepening%3Fgrowth%3D2%26first%3D6"}
    ).close()
    for other in ("adaptive?over=iterative-deepening%3Ffirst%3D6%26growth%3D3&width=2", "adaptive?width=2"):
        with pytest.raises(InputError, match="this run was started with policy = "):
            Ledger.open(tmp_path, {"policy": other})


def test_a_refused_resume_says_what_was_and_what_is(tmp_path: Path) -> None:
    def config(**changes: Any) -> dict[str, Any]:
        told: dict[str, Any] = {
            "budget": {"amount": 600, "unit": "tokens"}, "seed": 0, "identity": {"weights": "aaaa"},
            "files": {"config.json": "11", "model.safetensors": "22"}, "problems": {"count": 2, "sha256": "x"},
            "digests": {"a": "1", "b": "2"}, "command": ["/usr/bin/ttc", "solve", "--input", "my file.jsonl"],
        }  # fmt: skip
        return told | changes

    Ledger.open(tmp_path, config()).close()
    cases: dict[str, dict[str, Any]] = {
        "budget amount = 600, not 700; seed = 0, not 1;": {"budget": {"amount": 700, "unit": "tokens"}, "seed": 1},
        r"other files of the model: model.safetensors \(was 22, is 33\);": {
            "identity": {"weights": "bbbb"}, "files": {"config.json": "11", "model.safetensors": "33"},
        },
        r"2 problems, not 3 \(1 new, as \"c\"; 1 of other content, as \"b\"\)": {
            "problems": {"count": 3, "sha256": "y"}, "digests": {"a": "1", "b": "9", "c": "3"},
        },
        r"other problems \(in another order\)": {"problems": {"count": 2, "sha256": "y"}},
        r"repeat the first command to resume it \(ttc solve --input 'my file.jsonl'\), or": {"seed": 2},
    }  # fmt: skip
    for words, changes in cases.items():
        with pytest.raises(InputError, match=words):
            Ledger.open(tmp_path, config(**changes))


# -- a budget that leaves the engine idle --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("amount", "scope", "policy", "words"),
    [
        (
            "1k tokens",
            "problem",
            "self-consistency?n=16",
            "2 branches begin at once where the engine has room for 64",
        ),
        ("40k tokens", "problem", "self-consistency?n=16", ""),
        ("1k tokens", "problem", "greedy", ""),
    ],
)
def test_it_is_said_when_what_branches_hold_leaves_the_engine_idle(
    amount: str, scope: str, policy: str, words: str
) -> None:
    settings = Settings(policy=policy, budget=amount, scope=scope, max_thinking_tokens=400)
    this = Run(make_problems(1), FakeEngine(writer=lambda r, i: Script(10, "7", 1), concurrency=64), settings)
    assert this.notices == []
    list(this.results())
    assert len(this.notices) == bool(words)
    assert words in "".join(this.notices)
    if words:
        cap = int("".join(this.notices).partition("--max-thinking ")[2].split()[0])
        mended = replace(settings, max_thinking_tokens=cap)
        other = Run(
            make_problems(1), FakeEngine(writer=lambda r, i: Script(10, "7", 1), concurrency=64), mended
        )
        list(other.results())
        assert other.notices == [], "the mend works"
