"""Reading chains without reading anything twice: keys and values of what a reward model has read are kept, as an engine keeps them.

A search scores a chain at the end of each step. Every step goes on from one that was scored, so only its own tokens are new; chains
of one problem share its prompt, and siblings all that is before their fork.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ttc.rl.model import Block, Trunk, rope

BATCH_TOKENS = 8192
KEPT_BYTES = 256 * 2**20
"""Keys and values that are kept; of more, those not used for the longest time are dropped, and read again if they are wanted."""


@dataclass(frozen=True, slots=True)
class Read:
    """A sequence that was read: for each layer its keys and values, each (G, T, E), and the last hidden state (D,)."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    last: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


@dataclass(slots=True)
class Reader:
    """Reads sequences into a trunk. ``fresh`` says how many tokens that will compute, and ``last`` computes just those."""

    trunk: Trunk
    most_bytes: int = KEPT_BYTES
    _kept: OrderedDict[int, Read] = field(default_factory=OrderedDict)  # by ``_marks`` of its whole
    _bytes: int = 0

    def planned(self, rows: Sequence[Sequence[int]], shared: int) -> list[tuple[int, int]]:
        """What reading ``rows`` computes: of each sequence its length, and how much of it is known by then. Their first ``shared``
        tokens, the same in all, are computed once at the most."""
        return [(len(ids), known) for ids, known in self._plan(rows, shared)]

    @torch.no_grad()
    def last(self, rows: Sequence[Sequence[int]], shared: int) -> Tensor:
        """(N, D) last hidden states of ``rows``."""
        plan = [ids for ids, _ in self._plan(rows, shared)]
        apart = 1 if plan and len(plan[0]) == shared else 0  # the others go on from it
        parts, rest = [plan[:apart]], sorted(plan[apart:], key=len, reverse=True)
        while rest:
            count = max(1, BATCH_TOKENS // len(rest[0]))
            parts, rest = [*parts, rest[:count]], rest[count:]
        held = {ids: read for ids in map(tuple, rows) if (read := self._find(ids)) is not None}
        for part in parts:
            for read in self._extend(part, [self._longest(ids) for ids in part]):
                held[read.ids] = read
                self._kept[_marks(read.ids)[-1]] = read
                self._bytes += read.bytes
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].bytes
        return torch.stack([held[tuple(ids)].last for ids in rows])

    def _plan(self, rows: Sequence[Sequence[int]], shared: int) -> list[tuple[tuple[int, ...], int]]:
        """What is to be read, each sequence once, with how much of it is known by then; the shared beginning first, if it is not
        known and several need it."""
        wanted = [ids for ids in dict.fromkeys(map(tuple, rows)) if self._find(ids) is None]
        known = {ids: len(read.ids) if (read := self._longest(ids)) is not None else 0 for ids in wanted}
        if not shared or sum(n < shared for n in known.values()) < 2:
            return list(known.items())
        prompt = wanted[0][:shared]
        begun = self._longest(prompt)
        first = (prompt, len(begun.ids) if begun is not None else 0)
        return [first, *((ids, max(n, shared)) for ids, n in known.items() if ids != prompt)]

    def _find(self, ids: tuple[int, ...]) -> Read | None:
        read = self._kept.get(_marks(ids)[-1]) if ids else None
        return read if read is not None and read.ids == ids else None

    def _longest(self, ids: tuple[int, ...]) -> Read | None:
        """The longest beginning of ``ids`` that is kept, but not all of it."""
        marks = _marks(ids)
        for n in range(len(ids) - 1, 0, -1):
            read = self._kept.get(marks[n - 1])
            if read is not None and read.ids == ids[:n]:
                self._kept.move_to_end(marks[n - 1])
                return read
        return None

    def _extend(self, rows: Sequence[tuple[int, ...]], before: Sequence[Read | None]) -> list[Read]:
        """Compute what is new in each row behind what was read of it. B rows, P the longest known beginning (padded at its
        left), S the most new tokens (padded at their right)."""
        if not rows:
            return []
        device = self.trunk.embed_tokens.weight.device
        known = [len(read.ids) if read is not None else 0 for read in before]
        new = [len(ids) - n for ids, n in zip(rows, known, strict=True)]
        past, width = max(known), max(new)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), 1, width, past + width, dtype=torch.bool)
        for row, (each, n, m) in enumerate(zip(rows, known, new, strict=True)):
            ids[row, :m] = torch.tensor(each[n:])
            mask[row, 0, :, past - n : past] = True
        mask[..., past:] = torch.ones(width, width, dtype=torch.bool).tril()
        mask = mask.to(device)
        positions = torch.tensor(known)[:, None] + torch.arange(width)
        cos, sin = rope(positions.to(device), self.trunk.shape.head_width)
        cos, sin = cos[:, None], sin[:, None]
        x = self.trunk.embed_tokens(ids.to(device))
        layers: list[tuple[Tensor, Tensor]] = []
        for place, layer in enumerate(self.trunk.layers):
            assert isinstance(layer, Block)
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            if past:
                k = torch.cat([self._padded(before, place, 0, past, k), k], 2)
                v = torch.cat([self._padded(before, place, 1, past, v), v], 2)
            layers.append((k, v))
            group = q.shape[1] // k.shape[1]
            wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            mixed = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)
            x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = self.trunk.norm(x)
        found = []
        for row, (each, n, m) in enumerate(zip(rows, known, new, strict=True)):
            kept = tuple(
                (k[row, :, past - n : past + m].clone(), v[row, :, past - n : past + m].clone())
                for k, v in layers
            )
            found.append(Read(each, kept, hidden[row, m - 1].clone()))
        return found

    def _padded(
        self, before: Sequence[Read | None], layer: int, part: int, past: int, like: Tensor
    ) -> Tensor:
        """(B, G, P, E): the keys (``part`` 0) or values (1) known of each row, at the right end."""
        out = like.new_zeros(len(before), like.shape[1], past, like.shape[3])
        for row, read in enumerate(before):
            if read is not None:
                out[row, :, past - len(read.ids) :] = read.layers[layer][part]
        return out


def _marks(ids: Sequence[int]) -> list[int]:
    """A fingerprint of each beginning of ``ids``, from one token to all."""
    return list(accumulate(ids, lambda mark, token: hash((mark, token)), initial=0))[1:]
