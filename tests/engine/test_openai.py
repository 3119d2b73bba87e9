"""The HTTP engine against a scripted server: caps, retries, cancelling, concurrency, the servers' own
books."""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine.mock_server import Call, MockServer, Model, Script
from ttc.engine.openai import OpenAIEngine
from ttc.errors import EngineError, InputError
from ttc.types import AnswerFormat, Completion, Problem, Request

FORM = AnswerFormat(close_text="</think>A", answer_tokens=6)
PROBLEM = Problem("p", ({"role": "user", "content": "1+1"},))
THINKS = "<think>"


def request(thinking: int = 40, index: int = 0, **changes: Any) -> Request:
    return Request(PROBLEM, index, 1000 + index, thinking, **changes)


@contextmanager
def serving(
    model: Model, *, exact: bool = True, opens: str = THINKS, **options: Any
) -> Iterator[tuple[OpenAIEngine, MockServer]]:
    """A mock server with an engine on it; afterwards every thread and connection must be gone."""
    settings: dict[str, Any] = {
        "format": FORM,
        "backoff_s": 0.001,
        "timeout_s": 30.0,
        "stream_interval": 1,
    } | options
    threads = threading.active_count()
    with MockServer(model, exact=exact, opens=opens) as server:
        engine = OpenAIEngine(f"openai:{server.url}", **settings)
        try:
            yield engine, server
        finally:
            engine.close()
        assert not engine._running
    assert threading.active_count() == threads


def run(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Completion]:
    """All of them at once, in request order."""
    for ticket, one in enumerate(requests):
        engine.submit(ticket, one)
    return collect(engine, range(len(requests)))


def collect(engine: OpenAIEngine, tickets: Sequence[int] | range) -> list[Completion]:
    found: dict[int, Completion] = {}
    for _ in range(600):
        if len(found) == len(tickets):
            return [found[t] for t in tickets]
        found.update(engine.step().finished)
    raise AssertionError(f"only {len(found)} of {len(tickets)} ended")


