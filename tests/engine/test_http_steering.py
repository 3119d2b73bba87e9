"""Steering over HTTP by continuation requests, on a scripted server that has no plugin: one character a token."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace

import pytest

from tests.conftest import make_problems
from tests.engine.mock_server import Call, MockServer, Script
from ttc.api import Run, Settings
from ttc.checks import check_control
from ttc.engine.openai import OpenAIEngine
from ttc.errors import InputError
from ttc.policies import parse
from ttc.types import AnswerFormat, Completion, Control, Request, Sampling

CLOSE = "#"
FORM = AnswerFormat(think_open="<", think_close=CLOSE, close_text=CLOSE, answer_tokens=6)
SEED = 0


def thinker(lengths: list[int]):  # type: ignore[no-untyped-def]
    """A model that thinks so many tokens each time it is asked to think (the last length again and again), then answers 42."""
    calls = 0

    def model(call: Call) -> Script:
        nonlocal calls
        if call.body.get("vllm_xargs"):
            return Script("x")  # no plugin: the instructions are nothing to it
        if CLOSE in call.prompt.rpartition("<")[2]:
            return Script("42")
        length = lengths[min(calls, len(lengths) - 1)]
        calls += 1
        return Script("t" * length + CLOSE + "42")

    return model


def run(engine: OpenAIEngine, requests: list[Request]) -> list[Completion]:
    done: dict[int, Completion] = {}
    for ticket, each in enumerate(requests):
        engine.submit(ticket, each)
    while len(done) < len(requests):
        done |= dict(engine.step().finished)
    return [done[i] for i in range(len(requests))]


def asked(control: Control, cap: int = 100, index: int = 0) -> Request:
    return Request(make_problems(1)[0], index, index, cap, Sampling(), control=control)


def solve(lengths: list[int], *requests: Request) -> tuple[list[Completion], MockServer]:
    with MockServer(thinker(lengths), opens="<") as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1)
        try:
            return run(engine, list(requests)), server
        finally:
            engine.close()


def test_triggers_stand_at_their_checkpoints() -> None:
    [done], server = solve([500], asked(Control(("AB", "C"), (10, 20))))
    assert done.text == "t" * 10 + "AB" + "t" * 8 + "C" + "t" * 79 + CLOSE + "42"
    assert (done.triggers, done.forced_tokens, done.closed) == (2, 4, True)
    assert done.generated_tokens == server.sampled, "asking for the plugin wrote none"
    assert done.prompt_tokens == server.prompted


def test_ends_of_the_thought_are_replaced() -> None:
    [done], server = solve([12, 7, 9], asked(Control(("AB",), at_end=2)))
    assert done.text == "t" * 12 + "AB" + "t" * 7 + "AB" + "t" * 9 + CLOSE + "42"
    assert done.triggers == 2
    assert done.finish == "stop"
    assert done.generated_tokens == server.sampled
    assert done.generated_tokens + done.forced_tokens == len(done.token_ids) + 2, (
        "two ends were sampled and replaced"
    )


def test_a_least_thinking_gets_triggers_until_it_is_reached() -> None:
    [done], _ = solve([5], asked(Control(("AB",), min_thinking=30)))
    assert done.text.index(CLOSE) >= 30
    assert done.text.endswith(CLOSE + "42")


def test_a_finished_thought_gets_no_trigger() -> None:
    [done], _ = solve([5], asked(Control(("AB",), (10, 20))))
    assert done.text == "ttttt" + CLOSE + "42"
    assert done.triggers == 0


def test_caps_hold_whatever_is_asked() -> None:
    rng = random.Random(SEED)
    requests = [
        asked(
            Control(
                tuple(rng.sample(["A", "BCD", "EF"], 2)), tuple(sorted(rng.sample(range(1, 60), 3))),
                relative=rng.random() < 0.3, at_end=rng.randint(0, 2), min_thinking=rng.choice([0, 20]),
            ),
            cap=rng.randint(1, 60), index=i,
        )
        for i in range(60)
    ]  # fmt: skip
    done, server = solve([3, 8, 200, 1, 30], *requests)
    for request, completion in zip(requests, done, strict=True):
        assert completion.finish in ("stop", "length")
        assert completion.text.index(CLOSE) <= request.thinking_tokens
        assert completion.text.rpartition(CLOSE)[2], "never an empty answer"
        assert completion.output_tokens <= request.thinking_tokens + 7
    assert sum(c.generated_tokens for c in done) == server.sampled


def obedient(call: Call) -> Script:
    """A model behind ttc's plugin that would think for ever: its thought is closed at ``due``, and it answers in the same call."""
    told = json.loads(call.body.get("vllm_xargs", {}).get("ttc", "{}"))
    if not told:
        return Script("42") if CLOSE in call.prompt.rpartition("<")[2] else Script("t", endless=True)
    assert told["close"] == told["think_close"] == [ord(CLOSE)]
    return Script("t" * told["due"] + CLOSE + "42")


