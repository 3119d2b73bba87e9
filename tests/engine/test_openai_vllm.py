"""The HTTP engine on vLLM's own server, on loopback, with an embedded reasoner: its counts against
/metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import httpx
import pytest

from tests.engine.vllm_server import serving
from tests.waiting import LIMIT_S, until
from ttc import nano
from ttc.api import Run, Settings
from ttc.engine.http_server import Server
from ttc.engine.model import load_model_files
from ttc.engine.openai import OpenAIEngine
from ttc.errors import InputError
from ttc.rl import tokenizer
from ttc.types import Completion, Control, Problem, Request, Result, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow]
WILD = Sampling(temperature=2.0)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else a third process, and one that spins
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probabilities compile for half a minute
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(
        int(LIMIT_S)
    ),  # no idle connection breaks under a call, whose charge is then a bound
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TTC_SPARSE": '{"when": "cheaper"}',
}


def sums(count: int) -> list[Problem]:
    rng = random.Random(5)
    texts = [f"{rng.randint(10, 99)} + {rng.randint(10, 99)} + {rng.randint(10, 99)} =" for _ in range(count)]
    asked = [f"State the final answer to the following arithmetic problem: {text}" for text in texts]
    return [Problem(f"s{i}", ({"role": "user", "content": text},)) for i, text in enumerate(asked)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = nano.catalog()
    assert models, "the package ships its reasoners"
    log = tmp_path_factory.mktemp("server") / "log"
    model = ["--model", str(models[0].path), "--served-model-name", "tiny", "--max-model-len", "4096"]
    more = ["--max-num-seqs", "32", "--enable-prompt-tokens-details"]
    with serving([*model, *more], ENVIRONMENT, log) as ready:
        yield ready()


@pytest.fixture
def engine(server: str) -> Iterator[OpenAIEngine]:
    opened = OpenAIEngine(f"openai:{server}/v1", concurrency=32)
    yield opened
    opened.close()


def add_to_calls(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    """From now on each call carries these fields, too."""
    allowed = Server._allowed
    monkeypatch.setattr(Server, "_allowed", lambda self, body: allowed(self, body) | fields)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stops before its cap."""
    add_to_calls(monkeypatch, ignore_eos=True)