def until(engine: OpenAIEngine, condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        engine.step()
    raise AssertionError("it never came to that")


def seen(engine: OpenAIEngine, tokens: int, branches: int = 1) -> None:
    """Step until that many branches have shown that many tokens."""
    shown: set[int] = set()
    for _ in range(600):
        shown.update(t for t, p in engine.step().progress.items() if p.tokens >= tokens)
        if len(shown) >= branches:
            return
    raise AssertionError(f"only {len(shown)} branches came to {tokens} tokens")


def while_nothing_ends(engine: OpenAIEngine) -> None:
    for _ in range(10):
        assert not engine.step().finished


def answers_by(thought: str, answer: str) -> Model:
    """Thinks, closes, answers; asked to go on after a close it only answers."""

    def model(call: Call) -> Script:
        return Script(answer if "</think>" in call.prompt else f"{thought}</think>{answer}")

    return model


# -- one branch ----------------------------------------------------------------------------------------------------------
def test_a_branch_that_ends_by_itself_is_one_call_and_the_servers_usage() -> None:
    with serving(answers_by("2 and 2", "4")) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.text == "2 and 2</think>4"
        assert (done.finish, done.closed, done.forced_tokens) == ("stop", False, 0)
        assert (
            done.generated_tokens == len(done.text) + 1 == server.sampled
        )  # the end of sequence is a token too
        assert done.prompt_tokens == engine.count_prompt(PROBLEM) == len("1+1|<think>") == server.prompted
        assert done.token_ids[:-1] == tuple(ord(c) for c in done.text)
        assert len(server.calls) == 1
        counters = engine.counters()
        assert (counters.requests, counters.output_tokens) == (1, done.output_tokens)
        assert counters.prompt_tokens == done.prompt_tokens


def test_an_open_thought_is_closed_at_its_cap_and_answered_in_the_room() -> None:
    with serving(
        lambda call: Script("42" if "</think>" in call.prompt else "x", endless="</think>" not in call.prompt)
    ) as (
        engine,
        server,
    ):
        (done,) = run(engine, [request(10)])
        assert done.text == "x" * 10 + "</think>A" + "42"
        assert (done.finish, done.closed) == ("stop", True)
        assert (done.generated_tokens, done.forced_tokens) == (10 + 3, len("</think>A"))
        assert server.calls[1].prompt == "1+1|<think>" + "x" * 10 + "</think>A"
        assert done.prompt_tokens == server.prompted
        assert done.generated_tokens == server.sampled


def test_an_answer_that_is_still_being_written_at_the_cap_goes_on_in_the_room() -> None:
    with serving(
        lambda call: Script("t</think>" + "7" * 12 if "</think>" not in call.prompt else "7" * 9)
    ) as (engine, _):
        (done,) = run(engine, [request(12)])
        assert done.text == "t</think>" + "7" * 12
        assert (done.forced_tokens, done.closed, done.finish) == (0, False, "stop")


def test_lead_text_stands_before_an_unfinished_answer() -> None:
    form = AnswerFormat(close_text="</think>A", lead_text="=", answer_tokens=6)
    with serving(lambda call: Script("t</think>so", endless=True), format=form) as (engine, _):
        (done,) = run(engine, [request(14)])
        assert done.text.startswith("t</think>sot</=")
        assert done.forced_tokens == 1
        assert done.output_tokens == 14 + 1 + 6


def test_a_stop_inside_the_thought_still_gets_an_answer() -> None:
    with serving(lambda call: Script("9" if "</think>" in call.prompt else "hm")) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.text == "hm</think>A9"
        assert server.calls[1].prompt.endswith("|<think>hm</think>A")  # without the end-of-sequence token
        assert done.generated_tokens == server.sampled


@pytest.mark.parametrize("opens", ["", THINKS])
def test_no_thinking_at_all(opens: str) -> None:
    with serving(answers_by("never", "5"), opens=opens) as (engine, _):
        (done,) = run(engine, [request(0)])
        assert done.text == ("" if opens else "<think>") + "</think>A5"


def test_a_model_that_does_not_think_has_one_call() -> None:
    form = AnswerFormat(think_open="", think_close="", close_text="", answer_tokens=6)
    with serving(lambda call: Script("abc", endless=True), format=form, opens="") as (engine, server):
        (done,) = run(engine, [request(5)])
        assert (done.text, done.finish, done.forced_tokens) == ("abcabcabcab", "length", 0)
        assert len(server.calls) == 1


def test_a_prefix_is_gone_on_from() -> None:
    with serving(answers_by("", "8")) as (engine, server):
        (done,) = run(engine, [request(prefix="so far</think>")])
        assert done.text == "8"
        assert server.calls[0].prompt == "1+1|<think>so far</think>"


def test_signals_and_sampling_reach_the_server() -> None:
    with serving(answers_by("2", "4"), seeds=True, cache_salt="salt") as (engine, server):
        (done,) = run(engine, [request(signals=("mean-logprob",), effort=0.5)])
        assert done.mean_logprob == pytest.approx(-0.5)
        body = server.calls[0].body
        assert (body["seed"], body["temperature"], body["top_k"], body["cache_salt"]) == (
            1000,
            1.0,
            0,
            "salt",
        )
        assert body["skip_special_tokens"] is False
        (plain,) = run(engine, [request()])
        assert plain.mean_logprob is None


# -- caps ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("exact", [True, False])
def test_caps_hold_whatever_the_server_does(exact: bool) -> None:
    """500 branches of random lengths, most of which would never stop, with drops and refusals in between."""
    rng = random.Random(7)

    def model(call: Call) -> Script:
        kind = rng.random()
        if kind < 0.05:
            return Script(status=rng.choice([429, 500, 503]), message="busy")
        text = rng.choice(["x", "ab</think>", "word ", "</think>9"])
        drop = rng.randint(0, 30) if kind < 0.15 else None
        return Script(text, endless=kind < 0.8, drop_after=drop, usage=kind < 0.9, interval=rng.randint(1, 5))

    wants = [request(rng.randint(0, 60), i) for i in range(500)]
    with serving(model, exact=exact, concurrency=32, stream_interval=5) as (engine, server):
        done = run(engine, wants)
        for want, one in zip(wants, done, strict=True):
            assert one.output_tokens <= want.thinking_tokens + engine.room_tokens
            if one.finish in ("stop", "length"):
                _, closed, answer = one.text.partition("</think>")
                assert answer.strip() or (one.text and not closed and not exact), one
            else:
                assert one.finish == "error"
                assert one.error
        assert sum(d.output_tokens for d in done) == engine.counters().output_tokens
        assert sum(d.prompt_tokens for d in done) == engine.counters().prompt_tokens
        # What was sampled is charged in full: all that differs is what a cut call may have sampled unseen.
        assert sum(d.generated_tokens for d in done) >= server.sampled or not exact
        assert sum(d.finish == "error" for d in done) < 50
        assert server.peak <= 32


def test_a_server_that_ignores_max_tokens_is_cut() -> None:
    with serving(lambda call: Script("y", endless=True, deaf=True, delay_s=0.001)) as (engine, server):
        (done,) = run(engine, [request(10)])
        assert done.finish == "length"
        assert 10 + 6 <= done.generated_tokens < 10 + 6 + 4
        until(engine, lambda: server.hung_up == 2)


# -- concurrency and cancelling ------------------------------------------------------------------------------------------
def test_the_server_is_kept_full_and_never_over() -> None:
    """Whatever ends makes room for exactly as many."""

    def model(call: Call) -> Script:
        return Script("x", endless=True, hang_after=1 if call.number < 40 else None)

    with serving(model, concurrency=24, timeout_s=60.0) as (engine, server):
        for ticket in range(60):
            engine.submit(ticket, request(10, ticket))
        until(engine, lambda: server.open == 24)
        engine.step()
        assert len(server.calls) == 24
        engine.abort(range(16))
        until(engine, lambda: server.open == 24 and len(server.calls) == 40)
        engine.abort(range(16, 40))
        collect(engine, range(16, 60))
        assert server.peak == 24


def test_more_than_a_hundred_at_once() -> None:
    """httpx and aiohttp stop at 100 connections unless told otherwise."""
    with serving(lambda call: Script("x", endless=True, hang_after=3), concurrency=150, timeout_s=60.0) as (
        engine,
        server,
    ):
        for ticket in range(150):
            engine.submit(ticket, request(10, ticket))
        until(engine, lambda: server.open == 150)
        engine.abort(range(150))
        collect(engine, range(150))


def test_connections_are_used_again() -> None:
    with serving(answers_by("a", "b"), concurrency=4) as (engine, server):
        run(engine, [request(index=i) for i in range(60)])
        assert server.connections <= 4 + 1  # one more for what asks for tokens


@pytest.mark.parametrize("usage", [True, False])
def test_a_cancelled_branch_frees_the_server_and_is_charged(usage: bool) -> None:
    with serving(lambda call: Script("x", endless=True, hang_after=7, usage=usage)) as (engine, server):
        for ticket in range(3):
            engine.submit(ticket, request(50, ticket))
        seen(engine, 7, branches=3)
        engine.abort([0, 2, 99])
        first, third = collect(engine, [0, 2])
        assert first.finish == third.finish == "abort"
        assert first.output_tokens == third.output_tokens == 7
        assert first.prompt_tokens == len("1+1|<think>")
        until(engine, lambda: server.hung_up == 2)
        assert server.open == 1
        engine.abort([1])
        collect(engine, [1])


def test_what_a_server_may_have_sampled_unseen_is_charged() -> None:
    script = Script("x", endless=True, hang_after=9, interval=8)
    with serving(lambda call: script, stream_interval=8) as (engine, _):
        engine.submit(0, request(50))
        seen(engine, 9)
        engine.abort([0])
        (done,) = collect(engine, [0])
        assert done.generated_tokens == 9 + 7


def test_a_cancel_before_anything_ran_costs_nothing() -> None:
    with serving(lambda call: Script("x", hang_after=0), concurrency=1) as (engine, server):
        engine.submit(0, request())
        engine.submit(1, request(index=1))
        until(engine, lambda: server.open == 1)
        engine.abort([1, 0])
        first, second = collect(engine, [0, 1])
        assert second == Completion("", "abort", 0, 0)
        assert first.finish == "abort"
        assert first.generated_tokens == 1  # accepted: never nothing


def test_steering_closes_the_thought_and_answers() -> None:
    def model(call: Call) -> Script:
        return Script("6") if "</think>" in call.prompt else Script("x", endless=True, hang_after=8)

    with serving(model) as (engine, server):
        engine.submit(0, request(500))
        seen(engine, 8)
        engine.steer(0, "close")
        engine.steer(77, "close")
        (done,) = collect(engine, [0])
        assert done.text == "x" * 8 + "</think>A6"
        assert (done.finish, done.closed) == ("stop", True)
        assert server.hung_up == 1


def test_progress_counts_output_tokens() -> None:
    with serving(lambda call: Script("x", endless=True, hang_after=5)) as (engine, _):
        engine.submit(3, request(50))
        seen(engine, 5)
        engine.abort([3])
        (done,) = collect(engine, [3])
        assert done.output_tokens == 5


# -- failures ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_a_refusal_is_tried_again_and_costs_nothing(status: int) -> None:
    def model(call: Call) -> Script:
        if call.number < 2:
            return Script(status=status, message="busy", headers={"retry-after": "0.01"})
        return answers_by("a", "b")(call)

    with serving(model) as (engine, server):
        (done,) = run(engine, [request()])
        assert (done.finish, done.text) == ("stop", "a</think>b")
        assert done.generated_tokens == server.sampled
        assert done.prompt_tokens == server.prompted
        assert len(server.calls) == 3


def test_retries_end() -> None:
    with serving(lambda call: Script(status=500, message="out of\norder"), max_retries=3) as (engine, server):
        (done,) = run(engine, [request()])
        assert (done.finish, done.error) == ("error", "HTTP 500: out of order")
        assert done.output_tokens == done.prompt_tokens == 0
        assert len(server.calls) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_can_not_help_is_not_tried_again(status: int) -> None:
    with serving(lambda call: Script(status=status, message="maximum context length is 8")) as (
        engine,
        server,
    ):
        (done,) = run(engine, [request()])
        assert done.finish == "error"
        assert done.error == f"HTTP {status}: maximum context length is 8"
        assert len(server.calls) == 1


def test_a_dropped_stream_goes_on_from_what_it_has() -> None:
    def model(call: Call) -> Script:
        if call.number == 0:
            return Script("abcdefgh", drop_after=4)
        return Script("efgh</think>1")

    with serving(model) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.text == "abcdefgh</think>1"
        assert server.calls[1].prompt.endswith("|<think>abcd")
        assert server.calls[1].body["max_tokens"] == 40 - 4
        assert done.generated_tokens == server.sampled  # nothing twice, nothing lost
        assert done.prompt_tokens == server.prompted


def test_where_it_can_not_go_on_it_starts_again_and_pays_for_what_was_lost() -> None:
    def model(call: Call) -> Script:
        if call.number == 0:
            return Script("abcdefgh", drop_after=4)
        return Script("<think>xy</think>1")

    with serving(model, exact=False) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.text == "<think>xy</think>1"
        assert "abcd" not in server.calls[1].prompt
        assert server.calls[1].body["max_tokens"] == 40 - 4
        assert done.generated_tokens == server.sampled


def test_a_server_that_keeps_dropping_ends_in_an_error_with_what_was_used() -> None:
    with serving(lambda call: Script("x", endless=True, drop_after=3)) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.finish == "error"
        assert (
            done.generated_tokens == server.sampled == 6
        )  # no more calls than info.prompt_passes allows for
        assert engine.info.prompt_passes == 3


def test_a_hanging_server_is_left() -> None:
    def model(call: Call) -> Script:
        return Script("a", endless=True, hang_after=2) if call.number == 0 else answers_by("b", "c")(call)

    with serving(model, timeout_s=1.0) as (engine, _):
        (done,) = run(engine, [request()])
        assert done.text == "aab</think>c"


def test_a_server_that_goes_away_stops_the_engine() -> None:
    server = MockServer(answers_by("a", "b"), opens=THINKS)
    with server:
        engine = OpenAIEngine(server.url, format=FORM, backoff_s=0.001, max_retries=1)
    engine.submit(0, request())
    (done,) = collect(engine, [0])
    assert done.finish == "error"
    engine.submit(1, request())
    with pytest.raises(EngineError, match="can't be reached any more"):
        while_nothing_ends(engine)
    engine.close()


def test_a_prompt_longer_than_the_context_is_an_error_without_a_call() -> None:
    with serving(answers_by("a", "b"), context=20) as (engine, server):
        (done,) = run(engine, [request()])
        assert done.finish == "error"
        assert "do not fit into the model's context (20)" in done.error
        assert not server.calls


# -- servers of other kinds ----------------------------------------------------------------------------------------------
def test_a_chat_server_is_used_by_messages_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        serving(answers_by("<think>2", "4"), exact=False) as (engine, server),
    ):
        done = run(engine, [request(index=i) for i in range(3)])
        assert {d.text for d in done} == {"<think>2</think>4"}
        assert server.calls[0].path == "/v1/chat/completions"
        assert "top_k" not in server.calls[0].body
        assert server.calls[0].body["seed"] >= 1000
    assert sum("chat messages" in r.message for r in caplog.records) == 1


