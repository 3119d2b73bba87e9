"""The in-process engine on real vLLM with an embedded reasoner."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.conftest import PlainJudge
from ttc.api import Run, Settings
from ttc.engine.protocol import StepReport
from ttc.engine.vllm import VLLMEngine
from ttc.engine.vllm_start import plugin_installed
from ttc.errors import InputError
from ttc.types import Brief, Completion, Problem, Request, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    opened = VLLMEngine("nano-s", concurrency=32)
    yield opened
    opened.close()


def ahead(engine: VLLMEngine) -> bool:
    """Whether vLLM schedules a step while the one before runs (GPUs)."""
    return bool(engine._llm.vllm_config.scheduler_config.async_scheduling)


def sums(count: int, terms: int = 5, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        numbers = [rng.randint(10, 99) for _ in range(terms)]
        text = (
            f"State the final answer to the following arithmetic problem: {' + '.join(map(str, numbers))} ="
        )
        made.append(Problem(f"sum-{seed}-{i}", ({"role": "user", "content": text},), gold=str(sum(numbers))))
    return made


def request(problem: Problem, index: int, thinking: int = 200, **changes: object) -> Request:
    brief = Brief(seed=1, max_thinking_tokens=thinking, sampling=Sampling())
    return brief.request(problem, index, **changes)


def finish(
    engine: VLLMEngine, requests: list[Request], steer_at: dict[int, int] | None = None
) -> dict[int, Completion]:
    """Run requests to their ends, closing thoughts at given lengths."""
    done: dict[int, Completion] = {}
    waiting = list(enumerate(requests, start=1))
    running = 0
    while waiting or running:
        while waiting and running < engine.info.concurrency:
            ticket, each = waiting.pop(0)
            engine.submit(ticket, each)
            running += 1
        report: StepReport = engine.step()
        for ticket, progress in report.progress.items():
            if steer_at and progress.tokens == steer_at.get(ticket):
                engine.steer(ticket, "close")
        for ticket, completion in report.finished:
            done[ticket] = completion
            running -= 1
    return done


def test_the_plugin_is_installed() -> None:
    assert plugin_installed()


def test_an_answer_comes_back_with_thought_and_counts(engine: VLLMEngine) -> None:
    before = engine.counters()
    [completion] = finish(engine, [request(sums(1)[0], 0)]).values()
    after = engine.counters()
    assert completion.finish == "stop"
    assert completion.text.split("</think>")[1].strip().lstrip("-").isdigit()
    assert after.output_tokens - before.output_tokens == completion.output_tokens == len(completion.token_ids)
    assert (
        after.prompt_tokens - before.prompt_tokens
        == completion.prompt_tokens
        == engine.count_prompt(sums(1)[0])
    )
    assert completion.weight_reads == pytest.approx(after.steps - before.steps)


def test_five_hundred_caps_are_kept_to_the_token_and_no_answer_is_empty(engine: VLLMEngine) -> None:
    rng = random.Random(0)
    problems = sums(50, terms=6, seed=2)
    requests = [request(rng.choice(problems), i, rng.choice([1, 2, 5, 11, 17, 30, 60])) for i in range(500)]
    done = finish(engine, requests)
    assert len(done) == 500
    judge = PlainJudge()
    closed = 0
    for ticket, completion in done.items():
        cap = requests[ticket - 1].thinking_tokens
        assert completion.output_tokens <= cap + engine.room_tokens
        thought = completion.text.split("</think>")[0]
        assert len(engine.spelling.ids(thought)) <= cap
        assert judge.answer(requests[ticket - 1].problem, completion.text), completion.text
        assert completion.forced_tokens == (len(engine.spelling.close) if completion.closed else 0)
        closed += completion.closed
    assert 100 < closed < 500, "some were made to close, some ended by themselves"


def test_steering_closes_a_running_thought_within_a_step(engine: VLLMEngine) -> None:
    problems = sums(8, terms=8, seed=3)
    requests = [request(p, 0, 400) for p in problems]
    done = finish(engine, requests, steer_at=dict.fromkeys(range(1, 9, 2), 6))
    for ticket, completion in done.items():
        if ticket % 2:
            assert completion.closed
            assert len(engine.spelling.ids(completion.text.split("</think>")[0])) <= 7
            assert completion.output_tokens <= 7 + engine.room_tokens
        else:
            assert not completion.closed, "its neighbours are not disturbed"


def test_cancelling_one_branch_leaves_the_others_alone(engine: VLLMEngine) -> None:
    problem = sums(1, terms=8, seed=4)[0]
    for i in range(4):
        engine.submit(i + 1, request(problem, i))
    for _ in range(5):
        engine.step()
    engine.abort([2])
    done: dict[int, Completion] = {}
    while len(done) < 4:
        done |= dict(engine.step().finished)
    assert done[2].finish == "abort"
    assert done[2].output_tokens == 5 - ahead(engine)  # the step under way is not the branch's any more
    assert {t: done[t].finish for t in (1, 3, 4)} == dict.fromkeys((1, 3, 4), "stop")


def test_confidence_is_measured_where_the_logits_are(engine: VLLMEngine) -> None:
    """Against log-probabilities computed by transformers from the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = request(sums(1, seed=5)[0], 0, signals=("mean-logprob", "self-certainty"))
    [completion] = finish(engine, [asked]).values()
    assert completion.mean_logprob is not None
    assert completion.self_certainty is not None
    model = AutoModelForCausalLM.from_pretrained(engine.files.path, dtype=torch.bfloat16)
    prompt = engine.spelling.prompt(asked.problem, None)
    ids = torch.tensor([prompt + list(completion.token_ids)])
    with torch.no_grad():
        log_probs = model(ids).logits[0].float().log_softmax(-1)
    at = list(range(len(prompt) - 1, ids.shape[1] - 2))  # the last token is left out, and so are forced ones
    if completion.closed:
        at.remove(len(prompt) - 1 + asked.thinking_tokens)
    picked = [log_probs[i, ids[0, i + 1]].item() for i in at]
    certainty = [(-log_probs[i].mean() - math.log(log_probs.shape[-1])).item() for i in at]
    assert completion.mean_logprob == pytest.approx(sum(picked) / len(picked), abs=0.03)
    assert completion.self_certainty == pytest.approx(sum(certainty) / len(certainty), rel=0.05)


