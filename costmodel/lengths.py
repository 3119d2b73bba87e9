"""Lengths are distributions: what chains of unequal length cost, on average, in a batch, and with
deepening's triggers.

Owns the moments E[L], E[L²] (Kinetics eq. (10)) and expectations over them; ``costs`` prices one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttc.costmodel.costs import Cost, full, kinetics
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Observed lengths of chains in tokens, one entry per chain."""

    tokens: NDArray[np.float64]

    def __post_init__(self) -> None:
        values = np.asarray(self.tokens, dtype=np.float64).ravel()
        if values.size == 0 or not np.all(np.isfinite(values)) or np.any(values < 0):
            raise InputError("lengths: need at least one chain, each of 0 or more tokens and finite")
        object.__setattr__(self, "tokens", values)

    @property
    def mean(self) -> float:
        """E[L]."""
        return float(self.tokens.mean())

    @property
    def second_moment(self) -> float:
        """E[L²]."""
        return float((self.tokens**2).mean())

    @property
    def spread(self) -> float:
        """E[L²] / E[L]², 1 for chains of one length. What a mean alone leaves out of a quadratic cost."""
        return self.second_moment / self.mean**2 if self.mean else 1.0

    def capped(self, thinking_tokens: float, answer_tokens: float = 0.0) -> Lengths:
        """The same chains cut at ``thinking_tokens``; a cut chain then spends ``answer_tokens`` on a
        forced answer."""
        cut = self.tokens > thinking_tokens
        return Lengths(np.where(cut, thinking_tokens + answer_tokens, self.tokens))

    def expect(self, price: Callable[[Any], Cost]) -> Cost:
        """The mean cost over the chains; exact for any convention and any sparse method, because it prices
        each length."""
        each = price(self.tokens)
        return Cost(float(np.mean(each.flops)), float(np.mean(each.bytes)))


def kinetics_moments(
    shape: ModelShape, *, prompt_tokens: float, mean_tokens: float, second_moment: float, samples: float = 1
) -> Cost:
    """Kinetics eq. (10): the dense cost of N chains from E[L] and E[L²] alone.

    C = 2NP E[L] + 2rN L_in D E[L] + rND E[L²] (FLOPs) and 2 L_in D E[L] + N D E[L²] (bytes). Raises
    InputError when the moments are impossible (E[L²] < E[L]²).
    """
    if not second_moment >= mean_tokens**2 * (1 - 1e-12) or not mean_tokens >= 0:
        raise InputError(
            f"second_moment is {second_moment} with mean_tokens {mean_tokens}; E[L²] is never below E[L]²"
        )
    at_mean = kinetics(shape, prompt_tokens=prompt_tokens, generated_tokens=mean_tokens, samples=samples)
    excess = samples * (second_moment - mean_tokens**2)
    return at_mean + Cost(shape.pair_flops * excess / 2, shape.kv_elements * excess)


def batch_cost(
    shape: ModelShape, *, prompt_tokens: NDArray[Any], generated_tokens: NDArray[Any], **sparse: Any
) -> Cost:
    """The ``full`` cost of sequences of unequal lengths that start together and leave as they finish.

    The step over the k longest survivors reads the weights once: a batch of lengths L reads them max(L) -
    1 times after one shared prefill pass. (MoE: each step over b sequences reads the experts that b are
    expected to touch.)
    """
    pair = np.broadcast_arrays(np.asarray(prompt_tokens, float), np.asarray(generated_tokens, float))
    prompts, lengths = pair[0].ravel(), pair[1].ravel()
    unread = np.zeros_like(lengths)  # the weights are counted below, over the whole batch
    each = full(shape, prompt_tokens=prompts, generated_tokens=lengths, weight_reads=unread, **sparse)
    alive_until = np.sort(np.maximum(lengths - 1, 0))[::-1]  # decode steps of each sequence, longest first
    spans = alive_until - np.append(alive_until[1:], 0.0)  # steps with exactly k+1 sequences alive
    sizes = np.arange(1, lengths.size + 1)
    weights = float(np.sum(spans * shape.step_weight_bytes(sizes)))
    if prompts.sum() > 0:
        weights += float(shape.step_weight_bytes(float(prompts.sum())))
    return Cost(float(np.sum(each.flops)), float(np.sum(each.bytes)) + weights)


def deepening_triggers(thinking_tokens: float, first_tokens: float, growth: float) -> int:
    """How many correction triggers iterative deepening (arXiv 2502.05449) inserts in a chain of
    ``thinking_tokens``.

    A trigger stands at every checkpoint B0·gamma^k of total tokens that the chain reaches unfinished: for
    gamma > 1 at most 1 + floor(log_gamma(L/B0)); for gamma = 1 one per B0 tokens. Raises InputError for B0
    <= 0 or gamma < 1.
    """
    if not first_tokens > 0 or not growth >= 1:
        raise InputError(f"deepening from {first_tokens} tokens by {growth}; use first > 0 and growth >= 1")
    if thinking_tokens <= first_tokens:
        return 0
    if growth == 1:
        return math.ceil(thinking_tokens / first_tokens) - 1
    count = last = k = 0
    while (checkpoint := math.ceil(min(first_tokens * growth**k, thinking_tokens))) < thinking_tokens:
        if checkpoint > last:
            count, last, k = count + 1, checkpoint, k + 1
        else:  # on to where it is more
            k = max(k + 1, int(math.log(last / first_tokens) / math.log(growth)))
    return count


def deepening_cost(
    shape: ModelShape,
    *,
    prompt_tokens: float,
    thinking_tokens: float,
    first_tokens: float,
    growth: float,
    trigger_tokens: int,
    price: Callable[..., Cost] = full,
    **options: Any,
) -> Cost:
    """One deepened chain: its own tokens plus its triggers', decoded in the same cache (nothing is
    prefilled again)."""
    triggers = deepening_triggers(thinking_tokens, first_tokens, growth)
    total = thinking_tokens + triggers * trigger_tokens
    return price(shape, prompt_tokens=prompt_tokens, generated_tokens=total, **options)
