"""Keys as they lie in vLLM's CPU cache, and the page summaries made of them.

Each (page, KV head) is one contiguous piece: K, then V. How the kernel packs K differs by instruction set, so it is not assumed but
found out: known numbers are written through vLLM's own cache update and looked up again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ttc.attention.steps import Ids

DIGIT = 128  # written numbers must be exact in bf16
CHUNK = 64


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

    def __init__(self, kv_cache: Tensor, order: Tensor) -> None:
        self.blocks, self.heads, self.page, both = kv_cache.shape
        self.channels = both // 2
        self.where = kv_cache.data_ptr()
        self.ids = Ids(self.heads, 1)
        self.order = order
        turned = torch.arange(self.page * self.channels).view(self.channels, self.page).t().reshape(-1)
        self.transposed = torch.equal(order, turned)  # as the "vec" kernels have it
        self.kept: dict[str, Tensor] = {}

    def keys(self, kv_cache: Tensor, ids: Tensor) -> Tensor:
        """Keys [n, H, page, D] of the pages ``ids`` [n]."""
        size = self.page * self.channels
        packed = kv_cache.view(self.blocks, self.heads, 2, size)[ids, :, 0]
        if self.transposed:
            return packed.view(-1, self.heads, self.channels, self.page).transpose(2, 3)
        return packed[..., self.order].view(-1, self.heads, self.page, self.channels)

    def summaries(self, kind: str, dtype: torch.dtype) -> Tensor:
        """mean: [N, H, D] mean keys; bounds: [N, H, 2, D] least and largest per channel."""
        found = self.kept.get(kind)
        if found is None:
            middle = () if kind == "mean" else (2,)
            kept = dtype if dtype == torch.bfloat16 else torch.float32
            found = torch.zeros(self.blocks, self.heads, *middle, self.channels, dtype=kept)
            self.kept[kind] = found
        return found

    def update(self, kind: str, kv_cache: Tensor, ids: Tensor) -> None:
        """Summarise the pages ``ids`` afresh."""
        into = self.summaries(kind, kv_cache.dtype)
        for part in torch.split(ids, CHUNK):
            keys = self.keys(kv_cache, part)
            if kind == "mean":
                into[part] = keys.float().mean(2).to(into.dtype)
            else:
                into[part] = torch.stack(torch.aminmax(keys, dim=2), dim=2).to(into.dtype)
