"""The page choice in Triton, for GPUs: every page of every (row, KV head) is scored, then the best are picked; nothing waits for
the host.

Two kernels. The first scores blocks of pages in parallel. The second has one program for each (row, KV head): the score of the
last page that is kept is found bit by bit (32 passes over the scores, which are in registers or in cache), and the pages are
written in ascending order, with the earlier one where two tie: the same choice as select.cpp and ``choose.select``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from ttc.attention.choose import Ids

BLOCK_PAGES = 32  # scored by one program: 32 x 128 channels are 32 registers a thread at four warps
MOST_PROGRAMS = 4096  # of the first kernel: a few for each of a GPU's processors
CHUNK = 4096  # pages that the second kernel holds in registers: 16 a thread at eight warps


@triton.jit(do_not_specialize=["q_row", "table_row", "P"])
def score_pages(
    query, mean, bounds, tables, counts, rules, scores,
    q_row, q_head, q_group, table_row, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P,
    B: tl.constexpr,
):  # fmt: skip
    """Scores [b, H, P] of the pages. ``mean`` [N, H, D], ``bounds`` [N, H, 2, D] contiguous; WIDTH: D up to a power of two. The
    programs of a (row, KV head) take its blocks in turns."""
    row, head = tl.program_id(0), tl.program_id(1)
    rule = tl.load(rules + row)
    if rule != 0:
        count = tl.load(counts + row)
        d = tl.arange(0, WIDTH)
        within = d < D
        q = query + row * q_row + head * q_head + d
        total = tl.zeros([WIDTH], dtype=tl.float32)
        for g in range(G):
            total += tl.load(q + g * q_group, mask=within, other=0.0).to(tl.float32)
        for start in range(tl.program_id(2) * B, count, tl.num_programs(2) * B):
            at = start + tl.arange(0, B)
            here = at < count
            pages = tl.load(tables + row * table_row + at, mask=here, other=0).to(tl.int64)
            both = here[:, None] & within[None, :]
            if rule == 1:
                keys = tl.load(mean + (pages * H + head)[:, None] * D + d[None, :], mask=both, other=0.0).to(
                    tl.float32
                )
                best = tl.sum(keys * total[None, :], axis=1)
            else:
                where = bounds + (pages * H + head)[:, None] * (2 * D) + d[None, :]
                low = tl.load(where, mask=both, other=0.0).to(tl.float32)
                high = tl.load(where + D, mask=both, other=0.0).to(tl.float32)
                best = tl.full([B], float("-inf"), dtype=tl.float32)
                for g in range(G):
                    one = tl.load(q + g * q_group, mask=within, other=0.0).to(tl.float32)[None, :]
                    best = tl.maximum(best, tl.sum(tl.maximum(one * low, one * high), axis=1))
            tl.store(scores + (row * H + head) * P + at, best, mask=here)


@triton.jit
def inner_scores(own, at, count):
    """Scores as unsigned bits in their order, both zeros one; 0, under all, for the first page, the last, and beyond."""
    inner = (at > 0) & (at < count - 1)
    bits = (tl.load(own + at, mask=inner, other=0.0) + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(inner, tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000), 0)


@triton.jit(do_not_specialize=["table_row", "W", "P"])
def pick_pages(
    scores, tables, counts, keep, rules, out, table_row, by_page, by_head, W, P, H: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the ids of the kept pages of one (row, KV head) into ``out`` [b * H, W]. WHOLE: no row has more than C pages."""
    row, head = tl.program_id(0), tl.program_id(1)
    count, k = tl.load(counts + row), tl.load(keep + row * H + head)
    if tl.load(rules + row) != 0:
        table = tables + row * table_row
        to = out + (row * H + head) * W
        own = scores + (row * H + head) * P
        lanes = tl.arange(0, C)
        first = head * by_head
        if k >= count:
            for start in range(0, count, C):
                at = start + lanes
                pages = tl.load(table + at, mask=at < count, other=0)
                tl.store(to + at, pages * by_page + first, mask=at < count)
        else:
            need = k - 2  # besides the first page and the last
            bar = tl.where(need > 0, 0, -1).to(tl.uint32, bitcast=True)
            over = tl.full([], 0, dtype=tl.int32)
            held = inner_scores(own, lanes, count)
            if need > 0:
                for bit in range(32):
                    higher = bar | (tl.full([], 1, dtype=tl.uint32) << (31 - bit))
                    found = tl.sum((held >= higher).to(tl.int32))
                    if not WHOLE:
                        for start in range(C, count, C):
                            found += tl.sum((inner_scores(own, start + lanes, count) >= higher).to(tl.int32))
                    bar = tl.where(found >= need, higher, bar)
                over += tl.sum((held > bar).to(tl.int32))
                if not WHOLE:
                    for start in range(C, count, C):
                        over += tl.sum((inner_scores(own, start + lanes, count) > bar).to(tl.int32))
            ties = need - over
            written = tl.full([], 0, dtype=tl.int32)
            tied = tl.full([], 0, dtype=tl.int32)
            for start in range(0, count, C):
                at = start + lanes
                values = inner_scores(own, at, count)
                equal = ((values == bar) & (at > 0) & (at < count - 1)).to(tl.int32)
                rank = tied + tl.cumsum(equal, axis=0)  # of ties, the earlier ones
                taken = ((values > bar) | ((equal != 0) & (rank <= ties))).to(tl.int32)
                ends = ((at == count - 1) | ((at == 0) & (k > 1))).to(tl.int32)
                ones = taken | ends
                place = written + tl.cumsum(ones, axis=0) - 1
                pages = tl.load(table + at, mask=ones != 0, other=0)
                tl.store(to + place, pages * by_page + first, mask=ones != 0)
                written += tl.sum(ones)
                tied += tl.sum(equal)


