"""The HTTP engine against the ways in which servers write the same things differently: counts, ends, errors, contents, refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.http_engine import request, run, serving
from tests.engine.mock_server import Call, MockServer, Model, Script
from ttc.answers import extract
from ttc.api import Run, Settings
from ttc.engine.http_runner import REFUSALS
from ttc.engine.http_server import ServedModel, Server
from ttc.engine.http_stream import CallFailed, parse_event, refusal
from ttc.engine.openai import OpenAIEngine
from ttc.errors import InputError
from ttc.rewards import load_reward
from ttc.types import AnswerFormat, Problem, Sampling


def event(content: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def lines(*events: Mapping[str, Any] | bytes) -> tuple[bytes, ...]:
    """A stream of these events, and its end."""
    written = [e if isinstance(e, bytes) else b"data: " + json.dumps(e).encode() + b"\n\n" for e in events]
    return (*written, b"data: [DONE]\n\n")


def once(script: Script, then: Script | None = None) -> Model:
    return lambda call: script if call.number == 0 else then or Script("4")


# -- counts ----------------------------------------------------------------------------------------------------------------
def test_reasoning_that_completion_tokens_leave_out_is_charged() -> None:
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135}  # xAI, Gemini
    script = Script(raw=lines(event("It is 4."), event(finish="stop"), {"choices": [], "usage": usage}))
    with serving(once(script), exact=False, opens="") as (engine, _):
        (done,) = run(engine, [request(200)])
        assert (done.generated_tokens, done.prompt_tokens) == (103, 32)


@pytest.mark.parametrize("total", [41, None, 0])
def test_where_the_total_says_nothing_more_completion_tokens_count(total: int | None) -> None:
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": total}
    found = parse_event(event(usage=usage)).usage
    assert found is not None
    assert found.completion == 9


def test_an_answer_in_one_piece_without_counts_is_not_one_token() -> None:
    text = "The sum of these two numbers is four, as one can count on one hand."
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    assert parse_event({"choices": [choice]}).tokens >= len(text) / 4
    for word in (" four", "\u56db\u4e2a", " internationalisation"):
        assert parse_event(event(word)).tokens == 1
    assert parse_event(event("")).tokens == 0


# -- ends ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_a_text_that_ended_at_its_cap_is_made_to_answer(word: str) -> None:
    script = Script(raw=lines(event("<think>1 and 1 are"), event(finish=word)))
    with serving(once(script), exact=False, opens="") as (engine, server):
        (done,) = run(engine, [request()])
        assert done.text == "<think>1 and 1 are</think>A4"
        assert done.closed
        assert len(server.calls) == 2


def test_a_server_out_of_resources_is_asked_again() -> None:
    script = Script(raw=lines(event("<thi"), event(finish="insufficient_system_resource")))
    with serving(once(script, Script("It is 4.")), exact=False, opens="") as (engine, _):
        (done,) = run(engine, [request()])
        assert (done.text, done.finish) == ("It is 4.", "stop")


# -- errors ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        b'error: {"code":400,"message":"too long","type":"invalid_request_error"}\n\n',
        b'data: {"error":{"code":400,"message":"too long"}}\n\n',
        b'data: {"object":"error","message":"too long","code":40303}\n\n',
        b'data: {"error":"too long"}\n\n',
    ],
)
def test_an_error_inside_a_stream_is_no_empty_answer(line: bytes) -> None:
    with serving(lambda call: Script(raw=lines(line)), exact=False, max_retries=0) as (engine, _):
        (done,) = run(engine, [request()])
        assert (done.finish, done.error) == ("error", "too long")


def test_lines_that_keep_a_stream_alive_are_nothing() -> None:
    alive = (b": OPENROUTER PROCESSING\n\n", b"data:\n\n", b"event: ping\ndata: \n\n", b"\n")
    script = Script(raw=(*alive, *lines(event("It is"), *alive, event(" 4.", "stop"))))
    with serving(lambda call: script, exact=False, opens="", max_retries=0) as (engine, _):
        (done,) = run(engine, [request()])
        assert (done.text, done.finish) == ("It is 4.", "stop")


def test_a_letter_in_two_pieces() -> None:
    whole = b"data: " + json.dumps(event("\u221a2 \U0001f600", "stop"), ensure_ascii=False).encode() + b"\n\n"
    script = Script(raw=(*(whole[i : i + 1] for i in range(len(whole))), *lines()))
    with serving(lambda call: script, exact=False, opens="", max_retries=0) as (engine, _):
        (done,) = run(engine, [request()])
        assert done.text == "\u221a2 \U0001f600"


def test_no_credit_is_no_reason_to_wait() -> None:
    message = '{"error":{"message":"You exceeded your current quota","code":"insufficient_quota"}}'
    assert refusal(429, {}, message).status == 402
    assert not refusal(429, {}, message).again
    assert refusal(429, {}, '{"error":{"message":"slow down","code":"rate_limit_exceeded"}}').again


def test_a_run_without_credit_ends() -> None:
    with serving(lambda call: Script(status=402, message="Insufficient Balance"), exact=False) as (engine, _):
        run(engine, [request(index=i) for i in range(REFUSALS)])
        assert "credit" in engine._setting.gone


# -- contents --------------------------------------------------------------------------------------------------------------
def test_content_in_typed_pieces() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}
    script = Script(
        raw=lines(
            event([thinking]), event([{"type": "text", "text": "4"}, {"type": "new"}]), event(finish="stop")
        )
    )
    with serving(lambda call: script, exact=False, opens="") as (engine, _):
        (done,) = run(engine, [request()])
        assert done.text == "<think>2 and 2</think>4"


def test_a_server_that_thinks_anew_does_not_answer_with_its_thought() -> None:
    boxed = AnswerFormat(close_text="</think>\\boxed{", extract="boxed", answer_tokens=20)
    for anew, answer in (
        (Script(thought="Okay, so the"), None),
        (Script(thought="hm", text="\\boxed{4}"), "4"),
    ):
        model = once(Script(thought="x" * 99), anew)
        with serving(model, exact=False, opens="", format=boxed) as (engine, _):
            (done,) = run(engine, [request(8)])
            assert extract(done.text, boxed) == answer


# -- refusals --------------------------------------------------------------------------------------------------------------
def test_a_temperature_that_is_not_taken_is_left_out() -> None:
    def model(call: Call) -> Script:
        if "temperature" in call.body:
            words = "Unsupported value: 'temperature' does not support 0.6 with this model."
            return Script(status=400, message=words)
        return Script("It is 4.")

    with serving(model, exact=False, opens="", max_retries=0) as (engine, _):
        (done,) = run(engine, [request(sampling=Sampling(0.6))])
        assert (done.text, done.finish) == ("It is 4.", "stop")


@pytest.mark.parametrize("status", [400, 500])
def test_a_turn_that_goes_on_is_told_to_think_no_more_where_the_server_wants_that(status: int) -> None:
    def model(call: Call) -> Script:  # llama.cpp
        goes_on = call.body["messages"][-1]["role"] == "assistant"
        thinks = (call.body.get("chat_template_kwargs") or {}).get("enable_thinking", True)
        if goes_on and thinks:
            return Script(
                status=status, message="Assistant response prefill is incompatible with enable_thinking."
            )
        return Script("5") if goes_on else Script("x", endless=True)

    with serving(model, exact=False, max_retries=0) as (engine, server):
        done = run(engine, [request(4, i) for i in range(3)])
        assert [d.text for d in done] == ["xxxx</think>A5"] * 3
        before = len(server.calls)
        run(engine, [request(4)])
        assert len(server.calls) == before + 2
        assert "chat_template_kwargs" not in server.calls[-2].body


def test_a_server_that_keeps_refusing_a_turn_that_goes_on_is_not_asked_for_ever() -> None:
    def model(call: Call) -> Script:
        if call.body["messages"][-1]["role"] == "assistant":
            return Script(status=400, message="enable_thinking and prefill: no")
        return Script("x", endless=True)

    with serving(model, exact=False, max_retries=0) as (engine, server):
        (done,) = run(engine, [request(4)])
        assert done.finish == "error"
        assert len(server.calls) == 3


@pytest.mark.parametrize("says", ["logprobs is not supported", ""])
def test_a_server_without_log_probabilities_is_told_of_and_votes_count_alike(
    says: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def model(call: Call) -> Script:
        if says and {"logprobs", "top_logprobs"} & set(call.body):
            return Script(status=400, message=says)
        return Script("<think>2 and 2</think>4")

    problems = [Problem(f"p{i}", ({"role": "user", "content": "2+2"},), "4", "exact") for i in range(2)]
    with serving(model, exact=False, opens="") as (engine, _):
        for policy in ("best-of-n?n=3&score=mean-logprob", "weighted-vote?n=3&weight=mean-logprob"):
            settings = Settings(policy=policy, budget="9k tokens")
            found = list(Run(problems, engine, settings, out=tmp_path / policy[:4]).results())
            assert [(r.answer, r.error, dict(r.votes)) for r in found] == [("4", "", {"4": 3.0})] * 2
    assert sum("sends no log-probabilities" in r.message for r in caplog.records) == 1


# -- what a server says of itself --------------------------------------------------------------------------------------------
class Told:
    """A wire whose server answers these paths."""

    def __init__(self, **answers: Mapping[str, Any]) -> None:
        self.answers = answers

    async def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        name = path.rsplit("/", 1)[-1]
        if name not in self.answers:
            raise CallFailed("HTTP 404", again=False, status=404)
        return self.answers[name]


def learnt(server: Server) -> ServedModel:
    async def ask() -> ServedModel:
        (model,) = await server.models()
        await server.learn(model)
        return model

    return asyncio.run(ask())


@pytest.mark.parametrize("name", ["max_model_len", "context_length", "context_window", "max_context_length"])
def test_the_context_by_the_names_that_servers_give_it(name: str) -> None:
    wire: Any = Told(models={"data": [{"id": "m", name: 131072}]})
    server = Server("http://x", None, 1.0, _wire=wire)
    assert learnt(server).context == server.context == 131072


def test_the_context_of_a_server_that_tells_it_apart() -> None:
    settings = {"default_generation_settings": {"n_ctx": 4096}}
    wire: Any = Told(models={"data": [{"id": "m", "meta": {"n_ctx_train": 32768}}]}, props=settings)
    server = Server("http://x", None, 1.0, _wire=wire)
    learnt(server)
    assert server.context == 4096  # llama.cpp: what a slot has, not what the model was trained for
    for odd in ({}, {"default_generation_settings": None}, {"default_generation_settings": {"n_ctx": "?"}}):
        other: Any = Told(models={"data": [{"id": "m"}]}, props=odd)
        server = Server("http://x", None, 1.0, _wire=other)
        learnt(server)
        assert server.context == 0


@pytest.mark.parametrize(
    "data", ["m", ["m"], [{}], [{"id": "m", "max_model_len": "big"}], {"id": "m"}], ids=str
)
def test_a_list_of_models_of_another_form_is_one_line(data: Any) -> None:
    class Odd(MockServer):
        def _answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
            return 200, {"data": data}

    with (
        Odd(lambda call: Script()) as server,
        pytest.raises(InputError, match="give the address of an OpenAI") as caught,
    ):
        OpenAIEngine(server.url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [None, [], {}, {"data": "m"}, {"data": [{}]}, {"data": ["m"]}], ids=str)
def test_a_reward_server_of_another_kind_is_one_line(answer: Any) -> None:
    class Odd(MockServer):
        def _answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
            return 200, answer

    with (
        Odd(lambda call: Script()) as server,
        pytest.raises(InputError, match="give a vLLM server") as caught,
    ):
        load_reward(server.url)
    assert "\n" not in str(caught.value)
