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
_ONE = np.uint64(1)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
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
    the ``streams`` that their seeds select, the tokens that are ``watched`` for, and their temperatures, top-k and top-p where any
    row has one."""

    size: int
    controls: list[Control]
    outputs: list[list[int]]
    rows: torch.Tensor | None
    index: NDArray[np.int64]
    streams: NDArray[np.uint64]
    watched: NDArray[np.int64]
    heat: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None


class Draws:
    """The rows of a batch that are drawn here: ``put`` and ``take`` as the batch changes, ``apply`` at each step."""

    def __init__(self) -> None:
        self._controls: dict[int, Control] = {}
        self._streams = np.zeros(0, np.uint64)
        self._settings = np.zeros((3, 0))  # temperature, top-p, top-k (0: none)
        self._watched = np.zeros(
            (1, 0), np.int64
        )  # of open thoughts: the delimiter's last token; end marks (-1: none)
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
            none = np.full((len(self._watched), more), -1, np.int64)
            self._watched = np.concatenate([self._watched, none], axis=1)
        self._controls[row] = control
        self._watch(control)
        self._streams[row] = _stream(control.seed)
        settings = control.temperature, control.top_p, control.top_k
        self._settings[:, row] = settings
        if settings != (1.0, 1.0, 0):
            self._special.add(row)
        else:
            self._special.discard(row)

    def _watch(self, control: Control) -> None:
        tokens: list[int] = []
        if control.open:
            tokens = [control.think_close[-1], *(control.ends if len(control.think_close) == 1 else ())]
        if len(tokens) > len(self._watched):
            none = np.full((len(tokens) - len(self._watched), self._watched.shape[1]), -1, np.int64)
            self._watched = np.concatenate([self._watched, none])
            self._batch = None
        self._watched[:, control.row] = -1
        self._watched[: len(tokens), control.row] = tokens

    def closed(self, control: Control) -> None:
        """The branch's thought is closed: an end is an end now."""
        self._watch(control)
        if self._batch is not None:
            self._batch.watched[:, np.searchsorted(self._batch.index, control.row)] = -1

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
        controls = [self._controls[row] for row in rows]
        return _Batch(
            size,
            controls,
            [control.output for control in controls],
            None if whole else torch.from_numpy(index),
            index,
            streams,
            self._watched[:, index],
            None if heat is None else torch.from_numpy(heat.astype(np.float32))[:, None],
            None if top_k is None or top_k.min() == vocabulary else torch.from_numpy(top_k.astype(np.int64)),
            None if top_p is None or top_p.min() == 1 else torch.from_numpy(top_p.astype(np.float32)),
        )

    def apply(self, logits: torch.Tensor) -> list[Control]:
        """Draw a token for each row and make it the one that a greedy sampler takes; an end mark that is drawn in an open thought
        closes it instead. Returns the branches whose thought that may have closed. ``logits``: [batch, vocabulary], float32."""
        batch = self._batch
        if batch is None or batch.size != len(logits):
            batch = self._batch = self._now(*logits.shape)
        own = logits if batch.rows is None else logits[batch.rows]
        own = own / batch.heat if batch.heat is not None else own
        if batch.top_k is not None or batch.top_p is not None:
            from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

            own = apply_top_k_top_p(own.clone() if own is logits else own, batch.top_k, batch.top_p)
        noise = np.fromiter(map(len, batch.outputs), np.uint64, len(batch.outputs))
        noise *= _GOLDEN
        noise += batch.streams
        _mix(noise)
        noise >>= _ONE
        drawn = torch.ops._C.fused_gumbel_argmax(own, torch.from_numpy(noise.view(np.int64))).numpy()
        found = batch.watched == drawn
        closing = self._closing(batch, found, drawn) if found.any() else []
        logits.numpy()[batch.index, drawn] = np.inf  # in place, for a fraction of torch's time
        return closing

    @staticmethod
    def _closing(batch: _Batch, found: NDArray[np.bool_], drawn: NDArray[np.int64]) -> list[Control]:
        """The branches for which a token that is watched for was drawn (what is forced stays as it is)."""
        closing = []
        for place in np.flatnonzero(found.any(0)).tolist():
            control = batch.controls[place]
            if not found[0, place] and not control.forcing():
                drawn[place] = control.think_close[-1]
            closing.append(control)
        return closing


def _stream(seed: int) -> int:
    """What a seed adds to its noise: ``_mix`` of seed + golden ratio."""
    z = (seed + int(_GOLDEN)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix(z: NDArray[np.uint64]) -> None:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64, in place."""
    z ^= z >> _SHIFTS[0]
    z *= _FACTORS[0]
    z ^= z >> _SHIFTS[1]
    z *= _FACTORS[1]
    z ^= z >> _SHIFTS[2]
