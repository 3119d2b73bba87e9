"""What decoding costs: ``kinetics`` (the paper's equations) and ``full`` (ours), in FLOPs and bytes.

Sources: Kinetics, arXiv 2506.05333, equations (1)-(4) and (8)-(10). Every argument may be a number or a
numpy array (they broadcast); numbers in give Python floats out, without numpy. Raises InputError on
negative or NaN arguments.

Both are additive in ``start_tokens``: f(0, a) + f(a, b) = f(0, a + b) for a > 0, where f(s, k) prices the
k tokens after the s-th. So "k more tokens for a branch that has t" is ``full(..., start_tokens=t,
generated_tokens=k)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel.hardware import Hardware

KV_BLOCK_TOKENS = 32  # page size of a searching method where none is given
KINETICS_INTENSITY = 562.5  # FLOP/byte: B200 FP8 peak over its bandwidth, the constant of the paper's scripts
_NUMBERS = (int, float)
_SCALARS = (int, float, type(None))
_NO_CAP = 1e18  # stands for a KV budget of infinity (dense), which an array of budgets may hold


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs done and bytes moved; adds, scales, and prices itself in eFLOPs."""

    flops: Any = 0.0
    bytes: Any = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, factor: Any) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor)

    __rmul__ = __mul__

    def eflops(self, intensity: float | Hardware = KINETICS_INTENSITY) -> Any:
        """FLOPs + I·bytes, Kinetics eq. (3); I in FLOP/byte, or a Hardware (its default precision)."""
        factor = intensity if isinstance(intensity, _NUMBERS) else intensity.intensity()
        return self.flops + factor * self.bytes


@dataclass(frozen=True, slots=True)
class SparseMethod:
    """How a sparse method spends.

    ``summaries``: vectors scored per page (0: no search). ``dense_layers``: the first layers, left dense.
    ``extra_tokens``: read on top of the KV budget (sinks and recent window, where the budget does not contain
    them). ``paged``: the KV budget buys whole pages, as in ``ttc.attention``: a step keeps budget // page pages,
    the last of which is filled in part, and stays dense while choosing would move as many bytes as it saves.
    ``searches``: the part of a full search that a layer pays in a step, below 1 where layers or steps share a
    choice.
    """

    name: str
    summaries: int = 0
    dense_layers: int = 0
    extra_tokens: int = 0
    paged: bool = False
    searches: float = 1.0

    @classmethod
    def of(cls, text: str) -> SparseMethod:
        """``quest`` or ``quest?dense_layers=1&share_layers=4&share_steps=2`` (the plugin's options) or
        ``?sinks=4`` (tokens on top of the budget). Raises InputError by name."""
        name, _, options = text.partition("?")
        if name in RENAMED:
            raise InputError(f"kv_method: {name!r} is called {RENAMED[name]!r} everywhere now; write that")
        if name not in METHODS:
            raise InputError(f"kv_method is {text!r}; known: dense, {', '.join(METHODS)}")
        told = {"dense_layers": 0, "sinks": 0, "share_layers": 1, "share_steps": 1}
        for part in filter(None, options.split("&")):
            key, _, value = part.partition("=")
            least = told.get(key)
            if least is None or not value.isdecimal() or int(value) < least:
                known = ", ".join(told)
                raise InputError(f"kv_method: {part!r} is no option of a method; whole numbers for {known}")
            told[key] = int(value)
        shared = 1.0 / (told["share_layers"] * told["share_steps"])
        return replace(
            METHODS[name], dense_layers=told["dense_layers"], extra_tokens=told["sinks"], searches=shared
        )


