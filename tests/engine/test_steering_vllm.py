"""Steering on real vLLM with an embedded reasoner: random instructions under caps, preemption, worker processes, steps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PlainJudge
from tests.engine.test_vllm import finish, request, sums
from tests.waiting import LIMIT_S
from ttc.api import Run, Settings
from ttc.checks import check_control
from ttc.engine.course import Course
from ttc.engine.vllm import VLLMEngine
from ttc.errors import InputError
from ttc.policies import parse
from ttc.types import Completion, Control, Request

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "nano-s"
TRIGGERS = ("Wait, let me check.", "Wait", " Hm, 12 + 7?")


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    opened = VLLMEngine(MODEL, concurrency=64)
    yield opened
    opened.close()


def some_control(rng: random.Random, cap: int) -> Control:
    return Control(
        triggers=tuple(rng.sample(TRIGGERS, rng.randint(1, 3))),
        at=tuple(sorted(rng.sample(range(1, max(cap, 8)), rng.randint(0, 4)))),
        relative=rng.random() < 0.3,
        at_end=rng.choice([0, 0, 1, 2]),
        min_thinking=rng.choice([0, 0, rng.randint(0, cap)]),
        loop_repeats=rng.choice([0, 4]),
    )


def check(engine: VLLMEngine, asked: Request, done: Completion) -> None:
    """The cap is kept to the token, the answer is there, and every trigger that was due stands whole where it was due."""
    ids, [close] = list(done.token_ids), engine.spelling.end
    assert done.finish in ("stop", "length")
    assert close in ids
    assert ids.index(close) <= asked.thinking_tokens
    if done.closed and not (asked.control and asked.control.loop_repeats):
        assert ids.index(close) == asked.thinking_tokens
    assert len(ids) <= asked.thinking_tokens + engine.room_tokens
    assert PlainJudge().answer(asked.problem, done.text), done.text
    control = asked.control
    if control is None:
        return
    assert ids.index(close) >= min(control.min_thinking, asked.thinking_tokens)
    if control.at_end or control.min_thinking or control.loop_repeats:
        return  # what came when depends on what the model would have said
    course = Course(
        due=asked.thinking_tokens, think_close=[close], close=engine.spelling.close, at=list(control.at),
        triggers=[engine.spelling.ids(text) for text in control.triggers], relative=control.relative,
    )  # fmt: skip
    for token in ids:
        while not course.forcing() and course.next_position() <= len(course.output):
            course.arrive()
        if course.forcing():
            assert token == course.force(), (len(course.output), done.text)
        course.output.append(token)
    assert (course.begun, course.forced) == (done.triggers, done.forced_tokens)


def test_five_hundred_random_courses_keep_their_caps(engine: VLLMEngine) -> None:
    rng = random.Random(0)
    problems = sums(40, terms=6, seed=31)
    requests = []
    for i in range(500):
        cap = rng.choice([1, 2, 5, 17, 30, 60, rng.randint(1, 120)])
        control = some_control(rng, cap) if rng.random() < 0.9 else None
        requests.append(request(rng.choice(problems), i, cap, control=control))
    before = engine.counters()
    done = finish(engine, requests)
    assert len(done) == 500
    for ticket, completion in done.items():
        check(engine, requests[ticket - 1], completion)
    assert sum(c.triggers for c in done.values()) > 300
    assert 50 < sum(c.closed for c in done.values()) < 500
    spent = engine.counters().output_tokens - before.output_tokens
    assert spent == sum(c.output_tokens for c in done.values())


def test_a_branch_is_the_same_beside_others_as_alone(engine: VLLMEngine) -> None:
    """Instructions of neighbours do not touch a row: greedy, so that the batch can't decide."""
    from ttc.types import Sampling

    problems = sums(12, terms=5, seed=32)
    control = Control((TRIGGERS[0],), (20, 50))
    together = finish(
        engine,
        [
            request(p, i, 90, control=control if i % 2 else None, sampling=Sampling(0.0))
            for i, p in enumerate(problems)
        ],
    )
    for i, problem in enumerate(problems):
        [alone] = finish(
            engine, [request(problem, i, 90, control=control if i % 2 else None, sampling=Sampling(0.0))]
        ).values()
        assert alone.token_ids == together[i + 1].token_ids


def test_thinking_is_closed_when_confidence_falls(engine: VLLMEngine) -> None:
    problems = sums(16, terms=12, seed=33)
    low = Control(stop_below=0.0, stop_window=4, stop_top_k=5)
    high = Control(stop_below=1e9, stop_window=4, stop_top_k=5)
    free = finish(engine, [request(p, 0, 150, control=low) for p in problems])
    stopped = finish(engine, [request(p, 0, 150, control=high) for p in problems])
    assert all(c.closed and c.token_ids.index(engine.spelling.end[0]) <= 5 for c in stopped.values())
    assert sum(c.closed for c in free.values()) < len(problems)
    assert all(PlainJudge().answer(problems[t - 1], c.text) for t, c in stopped.items())


