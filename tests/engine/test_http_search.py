"""Search steps and anytime answers over HTTP, on a scripted server: one character a token, no prefix cache, its own books."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests import waiting
from tests.conftest import make_problems
from tests.engine.http_engine import until
from tests.engine.mock_server import Call, MockServer, Model, Script
from tests.engine.test_http_steering import CLOSE, FORM, run
from ttc.api import Run, Settings
from ttc.budget import Budget
from ttc.checks import check_control
from ttc.engine.http_branch import Span, Spans
from ttc.engine.http_runner import Setting
from ttc.engine.http_server import Server
from ttc.engine.openai import OpenAIEngine
from ttc.engine.protocol import Probed, ProbingEngine, StepReport
from ttc.errors import BudgetTooSmall, InputError
from ttc.policies import parse
from ttc.types import Completion, Problem, Request, Result, Sampling

SEED = 0


def reasoner(call: Call) -> Script:
    """Thinks in steps that end with a semicolon, of a length drawn from what it has written so far; answers after four of them
    with the problem's number, or with how many steps it was given."""
    asked, _, written = call.prompt.rpartition("<")
    done = written.count(";")
    if CLOSE in written:
        answer = f"{done}" if done < 4 else asked.rstrip("|").rpartition(" ")[2]
        return Script(answer[len(written.rpartition(CLOSE)[2]) :])
    rng = random.Random(f"{SEED}/{call.prompt}/{call.body['temperature'] and call.number}")
    steps = "".join("t" * rng.randint(2, 9) + ";" for _ in range(4 - done))
    return Script(steps + CLOSE + asked.rstrip("|").rpartition(" ")[2])


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer(reasoner, opens="<") as opened:
        yield opened


@pytest.fixture
def engine(server: MockServer) -> Iterator[OpenAIEngine]:
    opened = OpenAIEngine(server.url, format=FORM, stream_interval=1, concurrency=16)
    yield opened
    opened.close()


