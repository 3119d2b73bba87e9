"""What work costs: turns an engine's counts into a Charge, and bounds what the next piece can cost before it is submitted.

The one place where tokens become FLOPs, bytes, eFLOPs and dollars (formulas: ``ttc.costmodel``). ``full`` is charged with the
weight reads that the engine measured (the branch's share of each step); where the engine can't see its batch, with those of a full
one (its concurrency), and the bound uses the same. Likewise sparse decoding: charged is dense decoding less what the engine counted
as skipped, and dense decoding where it can't count; the bound takes off what is sure to be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ttc.attention.worth import VECTORS
from ttc.budget import Unit
from ttc.costmodel import KINETICS_INTENSITY, Cost, ModelShape, full, kinetics, kv_reads
from ttc.errors import InputError
from ttc.types import Charge, Completion, Problem, Request

if TYPE_CHECKING:
    from ttc.jobs import RewardModel


class Kinetics(NamedTuple):
    """A branch's eFLOPs by the paper: its own, and the prompt reads that it shares with the problem's other branches."""

    own: float
    shared: float


@dataclass(frozen=True, slots=True)
class Pricer:
    """``intensity`` in FLOP/byte; dollar prices per million tokens; ``kv_page`` the engine's tokens of a KV page;
    ``kv_force`` its word (``SparseEngine.sparse``) on where a KV budget and a method are in force (None: perhaps nowhere)."""

    shape: ModelShape | None
    concurrency: int
    measures_batch: bool
    intensity: float = KINETICS_INTENSITY
    usd_per_m_input: float | None = None
    usd_per_m_output: float | None = None
    kv_page: int | None = None
    kv_force: Callable[[int, str | None], tuple[float, float] | None] | None = None

    def check(self, unit: Unit) -> None:
        """Raise InputError if this unit can't be charged on this engine."""
        if unit == "eflops" and self.shape is None:
            raise InputError(
                "budget: eFLOPs can't be charged, the server's model config is unknown; pass --shape MODEL or use tokens"
            )
        if unit == "dollars" and self.usd_per_m_output is None:
            raise InputError(
                "budget: dollars need a price; pass --price-output (and --price-input) per million tokens"
            )

    def _reads(self, tokens: int, measured: float | None) -> float:
        if measured is not None and self.measures_batch:
            return measured
        return tokens / self.concurrency

    def charge(self, request: Request, completion: Completion, seconds: float) -> Charge:
        """The price of what the engine did for one branch, whatever its end."""
        tokens = completion.output_tokens + (0 if completion.forks else completion.probe_tokens)
        prompt = completion.prompt_tokens + sum(fork.prompt_tokens for fork in completion.forks)
        flops = moved = eflops = own = 0.0
        if self.shape is not None and tokens:
            if completion.calls:
                cost = sum((self._fork(*call) for call in completion.calls), Cost())
            else:
                cost = full(
                    self.shape,
                    prompt_tokens=completion.prompt_tokens,
                    cached_prompt_tokens=completion.cached_tokens,
                    generated_tokens=tokens,
                    weight_reads=self._reads(tokens, completion.weight_reads),
                )
            cost -= self._skipped(completion.kv_skipped or 0.0, completion.kv_scored)
            flops, moved, eflops = float(cost.flops), float(cost.bytes), float(cost.eflops(self.intensity))
            own = self.kinetics(request, completion).own
        for fork in completion.forks if self.shape is not None else ():
            cost = self._fork(*fork)
            flops, moved = flops + float(cost.flops), moved + float(cost.bytes)
            eflops += float(cost.eflops(self.intensity))
        if completion.calls:
            read = sum(kv_reads(call.prompt_tokens, call.output_tokens) for call in completion.calls)
        else:
            read = kv_reads(completion.prompt_tokens, tokens)
        read += sum(kv_reads(fork.prompt_tokens, fork.output_tokens) for fork in completion.forks)
        return Charge(
            tokens_generated=completion.generated_tokens,
            tokens_forced=completion.forced_tokens,
            tokens_probe=completion.probe_tokens,
            tokens_prompt=prompt,
            flops=flops,
            bytes=moved,
            eflops=eflops,
            eflops_kinetics=own,
            seconds=seconds,
            dollars=self._dollars(prompt, completion.output_tokens + completion.probe_tokens),
            kv_tokens=read - (completion.kv_skipped or 0.0),
        )

    def reading(self, reward: RewardModel, problem: Problem, texts: Sequence[str]) -> Charge:
        """The price of scoring ``texts``: one prefill, all of them in one pass over the weights; dollars as for prompt tokens. Of a
        model that does not tell its shape only the tokens are charged."""
        shape: ModelShape | None = getattr(reward, "shape", None)
        if shape is None:
            tokens = reward.tokens(problem, texts)
            return Charge(tokens_judge=tokens, dollars=self._dollars(tokens, 0))
        rows: Sequence[tuple[int, int]] = reward.reads(problem, texts)  # type: ignore[attr-defined]  # what has a shape has it
        tokens, cost = sum(length - known for length, known in rows), Cost(0.0, 0.0)
        for length, known in rows:
            cost += full(
                shape,
                prompt_tokens=length,
                cached_prompt_tokens=known,
                generated_tokens=0,
                weight_reads=1 / len(rows),
            )
        return Charge(
            tokens_judge=tokens, flops=float(cost.flops), bytes=float(cost.bytes), eflops=float(cost.eflops(self.intensity)),
            dollars=self._dollars(tokens, 0),
        )  # fmt: skip

    def _sparse(self, request: Request) -> dict[str, Any]:
        if request.kv_budget is None:
            return {}
        return {"kv_budget": request.kv_budget, "method": request.kv_method, "kv_block": self.kv_page}

    def _skipped(self, tokens: float, scored: float) -> Cost:
        """What ``tokens`` unread KV tokens save in the layers without a window, less the scoring of ``scored`` page vectors."""
        if self.shape is None or not (tokens or scored):
            return Cost(0.0, 0.0)
        shape, layers = self.shape, sum(n for n, window in self.shape.attention if window is None)
        flops = tokens * shape.pair_flops_per_layer - scored * shape.key_pair_flops_per_layer
        elements = tokens * shape.kv_elements_per_layer - scored * shape.key_elements_per_layer
        return Cost(layers * flops, layers * elements * shape.kv_bytes_per_element)

    def _sure(self, request: Request, prompt: int, tokens: int) -> Cost:
        """What sparse decoding is sure to save a branch of ``tokens`` output tokens: in each step past the context from which the
        budget is in force all but the budget, less the scoring of every page."""
        told = None
        if request.kv_budget is not None and self.kv_force is not None:
            told = self.kv_force(request.kv_budget, request.kv_method)
        below, part = told if told is not None else (math.inf, 0.0)
        last = prompt + tokens - 1
        if request.kv_budget is None or self.kv_page is None or last <= below:
            return Cost(0.0, 0.0)
        kept = max(1, request.kv_budget // self.kv_page) * self.kv_page
        first, scoring = max(prompt, int(below), kept) + 1, max(prompt, int(below)) + 1
        skipped = max(0, last - first + 1) * ((first + last) / 2 - kept)
        scored = (last - scoring + 1) * ((scoring + last) / 2 / self.kv_page + 1)
        scored *= VECTORS.get(request.kv_method or "", 0)
        return self._skipped(part * skipped, scored)

    def _fork(self, prompt: int, cached: int, tokens: int, reads: float | None) -> Cost:
        assert self.shape is not None
        return full(
            self.shape,
            prompt_tokens=prompt,
            cached_prompt_tokens=cached,
            generated_tokens=tokens,
            weight_reads=self._reads(tokens, reads),
        )

    def most_fork(self, unit: Unit, prompt: int, prefill: int, tokens: int) -> float:
        """The most, in ``unit``, that an anytime answer of ``tokens`` tokens can cost as a request of its own behind ``prompt``
        tokens, of which at most ``prefill`` are computed again; it may be alone in each of its steps."""
        if unit == "tokens":
            return float(tokens)
        if unit == "dollars":
            return self._dollars(prompt, tokens)
        if unit == "seconds" or self.shape is None:
            return 0.0
        return max(
            float(self._fork(prompt, cached, tokens, float(tokens)).eflops(self.intensity))
            for cached in {max(prompt - prefill, 0), max(prompt - 1, 0)}
        )

    def kinetics(self, request: Request, completion: Completion) -> Kinetics:
        """Kinetics Eq. 4 for one of N branches, dense unless it is known to have skipped KV tokens. The equation is linear in N:
        its slope is the branch's own cost, its intercept the prompt's KV reads, which the paper shares over the N. Of several calls
        the prompt is the first's: what later ones repeat is the branch's own output."""
        if self.shape is None or not completion.output_tokens:
            return Kinetics(0.0, 0.0)
        prompt = completion.calls[0].prompt_tokens if completion.calls else completion.prompt_tokens
        one, two = (
            kinetics(
                self.shape,
                prompt_tokens=prompt,
                generated_tokens=completion.output_tokens,
                samples=n,
                **(self._sparse(request) if completion.kv_skipped else {}),
            ).eflops(self.intensity)
            for n in (1, 2)
        )
        return Kinetics(float(two - one), float(2 * one - two))

    def _dollars(self, prompt: int, output: int) -> float:
        return prompt * (self.usd_per_m_input or 0.0) / 1e6 + output * (self.usd_per_m_output or 0.0) / 1e6

    def most(
        self, unit: Unit, request: Request, prompt: int, tokens: int, *, done: int = 0, reads: float = 0.0
    ) -> float:
        """The most that a branch can cost, in ``unit``, if it ends at ``tokens`` output tokens: ``done`` of them with ``reads``
        weight reads are history, each later one may be alone in its step. Seconds have no such bound (0: the driver watches the
        clock).
        """
        if unit == "tokens":
            return float(tokens)
        if unit == "dollars":
            return (
                prompt * (self.usd_per_m_input or 0.0) / 1e6 + tokens * (self.usd_per_m_output or 0.0) / 1e6
            )
        if unit == "seconds" or self.shape is None:
            return 0.0
        worst = self._reads(tokens, reads + tokens - done)
        saved = float(self._sure(request, prompt, tokens).eflops(self.intensity))
        return max(
            float(
                full(
                    self.shape,
                    prompt_tokens=prompt,
                    cached_prompt_tokens=cached,
                    generated_tokens=tokens,
                    weight_reads=worst,
                ).eflops(self.intensity)
            )
            - saved
            for cached in (0, max(prompt - 1, 0))
        )


def spent_in(unit: Unit, charge: Charge) -> float:
    """A charge in a budget's unit."""
    return float(getattr(charge, unit))
