"""What sparse decoding should do, worked out again from the raw keys, values and queries that vLLM hands to the backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttc.attention.choose import Ids


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
    ids: Ids
    kept_as: torch.dtype  # page summaries

    def kept(self, head: int) -> list[int]:
        """Positions of the pages read by a KV head."""
        count = -(-int(self.lengths[head]) // self.page)
        ids = [i - head * self.ids.head for i in self.table[head, :count].tolist()]
        assert all(i % self.ids.block == 0 for i in ids)
        return [self.pages.index(i // self.ids.block) for i in ids]


@contextmanager
def watch(monkeypatch: Any, check: Callable[[Seen], None], layer_class: Any) -> Iterator[None]:
    """Calls ``check`` for the rows of every sparse call of the backend with these layers. The raw KV is gathered from what is
    handed to the cache, by slot, apart from how the cache holds it."""
    stores: dict[str, tuple[Tensor, Tensor]] = {}
    write, attend = layer_class.do_kv_cache_update, layer_class.attend

    def writing(
        self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        write(self, layer, key, value, kv_cache, slot_mapping)
        blocks, heads, page, both = kv_cache.shape
        if layer.layer_name not in stores:
            shape = (blocks * page, heads, both // 2)
            stores[layer.layer_name] = (torch.zeros(shape), torch.zeros(shape))
        for store, new in zip(stores[layer.layer_name], (key, value), strict=True):
            store[slot_mapping.long().cpu()] = (
                new[: len(slot_mapping)].view(-1, heads, both // 2).float().cpu()
            )

    def attending(
        self: Any, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, metadata: Any, step: Any, plan: Any, table: Tensor
    ) -> None:  # fmt: skip
        attend(self, layer, query, kv_cache, output, metadata, step, plan, table)
        keys, values = stores[layer.layer_name]
        page, heads, ids = step.planner.page, kv_cache.shape[1], self.cache.ids
        shape = (step.rows, heads, self.num_heads // heads, keys.shape[-1])
        grouped, made = (t[: step.rows].reshape(shape).float().cpu() for t in (query, output))
        kept_as = torch.bfloat16 if kv_cache.dtype == torch.bfloat16 else torch.float32
        for i, row in enumerate(step.settings):
            pages = step.tables[i, : step.pages[i]].tolist()
            slots = (torch.tensor(pages)[:, None] * page + torch.arange(page)).flatten()[: step.lengths[i]]
            own = slice(i * heads, (i + 1) * heads)
            check(
                Seen(
                    row.setting.method if row else None, row.setting.budget if row else 0, grouped[i], keys[slots], values[slots],
                    table[own].cpu(), plan.lengths[own].cpu(), pages, page, made[i], self.scale, ids, kept_as,
                )
            )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(layer_class, "do_kv_cache_update", writing)
        patch.setattr(layer_class, "attend", attending)
        yield


@contextmanager
def replayed(monkeypatch: Any, check: Callable[[Seen], None]) -> Iterator[Callable[[Any], None]]:
    """For engines with full CUDA graphs that are opened within: it yields what takes an engine's step and calls ``check`` for its
    rows, if it was one for graphs. Query, table and output of each layer are copied aside by launches that become part of the
    graphs."""
    from ttc.attention.fixed import FixedPlanner, FixedStep
    from ttc.attention.gpu import GpuImpl

    notes: dict[str, tuple[Any, Tensor, Tensor, Tensor, Tensor]] = {}
    steps: list[FixedStep] = []
    attend, decode = GpuImpl.attend, FixedPlanner.decode

    def attending(
        self: Any, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, metadata: Any, step: Any, plan: Any, table: Tensor
    ) -> None:  # fmt: skip
        attend(self, layer, query, kv_cache, output, metadata, step, plan, table)
        if plan.frame is None:
            return
        found = notes.get(layer.layer_name)
        if found is None or found[1].data_ptr() != kv_cache.data_ptr():
            most, frame = step.planner.room.rows, plan.frame
            made = [torch.zeros(most, *t.shape[1:], dtype=t.dtype, device=t.device) for t in (query, output)]
            found = notes[layer.layer_name] = (self, kv_cache, *made, torch.zeros_like(frame.table))
        for into, new in zip(found[2:], (query[: step.rows], output[: step.rows], table), strict=True):
            into[: len(new)].copy_(new.view(len(new), *into.shape[1:]))

    def deciding(self: Any, *told: Any) -> FixedStep:
        steps[:] = [decode(self, *told)]
        return steps[0]

    def take(engine: Any) -> None:
        steps.clear()  # those of the capture have made-up rows
        engine.step()
        for step in steps:
            for impl, kv_cache, query, output, table in notes.values():
                heads, page = kv_cache.shape[1], step.planner.page
                shape = (heads, impl.num_heads // heads, kv_cache.shape[-1] // 2)
                [plan] = step.plans.values()
                for i, row in enumerate(step.settings):
                    pages = step.tables[i, : step.pages[i]].tolist()
                    if pages == [0]:
                        continue  # padding
                    kv = kv_cache[pages].transpose(1, 2).flatten(0, 1)[: step.lengths[i]].float().cpu()
                    keys, values = kv.chunk(2, -1)
                    own = slice(i * heads, (i + 1) * heads)
                    check(
                        Seen(
                            row.setting.method if row else None, row.setting.budget if row else 0,
                            query[i].view(shape).float().cpu(), keys, values, table[own].cpu(), plan.lengths[own].cpu(), pages,
                            page, output[i].view(shape).float().cpu(), impl.scale, impl.cache.ids, torch.bfloat16,
                        )
                    )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(GpuImpl, "attend", attending)
        patch.setattr(FixedPlanner, "decode", deciding)
        yield take


def page_values(seen: Seen, head: int) -> Tensor | None:
    """The worth of each page but the last by the method's formula, page by page; None for methods that look at no key."""
    query = seen.query[head]
    made = []
    logits = (seen.keys[:, head] @ query.T) * seen.scale
    weight = logits.softmax(0).sum(1)
    for start in range(0, len(seen.pages) * seen.page, seen.page):
        keys = seen.keys[start : start + seen.page, head]
        if seen.method == "block-topk":
            made.append((query.sum(0) * keys.mean(0).to(seen.kept_as).float()).sum())
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


