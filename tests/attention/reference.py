"""What sparse decoding should do, worked out again from the raw keys, values and queries that vLLM hands to the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Seen:
    """One sparse call of one layer: for each row of the batch its method, its raw KV and what the plugin made of it."""

    method: str | None
    budget: int
    query: Tensor  # [H, G, D]
    keys: Tensor  # [length, H, D]
    values: Tensor
    table: Tensor  # [H, W]
    lengths: Tensor  # [H]
    pages: list[int]  # of the row, in order
    page: int
    output: Tensor  # [H, G, D]
    scale: float

    def kept(self, head: int) -> list[int]:
        """Positions of the pages read by a KV head."""
        count = -(-int(self.lengths[head]) // self.page)
        heads = len(self.lengths)
        ids = self.table[head, :count].tolist()
        assert all(i % heads == head for i in ids)
        return [self.pages.index(i // heads) for i in ids]


@contextmanager
def watch(
    monkeypatch: Any, check: Callable[[Seen], None], every: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Calls ``check`` for the rows of every sparse call. The raw KV is gathered from what is handed to the cache, by slot, apart
    from how the cache packs it."""
    from ttc.attention import cpu

    stores: dict[str, tuple[Tensor, Tensor]] = {}
    write, attend, forward = cpu.CpuImpl.do_kv_cache_update, cpu.CpuImpl._attend, cpu.CpuImpl.forward
    calls: list[tuple[Any, ...]] = []

    def writing(
        self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        write(self, layer, key, value, kv_cache, slot_mapping)
        blocks, heads, page, both = kv_cache.shape
        if layer.layer_name not in stores:
            shape = (blocks * page, heads, both // 2)
            stores[layer.layer_name] = (torch.zeros(shape), torch.zeros(shape))
        for store, new in zip(stores[layer.layer_name], (key, value), strict=True):
            store[slot_mapping.long()] = new[: len(slot_mapping)].view(-1, heads, both // 2).float()

    def attending(self: Any, *args: Any) -> None:
        calls.append(args)
        attend(self, *args)

    def forwarding(self: Any, layer: Any, query: Tensor, *args: Any, **named: Any) -> Tensor:
        calls.clear()
        made = forward(self, layer, query, *args, **named)
        metadata = args[3]
        step = metadata.ttc_step
        if step is None or not calls or not every():
            return made
        _, grouped, _, _, output, _, lengths, table, _ = calls[0]
        heads = len(step.planner.factors[layer.layer_name])
        keys, values = stores[layer.layer_name]
        page = step.planner.page
        for i, row in enumerate(step.settings):
            pages = step.tables[i, : step.pages[i]].tolist()
            slots = (torch.tensor(pages)[:, None] * page + torch.arange(page)).flatten()[: step.lengths[i]]
            own = slice(i * heads, (i + 1) * heads)
            check(
                Seen(
                    row.setting.method if row else None, row.setting.budget if row else 0, grouped[own].float(), keys[slots],
                    values[slots], table[own], lengths[own], pages, page, output[own].float(), self.scale,
                )
            )  # fmt: skip
        return made

    with monkeypatch.context() as patch:
        patch.setattr(cpu.CpuImpl, "do_kv_cache_update", writing)
        patch.setattr(cpu.CpuImpl, "_attend", attending)
        patch.setattr(cpu.CpuImpl, "forward", forwarding)
        yield


def page_values(seen: Seen, head: int) -> Tensor | None:
    """The worth of each page but the last by the method's formula, page by page; None for methods that look at no key."""
    query = seen.query[head]
    made = []
    logits = (seen.keys[:, head] @ query.T) * seen.scale
    weight = logits.softmax(0).sum(1)
    for start in range(0, len(seen.pages) * seen.page, seen.page):
        keys = seen.keys[start : start + seen.page, head]
        if seen.method == "block-topk":
            made.append((query.sum(0) * keys.mean(0).bfloat16().float()).sum())
        elif seen.method == "quest":
            least, most = keys.min(0).values, keys.max(0).values
            made.append(torch.stack([torch.maximum(q * least, q * most).sum() for q in query]).max())
        elif seen.method == "oracle-topk":
            made.append(weight[start : start + seen.page].sum())
        else:
            return None
    return torch.stack(made)


def masked_attention(seen: Seen) -> Tensor:
    """Full attention [H, G, D] in float32 with every token outside the kept pages masked."""
    made = torch.zeros_like(seen.output)
    for head in range(len(seen.lengths)):
        logits = seen.query[head] @ seen.keys[:, head].T * seen.scale
        mask = torch.full((seen.keys.shape[0],), float("-inf"))
        for p in seen.kept(head):
            mask[p * seen.page : (p + 1) * seen.page] = 0
        made[head] = (logits + mask).softmax(-1) @ seen.values[:, head]
    return made
