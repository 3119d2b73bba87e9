"""Seeded samples of a whole batch at once: the token at a position is argmax(logits / T + Gumbel noise), and the noise is a
function of the branch's seed, the position and the token alone.

vLLM gives every seeded request a generator of its own and asks one after another at each step: 0.6 ms for 64 rows, a twentieth of a
small model's step, and a prefill that is cut kills its CPU engine, since a CPU generator can't be wound back. Counter-based noise
has no state: one call draws the batch, and a position that is sampled again after a preemption draws the same.

The cut by top-k and top-p is vLLM's own, and so is the kernel that adds the noise (SplitMix64 by seed and token).
This module imports torch and vLLM; nothing outside ``ttc.engine`` may import it.
"""

from __future__ import annotations

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
class _Batch:
    """What a batch of so many rows needs at each step: the ``outputs`` of its drawn rows in order (``rows``: None if they are all),
    the ``streams`` that their seeds select, and their temperatures, top-k and top-p where any row has one."""

    size: int
    outputs: list[list[int]]
    rows: torch.Tensor | None
    index: NDArray[np.int64]
    streams: NDArray[np.uint64]
    heat: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None


class Draws:
    """The rows of a batch that are drawn here: ``put`` and ``take`` as the batch changes, ``apply`` at each step."""

    def __init__(self) -> None:
        self._controls: dict[int, Control] = {}
        self._streams = np.zeros(0, np.uint64)
        self._settings = np.zeros((3, 0))  # temperature, top-p, top-k (0: none)
        self._special: set[int] = set()  # rows with other settings than temperature 1 alone
        self._batch: _Batch | None = None

    def __len__(self) -> int:
        return len(self._controls)

    def put(self, control: Control) -> None:
        row, self._batch = control.row, None
        if row >= len(self._streams):
            more = max(64, row + 1)
            self._streams = np.concatenate([self._streams, np.zeros(more, np.uint64)])
            self._settings = np.concatenate([self._settings, np.zeros((3, more))], axis=1)
        self._controls[row] = control
        self._streams[row] = _stream(control.seed)
        settings = control.temperature, control.top_p, control.top_k
        self._settings[:, row] = settings
        if settings != (1.0, 1.0, 0):
            self._special.add(row)
        else:
            self._special.discard(row)

    def take(self, row: int) -> None:
        self._controls.pop(row, None)
        self._special.discard(row)
        self._batch = None

    def _now(self, size: int, vocabulary: int) -> _Batch:
        rows = sorted(self._controls)
        whole = len(rows) == size
        index = np.array(rows)
        streams = self._streams[:size].copy() if whole else self._streams[rows]
        heat = top_p = top_k = None
        if self._special:
            heat, top_p, top_k = self._settings[:, rows]
            top_k = np.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)
        return _Batch(
            size,
            [self._controls[row].output for row in rows],
            None if whole else torch.from_numpy(index),
            index,
            streams,
            None if heat is None else torch.from_numpy(heat.astype(np.float32))[:, None],
            None if top_k is None or top_k.min() == vocabulary else torch.from_numpy(top_k.astype(np.int64)),
            None if top_p is None or top_p.min() == 1 else torch.from_numpy(top_p.astype(np.float32)),
        )

    def apply(self, logits: torch.Tensor) -> None:
        """Draw a token for each row and make it the one that a greedy sampler takes. ``logits``: [batch, vocabulary], float32."""
        batch = self._batch
        if batch is None or batch.size != len(logits):
            batch = self._batch = self._now(*logits.shape)
        own = logits if batch.rows is None else logits[batch.rows]
        own = own / batch.heat if batch.heat is not None else own
        if batch.top_k is not None or batch.top_p is not None:
            from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

            own = apply_top_k_top_p(own.clone() if own is logits else own, batch.top_k, batch.top_p)
        at = np.fromiter(map(len, batch.outputs), np.uint64, len(batch.outputs))
        noise = torch.from_numpy((_mixed(batch.streams + at * _GOLDEN) >> np.uint64(1)).view(np.int64))
        drawn = torch.ops._C.fused_gumbel_argmax(own, noise)
        logits.numpy()[batch.index, drawn.numpy()] = np.inf  # in place, for a fraction of torch's time


def _stream(seed: int) -> int:
    """What a seed adds to its noise: ``_mixed`` of seed + golden ratio."""
    z = (seed + int(_GOLDEN)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