def checker(tally: Counter[str]) -> Callable[[Seen], None]:
    """Pages and output of every row against the reference. Ties of scores within rounding may fall either way."""

    def check(seen: Seen) -> None:
        count, most = len(seen.pages), max(1, seen.budget // seen.page)
        for head in range(len(seen.lengths)):
            kept = seen.kept(head)
            wanted = count if seen.method is None else min(most, count)
            assert len(kept) == len(set(kept)) == wanted
            assert kept == sorted(kept)
            assert kept[-1] == count - 1
            if wanted == count or wanted < 2:
                continue
            assert kept[0] == 0
            values = page_values(seen, head)
            if values is None:
                assert kept == _static(str(seen.method), count, wanted)
            else:
                left = [p for p in range(1, count - 1) if p not in kept]
                chosen = [float(values[p]) for p in kept[1:-1]]
                slack = 1e-4 * float(values.abs().max())
                assert not chosen or min(chosen) >= max(float(values[p]) for p in left) - slack
            tally[str(seen.method)] += 1
        scale = float(seen.values.abs().max())
        assert float((seen.output - masked_attention(seen)).abs().max()) <= 2**-7 * scale

    return check


def _static(method: str, count: int, keep: int) -> list[int]:
    """Pages that need no key: the sink and the latest, or the sink and powers of two behind the last, filled with the latest."""
    if method == "streaming":
        return [0, *range(count - keep + 1, count)]
    order = [0, count - 1, *(count - 1 - 2**i for i in range(20) if count - 1 - 2**i > 0)]
    order += [p for p in range(count - 2, 0, -1) if p not in order]
    return sorted(order[:keep])