def test_more_prompts_than_a_prefill_holds_do_not_kill_the_engine(engine: VLLMEngine) -> None:
    """A seeded request whose prefill is cut crashes vLLM's CPU engine; ours never cuts one."""
    long = "1 + " * 600 + "1"
    problems = [
        Problem(f"long-{i}", ({"role": "user", "content": f"State the final answer: {i} + {long} ="},))
        for i in range(16)
    ]
    done = finish(engine, [request(p, 0, 4) for p in problems])
    assert len(done) == 16
    assert sum(c.prompt_tokens for c in done.values()) > 16_000
    assert {c.finish for c in done.values()} <= {"stop", "length"}


def test_the_ledger_equals_vllms_own_counters(engine: VLLMEngine) -> None:
    before = engine.counters()
    settings = Settings(policy="tests.driving:EarlyStop?n=4", budget="3k tokens", max_thinking_tokens=150)
    run = Run(sums(20, seed=6), engine, settings)
    results = list(run.results())
    after = engine.counters()
    charge = run.status.charge
    assert charge.tokens == after.output_tokens - before.output_tokens
    assert charge.tokens_prompt == after.prompt_tokens - before.prompt_tokens
    assert max(r.charge.tokens for r in results) <= 3000
    assert run.summary()["overrun"] == 0
    assert all(r.answer for r in results)
    assert any(b.finish == "abort" for r in results for b in r.branches)


@pytest.mark.parametrize(("budget", "scope"), [("100 GeFLOPs", "problem"), ("400 GeFLOPs", "run")])
def test_an_eflops_budget_is_never_exceeded_on_a_real_batch(
    engine: VLLMEngine, budget: str, scope: str
) -> None:
    settings = Settings(policy="self-consistency?n=64", budget=budget, scope=scope)
    run = Run(sums(10, terms=8, seed=7), engine, settings)
    results = list(run.results())
    spent = [r.charge.eflops for r in results]
    assert (sum(spent) if scope == "run" else max(spent)) <= run.budget.amount * (1 + 1e-9)
    assert run.summary()["overrun"] == 0
    assert all(r.answer for r in results)
    assert any(r.stop == "budget" for r in results), "the budget is what ended it"


def test_bad_models_are_refused_in_a_line() -> None:
    with pytest.raises(InputError, match=r"model: there is no 'nano-zz'; use one of .*nano"):
        VLLMEngine("nano-zz")
    with pytest.raises(InputError, match="has no config"):
        VLLMEngine("./tests")


