"""Times single steps of a running vLLM engine: the measuring half of ``ttc calibrate`` (the fit:
``ttc.costmodel.calibrate``).

The KV of a decoded context is random numbers (``ttc.engine.filled``), so no prefill stands before a decode step and no two
sequences share KV pages. Prefill is timed on tokens that no cache has. Values don't matter to the time of a dense step or of one
that selects pages.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ttc.attention.settings import DEFAULT_METHOD, KvSetting
from ttc.errors import EngineError, InputError

if TYPE_CHECKING:
    from ttc.engine.vllm import VLLMEngine

WARM_STEPS = 2
ENGINE_ARGS: Mapping[str, Any] = {
    "enable_prefix_caching": False,
    "kv_transfer_config": {
        "kv_connector": "FilledContexts",
        "kv_connector_module_path": "ttc.engine.filled",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"startup_fill": True, "fill_mean": 0.0, "fill_std": 1.0},
    },
}
"""What an engine that is stepped has to be started with (``EngineArgs``)."""


ASKED = "ttc_filled"
"""The key of ``kv_transfer_params`` that asks for a filled context."""


class Counted(NamedTuple):
    """What vLLM estimates of one step; ``activation_bytes`` are part of ``bytes``."""

    flops: float
    bytes: float
    activation_bytes: float


class VLLMStepper:
    """Implements ``ttc.costmodel.calibrate.Stepper`` on an idle ``VLLMEngine`` that was started with ``ENGINE_ARGS``; ``repeats``
    steps are timed per visit; ``kv_method`` reads what a KV budget lets be read."""

    def __init__(
        self, engine: VLLMEngine, *, repeats: int = 9, seed: int = 0, kv_method: str = DEFAULT_METHOD
    ) -> None:
        self._engine, self._repeats, self._method = engine, repeats, kv_method
        self._llm: Any = engine._llm
        shape = engine.info.shape
        if shape is None:
            raise InputError(
                f"calibrate: the shape of {engine.info.model} is not known; it needs a config.json"
            )
        self._vocab = shape.vocab
        self._random = random.Random(seed)
        self._names = itertools.count()

    @property
    def longest(self) -> int:
        """The longest context that leaves room for the timed steps."""
        return int(self._engine.info.context) - self._repeats - WARM_STEPS - 2

    @property
    def capacity(self) -> float:
        """Tokens that the KV cache holds, all sequences together; infinity where vLLM does not say."""
        config = self._llm.vllm_config.cache_config
        tokens = getattr(config, "kv_cache_size_tokens", None)
        return float(tokens or (config.num_gpu_blocks or math.inf) * config.block_size)

    def fits(self, batch: int, context: int) -> bool:
        """Whether the KV cache holds ``batch`` sequences of this context, with the steps that are timed."""
        page = int(self._llm.vllm_config.cache_config.block_size)
        pages = -(-(context + self._repeats + WARM_STEPS) // page)
        return batch * pages * page <= self.capacity

    def measure(
        self, batch: int, context: int, kv_budget: int | None, phase: Literal["decode", "prefill"]
    ) -> list[float]:
        """Seconds of ``repeats`` steps; raises InputError for a cell that does not fit the engine."""
        if batch > self._engine.info.concurrency:
            raise InputError(
                f"calibrate: batch {batch} exceeds the engine's {self._engine.info.concurrency}; lower it"
            )
        if context > self.longest:
            raise InputError(f"calibrate: context {context} exceeds {self.longest} here; lower --contexts")
        if not self.fits(batch, context):
            raise InputError(
                f"calibrate: {batch} sequences of {context} tokens exceed the KV cache ({self.capacity:,.0f} tokens); lower either"
            )
        try:
            if phase == "prefill":
                return [self._prefill(context) for _ in range(max(2, self._repeats // 3))]
            return self._decode(batch, context, kv_budget)
        except (InputError, EngineError):
            raise
        except Exception as error:
            raise EngineError(
                f"calibrate: vLLM failed at batch {batch}, context {context}: {error}"
            ) from error

    def counters(self, batch: int, context: int, phase: Literal["decode", "prefill"]) -> Counted | None:
        """vLLM's own estimate (``--enable-mfu-metrics``) for the same step: FLOPs, bytes moved, and the
        part of the bytes that are activations, which our model leaves out. None where this vLLM or this
        model has no estimate."""
        try:
            from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

            model = ModelMetrics(self._llm.vllm_config)
        except Exception:  # a private part of vLLM that other versions lack
            return None
        if not model.is_enabled():
            return None
        step = ExecutionContext()
        for _ in range(batch if phase == "decode" else 1):
            step.add(1 if phase == "decode" else context, context, is_prefill=phase == "prefill")
        reads = model.get_read_bytes_breakdown(step)
        writes = model.get_write_bytes_breakdown(step)
        kept = ("weight", "weights", "kv_cache", "attn_input")
        activations = sum(
            v for part in (reads, writes) for k, v in part.items() if not any(word in k for word in kept)
        )
        moved = sum(reads.values()) + sum(writes.values())
        return Counted(float(model.get_num_flops(step)), float(moved), float(activations))

    def _prefill(self, tokens: int) -> float:
        self._add(tokens, 1, {})
        seconds = 0.0
        while self._llm.has_unfinished_requests():  # more than one step where vLLM cuts a long prefill
            seconds += self._step()[0]
        return seconds

    def _decode(self, batch: int, context: int, kv_budget: int | None) -> list[float]:
        told: dict[str, Any] = {"kv_transfer_params": {ASKED: True}}
        if kv_budget is not None:
            told |= KvSetting(kv_budget, self._method).extra_args()
        start = max(
            1, context - self._repeats // 2 - WARM_STEPS - 1
        )  # the timed steps straddle the wanted context
        names = [self._add(start, 10**6, told) for _ in range(batch)]
        started: set[str] = set()
        while len(started) < batch:
            started |= set(self._step()[1])
        for _ in range(WARM_STEPS):
            self._step()
        timed = [self._step() for _ in range(self._repeats)]
        self._llm.abort_request(names)
        while self._llm.has_unfinished_requests():
            self._llm.step()
        if any(len(moved) != batch for _, moved in timed):
            raise EngineError(f"calibrate: vLLM did not keep {batch} sequences of {context} tokens in a step")
        return [seconds for seconds, _ in timed]

    def _step(self) -> tuple[float, list[str]]:
        begun = time.perf_counter()
        outputs = self._llm.step()
        return time.perf_counter() - begun, [str(output.request_id) for output in outputs]

    def _add(self, length: int, tokens: int, told: Mapping[str, Any]) -> str:
        vllm = self._engine._vllm
        name = f"calibrate-{next(self._names)}"
        ids = self._random.choices(range(self._vocab), k=length)
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=min(tokens, int(self._engine.info.context) - length),
            ignore_eos=True,
            detokenize=False,
            extra_args=dict(told) or None,
        )
        self._llm.add_request(name, {"prompt_token_ids": ids}, params)
        return name
