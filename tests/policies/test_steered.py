"""Chains steered by name: where the checkpoints lie and what they may cost, and the policies on the fake engine and at the door."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ttc
from tests.conftest import make_problems
from tests.driving import jobs_of, make_driver, total
from ttc.api import Run, Settings
from ttc.budget import Budget, Unit
from ttc.checks import check_control
from ttc.engine.course import Course, check_words
from ttc.engine.fake import FakeEngine, random_writer
from ttc.engine.protocol import EngineInfo
from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.policies import parse
from ttc.samplers.deepening import checkpoints
from ttc.types import (
    Brief,
    Control,
    Generate,
    Inserting,
    Outcome,
    Problem,
    Request,
    Result,
    Routine,
    Sampling,
    Steer,
)


def begun(at: tuple[int, ...], limit: int, trigger: int, *, incremental: bool) -> tuple[int, int]:
    """Triggers in a thought that is as long as it may be, and their tokens, by running its course."""
    course = Course(
        due=limit, think_close=[1], close=[1], triggers=[[9] * trigger], at=list(at), relative=incremental
    )
    while len(course.output) <= limit:
        while not course.forcing() and course.next_position() <= len(course.output):
            course.arrive()
        course.output.append(course.force() if course.forcing() else len(course.output) + 100)
    return course.begun, course.output.count(9)


def most_triggers(
    first: int, growth: float, limit: int, *, trigger_tokens: int = 1, incremental: bool = False
) -> int:
    """A bound on the triggers in a thought of at most ``limit`` tokens (so overhead is at most this times the trigger's length).

    Total, growth g > 1: the k-th checkpoint lies at ceil(B0 g^k) >= B0 g^k, and is used only if it is below ``limit``; so
    k < log_g(limit / B0), and there are at most 1 + floor(log_g(limit / B0)). Total, g = 1: a checkpoint every B0 tokens,
    floor((limit - 1) / B0). Incremental: before the K-th trigger lie sum_{k<K} B0 g^k = B0 (g^K - 1) / (g - 1) new tokens (B0 K for
    g = 1) and K - 1 triggers; so K <= log_g(1 + (limit / B0)(g - 1)) (limit / (B0 + t) + 1 for g = 1, t the trigger's tokens).
    As a share of the thought, the overhead of total checkpoints falls as log(L) / L; that of the uniform baseline stays at t / B0.
    """
    if limit <= first:
        return 0
    if growth == 1:
        return (limit + trigger_tokens) // (first + trigger_tokens) if incremental else (limit - 1) // first
    if incremental:
        return math.floor(math.log(1 + limit / first * (growth - 1), growth) + 1e-9)
    return 1 + math.floor(math.log(limit / first, growth) + 1e-9)


@given(
    first=st.integers(1, 200),
    growth=st.one_of(st.just(1.0), st.floats(1.01, 5.0)),
    limit=st.integers(1, 3000),
    trigger=st.integers(1, 20),
    incremental=st.booleans(),
)
def test_the_bound_on_trigger_overhead_holds(
    first: int, growth: float, limit: int, trigger: int, incremental: bool
) -> None:
    at = checkpoints(first, growth, limit, incremental=incremental)
    count, tokens = begun(at, limit, trigger, incremental=incremental)
    bound = most_triggers(first, growth, limit, trigger_tokens=trigger, incremental=incremental)
    assert count <= bound
    assert tokens <= bound * trigger
    if growth > 1 and not incremental:
        assert all(b > a for a, b in itertools.pairwise(at))


def test_the_bound_is_reached() -> None:
    for first, growth, limit in [(64, 2.0, 5000), (10, 1.5, 1000), (50, 1.0, 1000)]:
        at = checkpoints(first, growth, limit)
        assert begun(at, limit, 1, incremental=False)[0] == most_triggers(first, growth, limit)


def test_deepening_costs_ever_less_of_a_thought_and_uniform_does_not() -> None:
    share = {
        growth: [most_triggers(64, growth, length) / length for length in (512, 4096, 32768)]
        for growth in (1.0, 2.0)
    }
    assert share[2.0][0] > 2 * share[2.0][1] > 8 * share[2.0][2]
    assert share[1.0][2] == pytest.approx(share[1.0][1], rel=0.05)


def test_growth_of_any_size_has_its_checkpoints() -> None:
    """Just above 1 every token is one, as the formula says, and it does not take the formula's millions of steps."""
    assert checkpoints(1, 1.0000001, 50) == tuple(range(1, 50))
    assert checkpoints(20, 1.001, 64) == tuple(
        sorted({math.ceil(20 * 1.001**k) for k in range(1200)} - {*range(64, 99)})
    )
    for growth in (1e9, 1e300, 1.7e308):
        assert checkpoints(20, growth, 4096) == (20,)
        assert checkpoints(20, growth, 4096, incremental=True) == (20,)


def test_checkpoints_by_hand() -> None:
    assert checkpoints(64, 2.0, 600) == (64, 128, 256, 512)
    assert checkpoints(64, 2.0, 600, incremental=True) == (64, 128, 256)
    assert checkpoints(100, 1.0, 401) == (100, 200, 300, 400)
    assert checkpoints(10, 1.01, 14) == (10, 11, 12, 13), "rounding up never gives the same place twice"
    assert checkpoints(500, 2.0, 400) == ()


# -- on the fake engine ----------------------------------------------------------------------------------------------------------
def solve(text: str, *, cap: int = 100, mean: float = 1e9, n: int = 6, **more: Any) -> list[Result]:
    engine = FakeEngine(random_writer(mean_thinking=mean))
    driver = make_driver(engine, parse(text), Budget(5000.0, "tokens"), cap=cap, **more)
    results = list(driver.run(make_problems(n)))
    charge = total(results)
    assert charge.tokens - charge.tokens_judge == engine.counters().output_tokens
    return results


def test_iterative_deepening_forces_its_checkpoints() -> None:
    for result in solve("iterative-deepening?first=10&growth=2&trigger=a b c&n=3"):
        for branch in result.branches:
            assert branch.completion.triggers == 4  # at 10, 20, 40 and 80
            assert branch.completion.forced_tokens == 4 * 3 + 3
        assert result.charge.tokens_forced == 3 * 15


def test_a_finished_chain_is_left_alone_or_reopened() -> None:
    left = [
        b.completion for r in solve("iterative-deepening?first=30&trigger=a b", mean=10) for b in r.branches
    ]
    again = [
        b.completion
        for r in solve("iterative-deepening?first=30&trigger=a b&reopen=true", mean=10)
        for b in r.branches
    ]
    assert sum(c.triggers for c in left) < sum(c.triggers for c in again)
    assert all(c.triggers == 2 for c in again), "30 and 60 are below the cap of 100"


def test_budget_forcing_extends_so_often() -> None:
    plain = solve("plain?n=2", mean=20)
    forced = solve("budget-forcing?n=2&extend=2", mean=20)
    for bare, more in zip(plain, forced, strict=True):
        for a, b in zip(bare.branches, more.branches, strict=True):
            assert b.completion.output_tokens > a.completion.output_tokens
            assert b.completion.triggers == 2 or b.completion.closed


def test_plain_holds_least_and_cap_and_total() -> None:
    for result in solve("plain?least=30&cap=50&n=4", mean=5):
        assert all(30 < b.completion.output_tokens <= 50 + 8 for b in result.branches)
    engine = FakeEngine(random_writer(mean_thinking=1e9))
    driver = make_driver(engine, parse("plain?total=40&n=4"), Budget(5000.0, "tokens"), cap=100)
    driver.brief = replace(driver.brief, room_tokens=engine.room_tokens)
    for result in driver.run(make_problems(3)):
        assert all(b.completion.output_tokens <= 40 for b in result.branches)
        assert all(b.usable for b in result.branches)


@dataclass
class LikesLong:
    """A reward model that scores by the length of the answer."""

    def tokens(self, problem: Problem, texts: Any) -> int:
        return len(texts)

    def score(self, problem: Problem, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]


def test_the_reward_models_favourite_is_kept() -> None:
    for result in solve("budget-forcing?n=5&extend=1&select=reward", mean=10, reward=LikesLong()):
        longest = max(len(b.completion.text) for b in result.branches)
        assert result.answer in {b.vote for b in result.branches if len(b.completion.text) == longest}
        assert result.charge.tokens_judge == 5


def test_an_effort_goes_into_the_requests() -> None:
    brief = Brief(seed=0, max_thinking_tokens=50, sampling=Sampling())
    work = next(parse("plain?effort=0.5&n=2").run(make_problems(1)[0], brief))
    assert isinstance(work, Generate)
    assert [r.effort for r in work.requests] == [0.5, 0.5]


def test_effort_in_words_stands_behind_the_problem_and_one_that_is_not_read_is_told() -> None:
    problems = make_problems(2)
    run = ttc.Run(
        problems, FakeEngine(), ttc.Settings(policy="plain?text=Think%20briefly.", budget="1k tokens")
    )
    assert [p.text for p in run.problems] == [p.text + "\nThink briefly." for p in problems]
    assert [r.problem_id for r in run.results()] == [p.id for p in problems]
    assert run.notices == []
    for settings in (ttc.Settings(policy="plain?effort=0.5"), ttc.Settings(effort=0.5)):
        [notice] = ttc.Run(problems, FakeEngine(), settings).notices
        assert notice.startswith("effort: fake's chat template reads none, so 0.5 changes nothing")


# -- text on the controller's word -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Nudge:
    """Two chains; once either has been probed, both are told ``text``."""

    text: str = "one two three"
    name: str = "nudge"
    traits = Traits(needs=("insert",))

    def run(self, problem: Problem, brief: Brief) -> Routine:
        requests = tuple(brief.request(problem, i, probe_every=10) for i in range(2))
        reply, told = (yield Steer(requests)), False
        branches = list(reply.branches)
        while reply.running:
            words = tuple(Inserting(i, self.text) for i in range(2)) if reply.probes and not told else ()
            told = told or bool(words)
            reply = yield Steer(insert=words, why="probed")
            branches += reply.branches
        return Outcome(branches[0].vote, "samples", {b.vote: 1.0 for b in branches if b.vote})


@pytest.mark.parametrize("unit", ["tokens", "eflops"])
def test_text_goes_into_running_chains_inside_their_caps_and_is_charged(unit: Unit) -> None:
    engine = FakeEngine(random_writer(mean_thinking=1e9), probes=True)
    driver = make_driver(engine, Nudge(), Budget(1e15, unit), cap=60)
    results = list(driver.run(make_problems(3)))
    assert driver.overrun == 0
    charge = total(results)
    assert charge.tokens == engine.counters().output_tokens
    for branch in (b for r in results for b in r.branches):
        assert branch.completion.triggers == 1
        assert branch.completion.forced_tokens == 3 + engine.close_tokens
        assert branch.completion.output_tokens <= 60 + engine.room_tokens
    assert any("insert 'one two three'" in d.what for r in results for d in r.decisions)


def test_text_that_finds_no_place_before_the_cap_is_not_begun() -> None:
    engine = FakeEngine(random_writer(mean_thinking=1e9), probes=True)
    results = list(make_driver(engine, Nudge(), Budget(1e6, "tokens"), cap=13).run(make_problems(2)))
    assert all(b.completion.triggers == 0 for r in results for b in r.branches)
    assert all(r.answer is not None for r in results)


def test_an_engine_that_cannot_insert_is_named() -> None:
    class Other(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, inserts=False)

    with pytest.raises(InputError, match="puts text into chains as they run, which the fake engine can't"):
        Run(make_problems(1), Other(), Settings(policy=Nudge()))


# -- at the door -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iterative-deepening?growth=0", "growth=0"),
        ("iterative-deepening?growth=-2", "growth=-2"),
        ("iterative-deepening?growth=0.5", "give 1"),
        ("iterative-deepening?growth=nan", "growth=nan"),
        ("iterative-deepening?first=0", "first=0"),
        ("iterative-deepening?trigger=", "trigger"),
        ("iterative-deepening?trigger=Wait||Hm", "trigger"),
        ("iterative-deepening?select=best", "select"),
        ("budget-forcing?extend=-1", "extend=-1"),
        ("budget-forcing?trigger= ", "trigger"),
        ("plain?least=50&cap=20", "least=50"),
        ("plain?effort=2", "effort=2"),
        ("plain?loops=-1", "loops=-1"),
        ("plain?loops=1", "2 or more"),
        ("plain?stop_below=-1", "stop_below=-1"),
        ("plain?stop_below=nan", "stop_below=nan"),
        ("iterative-deepening?growth=inf", "growth=inf"),
        ("plain?n=0", "n=0"),
    ],
)
def test_options_without_sense_are_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=r"^policy: ") as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cap_smaller_than_the_answers_room_is_refused() -> None:
    with pytest.raises(InputError, match="give at least 9"):
        check_control(parse("plain?total=8"), FakeEngine())
    check_control(parse("plain?total=9"), FakeEngine())