def keep_thinking(engine: OpenAIEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on thoughts stay open to their caps, whatever is drawn."""
    [delimiter] = engine._call(engine._setting.span_ids(engine.info.format.think_close))
    ends = {str(token): -100 for token in (delimiter, tokenizer.EOS)}  # an end of text closes a thought, too
    add_to_calls(monkeypatch, ignore_eos=True, logit_bias=ends)


def metric(server: str, name: str) -> float:
    lines = httpx.get(f"{server}/metrics", trust_env=False, timeout=LIMIT_S).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def settled(server: str) -> dict[str, float]:
    """The server's totals once nothing runs there any more."""
    until(lambda: metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0)
    return {name: metric(server, f"{name}_tokens_total") for name in ("generation", "prompt")}


def collect(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Completion]:
    """Run all, at most ``concurrency`` at a time, in request order."""
    done: dict[int, Completion] = {}
    waiting = list(enumerate(requests))
    running = 0
    while len(done) < len(requests):
        while waiting and running < engine.info.concurrency:
            engine.submit(*waiting.pop(0))
            running += 1
        ended = engine.step().finished
        running -= len(ended)
        done |= dict(ended)
    return [done[i] for i in range(len(requests))]


def test_what_the_server_is(engine: OpenAIEngine) -> None:
    info = engine.info
    assert (info.model, info.context, info.concurrency) == ("tiny", 4096, 32)
    assert info.shape is not None
    assert info.format == load_model_files(str(nano.catalog()[0].path)).format
    assert info.identity["server"].startswith("vllm ")
    assert "weights" in info.identity


def counted(done: Sequence[Completion], native: bool) -> int:
    """The tokens that a server counts as generated: what its plugin inserts is among them, what a client writes into a prompt is
    not."""
    return sum(d.output_tokens if native else d.generated_tokens for d in done)


def asked_once(engine: OpenAIEngine, native: bool) -> None:
    """Whether the server closes thoughts at their caps by itself."""
    engine._server.steers = None
    assert engine._call(engine._server.learn_plugin()), "this package is installed, so vLLM loads its plugin"
    engine._server.steers = native


def in_one_call(engine: OpenAIEngine, problem: Problem, done: Completion) -> bool:
    """Whether the thought, all that was put into it, and its answer came in one call. An answer may turn out to be nothing, as none
    of its tokens is told to be something: then it is asked for again."""
    answer = done.text.partition("</think>")[2]
    blank = answer[:1].isspace() or "</think>" in answer
    return blank or done.prompt_tokens == engine.count_prompt(problem)


@pytest.mark.parametrize("native", [True, False])
def test_counts_are_the_servers_own(engine: OpenAIEngine, server: str, native: bool) -> None:
    before = settled(server)
    asked_once(engine, native)
    assert settled(server) == before, "asking for the plugin costs nothing"
    problems = sums(8)
    done = collect(engine, [Request(p, i, i, 150, Sampling(1.0)) for p in problems for i in range(6)])
    after = settled(server)
    assert counted(done, native) == after["generation"] - before["generation"]
    assert sum(d.prompt_tokens for d in done) == after["prompt"] - before["prompt"]
    assert engine.counters().output_tokens == sum(d.output_tokens for d in done)
    first = done[0]
    assert first.finish in ("stop", "length")
    assert first.text.partition("</think>")[2]
    if native:
        assert all(in_one_call(engine, problems[i // 6], one) for i, one in enumerate(done))
    if not first.closed:
        assert in_one_call(engine, problems[0], first)
    assert len(first.token_ids) == first.output_tokens


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("native", [True, False])
def test_caps_hold_and_no_answer_is_empty(engine: OpenAIEngine, server: str, native: bool) -> None:
    """With ttc's plugin there a cap is one request; without it a thought that is still open at its cap is answered in a second."""
    asked_once(engine, native)
    before = settled(server)
    rng = random.Random(3)
    wants = [Request(p, i, i, rng.randint(0, 50), WILD) for p in sums(10) for i in range(6)]
    done = collect(engine, wants)
    assert any(d.closed for d in done)
    for want, one in zip(wants, done, strict=True):
        assert one.finish in ("stop", "length")
        assert one.output_tokens <= want.thinking_tokens + engine.room_tokens
        assert one.text.partition("</think>")[2]
        if native and want.thinking_tokens:
            assert in_one_call(engine, want.problem, one)
    after = settled(server)
    apart = [
        d for d, want in zip(done, wants, strict=True) if not want.thinking_tokens
    ]  # closed in its prompt
    there = [d for d, want in zip(done, wants, strict=True) if want.thinking_tokens]
    assert counted(there, native) + counted(apart, False) == after["generation"] - before["generation"]
    assert sum(d.prompt_tokens for d in done) == after["prompt"] - before["prompt"]


@pytest.mark.usefixtures("endless")
def test_a_cancelled_branch_is_dropped_by_the_server(engine: OpenAIEngine, server: str) -> None:
    before = settled(server)
    for ticket, problem in enumerate(sums(24)):
        engine.submit(ticket, Request(problem, 0, ticket, 3900, WILD))
    moved: set[int] = set()
    done: dict[int, Completion] = {}
    while len(moved | set(done)) < 24:
        report = engine.step()
        moved |= set(report.progress)
        done |= dict(report.finished)
    engine.abort(range(24))
    while len(done) < 24:
        done |= dict(engine.step().finished)
    after = settled(server)
    cancelled = [d for d in done.values() if d.finish == "abort"]
    assert cancelled
    assert all(d.generated_tokens > 0 and d.prompt_tokens > 0 for d in cancelled)
    sampled = after["generation"] - before["generation"]
    assert sampled < 24 * 3900, "a server that had not dropped them would have run each to its cap"
    charged = sum(d.generated_tokens for d in done.values())
    # A call that is cut is charged what came, at least one token, and what an event may hold more (7); nothing may have come.
    assert charged <= sampled + 24 * 8


@pytest.mark.usefixtures("endless")
def test_steering_closes_the_thought(engine: OpenAIEngine) -> None:
    engine.submit(0, Request(sums(1)[0], 0, 0, 900, WILD))
    done: dict[int, Completion] = {}
    while not done:
        report = engine.step()
        if report.progress.get(0) is not None:
            engine.steer(0, "close")
        done |= dict(report.finished)
    assert done[0].text.partition("</think>")[2]


def test_confidence_is_measured(engine: OpenAIEngine) -> None:
    (done,) = collect(engine, [Request(sums(1)[0], 0, 0, 150, signals=("mean-logprob",))])
    assert done.mean_logprob is not None
    assert -5.0 < done.mean_logprob < 0.0


def test_chat_messages_do_as_well(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Server, path: str) -> bool:
        return False

    monkeypatch.setattr(Server, "_exists", nothing)
    engine = OpenAIEngine(server, concurrency=8)
    try:
        before = settled(server)
        done = collect(
            engine, [Request(p, 0, 0, thinking, Sampling(0.0)) for p in sums(4) for thinking in (0, 6, 150)]
        )
        assert all(d.finish in ("stop", "length") for d in done)
        assert all(d.text.partition("</think>")[2].strip() for d in done)
        assert sum(d.generated_tokens for d in done) == settled(server)["generation"] - before["generation"]
    finally:
        engine.close()


@pytest.mark.parametrize("native", [True, False])
def test_chains_are_steered_there_too(
    engine: OpenAIEngine, server: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server's own plugin (this package is installed, so vLLM loads it), and by continuation requests: the same triggers at
    the same places, counts that are the server's own."""
    asked_once(engine, native)
    words, problems = ("Wait, let me check.", "Wait"), sums(10)
    twice, at_end = Control(words, (7, 30)), Control(words[1:], at_end=1)
    wants = [Request(p, i, i, 60, Sampling(1.0), control=twice) for p in problems for i in range(3)]
    wants += [Request(p, 9, 9, 80, Sampling(0.0), control=at_end) for p in problems]
    wants += [
        Request(p, 8, 8, cap, WILD, control=Control(words[1:], (4,))) for cap in (6, 15) for p in problems
    ]
    before = settled(server)
    done = collect(engine, wants)
    assert any(one.triggers for one in done[30:40]), "a greedy thought that ends before 80 tokens goes on"
    with monkeypatch.context() as patch:
        keep_thinking(engine, patch)
        open_to_the_end = [w for w in wants if w.control is not at_end]
        kept = collect(engine, open_to_the_end)
    assert [one.triggers for one in kept] == [2] * 30 + [1] * 20
    assert all(one.closed for one in kept)
    wants, done = wants + open_to_the_end, done + kept
    after = settled(server)
    for want, one in zip(wants, done, strict=True):
        thought, _, answer = one.text.partition("</think>")
        assert answer
        assert len(engine._call(engine._server.tokenize(text=thought))) <= want.thinking_tokens
        assert one.output_tokens <= want.thinking_tokens + engine.room_tokens
        if want.control is twice and one.triggers == 2:
            assert thought.index(words[0]) < thought.rindex(words[1])
        assert sum(thought.count(word) for word in words) >= one.triggers
        if native:
            assert in_one_call(engine, want.problem, one), "cap, triggers and answer"
    sampled = after["generation"] - before["generation"]
    inserted = sum(d.forced_tokens for d in done)
    assert sum(d.generated_tokens for d in done) == sampled - (inserted if native else 0)
    assert sum(d.prompt_tokens for d in done) == after["prompt"] - before["prompt"]


class Longest:
    """A process reward model that likes length: enough to search by, and nothing to load."""

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return len(texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [len(text) / (1000 + len(text)) for text in texts]


def test_search_and_anytime_answers_are_charged_as_the_server_counts(
    engine: OpenAIEngine, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and forks are calls of their own on the branch's tokens: prompt and output tokens are the server's, most of the prompts
    are found in its prefix cache, and every problem has an answer."""
    asked_once(engine, False)
    before, cached = settled(server), metric(server, "prefix_cache_hits_total")
    problems = sums(6)
    settings = Settings(
        policy="beam?n=4&width=2&step=;&tokens=40", budget="6k tokens", max_thinking_tokens=300
    )
    results = list(Run(problems, engine, settings, reward=Longest()).results())
    steps = [branch for result in results for branch in result.branches]
    assert all(result.answer is not None for result in results)
    assert any(branch.completion.partial for branch in steps)
    for branch in steps:
        if branch.completion.partial and branch.finish == "stop":
            assert branch.completion.text.endswith(";")
    keep_thinking(engine, monkeypatch)
    probed = Settings(
        policy="parallel-probe?n=2&every=12&warmup=999", budget="20k tokens", max_thinking_tokens=600
    )
    asked_once(engine, True)
    capped: list[Result] = []
    until(  # on a machine that stands still while these thoughts are written, nothing can be asked in time
        lambda: any(branch.probes for result in capped for branch in result.branches),
        lambda: capped.extend(Run(problems[:3], engine, probed).results()),
        "an anytime answer is heard",
    )
    chains = sum(len(result.branches) for result in capped)
    closed = sum(r.charge.tokens_forced for r in capped)  # by the server itself, in the chain's own call
    results += capped
    forks = [fork for result in results for branch in result.branches for fork in branch.completion.forks]
    after = settled(server)
    span = len(engine._call(engine._setting.span_ids(engine.info.format.close_text)))
    inserted = span * len(forks)
    charged = sum(r.charge.tokens_generated + r.charge.tokens_probe for r in results) + closed
    sampled = after["generation"] - before["generation"]
    # At the end of each chain a fork may be cut: it is charged whole, and its prompt, too, though it may not have got there.
    assert sampled <= charged - inserted <= sampled + chains * engine.room_tokens
    unsure = sum(fork.prompt_tokens for fork in forks if fork.output_tokens >= engine.room_tokens)
    prompts = sum(r.charge.tokens_prompt for r in results)
    assert after["prompt"] - before["prompt"] <= prompts <= after["prompt"] - before["prompt"] + unsure
    assert metric(server, "prefix_cache_hits_total") > cached


def test_a_kv_budget_rides_with_each_call(engine: OpenAIEngine) -> None:
    """A budget over the whole context says what dense says; a small one does not, nor does its KV leak into dense requests.
    Steered chains carry both instructions. Charged is the whole context,
    since the server may have stayed dense."""
    [problem] = sums(1)
    problem = Problem(
        "long",
        ({"role": "user", "content": problem.messages[0]["content"].replace(" =", " + 37" * 60 + " =")},),
    )
    settings = {
        "policy": "self-consistency?n=1",
        "budget": "2k tokens",
        "temperature": 0.0,
        "max_thinking_tokens": 200,
    }

    def solved(**more: object) -> tuple[str, float]:
        run = Run([problem], engine, Settings(**(settings | more)))  # type: ignore[arg-type]
        [result] = run.results()
        [branch] = result.branches
        whole = sum(branch.completion.prompt_tokens + i for i in range(1, branch.completion.output_tokens))
        assert result.charge.kv_tokens == whole
        return branch.completion.text, result.charge.kv_tokens

    dense, read = solved()
    narrow, _ = solved(kv_budget=128, kv_method="streaming")
    assert narrow != dense
    assert solved(kv_budget=4096) == (dense, read)
    assert solved() == (dense, read)
    control = Control(("Wait",), (7,))
    wants = [
        Request(problem, i, i, 60, Sampling(0.0), control=control, kv_budget=kv)
        for i, kv in enumerate((None, 128, 4096))
    ]
    texts = [
        done.text for want in wants for done in collect(engine, [want])
    ]  # rounding differs between batches
    assert texts[0] == texts[2] != texts[1]
    assert all("Wait" in text for text in texts)
    with pytest.raises(InputError, match="kv-budget: 64 tokens is under one page of 128"):
        solved(kv_budget=64)
