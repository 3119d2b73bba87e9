"""The HTTP engine against servers that refuse, drop, hang, go away, are of another kind or none at all."""

from __future__ import annotations

import logging
import threading
from contextlib import closing

import pytest

from tests import waiting
from tests.engine.http_engine import (
    FORM,
    PROBLEM,
    THINKS,
    answers_by,
    collect,
    request,
    run,
    seen,
    serving,
    until,
    while_nothing_ends,
)
from tests.engine.mock_server import Call, MockServer, Script
from tests.waiting import LIMIT_S, Port
from ttc.engine.openai import OpenAIEngine
from ttc.errors import EngineError, InputError
from ttc.types import Completion


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

    with serving(model, timeout_s=3 * LIMIT_S) as (engine, server):
        engine.submit(0, request())
        seen(engine, 2)
        clock = engine._loop.time
        engine._loop.time = lambda: clock() + 3 * LIMIT_S  # type: ignore[method-assign]
        engine._loop.call_soon_threadsafe(lambda: None)  # so that it looks at its clock
        (done,) = collect(engine, [0])
        assert done.text == "aab</think>c"
        assert len(server.calls) == 2


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


class Restarting:
    """A server whose first call streams until ``finish``, and whose others are answered at once."""

    def __init__(self, port: int) -> None:
        self.finish = threading.Event()
        self.server = MockServer(self.model, opens=THINKS, port=port)

    def model(self, call: Call) -> Script:
        text = "t" * 12 + "</think>7"
        return Script(text, gate=lambda position: bool(call.number) or position < 3 or self.finish.is_set())


@pytest.mark.parametrize("back", [True, False])
def test_a_server_that_takes_no_calls_while_a_stream_lives(back: bool) -> None:
    """What is asked meanwhile waits, while one branch tries; it runs when the server is back, or the engine stops with the stream's
    end, and has failed no branch but those that had found out."""
    with Port() as port, (restarting := Restarting(port.number)).server as server:
        options = {"format": FORM, "backoff_s": 0.001, "max_retries": 1, "concurrency": 8}
        with closing(OpenAIEngine(server.url, **options)) as engine:  # type: ignore[arg-type]
            engine.submit(0, request())
            seen(engine, 3)
            server.refuse()
            engine.submit(1, request(index=1))
            (lost,) = collect(engine, [1])
            assert (lost.finish, lost.output_tokens, lost.prompt_tokens) == ("error", 0, 0)
            for ticket in range(2, 6):
                engine.submit(ticket, request(index=ticket))
            until(engine, lambda: engine._scout == 2)
            while_nothing_ends(engine)
            if back:
                server.welcome()
                assert [d.finish for d in collect(engine, range(2, 6))] == ["stop"] * 4
                restarting.finish.set()
                assert collect(engine, [0])[0].text == "t" * 12 + "</think>7"
                return
            restarting.finish.set()
            found: dict[int, Completion] = {}
            with pytest.raises(EngineError, match="can't be reached any more"):
                waiting.until(lambda: False, lambda: found.update(engine.step().finished))
            assert found[0].text == "t" * 12 + "</think>7", "the stream is read to its end"
            assert {t: d.finish for t, d in found.items() if t} == {2: "error"}, "the others wait"


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
    with Port() as port, pytest.raises(InputError, match="start the server") as caught:
        OpenAIEngine(f"openai:{port.url}")
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