@pytest.mark.parametrize(
    ("policy", "more", "words"),
    [
        ("budget-forcing?trigger=one two three&cap=4", {}, "'one two three' has 3 tokens"),
        ("budget-forcing?trigger=one two three", {"max_thinking_tokens": 4}, "at least 5"),
        ("budget-forcing?trigger=one two three", {"budget": "12 tokens"}, "at least 5"),
        ("plain?least=2&trigger=one two three&total=12", {}, "'one two three' has 3 tokens"),
        ("iterative-deepening?first=10&trigger=w|one two three&cap=13", {}, "can begin at 10"),
        ("iterative-deepening?first=64&cap=64", {}, "first=64 lies behind the cap of 64"),
        ("iterative-deepening?first=64&cap=1", {}, "raise the cap (cap, --max-thinking or the budget)"),
        ("iterative-deepening?first=64", {"max_thinking_tokens": 20}, "first=64 lies behind the cap of 20"),
        ("plain?least=30", {"max_thinking_tokens": 20}, "least=30 is more than the 20"),
        ("plain?least=30", {"budget": "20 tokens"}, "least=30 is more than the 12"),
    ],
)
def test_what_would_silently_never_be_begun_is_refused_before_work_starts(
    policy: str, more: dict[str, Any], words: str
) -> None:
    engine = FakeEngine()
    with pytest.raises(InputError) as caught:
        Run(make_problems(2), engine, Settings(policy=policy, **more))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.counters().requests == 0