@triton.jit
def summarise_pages(
    ids, sources, targets, like, kept_like, by_block, by_head, by_token, H: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The summary of one head's part of one page in one layer: mean keys [N, H, D], or bounds [N, H, 2, D]. ``sources`` and
    ``targets`` [layers]: the addresses of the caches and of their summaries; ``like``, ``kept_like``: one of each, for its type."""
    page, head, layer = tl.load(ids + tl.program_id(0)).to(tl.int64), tl.program_id(1), tl.program_id(2)
    source = tl.cast(tl.load(sources + layer), tl.pointer_type(like.dtype.element_ty))
    target = tl.cast(tl.load(targets + layer), tl.pointer_type(kept_like.dtype.element_ty))
    t, d = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    within = d < D
    both = (t < PAGE)[:, None] & within[None, :]
    keys = source + page * by_block + head * by_head + t[:, None] * by_token + d[None, :]
    to = target + (page * H + head) * (D if MEAN else 2 * D) + d
    values = tl.load(keys, mask=both, other=0.0).to(tl.float32)
    if MEAN:
        tl.store(to, (tl.sum(values, axis=0) / PAGE).to(kept_like.dtype.element_ty), mask=within)
    else:
        low = tl.min(tl.where(both, values, float("inf")), axis=0)
        high = tl.max(tl.where(both, values, float("-inf")), axis=0)
        tl.store(to, low.to(kept_like.dtype.element_ty), mask=within)
        tl.store(to + D, high.to(kept_like.dtype.element_ty), mask=within)


def summarise(
    kind: str, ids: Tensor, sources: Tensor, targets: Tensor, kv_cache: Tensor, kept: Tensor, layers: int
) -> None:
    """Summarise the pages ``ids`` of all layers. ``sources``, ``targets`` [layers] int64: addresses of the caches, all laid out as
    ``kv_cache`` [N, H, page, 2 D], and of their summaries, all like ``kept``."""
    _, heads, page, both = kv_cache.shape
    by_block, by_head, by_token, _ = kv_cache.stride()
    summarise_pages[(len(ids), heads, layers)](
        ids, sources, targets, kv_cache, kept, by_block, by_head, by_token, heads, page, both // 2, triton.next_power_of_2(page),
        triton.next_power_of_2(both // 2), kind == "mean",
    )  # fmt: skip


def select(
    out: Tensor, query: Tensor, mean: Tensor | None, bounds: Tensor | None, tables: Tensor, counts: Tensor, keep: Tensor,
    rules: Tensor, *, ids: Ids, pages: int, scores: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` [b*H, W] int32 for every row whose ``rules`` [b] is not 0; as ``choose.select``, with the ids of a page's heads
    ``page * ids.block + head * ids.head`` and ``pages`` the most that a row has (known to the host). ``scores``: room for
    b * H * ``pages`` float32."""
    rows, heads, group, channels = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    if scores is None:
        scores = empty(rows, heads, pages, dtype=float32, device=query.device)
    some = mean if mean is not None else bounds
    blocks = triton.cdiv(pages, BLOCK_PAGES)
    score_pages[(rows, heads, max(1, min(blocks, MOST_PROGRAMS // (rows * heads))))](
        query, mean if mean is not None else some, bounds if bounds is not None else some, tables, counts, rules, scores,
        *query.stride()[:3], tables.stride(0), heads, group, channels, triton.next_power_of_2(channels), pages, BLOCK_PAGES,
    )  # fmt: skip
    chunk = min(CHUNK, triton.next_power_of_2(max(pages, 16)))
    pick_pages[(rows, heads)](
        scores, tables, counts, keep, rules, out, tables.stride(0), ids.block, ids.head, out.stride(0), pages, heads, chunk,
        pages <= chunk, num_warps=max(1, min(8, chunk // 256)),
    )  # fmt: skip