def test_reasoning_sent_apart_is_folded_back() -> None:
    def model(call: Call) -> Script:
        return Script(thought="2 and 2", text="4")

    with serving(model, exact=False, opens="") as (engine, _):
        (done,) = run(engine, [request()])
        assert done.text == "<think>2 and 2</think>4"
        (short,) = run(engine, [request(3)])
        assert short.text.startswith("<think>2 a</think>A")
        assert short.closed


def test_a_thought_that_the_template_opened_is_opened_in_the_turn_that_goes_on() -> None:
    def model(call: Call) -> Script:
        return Script("5") if "</think>" in call.prompt else Script("x", endless=True)

    with serving(model, exact=False) as (engine, server):
        (done,) = run(engine, [request(4)])
        assert done.text == "xxxx</think>A5"
        assert server.calls[1].prompt == "1+1|<think>xxxx</think>A"
        assert server.calls[1].body["continue_final_message"] is True


def test_a_plain_chat_model_is_not_made_to_think() -> None:
    with serving(lambda call: Script("It is 4."), exact=False, opens="") as (engine, server):
        (done,) = run(engine, [request()])
        assert (done.text, done.finish, len(server.calls)) == ("It is 4.", "stop", 1)


def test_no_usage_at_all_counts_the_stream() -> None:
    with serving(lambda call: Script("abc</think>d", usage=False), exact=False) as (engine, _):
        (done,) = run(engine, [request()])
        assert done.generated_tokens == len("abc</think>d")
        assert done.prompt_tokens == engine.count_prompt(PROBLEM) > 0