def test_a_trigger_that_would_end_the_thought_is_refused() -> None:
    with pytest.raises(InputError, match=r"trigger: 'so </think>' holds '</think>', which ends the thought"):
        check_words(Control(("Wait", "so </think>"), (5,)), "</think>")


@pytest.mark.parametrize(
    "policy", ["budget-forcing?trigger=one two three&cap=5", "iterative-deepening?first=10&trigger=w&cap=12"]
)
def test_a_trigger_that_just_fits_is_begun(policy: str) -> None:
    engine = FakeEngine(random_writer(mean_thinking=1e9 if "deepening" in policy else 1.5))
    results = list(Run(make_problems(8), engine, Settings(policy=policy, seed=1)).results())
    assert sum(b.completion.triggers for r in results for b in r.branches) > 0


def test_an_engine_that_cannot_steer_is_named() -> None:
    class Plainest:
        info, room_tokens = FakeEngine().info, 8

    with pytest.raises(InputError, match="steers chains as they run, which the fake engine can't"):
        check_control(parse("budget-forcing"), Plainest())  # type: ignore[arg-type]
    check_control(parse("self-consistency"), Plainest())  # type: ignore[arg-type]


def test_what_a_control_is_belongs_to_the_requests_digest() -> None:
    problem = make_problems(1)[0]
    plain = Request(problem, 0, 1, 10)
    steered = replace(plain, control=Control(("Wait",), (5,)))
    assert (
        len({plain.digest(), steered.digest(), replace(steered, control=Control(("Wait",), (6,))).digest()})
        == 3
    )


@pytest.mark.parametrize("seed", range(60))
def test_steered_policies_keep_any_budget(seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice(
        [
            "iterative-deepening?first=5&n=3&reopen=1",
            "budget-forcing?n=3&extend=3",
            "plain?least=20&n=3&loops=3",
        ]
    )
    unit = rng.choice(["tokens", "eflops", "dollars"])
    engine = FakeEngine(random_writer(mean_thinking=30, p_fail=0.1), concurrency=rng.randint(1, 6))
    driver = make_driver(engine, parse(text), Budget(1.0, "tokens"), cap=80)
    jobs = jobs_of(make_driver(engine, parse(text), Budget(1e18, unit), cap=80), make_problems(3))  # type: ignore[arg-type]
    least = max(driver.cashier.pricer.most(unit, j.brief.request(j.problem, 0), 60, 9) for j in jobs)  # type: ignore[arg-type]
    run = make_driver(engine, parse(text), Budget(least * rng.uniform(1.0, 40.0), unit), cap=80)  # type: ignore[arg-type]
    results = list(run.run(make_problems(3)))
    assert len(results) == 3
    assert run.overrun == 0
    assert total(results).tokens == engine.counters().output_tokens
