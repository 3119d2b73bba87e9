"""Keys as they lie in vLLM's caches, and the page summaries made of them.

On GPU a page holds [H, page, K|V] or [page, H, K|V] and is read with strides. On CPU each (page, KV head) is one contiguous
piece, K then V, and how the kernel packs K differs by instruction set; so it is not assumed but found out: known numbers are
written through vLLM's own cache update and looked up again.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ttc.attention.choose import Ids

DIGIT = 128  # written numbers must be exact in bf16


@cache
def key_order(isa: str, page: int, channels: int, dtype: torch.dtype) -> Tensor | None:
    """Where each (token, channel) of a packed page lies: [page * channels] indices in token-major order. None if K is not merely
    reordered (and so can't be summarised)."""
    from vllm import _custom_ops as ops

    def written(values: Tensor) -> Tensor:
        area = torch.full((1, 1, 2 * page, channels), -1.0, dtype=dtype)
        keys, vals = area.chunk(2, dim=2)
        source = values.to(dtype).view(page, 1, channels).contiguous()
        slots = torch.arange(page, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(source, torch.zeros_like(source), keys, vals, slots, isa)
        return area.view(-1)[: page * channels].long()

    index = torch.arange(page * channels)
    found, unit = torch.zeros_like(index), 1
    while unit < page * channels:
        found += written((index // unit) % DIGIT) * unit
        unit *= DIGIT
    if not torch.equal(found.sort().values, index):
        return None
    return found.argsort()


class Cache:
    """One layer's KV cache [N, H, page, 2 D] and its summaries, which are made when first needed."""

    ids: Ids
    at_once = 64  # pages that one pass summarises

    def __init__(self, kv_cache: Tensor) -> None:
        self.blocks, self.heads, self.page, both = kv_cache.shape
        self.channels = both // 2
        self.where = kv_cache.data_ptr(), kv_cache.shape
        self.kept: dict[
            str, Tensor
        ] = {}  # mean: [N, H, D] mean keys; bounds: [N, H, 2, D] least and largest per channel

    def keys(self, kv_cache: Tensor, ids: Tensor) -> Tensor:
        """Keys [n, H, page, D] of the pages ``ids`` [n]."""
        raise NotImplementedError

    def room(self, kind: str, kv_cache: Tensor) -> Tensor:
        """The tensor of one kind of summaries, made when first asked for."""
        found = self.kept.get(kind)
        if found is None:
            middle = () if kind == "mean" else (2,)
            kept = kv_cache.dtype if kv_cache.dtype == torch.bfloat16 else torch.float32
            found = torch.zeros(
                self.blocks, self.heads, *middle, self.channels, dtype=kept, device=kv_cache.device
            )
            self.kept[kind] = found
        return found

    def update(self, kind: str, kv_cache: Tensor, ids: Tensor) -> None:
        """Summarise the pages ``ids`` afresh."""
        into = self.room(kind, kv_cache)
        for part in torch.split(ids, self.at_once):
            keys = self.keys(kv_cache, part)
            if kind == "mean":
                into[part] = keys.float().mean(2).to(into.dtype)
            else:
                into[part] = torch.stack(torch.aminmax(keys, dim=2), dim=2).to(into.dtype)


class PackedCache(Cache):
    """On CPU; ``order`` is ``key_order`` of its kernels."""

    def __init__(self, kv_cache: Tensor, order: Tensor) -> None:
        super().__init__(kv_cache)
        self.ids = Ids(self.heads, 1)
        self.order = order
        own = kv_cache.view(self.blocks * self.heads, 1, self.page * 2, self.channels)
        self.by_head = own.chunk(2, dim=2)  # keys and values, each head's part of a page as a page
        turned = torch.arange(self.page * self.channels).view(self.channels, self.page).t().reshape(-1)
        self.transposed = torch.equal(order, turned)  # as the "vec" kernels have it

    def keys(self, kv_cache: Tensor, ids: Tensor) -> Tensor:
        size = self.page * self.channels
        packed = kv_cache.view(self.blocks, self.heads, 2, size)[ids, :, 0]
        if self.transposed:
            return packed.view(-1, self.heads, self.channels, self.page).transpose(2, 3)
        return packed[..., self.order].view(-1, self.heads, self.page, self.channels)


class StridedCache(Cache):
    """On GPU, in whatever order vLLM lays it out (NHD has a token's heads side by side, HND a head's tokens).

    ``view`` [M, 1, page, 2 D] has each head's part of a page as a page: page b, head h is entry ``b * ids.block + h * ids.head``.
    With HND the entries lie one after the other; with NHD they are strided and overlap, which only kernels that write would mind.
    """

    at_once = 1024

    def __init__(self, kv_cache: Tensor) -> None:
        super().__init__(kv_cache)
        by_block, by_head, by_token, one = kv_cache.stride()
        assert one == 1
        unit = math.gcd(by_block, by_head) if self.heads > 1 else by_block
        self.ids = Ids(by_block // unit, by_head // unit if self.heads > 1 else 0)
        entries = (self.blocks - 1) * self.ids.block + (self.heads - 1) * self.ids.head + 1
        shape, steps = (entries, 1, self.page, 2 * self.channels), (unit, self.page * by_token, by_token, 1)
        self.view = kv_cache.as_strided(shape, steps)

    def keys(self, kv_cache: Tensor, ids: Tensor) -> Tensor:
        return kv_cache[..., : self.channels][ids]