class Longest:
    """A process reward model that likes length."""

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return len(texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [len(text) / (100 + len(text)) for text in texts]


def spent(results: Sequence[Result]) -> tuple[int, int, int]:
    """Output tokens that the server sampled, those that were inserted, prompt tokens, as charged."""
    charges = [r.charge for r in results]
    return (
        sum(c.tokens_generated for c in charges),
        sum(c.tokens_forced for c in charges),
        sum(c.tokens_prompt for c in charges),
    )


# -- steps -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [{"step_text": ";", "step_tokens": 50}, {"step_tokens": 7}])
def test_a_chain_in_steps_is_gone_on_from_the_very_tokens(
    engine: OpenAIEngine, server: MockServer, step: dict[str, Any]
) -> None:
    problem = make_problems(1)[0]
    ids: tuple[int, ...] = ()
    text, steps, prompts = "", 0, 0
    while True:
        prefix: dict[str, Any] = {"prefix": text, "prefix_ids": ids} if ids else {}
        [done] = run(
            engine, [Request(problem, steps, steps, 100 - len(ids), Sampling(0.0), **prefix, **step)]
        )
        assert done.prompt_tokens == engine.count_prompt(problem) + len(ids), (
            "one call: prompt and what is written"
        )
        ids, text, steps = ids + done.token_ids, text + done.text, steps + 1
        prompts += done.prompt_tokens
        if not done.partial:
            break
        assert done.finish in ("stop", "length")
        if "step_text" in step:
            assert done.text.endswith(";")
            assert done.text.count(";") == 1
        else:
            assert len(done.token_ids) == 7
    assert steps > 2
    assert "".join(map(chr, ids)).rstrip("\0") == text, "tokens and text say the same"
    assert text.count(";") == 4
    assert text.endswith(CLOSE + "0")
    assert (server.sampled, server.prompted) == (len(ids), prompts)


def test_a_step_as_long_as_the_thought_is_run_to_its_end(engine: OpenAIEngine) -> None:
    [done] = run(engine, [Request(make_problems(1)[0], 0, 0, 6, step_text="?", step_tokens=6)])
    assert not done.partial
    assert done.text.index(CLOSE) <= 6
    assert done.text.rpartition(CLOSE)[2]


def test_a_step_that_was_cut_goes_on_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def dropping(call: Call) -> Script:
        script = Script("ttttttttt;uuuuuuuuuuuuuuuu")
        return Script(script.text, drop_after=5) if call.number == 0 else Script("tttt;uuuu")

    with MockServer(dropping, opens="<") as server:
        engine = OpenAIEngine(server.url, format=FORM, stream_interval=1, backoff_s=0.001)
        try:
            [done] = run(engine, [Request(make_problems(1)[0], 0, 0, 90, step_text=";", step_tokens=40)])
        finally:
            engine.close()
    assert done.partial
    assert done.text == "ttttttttt;"
    assert done.generated_tokens == 10


@pytest.mark.parametrize(
    "policy", ["beam?n=4&width=2", "dvts?n=4&width=2", "particles?n=4", "particles?n=4&step=;&tokens=30"]
)
def test_search_is_charged_what_the_server_did(
    engine: OpenAIEngine, server: MockServer, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(policy=policy if "step" in policy else policy + "&tokens=8", budget="3k tokens")
    with caplog.at_level(logging.WARNING):
        results = list(Run(make_problems(4), engine, settings, reward=Longest()).results())
    assert [r.answer for r in sorted(results, key=lambda r: r.problem_id)] == ["0", "1", "2", "3"]
    generated, _, prompted = spent(results)
    assert (generated, prompted) == (server.sampled, server.prompted)
    assert sum(len(r.branches) for r in results) > 4 * len(results), "it was done in steps"
    assert sum("each step" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("seed", range(12))
def test_any_budget_holds_for_search_over_http(engine: OpenAIEngine, seed: int) -> None:
    rng = random.Random(seed)
    policy = parse(
        f"{rng.choice(['beam?n=4&width=2', 'dvts?n=4&width=2', 'particles?n=3'])}&step=;&tokens={rng.randint(4, 30)}"
    )
    budget = Budget(float(rng.choice([8, 12, 30, 70, 200])), "tokens")
    try:
        session = Run(
            make_problems(2), engine, Settings(policy=policy, budget=budget, seed=seed), reward=Longest()
        )
    except BudgetTooSmall:
        return
    results = list(session.results())
    assert session.driver.overrun == 0
    assert all(r.answer is not None for r in results), [r.error for r in results]


# -- anytime answers -------------------------------------------------------------------------------------------------------------
def listening(heard: Callable[[], int]) -> Model:
    """``reasoner``, asked for anytime answers every four tokens from the eighth on: a thought goes on once what is due is heard."""

    def model(call: Call) -> Script:
        script = reasoner(call)
        thought = script.text.index(CLOSE) if CLOSE in script.text else 0
        return Script(script.text, gate=lambda position: heard() >= min(position, thought) // 4 - 1)

    return model


def test_a_running_branch_says_what_it_would_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The answers are those of calls of their own with the thought closed behind the branch's tokens; the branch is as it would
    have been; every token on either side of a fork is charged."""
    problem = make_problems(1)[0]
    probes: list[tuple[int, str]] = []
    with (
        caplog.at_level(logging.WARNING),
        MockServer(listening(lambda: len(probes)), opens="<") as mock,
    ):
        engine = OpenAIEngine(mock.url, format=FORM, stream_interval=1)
        assert isinstance(engine, ProbingEngine)
        assert engine.info.probe_tokens == engine.room_tokens
        try:
            done = probed(
                engine, Request(problem, 0, 0, 100, Sampling(0.0), probe_every=4, probe_from=5), probes
            )
            [alone] = run(engine, [Request(problem, 0, 0, 100, Sampling(0.0))])
            counters = engine.counters()
        finally:
            engine.close()
    assert done.text == alone.text
    assert [tokens for tokens, _ in probes] == list(range(8, done.text.index(CLOSE) + 1, 4))
    assert len(probes) >= 3
    for tokens, text in probes:
        thought, _, answer = text.partition(CLOSE)
        assert done.text.startswith(thought)
        assert len(thought) == tokens
        assert answer == (f"{thought.count(';')}" if thought.count(";") < 4 else "0")
    # of each fork: the closing span, the answer and its end
    assert [f.output_tokens for f in done.forks] == [1 + 2] * len(probes)
    assert done.probe_tokens == 3 * len(probes)
    inserted = len(done.forks) + done.forced_tokens + alone.forced_tokens
    assert counters.output_tokens == mock.sampled + inserted
    assert counters.prompt_tokens == mock.prompted
    assert sum("anytime answers" in record.message for record in caplog.records) == 1


def probed(engine: OpenAIEngine, request: Request, probes: list[tuple[int, str]]) -> Completion:
    """Run a request to its end; the anytime answers come into ``probes`` as they are heard."""
    done: list[Completion] = []

    def step() -> None:
        report = engine.step()
        probes.extend((probe.tokens, probe.text) for probe in report.probes)
        done.extend(completion for _, completion in report.finished)

    engine.submit(0, request)
    waiting.until(lambda: bool(done), step, "the branch has ended")
    return done[0]


def test_a_fork_under_way_is_cancelled_with_its_branch_and_charged() -> None:
    chain = "t" * 60 + CLOSE + "7"

    def hanging(call: Call) -> Script:
        if CLOSE in call.prompt.rpartition("<")[2]:
            return Script("12345", hang_after=2)
        return Script(chain, gate=lambda position: position < len(chain) or mock.sampled == len(chain) + 2)

    probes: list[tuple[int, str]] = []
    with MockServer(hanging, opens="<") as mock:
        engine = OpenAIEngine(mock.url, format=FORM, stream_interval=1)
        try:
            done = probed(engine, Request(make_problems(1)[0], 0, 0, 100, probe_every=10), probes)
            until(engine, lambda: mock.open == 0)
        finally:
            engine.close()
        assert not probes
        assert done.text.endswith(CLOSE + "7")
        [fork] = done.forks
        assert fork.output_tokens == 1 + 6  # whole: what it has sampled unseen is not known
        assert mock.sampled == done.generated_tokens + 2


@pytest.mark.parametrize("budget", ["60 tokens", "200 tokens", "3k tokens"])
def test_a_policy_that_probes_works_over_http_within_its_budget(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork that its branch's end cuts is charged whole, whatever the server has made of it by then."""
    heard: list[Probed] = []

    def waiting_for_the_first(call: Call) -> Script:
        script = reasoner(call)
        return Script(
            script.text, gate=lambda position: CLOSE not in script.text or position < 6 or bool(heard)
        )

    with MockServer(waiting_for_the_first, opens="<") as mock:
        engine = OpenAIEngine(mock.url, format=FORM, stream_interval=1)
        step = engine.step

        def noted() -> StepReport:
            report = step()
            heard.extend(report.probes)
            return report

        monkeypatch.setattr(engine, "step", noted)
        try:
            policy = "parallel-probe?n=4&every=5&warmup=999&stable=999"
            session = Run(make_problems(3), engine, Settings(policy=policy, budget=budget))
            results = list(session.results())
        finally:
            engine.close()
    assert session.driver.overrun == 0
    assert all(r.answer is not None for r in results)
    generated, _, prompted = spent(results)
    branches = [b for r in results for b in r.branches]
    assert any(b.probes for b in branches)
    forks = [fork for b in branches for fork in b.completion.forks]
    cut = [fork for fork in forks if fork.output_tokens == 1 + FORM.answer_tokens]
    assert len(cut) <= len(branches)
    assert mock.prompted <= prompted <= mock.prompted + sum(fork.prompt_tokens for fork in cut)
    charged = generated + sum(r.charge.tokens_probe for r in results) - len(forks)
    assert mock.sampled <= charged <= mock.sampled + FORM.answer_tokens * len(cut)


# -- at the door -----------------------------------------------------------------------------------------------------------------
def test_a_server_that_knows_no_tokens_is_named() -> None:
    with MockServer(reasoner, exact=False) as server:
        engine = OpenAIEngine(server.url, format=FORM)
        try:
            assert engine.info.probe_tokens is None
            with pytest.raises(InputError, match="/tokenize"):
                check_control(parse("beam"), engine)
        finally:
            engine.close()


def test_what_stands_behind_a_steps_text_in_its_last_token() -> None:
    """A server shows a token up to the text that it stopped at; the tokens go on from the whole of it."""

    class Words(Server):
        async def detokenize(self, ids: Sequence[int]) -> str:
            return ["; so", "\n  x", "\n\n\n", "so"][ids[0]]

    async def tails() -> list[str]:
        nothing, slots = Span("", ()), asyncio.Semaphore()
        spans = Spans(nothing, nothing, nothing, nothing)
        setting = Setting(Words("http://x", None, 1.0), FORM, spans, True, 99, 0, 0.0, 0, slots, slots)
        return [await setting.tail(i, step) for i, step in [(0, ";"), (1, "\n\n"), (2, "\n\n"), (3, ";")]]

    assert asyncio.run(tails()) == [" so", "  x", "\n", ""]
