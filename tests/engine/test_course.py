"""A branch's course against a plain reading of its rules, and the fake engine that runs it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import PlainJudge, make_problems
from tests.driving import jobs_of, make_driver, total
from ttc.budget import Budget, Unit
from ttc.engine.course import Course
from ttc.engine.fake import CLOSE as FAKE_CLOSE
from ttc.engine.fake import WORD, FakeEngine, random_writer
from ttc.errors import BudgetTooSmall
from ttc.policies import parse
from ttc.types import Completion, Control, Request, Sampling, seed_for

CLOSE, FREE = 7, (20, 21, 22, 23, 24)
TRIGGERS = ([11, 12, 13], [14, 15])


def follow(course: Course, rng: random.Random, tokens: int, p_end: float = 0.0) -> list[int]:
    """Write ``tokens`` tokens as an engine would: free ones at random, an end of thought with ``p_end``."""
    while len(course.output) < tokens:
        while not course.forcing() and course.next_position() <= len(course.output):
            course.arrive()
        ends = not course.forcing() and not course.thought_closed() and rng.random() < p_end
        if ends and course.guards_end():
            if not course.forbids_end():
                course.end_came()
            ends = False
        if course.forcing():
            course.output.append(course.force())
        else:
            course.output.append(CLOSE if ends else rng.choice(FREE))
    return course.output


def told(**changes: Any) -> Course:
    return Course.of({"think_close": [CLOSE], "close": [CLOSE, 8], "due": 1000} | changes)


def places(output: list[int], ids: list[int]) -> list[int]:
    return [i for i in range(len(output)) if output[i : i + len(ids)] == ids]


def test_triggers_stand_at_their_totals_and_take_turns() -> None:
    output = follow(told(triggers=[*TRIGGERS], at=[5, 20, 40]), random.Random(0), 60)
    assert places(output, TRIGGERS[0]) == [5, 40]
    assert places(output, TRIGGERS[1]) == [20]


def test_relative_checkpoints_count_from_the_end_of_the_trigger_before() -> None:
    output = follow(told(triggers=[TRIGGERS[0]], at=[5, 10, 20], relative=True), random.Random(0), 60)
    assert places(output, TRIGGERS[0]) == [5, 5 + 3 + 10, 18 + 3 + 20]


def test_a_closed_thought_gets_no_trigger() -> None:
    course = told(triggers=[TRIGGERS[0]], at=[5])
    course.output.extend([20, CLOSE, 20, 20, 20])
    assert not course.arrive()
    assert course.begun == 0


def test_ends_of_thought_are_replaced_so_often_and_then_let_pass() -> None:
    course = told(triggers=[TRIGGERS[1]], at_end=2)
    output = follow(course, random.Random(1), 200, p_end=0.2)
    assert len(places(output, TRIGGERS[1])) == 2 == course.begun
    assert course.thought_closed()
    assert not course.closed_by_force


def test_an_end_below_the_least_thinking_becomes_a_trigger_or_is_impossible() -> None:
    with_trigger = told(triggers=[TRIGGERS[0]], min_thinking=50)
    output = follow(with_trigger, random.Random(2), 200, p_end=0.3)
    assert output.index(CLOSE) >= 50
    assert with_trigger.begun >= 1
    without = told(min_thinking=50)
    output = follow(without, random.Random(2), 200, p_end=0.3)
    assert output.index(CLOSE) >= 50
    assert without.forced == 0


def test_a_loop_gets_a_trigger_once_and_is_closed_if_it_goes_on() -> None:
    course = told(triggers=[TRIGGERS[0]], loop_repeats=4)
    for _ in range(400):
        while not course.forcing() and course.next_position() <= len(course.output):
            course.arrive()
        course.output.append(
            course.force() if course.forcing() else (30, 31, 32)[(len(course.output) - course.base) % 3]
        )
        if course.thought_closed():
            break
    assert course.looped
    assert course.begun == 1
    assert course.closed_by_force
    assert len(course.output) < 150


@pytest.mark.parametrize("seed", range(5))
def test_what_is_no_loop_is_left_alone(seed: int) -> None:
    course = told(loop_repeats=4)
    follow(course, random.Random(seed), 800)
    assert course.forced == 0


def test_the_controllers_word_cuts_a_trigger_short_and_inserts_where_it_fits() -> None:
    course = told(triggers=[TRIGGERS[0]], at=[3])
    follow(course, random.Random(0), 4)
    course.close_now()
    assert follow(course, random.Random(0), 7)[3:] == [11, CLOSE, 8, course.output[-1]]
    fresh = told(due=20)
    follow(fresh, random.Random(0), 5)
    assert fresh.insert_now([40, 41])
    assert follow(fresh, random.Random(0), 7)[5:7] == [40, 41]
    assert not fresh.insert_now([40] * 30), "it does not fit before the cap"


def random_instructions(rng: random.Random) -> dict[str, Any]:
    due = rng.randint(0, 80)
    return {
        "due": due,
        "triggers": [list(t) for t in rng.sample(TRIGGERS, rng.randint(0, 2))],
        "at": sorted(rng.sample(range(1, 90), rng.randint(0, 4))),
        "relative": rng.random() < 0.3,
        "at_end": rng.randint(0, 3),
        "min_thinking": rng.choice([0, 0, rng.randint(0, due)]),
        "loop_repeats": rng.choice([0, 3]),
    }


@pytest.mark.parametrize("seed", range(500))
def test_whatever_is_asked_for_the_cap_holds_and_spans_are_whole(seed: int) -> None:
    rng = random.Random(seed)
    course = told(**random_instructions(rng))
    output = follow(course, rng, 120, p_end=rng.choice([0.0, 0.05, 0.3]))
    assert output.index(CLOSE) <= course.due
    for at, length in course.spans:
        assert tuple(output[at : at + length]) in {(11, 12, 13), (14, 15), (CLOSE, 8)}
        assert at + length <= course.due or output[at] == CLOSE, "a trigger that does not fit is not begun"
    assert course.forced == sum(length for _, length in course.spans)
    assert len({at for at, _ in course.spans}) == len(course.spans), "nothing is executed twice"


@pytest.mark.parametrize("seed", range(300))
def test_a_course_read_back_from_the_output_goes_on_the_same_way(seed: int) -> None:
    """Preempted in a worker process: the Course is made anew from instructions and output. Triggers are never in the free text
    here, so nothing is ambiguous."""
    rng = random.Random(seed)
    instructions = random_instructions(rng) | {"loop_repeats": 0, "at_end": 0, "min_thinking": 0}
    whole = follow(told(**instructions), random.Random(seed), 120)
    first, second = told(**instructions), told(**instructions)
    second.output.extend(follow(first, random.Random(seed), rng.randint(1, 119)))
    second.read_back()
    follow(second, random.Random(seed + 1), 120)
    assert [t for t in second.output if t not in FREE] == [t for t in whole if t not in FREE]
    assert [at for at, _ in second.spans] == [i for i, t in enumerate(second.output) if t in (11, 14, CLOSE)]


# -- the same course under the fake engine ---------------------------------------------------------------------------------------
def random_request(rng: random.Random, index: int) -> Request:
    cap = rng.choice([1, 2, 3, rng.randint(1, 150)])
    control = Control(
        triggers=tuple(rng.sample(["Wait", "let me check that again", "one two three"], rng.randint(0, 2))),
        at=tuple(sorted(rng.sample(range(1, 200), rng.randint(0, 4)))),
        relative=rng.random() < 0.3,
        at_end=rng.randint(0, 3),
        min_thinking=rng.choice([0, rng.randint(0, cap)]),
        loop_repeats=rng.choice([0, 0, 3]),
    )
    problem = make_problems(7)[index % 7]
    return Request(
        problem,
        index,
        seed_for(0, problem.id, index),
        cap,
        Sampling(),
        control=rng.choice([None, control, control]),
    )


def finish(engine: FakeEngine, requests: list[Request]) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    waiting, running = list(enumerate(requests)), 0
    while waiting or running:
        while waiting and running < engine.concurrency:
            engine.submit(*waiting.pop())
            running += 1
        ended = engine.step().finished
        running -= len(ended)
        done |= dict(ended)
    return done


def test_ten_thousand_caps_are_kept_to_the_token_and_no_answer_is_empty() -> None:
    rng = random.Random(0)
    requests = [random_request(rng, i) for i in range(10_000)]
    engine = FakeEngine(random_writer(mean_thinking=60.0), concurrency=500)
    done = finish(engine, requests)
    judge, at_cap = PlainJudge(), 0
    for ticket, completion in done.items():
        request = requests[ticket]
        ids = list(completion.token_ids)
        thought = ids.index(FAKE_CLOSE)
        assert thought <= request.thinking_tokens
        assert completion.output_tokens <= request.thinking_tokens + engine.room_tokens
        assert judge.answer(request.problem, completion.text)
        assert completion.output_tokens == len(ids)
        assert completion.forced_tokens == ids.count(WORD) + (engine.close_tokens if completion.closed else 0)
        if completion.closed and not (request.control and request.control.loop_repeats):
            assert thought == request.thinking_tokens, "closed neither early nor late"
        at_cap += completion.closed
    assert len(done) == 10_000
    assert 3000 < at_cap < 9500, "some were made to close, some ended by themselves"
    assert engine.counters().output_tokens == sum(c.output_tokens for c in done.values())


def test_the_fake_engine_forces_what_a_control_says() -> None:
    problem = make_problems(1)[0]
    request = Request(problem, 0, 1, 100, control=Control(("one two three",), (10, 20)))
    engine = FakeEngine(random_writer(mean_thinking=1e9))
    [completion] = finish(engine, [request]).values()
    assert completion.triggers == 2
    assert completion.forced_tokens == 2 * 3 + engine.close_tokens
    assert [i for i, t in enumerate(completion.token_ids) if t == WORD] == [10, 11, 12, 20, 21, 22]
    [bare] = finish(engine, [replace(request, control=None)]).values()
    assert bare.triggers == 0


@pytest.mark.parametrize("seed", range(80))
def test_anytime_answers_keep_any_budget(seed: int) -> None:
    rng = random.Random(seed)
    engine = FakeEngine(
        random_writer(mean_thinking=60.0, p_fail=0.1), concurrency=rng.randint(1, 6), probes=True
    )
    unit: Unit = rng.choice(["tokens", "eflops", "dollars"])
    policy = parse(rng.choice(["adaptive?probe_every=7&width=3&after=0.1", "parallel-probe?n=4&every=9"]))
    rich, problems = make_driver(engine, policy, Budget(1e18, unit)), make_problems(4)
    least = rich.cashier.most(jobs_of(rich, problems)[0], Request(problems[0], 0, 0, 40, probe_every=7), 40)
    driver = make_driver(
        engine, policy, Budget(least * rng.uniform(1, 30), unit, rng.choice(["problem", "run"]))
    )
    try:
        results = list(driver.run(problems))
    except BudgetTooSmall:
        return
    assert driver.overrun == 0
    charge = total(results)
    assert charge.tokens == engine.counters().output_tokens
    assert charge.tokens_prompt == engine.counters().prompt_tokens
    assert len(results) == 4