METHODS: Mapping[str, SparseMethod] = MappingProxyType(
    {
        m.name: m
        for m in (
            # The plugin's methods (ttc.attention); the first page and the last are inside the budget.
            SparseMethod("block-topk", summaries=1, paged=True),  # mean key per page, Kinetics eq. (9)
            SparseMethod("quest", summaries=2, paged=True),  # channel-wise minimum and maximum per page
            SparseMethod("streaming", paged=True),  # the first and the latest pages (StreamingLLM)
            SparseMethod("power", paged=True),  # static pages at distances 2^i (PowerAttention)
            SparseMethod("oracle-topk", paged=True),  # by true attention mass; its search is not charged
            # Bounds that no engine has, token by token.
            SparseMethod("token-topk"),  # exact top-k at no search cost: Kinetics' upper bound
            SparseMethod("token-window"),  # recent window, sinks inside the budget
        )
    }
)

RENAMED: Mapping[str, str] = MappingProxyType(
    {"block": "block-topk", "meanmax": "quest", "oracle": "token-topk", "local": "token-window"}
)
"""What methods were called when the cost model had names of its own."""


def kinetics(
    shape: ModelShape,
    *,
    prompt_tokens: Any,
    generated_tokens: Any,
    samples: Any = 1,
    kv_budget: Any = None,
    kv_block: Any = None,
    method: str | SparseMethod | None = None,
    start_tokens: Any = 0,
) -> Cost:
    """Kinetics eq. (1), (2): N chains of L tokens over one prompt; sparse by eq. (8), (9). FLOPs and bytes
    (16-bit KV).

    With D = KV elements per token, r the GQA ratio, P active parameters:
      FLOPs = 2 P N L + 2 r D N S,           S = L_in L + L²/2, tokens attended per chain
      bytes = 2 D (L_in L + N L²/2)          prompt reads shared over N; no weight reads, no prefill
    Sparse: until the context holds B tokens decoding is dense; from there each token reads B, unshared
    (eq. 8), and scores the summaries of context/Block pages with keys only (eq. 9, with the r that its
    compute term lacks in print). So S is the exact integral of min(L_in + t, B): for L_in >= B eq. (8) to
    the letter, for a budget that never binds eq. (4).
    """
    arrays = _validate(prompt_tokens, generated_tokens, samples, start_tokens)
    rule = sparse_rule(kv_budget, kv_block, method)
    block = KV_BLOCK_TOKENS if kv_block is None else kv_block
    pair_flops, read_bytes = shape.pair_flops, 2.0 * shape.kv_elements
    end = start_tokens + generated_tokens
    if rule is None:
        own = (end * end - start_tokens * start_tokens) / 2
        shared = prompt_tokens * generated_tokens
        pairs, reads, search, search_reads = shared + own, shared + samples * own, 0.0, 0.0
    else:
        arrays = arrays or not isinstance(kv_budget, _NUMBERS) or not isinstance(kv_block, _SCALARS)
        low, high = _bounds(arrays)
        cap = low(kv_budget, _NO_CAP) + rule.extra_tokens
        dense = high(low(cap - prompt_tokens - start_tokens, generated_tokens), 0)
        full_at = start_tokens + dense
        own = (full_at * full_at - start_tokens * start_tokens) / 2
        shared = prompt_tokens * dense
        capped = cap * (generated_tokens - dense)
        pairs, reads = shared + own + capped, shared + samples * (own + capped)
        search = search_reads = 0.0
        if rule.summaries:
            prompt_pages = prompt_tokens * (generated_tokens - dense)
            own_pages = (end * end - full_at * full_at) / 2
            scale = 0.5 * rule.summaries * rule.searches / block
            search, search_reads = (
                scale * (prompt_pages + own_pages),
                scale * (prompt_pages + samples * own_pages),
            )
    linear = 2.0 * shape.kinetics_params * generated_tokens
    return Cost(samples * (linear + pair_flops * (pairs + search)), read_bytes * (reads + search_reads))