@pytest.mark.parametrize("plugin", [True, False])
def test_a_cap_alone_is_one_call_where_the_plugin_is(plugin: bool) -> None:
    with MockServer(obedient, opens="<", plugin=plugin) as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1)
        try:
            wants = [
                Request(make_problems(1)[0], i, i, 5 * i + 1, signals=("mean-logprob",)) for i in range(8)
            ]
            done = run(engine, wants)
        finally:
            engine.close()
    assert len(server.calls) == (8 if plugin else 16)
    for want, one in zip(wants, done, strict=True):
        assert one.text == "t" * want.thinking_tokens + CLOSE + "42"
        assert (one.closed, one.forced_tokens, one.triggers) == (True, 1, 0)
        assert one.generated_tokens == want.thinking_tokens + 3
        assert one.mean_logprob == -0.5
    assert sum(one.prompt_tokens for one in done) == server.prompted
    forced = 8 if plugin else 0
    assert sum(one.generated_tokens for one in done) + forced == server.sampled


def test_a_capped_call_that_breaks_goes_on_without_the_plugin() -> None:
    def breaking(call: Call) -> Script:
        script = obedient(call)
        return replace(script, drop_after=5) if call.number == 0 else script

    with MockServer(breaking, opens="<", plugin=True) as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1, backoff_s=0.001)
        try:
            [done] = run(engine, [Request(make_problems(1)[0], 0, 0, 12)])
        finally:
            engine.close()
    assert done.text == "t" * 12 + CLOSE + "42"
    assert len(server.calls) == 3
    assert done.output_tokens == 12 + 1 + 3
    assert done.prompt_tokens == server.prompted


def test_a_server_that_decodes_speculatively_is_capped_from_here() -> None:
    """vLLM checks a request's instructions there, and then loads no processor that would execute them."""

    def free(call: Call) -> Script:
        return Script("42") if CLOSE in call.prompt.rpartition("<")[2] else Script("t", endless=True)

    with MockServer(free, opens="<", plugin=True, speculates=True) as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1)
        try:
            [done] = run(engine, [Request(make_problems(1)[0], 0, 0, 12)])
        finally:
            engine.close()
    assert done.text == "t" * 12 + CLOSE + "42"
    assert not any("vllm_xargs" in call.body for call in server.calls)


@pytest.mark.parametrize("opens", ["", "<"])
def test_a_thought_that_the_template_does_not_open_is_left_to_the_model(opens: str) -> None:
    """An instruct model that answers at once would be taken for one that stops inside its thought."""
    with MockServer(lambda call: Script("42"), opens=opens, plugin=True) as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1)
        try:
            run(engine, [Request(make_problems(1)[0], 0, 0, 12)])
        finally:
            engine.close()
    assert ("vllm_xargs" in server.calls[0].body) == bool(opens)


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        solve([50], *(asked(Control(("A",), (5,)), index=i) for i in range(4)))
    assert sum("plugin is not loaded" in r.message for r in caplog.records) == 1


def test_a_server_without_the_plugin_stays_dense() -> None:
    with MockServer(thinker([5]), opens="<") as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1)
        try:
            run = Run(
                make_problems(1),
                engine,
                Settings(policy="self-consistency?n=1", budget="200 tokens", kv_budget=64),
            )
            assert run.notices == [
                "kv-budget: decoding stays dense; ttc's plugin is not loaded in the server; install ttc beside that vLLM"
            ]
            assert engine.learn_kv() is engine.info
        finally:
            engine.close()


def test_what_needs_the_plugin_is_refused_without_it() -> None:
    with MockServer(thinker([50]), opens="<") as server:
        engine = OpenAIEngine(server.url, format=FORM)
        try:
            check_control(parse("iterative-deepening"), engine)
            check_control(parse("budget-forcing"), engine)
            for policy in ("plain?loops=4", "plain?stop_below=1", "plain?least=20"):
                with pytest.raises(InputError, match="plugin"):
                    check_control(parse(policy), engine)
            check_control(parse("beam"), engine)
        finally:
            engine.close()
    with MockServer(thinker([50]), exact=False) as server:
        engine = OpenAIEngine(server.url, format=FORM)
        try:
            with pytest.raises(InputError, match="/tokenize"):
                check_control(parse("budget-forcing"), engine)
        finally:
            engine.close()
