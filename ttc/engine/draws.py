"""Seeded samples of a whole batch at once: the token at a position is argmax(logits / T + Gumbel noise), and the noise is a
function of the branch's seed, the position and the token alone.

vLLM gives every seeded request a generator of its own and asks one after another at each step: 0.6 ms for 64 rows, a twentieth of a
small model's step, and a prefill that is cut kills its CPU engine, since a CPU generator can't be wound back. Counter-based noise
has no state: one call draws the batch, and a position that is sampled again after a preemption draws the same.

The cut by top-k and top-p is vLLM's own, and so is the kernel that adds the noise (SplitMix64 by seed and token).
This module imports torch and vLLM; nothing outside ``ttc.engine`` may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ttc.engine.control import Control

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def available() -> bool:
    """True if this vLLM has the kernel, and it does what we take it to do: its CPU build. Elsewhere requests carry their seeds and
    vLLM draws."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    current_platform.import_kernels()
    sure = torch.tensor([[-torch.inf, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]])
    try:
        drawn = torch.ops._C.fused_gumbel_argmax(sure, torch.tensor([1, 1 << 62]))
    except (AttributeError, RuntimeError):  # not there, or of another form
        return False
    return bool(drawn.tolist() == [1, 2])


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows of a batch that are drawn here (``rows``: None if they are the whole batch in order), with the ``streams`` that
    their seeds select, and their temperatures, top-k and top-p where any row has one."""

    controls: list[Control]
    rows: torch.Tensor | None
    index: torch.Tensor
    streams: NDArray[np.uint64]
    heat: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None

    @staticmethod
    def of(controls: Sequence[Control], batch: int, vocabulary: int) -> Draws:
        """``batch`` rows of ``vocabulary`` logits hold these branches."""
        drawn = sorted(controls, key=lambda c: c.row)
        index = torch.tensor([c.row for c in drawn])
        heats, tops = [c.temperature for c in drawn], [c.top_p for c in drawn]
        ks = [c.top_k if 0 < c.top_k < vocabulary else vocabulary for c in drawn]
        return Draws(
            drawn,
            None if len(drawn) == batch else index,
            index,
            _mixed(np.array([c.seed & _MASK for c in drawn], np.uint64) + _GOLDEN),
            torch.tensor(heats)[:, None] if any(heat != 1 for heat in heats) else None,
            torch.tensor(ks) if min(ks) < vocabulary else None,
            torch.tensor(tops) if min(tops) < 1 else None,
        )

    def apply(self, logits: torch.Tensor) -> None:
        """Draw a token for each row and make it the one that a greedy sampler takes. ``logits``: [batch, vocabulary], float32."""
        own = logits if self.rows is None else logits[self.rows]
        own = own / self.heat if self.heat is not None else own
        if self.top_k is not None or self.top_p is not None:
            from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

            own = apply_top_k_top_p(own.clone() if own is logits else own, self.top_k, self.top_p)
        at = np.fromiter((len(c.output) for c in self.controls), np.uint64, len(self.controls))
        noise = torch.from_numpy((_mixed(self.streams + at * _GOLDEN) >> np.uint64(1)).astype(np.int64))
        logits[self.index, torch.ops._C.fused_gumbel_argmax(own, noise)] = torch.inf


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