def test_an_answer_in_one_piece_is_taken() -> None:
    with serving(lambda call: Script("a</think>b", whole=True), exact=False) as (engine, server):
        (done,) = run(engine, [request()])
        assert (done.text, done.finish) == ("a</think>b", "stop")
        assert done.generated_tokens == server.sampled


def test_fields_that_a_server_does_not_take_are_left_out() -> None:
    def model(call: Call) -> Script:
        for name in ("seed", "stream_options", "max_tokens"):
            if name in call.body:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return Script(status=400, message=f"Unsupported parameter: '{name}'.{hint}")
        return answers_by("a", "b")(call)

    with serving(model, exact=False, max_retries=0) as (engine, server):
        done = run(engine, [request(index=i) for i in range(8)])
        assert {d.finish for d in done} == {"stop"}
        before = len(server.calls)
        run(engine, [request()])
        assert len(server.calls) == before + 1


# -- bad input -----------------------------------------------------------------------------------------------------------
def test_no_server_is_one_line_with_the_mend() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with pytest.raises(InputError, match="start the server") as caught:
        OpenAIEngine(f"openai:http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_told_what_there_is() -> None:
    with MockServer(answers_by("a", "b")) as server, pytest.raises(InputError, match="it serves mock"):
        OpenAIEngine(server.url, "other")


@pytest.mark.parametrize("url", ["", "openai:", "ftp://x", "http://", "http://host:port"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="can't read the address"):
        OpenAIEngine(url)


def test_what_is_no_openai_server() -> None:
    with MockServer(answers_by("a", "b")) as server, pytest.raises(InputError, match="OpenAI-compatible"):
        OpenAIEngine(server.url.replace("/v1", "/elsewhere"))


# -- the end -------------------------------------------------------------------------------------------------------------
def test_closing_in_the_middle_leaves_nothing() -> None:
    with serving(lambda call: Script("x", endless=True, hang_after=3)) as (engine, server):
        for ticket in range(5):
            engine.submit(ticket, request(50, ticket))
        until(engine, lambda: server.open == 5)
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.step()
        with pytest.raises(EngineError, match="closed"):
            engine.submit(9, request())
        engine._running.clear()


def test_any_thread_may_use_it() -> None:
    with serving(answers_by("a", "b"), concurrency=8) as (engine, _):

        def work(base: int) -> None:
            for ticket in range(base, base + 10):
                engine.submit(ticket, request(index=ticket))
                engine.count_prompt(PROBLEM)

        threads = [threading.Thread(target=work, args=(base,)) for base in (0, 10, 20)]
        for thread in threads:
            thread.start()
        done = collect(engine, range(30))
        for thread in threads:
            thread.join()
        assert {d.finish for d in done} == {"stop"}