# -- anytime answers --------------------------------------------------------------------------------------------------------------
def probed(
    engine: VLLMEngine, requests: list[Request]
) -> tuple[dict[int, Completion], dict[int, list[tuple[int, str]]]]:
    """Run requests to their ends; what they are, and the anytime answers heard of each: (tokens, text)."""
    heard: dict[int, list[tuple[int, str]]] = {}
    done: dict[int, Completion] = {}
    for ticket, each in enumerate(requests, start=1):
        engine.submit(ticket, each)
    while len(done) < len(requests):
        report = engine.step()
        done |= dict(report.finished)
        for probe in report.probes:
            heard.setdefault(probe.ticket, []).append((probe.tokens, probe.text))
    return done, heard


def test_a_probed_branch_answers_at_any_time_and_is_left_as_it_was(engine: VLLMEngine) -> None:
    asked = [request(p, 0, 150, probe_from=10, probe_every=10) for p in sums(8, terms=8, seed=21)]
    before = engine.counters()
    done, heard = probed(engine, asked)
    after = engine.counters()
    plain = finish(engine, [replace(r, probe_from=0, probe_every=0) for r in asked])
    judge = PlainJudge()
    for ticket, completion in done.items():
        assert completion.token_ids == plain[ticket].token_ids, "probes change nothing of the branch"
        thought = len(engine.spelling.ids(completion.text.split("</think>")[0]))
        assert [at for at, _ in heard[ticket]][:3] == [10, 20, 30]
        assert all(at <= thought for at, _ in heard[ticket])
        for at, text in heard[ticket]:
            assert engine.spelling.ids(text)[:at] == list(completion.token_ids[:at])
            assert judge.answer(asked[ticket - 1].problem, text), "never an empty answer"
        assert len(heard[ticket]) <= len(completion.forks) <= len(heard[ticket]) + 1
        assert engine.info.probe_tokens is not None
        assert all(fork.output_tokens <= engine.info.probe_tokens for fork in completion.forks)
        assert completion.probe_tokens == sum(fork.output_tokens for fork in completion.forks)
    spent = sum(c.output_tokens + c.probe_tokens for c in done.values())
    assert spent == after.output_tokens - before.output_tokens
    prompts = sum(c.prompt_tokens + sum(f.prompt_tokens for f in c.forks) for c in done.values())
    assert prompts == after.prompt_tokens - before.prompt_tokens


def test_a_fork_shares_the_branchs_prefix(engine: VLLMEngine) -> None:
    """All whole blocks behind it are found in the cache: less than one block is computed again."""
    block = engine.info.probe_prefill
    assert block is not None
    [completion] = probed(
        engine, [request(sums(1, terms=20, seed=22)[0], 0, 400, probe_from=block, probe_every=block)]
    )[0].values()
    whole = [fork for fork in completion.forks if fork.prompt_tokens > block]
    assert whole
    assert all(fork.prompt_tokens - fork.cached_tokens <= block for fork in whole)


def test_cancelled_branches_take_their_anytime_answers_with_them(engine: VLLMEngine) -> None:
    before = engine.counters()
    for ticket, problem in enumerate(sums(6, terms=12, seed=23), start=1):
        engine.submit(ticket, request(problem, 0, 300, probe_every=3))
    for _ in range(20):
        engine.step()
    engine.abort(range(1, 7))
    done = dict(engine.step().finished)
    assert not engine._running
    after = engine.counters()
    assert (
        sum(c.output_tokens + c.probe_tokens for c in done.values())
        == after.output_tokens - before.output_tokens
    )


@pytest.mark.parametrize(
    "policy", ["adaptive?probe_every=16&max_samples=6&width=3", "parallel-probe?n=4&every=16"]
)
def test_policies_that_probe_work_live(engine: VLLMEngine, policy: str) -> None:
    problems = sums(12, terms=8, seed=24)
    before = engine.counters()
    run = Run(problems, engine, Settings(policy=policy, budget="3k tokens", max_thinking_tokens=200))
    results = list(run.results())
    after = engine.counters()
    assert all(r.answer is not None for r in results)
    assert any(b.probes for r in results for b in r.branches)
    assert sum(r.charge.tokens_probe for r in results) > 0
    assert sum(r.charge.tokens for r in results) == after.output_tokens - before.output_tokens
    assert sum(r.charge.tokens_prompt for r in results) == after.prompt_tokens - before.prompt_tokens
    assert run.driver.overrun == 0
