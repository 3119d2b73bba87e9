"""The HTTP engine against a scripted server: caps, concurrency, cancelling, the servers' own books."""

from __future__ import annotations

import random
import threading

import pytest

from tests.engine.http_engine import (
    PROBLEM,
    THINKS,
    answers_by,
    collect,
    request,
    run,
    seen,
    serving,
    until,
)
from tests.engine.mock_server import Call, Script
from tests.waiting import LIMIT_S
from ttc.costmodel import full, kinetics, kv_reads
from ttc.engine import http_stream
from ttc.engine.fake import TINY_SHAPE
from ttc.errors import EngineError
from ttc.pricing import Pricer
from ttc.types import AnswerFormat, Completion


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
    script = Script("y", endless=True, deaf=True, gate=lambda position: position < 500)
    with serving(lambda call: script) as (engine, server):
        (done,) = run(engine, [request(10)])
        assert done.finish == "length"
        assert done.generated_tokens == 10 + 1 + 6 + 1, "each call is cut at the first token past its cap"
        until(engine, lambda: server.hung_up == 2)


# -- concurrency and cancelling ------------------------------------------------------------------------------------------
def test_the_server_is_kept_full_and_never_over() -> None:
    """Whatever ends makes room for exactly as many."""

    def model(call: Call) -> Script:
        return Script("x", endless=True, hang_after=1 if call.number < 40 else None)

    with serving(model, concurrency=24) as (engine, server):
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
    with serving(lambda call: Script("x", endless=True, hang_after=3), concurrency=150) as (engine, server):
        for ticket in range(150):
            engine.submit(ticket, request(10, ticket))
        until(engine, lambda: server.open == 150)
        engine.abort(range(150))
        collect(engine, range(150))


def test_connections_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_stream, "KEEPALIVE_S", LIMIT_S)
    with serving(answers_by("a", "b"), concurrency=4) as (engine, server):
        run(engine, [request(index=i) for i in range(60)])
        assert server.accepted <= 4


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
        assert server.open == 1, "the other is left alone"
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


def test_a_cancel_before_the_servers_first_word_is_charged() -> None:
    """The call is out, and what the server made of it by then can't be known: its prompt, a token, and what an event may hold."""
    with serving(lambda call: Script("x", mute=True), stream_interval=8) as (engine, server):
        engine.submit(0, request(50))
        until(engine, lambda: server.sampled == 1)
        engine.abort([0])
        (done,) = collect(engine, [0])
        assert done.finish == "abort"
        assert done.prompt_tokens == server.prompted
        assert done.generated_tokens == 1 + 7


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
        until(engine, lambda: server.hung_up == 1)


def test_progress_counts_output_tokens() -> None:
    with serving(lambda call: Script("x", endless=True, hang_after=5)) as (engine, _):
        engine.submit(3, request(50))
        seen(engine, 5)
        engine.abort([3])
        (done,) = collect(engine, [3])
        assert done.output_tokens == 5


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


def test_what_was_taken_while_the_server_was_away_runs_when_it_is_back() -> None:
    heard = threading.Event()

    def model(call: Call) -> Script:
        gate = (
            (lambda position: position < 3 or heard.is_set()) if call.number == 0 else (lambda position: True)
        )
        return Script("t" * 12 + "</think>7", gate=gate)

    with serving(model) as (engine, _):
        engine.submit(0, request())
        seen(engine, 3)

        def away() -> None:  # at one go: no event comes between
            engine._setting.gone = "refused"
            for ticket in (1, 2):
                engine._start(ticket, request(index=ticket))
            engine._abort([2])
            heard.set()

        engine._on_loop(away)
        first, second, third = collect(engine, [0, 1, 2])
        assert (first.finish, second.finish, third.finish) == ("stop", "stop", "abort")
        assert third.output_tokens == 0


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


def test_each_call_of_a_branch_is_priced_on_its_own_prompt() -> None:
    """The second call's prompt holds the thought: its tokens are read once more, and are no part of the first call's context."""
    with serving(lambda call: Script("x", endless=True) if call.number == 0 else Script("5")) as (
        engine,
        server,
    ):
        asked = request(30)
        (done,) = run(engine, [asked])
        prompt = engine.count_prompt(asked.problem)
        assert [tuple(call) for call in done.calls] == [
            (prompt, 0, 30, None),
            (prompt + 30 + len("</think>A"), 0, 2, None),
        ]
        assert done.prompt_tokens == sum(call.prompt_tokens for call in done.calls) == server.prompted
    pricer = Pricer(TINY_SHAPE, 1, False)
    charge = pricer.charge(asked, done, 0.0)
    parts = [
        full(TINY_SHAPE, prompt_tokens=call.prompt_tokens, generated_tokens=call.output_tokens, batch=1)
        for call in done.calls
    ]
    read = sum(kv_reads(call.prompt_tokens, call.output_tokens) for call in done.calls)
    assert charge.kv_tokens == read
    assert charge.flops == pytest.approx(sum(part.flops for part in parts))
    paper = [
        kinetics(TINY_SHAPE, prompt_tokens=prompt, generated_tokens=done.output_tokens, samples=n).eflops()
        for n in (1, 2)
    ]
    assert charge.eflops_kinetics == pytest.approx(paper[1] - paper[0])
    assert charge.eflops <= pricer.most("eflops", asked, 3 * prompt + 2 * 60, 60)
    with serving(answers_by("a", "b")) as (engine, _):
        (whole,) = run(engine, [request()])
        assert whole.calls == ()
