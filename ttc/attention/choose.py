"""Which pages a decode step reads: the five methods, on plain tensors, without vLLM.

Shapes: b rows (sequences), H KV heads, G query heads for each, D channels, P pages of a row, W = the widest table. The first page
and the last are always kept (``keep`` >= 2; a keep of 1 is the last page alone). A table entry is the id of one head's part of a
page, ascending in position.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttc.attention.compiled import Selection, selector


class Ids(NamedTuple):
    """How ids count in the per-head view of a cache: page p of head h is ``p * block + h * head`` ((H, 1) on CPU)."""

    block: int
    head: int


def static_pages(method: str, pages: int, keep: int) -> Sequence[int]:
    """Positions of the pages kept by a method that looks at no key.

    streaming: the sink page and the latest (StreamingLLM, arXiv 2309.17453). power: the sink, the latest and those at distances
    1, 2, 4, … pages, nearest first; what is left goes to the latest (the fixed pattern of PowerAttention, arXiv 2503.03588).
    """
    if keep >= pages:
        return range(pages)
    if keep == 1:
        return [pages - 1]
    if method == "streaming":
        return [0, *range(pages - keep + 1, pages)]
    kept, distance = {0, pages - 1}, 1
    while distance < pages and len(kept) < keep:
        kept.add(pages - 1 - distance)
        distance *= 2
    latest = pages - 2
    while len(kept) < keep:
        kept.add(latest)
        latest -= 1
    return sorted(kept)


def scores(rule: int, query: Tensor, summaries: Tensor) -> Tensor:
    """Page scores [H, P] of one row: ``query`` [H, G, D]; ``summaries`` [P, H, D] mean keys or [P, H, 2, D] bounds.

    block-topk: mean key times the sum of the group's queries (Kinetics, arXiv 2506.05333, eq. 9, one choice for a GQA group).
    quest: the upper bound sum_d max(q_d lo_d, q_d hi_d) (Quest, arXiv 2406.10774, alg. 1), the largest over the group.
    """
    query, summaries = query.float(), summaries.float()
    if rule == 1:
        return torch.einsum("hd,phd->hp", query.sum(1), summaries)
    low, high = summaries[:, :, 0], summaries[:, :, 1]
    bound = torch.einsum("hgd,phd->hgp", query.clamp(min=0), high) + torch.einsum(
        "hgd,phd->hgp", query.clamp(max=0), low
    )
    return bound.amax(1)


def oracle_scores(query: Tensor, keys: Tensor, length: int, scale: float) -> Tensor:
    """Attention mass [H, P] that each page really gets, summed over the group: ``query`` [H, G, D], ``keys`` [P, H, BS, D]."""
    pages, heads, size, _ = keys.shape
    logits = torch.einsum("hgd,phsd->hgps", query.float(), keys.float()).flatten(2) * scale
    logits[:, :, length:] = float("-inf")
    return logits.softmax(-1).view(heads, query.shape[1], pages, size).sum((1, 3))


def best_pages(values: Tensor, keep: int) -> Tensor:
    """Positions [keep], ascending: first, last, and the best of ``values`` [P] between them, the earlier one where two tie."""
    pages = values.shape[0]
    every = torch.arange(pages, device=values.device)
    if keep >= pages:
        return every
    if keep == 1:
        return every[-1:]
    order = values[1:-1].sort(descending=True, stable=True).indices[: keep - 2] + 1
    return torch.cat([every[:1], order.sort().values, every[-1:]])


def compiled(kind: str) -> ctypes.CDLL | None:
    """The compiled selector, if this ``kind`` of selector (compiled, torch or auto) is that here."""
    library = None if kind == "torch" else selector()
    if library is None and kind == "compiled":
        raise RuntimeError("the C++ page selector can't be built here")
    return library


def select(
    out: Tensor,
    query: Tensor,
    mean: Tensor | None,
    bounds: Tensor | None,
    tables: Tensor,
    counts: Tensor,
    keep: Tensor,
    rules: Tensor,
    *,
    kind: str = "auto",
    ids: Ids | None = None,
) -> None:
    """Fill ``out`` [b*H, W] int32 for every row whose ``rules`` [b] is not 0; the other rows stay as they are.

    ``query`` [b, H, G, D]; ``mean`` [N, H, D] and ``bounds`` [N, H, 2, D] over all N pages of the cache (bf16 or float32);
    ``tables`` [b, >=P] page ids, ``counts`` [b] pages, ``keep`` [b, H] pages to keep: all int32. ``kind``: compiled, torch or auto;
    the compiled one knows no ``ids`` but (H, 1), which None stands for.
    """
    library = compiled(kind)
    heads = query.shape[1]
    if library is not None:
        Selection(library, tables, counts, keep, rules, out.shape[1], *query.shape[1:])(
            out, query, mean, bounds
        )
        return
    for b, rule in enumerate(rules.tolist()):
        if not rule:
            continue
        pages = tables[b, : int(counts[b])].long()
        summaries = mean if rule == 1 else bounds
        assert summaries is not None
        own = out[b * heads : (b + 1) * heads]
        fill_scored(own, scores(rule, query[b], summaries[pages]), pages, keep[b].tolist(), ids)


def fill_scored(
    out: Tensor, values: Tensor, pages: Tensor, keep: Sequence[int], ids: Ids | None = None
) -> None:
    """Write one row's table [H, W] from page scores [H, P] of ``pages`` [P]."""
    by_page, by_head = (values.shape[0], 1) if ids is None else ids
    for head, k in enumerate(keep):
        chosen = best_pages(values[head], k)
        out[head, :k] = (pages[chosen] * by_page + head * by_head).to(torch.int32)