def full(
    shape: ModelShape,
    *,
    prompt_tokens: Any,
    generated_tokens: Any,
    samples: Any = 1,
    cached_prompt_tokens: Any = 0,
    start_tokens: Any = 0,
    batch: Any = None,
    weight_reads: Any = None,
    kv_budget: Any = None,
    kv_block: Any = None,
    method: str | SparseMethod | None = None,
    tensor_parallel: int = 1,
) -> Cost:
    """Ours: everything an engine does for N chains of L tokens over one prompt. FLOPs and bytes, exact
    discrete sums.

    Prefill, once for all N, of the prompt tokens that no cache holds; its logits give each chain's first
    token. Token j >= 2 is one decode step over a context of prompt + j - 1 tokens (itself included), in
    which every layer reads the KV that it attends to (all, its window, or min(context, budget) under a
    sparse method), writes one token's KV, and multiplies the active parameters. A sparse layer whose
    context exceeds the budget also scores summaries x ceil(context/block) page vectors; paged methods keep
    budget // block whole pages, of which the last is filled in part (``SparseMethod``). A step is shared
    by ``batch`` sequences (default: the N samples), so a forward carries 1/batch of a pass over the
    weights (MoE: over the experts that a batch is expected to touch); ``weight_reads`` gives the measured
    number of passes instead. ``start_tokens`` > 0 prices the tokens after the start_tokens-th alone,
    without prefill. ``tensor_parallel`` replicates KV heads that are fewer than the devices; bytes are
    summed over the devices.
    """
    arrays = _validate(prompt_tokens, generated_tokens, samples, start_tokens)
    if tensor_parallel < 1:
        raise InputError(f"tensor_parallel is {tensor_parallel}; give 1 or more devices")
    rule = sparse_rule(kv_budget, kv_block, method)
    block = KV_BLOCK_TOKENS if kv_block is None else kv_block
    if not arrays:
        arrays = not (
            isinstance(cached_prompt_tokens, _NUMBERS)
            and isinstance(batch, _SCALARS)
            and isinstance(weight_reads, _SCALARS)
            and isinstance(kv_budget, _SCALARS)
            and isinstance(kv_block, _SCALARS)
        )
    if not arrays:
        if not 0 <= cached_prompt_tokens <= prompt_tokens:
            raise InputError(
                f"cached_prompt_tokens is {cached_prompt_tokens}; it must be 0 to {prompt_tokens}, the prompt"
            )
        if (batch is not None and not batch > 0) or (weight_reads is not None and not weight_reads >= 0):
            raise InputError(
                f"batch is {batch}, weight_reads {weight_reads}; batch must be positive, reads 0 or more"
            )
    low, high = _bounds(arrays)
    started = high(low(start_tokens, 1), 0)  # 1 where a token exists already, so that prefill is past
    first = 1 - started
    steps = high(generated_tokens - first, 0)
    context = prompt_tokens + high(start_tokens, 1) - 1  # tokens attended at decode step i are context + i

    flops, reads = _decode(shape, context, steps, kv_budget, block, rule, low, high)
    fresh = (prompt_tokens - cached_prompt_tokens) * first
    prefills = high(low(fresh, 1), 0)
    prompt_flops, prompt_reads = _prefill(shape, cached_prompt_tokens, fresh, prefills, low, high)
    decodes = samples * steps
    forwards = decodes + prefills
    copies = max(1, tensor_parallel // shape.kv_heads) if tensor_parallel > 1 else 1
    moved = (samples * reads + prompt_reads) * (shape.kv_bytes_per_element * copies)
    moved = moved + (decodes + fresh) * (shape.kv_bytes * copies)
    if shape.state_elements:
        moved = moved + decodes * (2 * shape.state_elements * shape.kv_bytes_per_element)
    if weight_reads is not None:
        reads_at_least = high(weight_reads, 1e-300) if arrays else weight_reads
        batch = forwards / reads_at_least if arrays or weight_reads else math.inf
    elif batch is None:
        batch = high(samples, 1)
    if shape.experts:
        crowd = high(fresh, batch)  # a prefill's own tokens touch more experts than a batch of decodes
        weights = decodes * shape.step_weight_bytes(batch) + prefills * shape.step_weight_bytes(crowd)
    else:
        weights = forwards * shape.step_weight_bytes(batch)
    return Cost(samples * flops + prompt_flops, moved + weights / high(batch, 1e-300))


_Pick = Callable[[Any, Any], Any]


def _decode(
    shape: ModelShape,
    context: Any,
    steps: Any,
    kv_budget: Any,
    block: Any,
    rule: SparseMethod | None,
    low: _Pick,
    high: _Pick,
) -> tuple[Any, Any]:
    """FLOPs and KV elements read (page summaries included) of ``steps`` decode steps of one chain after
    ``context``."""
    flops, reads = steps * shape.token_flops, 0.0
    for layers, window in shape.attention:
        if window is not None or rule is None:
            pairs = layers * _sum_min(context, steps, window, low, high)
        else:
            sparse = max(0, layers - rule.dense_layers)
            read, scored = _sum_sparse(context, steps, low(kv_budget, _NO_CAP), block, rule, low, high)
            pairs = sparse * read
            if sparse < layers:
                pairs = pairs + (layers - sparse) * _sum_min(context, steps, None, low, high)
            if rule.summaries:
                scored = sparse * scored
                flops = flops + shape.key_pair_flops_per_layer * scored
                reads = reads + shape.key_elements_per_layer * scored
        flops = flops + shape.pair_flops_per_layer * pairs
        reads = reads + shape.kv_elements_per_layer * pairs
    return flops, reads


def kv_reads(prompt_tokens: float, generated_tokens: float, kv_budget: int | None = None) -> float:
    """KV tokens that one chain reads in each layer while it decodes: the context of every step after the first token, at most the
    budget of each."""
    return float(_sum_min(prompt_tokens, max(0, generated_tokens - 1), kv_budget, min, max))


def sparse_steps(
    *,
    prompt_tokens: Any,
    generated_tokens: Any,
    kv_budget: Any,
    kv_block: Any = None,
    method: str | SparseMethod | None = None,
) -> Any:
    """Decode steps of one chain in which it reads a part of its KV (the first token comes from prefill). Numbers or arrays."""
    rule = sparse_rule(kv_budget, kv_block, method)
    if rule is None:
        return 0.0 * generated_tokens
    low, high = _bounds(
        not all(isinstance(v, _SCALARS) for v in (prompt_tokens, generated_tokens, kv_budget))
    )
    _, dense = _kept(kv_budget, KV_BLOCK_TOKENS if kv_block is None else kv_block, rule, high)
    steps = high(generated_tokens - 1, 0)
    return high(low(prompt_tokens + steps - dense, steps), 0)


def _prefill(
    shape: ModelShape, cached: Any, fresh: Any, prefills: Any, low: _Pick, high: _Pick
) -> tuple[Any, Any]:
    """FLOPs and KV elements read of ``fresh`` prompt tokens after ``cached`` ones; the head multiplies the
    last alone."""
    flops = fresh * (shape.token_flops - 2.0 * shape.head_params) + prefills * 2.0 * shape.head_params
    for layers, window in shape.attention:
        pairs = _sum_min(cached, fresh, window, low, high)
        flops = flops + (layers * shape.prefill_pair_flops_per_layer) * pairs
    return flops, prefills * shape.kv_elements * cached


def _validate(prompt_tokens: Any, generated_tokens: Any, samples: Any, start_tokens: Any) -> bool:
    """True if any argument is an array; raises on one that is negative, NaN or infinite."""
    if (
        isinstance(prompt_tokens, _NUMBERS)
        and isinstance(generated_tokens, _NUMBERS)
        and isinstance(samples, _NUMBERS)
        and isinstance(start_tokens, _NUMBERS)
    ):
        inf = math.inf
        if (
            0 <= prompt_tokens < inf
            and 0 <= generated_tokens < inf
            and 0 <= samples < inf
            and 0 <= start_tokens < inf
        ):
            return False
        arrays = False
    else:
        arrays = True
    named = {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "samples": samples,
        "start_tokens": start_tokens,
    }
    for name, value in named.items():
        least = value if isinstance(value, _NUMBERS) else value.min() if value.size else 0
        most = value if isinstance(value, _NUMBERS) else value.max() if value.size else 0
        if not (least >= 0 and most < math.inf):
            raise InputError(f"{name} is {most if least >= 0 else least}; it must be 0 or more, and finite")
    return arrays


def sparse_rule(kv_budget: Any, kv_block: Any, method: str | SparseMethod | None) -> SparseMethod | None:
    """The sparse method in force: None is dense; a budget alone is top-k by token at no
    search cost, with a block size ``block-topk``."""
    if kv_budget is None:
        return None
    if method == "dense":
        return None
    for name, value in (("kv_budget", kv_budget), ("kv_block", 1 if kv_block is None else kv_block)):
        least = value if isinstance(value, _NUMBERS) else value.min()
        if not least >= 1:
            raise InputError(f"{name} is {least}; give 1 or more tokens, or leave it out")
    if method is None:
        rule = METHODS["token-topk" if kv_block is None else "block-topk"]
    elif isinstance(method, SparseMethod):
        rule = method
    else:
        rule = METHODS.get(method) or SparseMethod.of(method)
    return rule


def _bounds(arrays: bool) -> tuple[_Pick, _Pick]:
    if not arrays:
        return min, max
    import numpy as np

    return np.minimum, np.maximum


def _sum_min(before: Any, steps: Any, cap: Any, low: _Pick, high: _Pick) -> Any:
    """Sum over i = 1..steps of min(before + i, cap), exactly; cap None is no cap."""
    if cap is None:
        return steps * before + steps * (steps + 1) / 2
    filling = high(low(cap - before, steps), 0)
    return filling * before + filling * (filling + 1) / 2 + cap * (steps - filling)


def _sum_sparse(
    context: Any, steps: Any, budget: Any, block: Any, rule: SparseMethod, low: _Pick, high: _Pick
) -> tuple[Any, Any]:
    """KV tokens read and page vectors scored by one layer in ``steps`` steps after ``context``, exactly.

    Token by token: min(context, budget + extra), and a search once the context exceeds that. Paged, with K pages
    kept of S tokens: context c lies in p = ceil(c/S) pages; dense up to the largest p with p S <= K S + p v / 2
    (v summaries are v / 2 tokens' KV), from there K S - (p S - c) tokens, because the last page holds c - (p - 1) S.
    """
    kept, dense = _kept(budget, block, rule, high)
    unsearched = high(low(dense - context, steps), 0)
    begun, end = context + unsearched, context + steps
    pages: Any = 0.0
    if rule.summaries or rule.paged:
        pages = _sum_pages(end, block) - _sum_pages(begun, block)
    read = unsearched * context + unsearched * (unsearched + 1) / 2 + kept * (steps - unsearched)
    if rule.paged:
        unfilled = block * pages - (end * (end + 1) - begun * (begun + 1)) / 2
        read = read - unfilled
    return read, rule.summaries * rule.searches * pages


def _kept(budget: Any, block: Any, rule: SparseMethod, high: _Pick) -> tuple[Any, Any]:
    """Tokens that a sparse step keeps, with the last page full, and the context up to which a step is dense."""
    if not rule.paged:
        return budget + rule.extra_tokens, budget + rule.extra_tokens
    kept = high(budget // block, 1) * block + rule.extra_tokens
    worth = block - rule.summaries / 2  # tokens that a page left out saves
    return kept, (kept // worth) * block if worth > 0 else _NO_CAP


def _sum_pages(tokens: Any, block: Any) -> Any:
    """Sum over x = 1..tokens of ceil(x / block), exactly."""
    whole = tokens // block
    return block * whole * (whole + 1) / 2 + (tokens - whole * block) * (whole + 1)
