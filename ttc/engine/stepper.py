"""Times single steps of a running vLLM engine: the measuring half of ``ttc calibrate`` (the fit:
``ttc.costmodel.calibrate``).

Prompts are fixed random token streams, one per sequence, so that each cell's prefill is found in the
prefix cache once it has been done for the longest context, and no two sequences share KV pages. Prefill is
timed on fresh tokens.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ttc.errors import EngineError, InputError

if TYPE_CHECKING:
    from ttc.engine.vllm import VLLMEngine

WARM_STEPS = 2


class Counted(NamedTuple):
    """What vLLM estimates of one step; ``activation_bytes`` are part of ``bytes``."""

    flops: float
    bytes: float
    activation_bytes: float


class VLLMStepper:
    """Implements ``ttc.costmodel.calibrate.Stepper`` on an idle ``VLLMEngine``; ``repeats`` steps are
    timed per visit."""

    def __init__(self, engine: VLLMEngine, *, repeats: int = 9, seed: int = 0) -> None:
        self._engine, self._repeats = engine, repeats
        self._llm: Any = engine._llm
        shape = engine.info.shape
        if shape is None:
            raise InputError(
                f"calibrate: the shape of {engine.info.model} is not known; it needs a config.json"
            )
        self._vocab = shape.vocab
        self._fresh = random.Random(seed)
        self._streams: dict[int, list[int]] = {}
        self._names = itertools.count()

    @property
    def longest(self) -> int:
        """The longest context that leaves room for the timed steps."""
        return int(self._engine.info.context) - self._repeats - WARM_STEPS - 2

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
        self._add([self._fresh.randrange(self._vocab) for _ in range(tokens)], 1, None)
        return self._step()[0]

    def _decode(self, batch: int, context: int, kv_budget: int | None) -> list[float]:
        start = context - self._repeats // 2 - 1  # the timed steps straddle the wanted context
        names = [self._add(self._stream(i)[:start], 10**6, kv_budget) for i in range(batch)]
        started: set[str] = set()
        while len(started) < batch:
            started |= set(self._step()[1])
        for _ in range(WARM_STEPS):
            self._step()
        seconds = [self._step()[0] for _ in range(self._repeats)]
        self._llm.abort_request(names)
        while self._llm.has_unfinished_requests():
            self._llm.step()
        return seconds

    def _step(self) -> tuple[float, list[str]]:
        begun = time.perf_counter()
        outputs = self._llm.step()
        return time.perf_counter() - begun, [str(output.request_id) for output in outputs]

    def _add(self, ids: list[int], tokens: int, kv_budget: int | None) -> str:
        vllm = self._engine._vllm
        name = f"calibrate-{next(self._names)}"
        room = int(self._engine.info.context) - len(ids)
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=min(tokens, room),
            ignore_eos=True,
            detokenize=False,
            extra_args=None if kv_budget is None else {"kv_budget": kv_budget},
        )
        self._llm.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def _stream(self, index: int) -> list[int]:
        if index not in self._streams:
            source = random.Random(f"stream {index}")
            self._streams[index] = [
                source.randrange(self._vocab) for _ in range(int(self._engine.info.context))
            ]
        return self._streams[index]