def told_as_they_run(
    engine: VLLMEngine, requests: list[Request], when: int, text: str
) -> dict[int, Completion]:
    """Run all; at ``when`` tokens the odd tickets are told to close, the even ones ``text``."""
    done: dict[int, Completion] = {}
    told: set[int] = set()
    for ticket, each in enumerate(requests):
        engine.submit(ticket, each)
    while len(done) < len(requests):
        report = engine.step()
        for ticket, progress in report.progress.items():
            if progress.tokens >= when and ticket not in told:
                told.add(ticket)
                if ticket % 2:
                    engine.steer(ticket, "close")
                else:
                    engine.insert(ticket, text)
        done |= dict(report.finished)
    return done


def check_told(
    engine: VLLMEngine, done: dict[int, Completion], when: int, text: str, *, cap: int, lag: int
) -> int:
    """The word took effect within ``lag`` tokens where the thought was still open; returns how many times it did before the
    thought's ``cap``."""
    ids, [close] = engine.spelling.ids(text), engine.spelling.end
    seen = 0
    for ticket, one in done.items():
        written = list(one.token_ids)
        end = written.index(close)
        assert PlainJudge().answer(sums(1)[0], one.text), one.text
        if ticket % 2:
            assert end <= when + lag
            if one.closed:
                assert one.forced_tokens == 1
                seen += end < cap
        elif one.triggers:
            places = [i for i in range(when, when + lag + 1) if written[i : i + len(ids)] == ids]
            assert places, one.text
            assert one.forced_tokens == len(ids) + one.closed
            seen += 1
        else:
            assert end <= when + lag, "it was closing when the word came"
    return seen


def test_the_controllers_word_reaches_a_running_thought_at_its_next_step(engine: VLLMEngine) -> None:
    problems, before = sums(16, terms=12, seed=34), engine.counters()
    done = told_as_they_run(engine, [request(p, 0, 150) for p in problems], 9, TRIGGERS[0])
    assert check_told(engine, done, 9, TRIGGERS[0], cap=150, lag=1) > 10
    assert (
        sum(d.output_tokens for d in done.values()) == engine.counters().output_tokens - before.output_tokens
    )
    engine.submit(99, request(problems[0], 1, 20))
    with pytest.raises(InputError, match="no token"):
        engine.insert(99, "")
    engine.abort([99])
    assert dict(engine.step().finished)


