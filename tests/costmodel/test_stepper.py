"""The stepper drives an engine as calibrate expects: right batch, right context, right KV budget, nothing left running."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ttc.costmodel import ModelShape
from ttc.engine.stepper import VLLMStepper
from ttc.errors import EngineError, InputError


class ScriptedLLM:
    """vLLM's three verbs: prefills one sequence a step, then decodes all; remembers what every step saw. A step takes a second a
    token of its contexts."""

    def __init__(self, fail: bool = False, blocks: int = 64) -> None:
        cache = SimpleNamespace(block_size=32, num_gpu_blocks=blocks)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.waiting: list[tuple[str, int, Any]] = []
        self.running: dict[str, list[int]] = {}
        self.steps: list[list[int]] = []
        self.told: list[Any] = []
        self.loses: int | None = None  # from this step on a sequence is missing
        self.fail = fail
        self.now = 0.0

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        self.waiting.append((name, len(prompt["prompt_token_ids"]), params))
        self.told.append(params.extra_args)

    def step(self) -> list[Any]:
        if self.fail:
            raise RuntimeError("out of blocks")
        if self.waiting:
            name, prompt, params = self.waiting.pop(0)
            self.running[name] = [prompt, params.max_tokens]
        for state in self.running.values():
            state[0] += 1
            state[1] -= 1
        outputs = [SimpleNamespace(request_id=name) for name in self.running]
        self.steps.append([context for context, _ in self.running.values()])
        self.now += sum(self.steps[-1])
        if self.loses is not None and len(self.steps) > self.loses:
            outputs = outputs[1:]
        self.running = {name: state for name, state in self.running.items() if state[1] > 0}
        return outputs

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.running.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.waiting)


def _stepper(llm: ScriptedLLM, repeats: int = 5, **options: Any) -> VLLMStepper:
    info = SimpleNamespace(context=512, concurrency=4, model="scripted", shape=ModelShape.named("Qwen3-0.6B"))
    vllm = SimpleNamespace(SamplingParams=lambda **fields: SimpleNamespace(**fields))
    engine: Any = SimpleNamespace(_llm=llm, info=info, _vllm=vllm)
    return VLLMStepper(engine, repeats=repeats, **options)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    """One whose clock is the stepper's."""
    scripted = ScriptedLLM()
    monkeypatch.setattr("ttc.engine.stepper.time", SimpleNamespace(perf_counter=lambda: scripted.now))
    return scripted


def test_decode_times_full_batches_at_the_wanted_context(llm: ScriptedLLM) -> None:
    seconds = _stepper(llm).measure(3, 100, None, "decode")
    timed = llm.steps[-5:]
    assert seconds == [sum(contexts) for contexts in timed]
    assert all(len(contexts) == 3 for contexts in timed)
    assert all(abs(context - 100) <= 10 for contexts in timed for context in contexts)
    assert not llm.has_unfinished_requests()


def test_prefill_times_one_fresh_prompt(llm: ScriptedLLM) -> None:
    assert _stepper(llm, repeats=9).measure(1, 64, None, "prefill") == [65.0] * 3
    assert llm.steps == [[65]] * 3


def test_a_decode_asks_for_a_filled_context_and_for_its_kv_budget() -> None:
    llm = ScriptedLLM()
    stepper = _stepper(llm, kv_method="quest")
    stepper.measure(1, 100, None, "decode")
    stepper.measure(1, 100, 64, "decode")
    stepper.measure(1, 100, None, "prefill")
    filled = {"kv_transfer_params": {"ttc_filled": True}}
    assert llm.told[0] == filled
    assert llm.told[1] == filled | {"ttc_kv": {"budget": 64, "method": "quest"}}
    assert llm.told[2] is None


def test_a_batch_that_shrinks_is_no_measurement() -> None:
    llm = ScriptedLLM()
    llm.loses = 6
    with pytest.raises(EngineError, match="did not keep 3 sequences"):
        _stepper(llm).measure(3, 100, None, "decode")


def test_cells_that_do_not_fit_are_refused() -> None:
    stepper = _stepper(ScriptedLLM())
    with pytest.raises(InputError, match="batch 9 exceeds"):
        stepper.measure(9, 10, None, "decode")
    with pytest.raises(InputError, match="context 511 exceeds"):
        stepper.measure(1, 511, None, "decode")
    small = _stepper(ScriptedLLM(blocks=10))
    assert small.fits(2, 100)
    assert not small.fits(3, 100)
    with pytest.raises(InputError, match="exceed the KV cache"):
        small.measure(3, 100, None, "decode")
    with pytest.raises(EngineError, match="out of blocks"):
        _stepper(ScriptedLLM(fail=True)).measure(1, 10, None, "decode")