@pytest.fixture(scope="module")
def small() -> Iterator[VLLMEngine]:
    """A pool of KV blocks far too small for its batch. (Open to the end: an engine that is collected takes the others along.)"""
    args = {"num_gpu_blocks_override": 10, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    opened = VLLMEngine(MODEL, concurrency=12, context=1024, engine_args=args)
    yield opened
    opened.close()


def test_preempted_branches_execute_their_instructions_once(small: VLLMEngine) -> None:
    """Branches are thrown out and computed again, in chunks beside others that decode."""
    rng = random.Random(1)
    asked = [
        request(p, i, 400, control=Control(
            TRIGGERS[:2], tuple(sorted(rng.sample(range(5, 390), 5))), at_end=i % 3 and 2, min_thinking=200 * (i % 4 == 1)
        ))
        for i, p in enumerate(sums(12, terms=24, seed=35))
    ]  # fmt: skip
    assert all(small.count_prompt(one.problem) > 64 for one in asked), "a prefill is cut"
    done = finish(small, asked)
    for ticket, completion in done.items():
        check(small, asked[ticket - 1], completion)
    assert small._stats.preemptions > 0, "the pool was not small enough to test anything"
    assert sum(c.triggers for c in done.values()) > 12
    assert sum(c.output_tokens for c in done.values()) == small.counters().output_tokens


# -- in a process of its own -------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2]


def run_script(folder: Path, script: str, **environment: str) -> dict[str, Any]:
    """The last line that a script prints, as JSON."""
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


WORKERS = """
import json, sys
from tests.engine.test_steering_vllm import MODEL, TRIGGERS, check, check_told, told_as_they_run
from tests.engine.test_vllm import finish, request, sums
from ttc.engine.vllm import VLLMEngine
from ttc.types import Control

if __name__ == "__main__":
    engine = VLLMEngine(MODEL, concurrency=16)
    assert not engine.info.steerable, "with worker processes the controller's word comes a few tokens late"
    asked = [
        request(p, i, 30 + 5 * i, control=Control(TRIGGERS[:2], (10 + i, 40, 70)) if i % 4 else None,
                probe_every=20 if i % 3 == 0 else 0)
        for i, p in enumerate(sums(24, terms=6, seed=36))
    ]
    done = finish(engine, asked)
    for ticket, completion in done.items():
        check(engine, asked[ticket - 1], completion)
    spent, forks, heard = sum(c.output_tokens + c.probe_tokens for c in done.values()), 0, 0
    for _ in range(20):
        probed = finish(engine, [request(p, 8, 240, probe_every=60) for p in sums(4, terms=48, seed=39)])
        spent += sum(c.output_tokens + c.probe_tokens for c in probed.values())
        if forks := sum(len(c.forks) for c in probed.values()):
            break
    for _ in range(20):
        told = told_as_they_run(engine, [request(p, 9, 300) for p in sums(8, terms=64, seed=34)], 9, TRIGGERS[0])
        spent += sum(c.output_tokens for c in told.values())
        if heard := check_told(engine, told, 9, TRIGGERS[0], cap=300, lag=300):
            break
    print(json.dumps({
        "forks": forks, "heard": heard, "triggers": sum(c.triggers for c in done.values()),
        "unseen": engine.counters().output_tokens - spent, "most": engine._forks.made * engine.info.probe_tokens,
    }))
    engine.close()
"""


def test_worker_processes_execute_the_same_instructions(tmp_path: Path) -> None:
    """When a word comes to them, and how much of a fork is seen before it is cancelled, is up to the machine: branches run until
    a fork has written something, and a word has come before the end of a thought."""
    report = run_script(tmp_path, WORKERS, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert report["triggers"] > 20
    assert report["forks"] > 0
    assert report["heard"] > 0, "the word reaches the workers"
    assert 0 <= report["unseen"] <= report["most"], (
        "of a cancelled fork, what the worker wrote in the meantime"
    )


# -- steps -----------------------------------------------------------------------------------------------------------------------
class Longest:
    """A process reward model that likes length: enough to search by, and nothing to load."""

    def tokens(self, problem: Any, texts: Any) -> int:
        return len(texts)

    def score(self, problem: Any, texts: Any) -> list[float]:
        return [len(text) / (1000 + len(text)) for text in texts]


@pytest.mark.parametrize(
    "text", ["beam?n=4&width=2", "dvts?n=4&width=2", "particles?n=4", "particles?n=4&step=;"]
)
def test_search_goes_on_from_the_cache(engine: VLLMEngine, text: str) -> None:
    problems, before = sums(6, terms=6, seed=37), engine.counters()
    policy = parse(text + "&tokens=24&most=20")
    run = Run(
        problems,
        engine,
        Settings(policy=policy, budget="8k tokens", max_thinking_tokens=200),
        reward=Longest(),
    )
    results = list(run.results())
    after = engine.counters()
    assert all(r.answer is not None for r in results), [r.error for r in results]
    assert (
        sum(r.charge.tokens - r.charge.tokens_judge for r in results)
        == after.output_tokens - before.output_tokens
    )
    steps = [b for r in results for b in r.branches]
    assert len(steps) > 4 * len(problems)
    fresh = (after.prompt_tokens - after.cached_tokens) - (before.prompt_tokens - before.cached_tokens)
    block = engine.info.probe_prefill or 0
    longest = max(b.completion.prompt_tokens for b in steps)
    assert fresh <= len(steps) * min(block, longest), "a step computes no more than its last block again"
    assert all(b.completion.partial or b.usable for b in steps)


def test_a_step_that_is_continued_keeps_its_tokens(engine: VLLMEngine) -> None:
    from dataclasses import replace

    problem = sums(1, terms=6, seed=38)[0]
    asked = request(problem, 0, 120, step_tokens=10)
    [first] = finish(engine, [asked]).values()
    assert first.partial
    assert first.output_tokens == 10
    more = replace(
        asked, index=1, prefix=first.text, prefix_ids=first.token_ids, thinking_tokens=110, step_tokens=0
    )
    [second] = finish(engine, [more]).values()
    assert second.prompt_tokens == first.prompt_tokens + 10
    assert not second.partial
    assert PlainJudge().answer(problem, first.text + second.text)
    short = replace(asked, thinking_tokens=8)
    [whole] = finish(engine, [short]).values()
    assert not whole.partial, "a step as long as the whole thought is run to its end"


# -- at the door -----------------------------------------------------------------------------------------------------------------
def test_what_no_branch_of_this_model_can_follow_is_refused(engine: VLLMEngine) -> None:
    with pytest.raises(InputError, match="no single token"):
        check_control(parse("beam?step=%0A%0A%0A&tokens=9"), engine)
    with pytest.raises(InputError, match="trigger"):
        engine.check_control(Control(("",), (5,)))
    with pytest.raises(InputError, match="no token for a part of 'Wait ☃'"):
        engine.check_control(Control(("Wait ☃",), (5,)))
    check_control(parse("beam?step=;&tokens=9"), engine)


def test_a_model_without_a_delimiter_is_named_with_the_flag(engine: VLLMEngine) -> None:
    kept, engine.spelling.end = engine.spelling.end, []
    try:
        with pytest.raises(InputError, match="--think-close"):
            check_control(parse("budget-forcing"), engine)
    finally:
        engine.spelling.end = kept
