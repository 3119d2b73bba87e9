"""What the sparse backends share: a builder that plans each step, and a layer that chooses its pages and attends to them.

Both are mixins before vLLM's own classes, and leave to them all that is not sparse: prefill rows, layers that can't (sliding
windows, encoders), steps without sparse rows. In a sparse call every (row, KV head) is a sequence of its own with one KV head, over
a view of the cache in which each head's part of a page is a page. Read and run against vLLM 0.32.0 on CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import CrossAttentionSpec, EncoderOnlyAttentionSpec

from ttc.attention import choose, worth
from ttc.attention.pages import Cache
from ttc.attention.rows import Batch, Row, batch_of
from ttc.attention.settings import CONFIG_KEY, KvSetting, SparseOptions
from ttc.attention.steps import Factors, LayerPlan, Planner, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("ttc.attention")
MEASURED_PAGES = 128  # the most that a sequence has while the cost of choosing is measured
_WARNED: set[str] = set()


class SparseBuilder:
    """Adds ``metadata.ttc_step`` in steps in which some row decodes sparsely. ``pooled``: see ``Planner``."""

    planner_class: ClassVar[type[Planner]] = Planner
    pooled: ClassVar[bool] = False
    repeats = 12  # of each measured time
    made: Any = None

    if TYPE_CHECKING:

        def _init_reorder_batch_threshold(self, threshold: int) -> None: ...

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.spec, self.config, self.where = kv_cache_spec, vllm_config, device
        self.options = SparseOptions.of((vllm_config.additional_config or {}).get(CONFIG_KEY))
        self.batch = batch_of(vllm_config)
        names = sorted(layer_names, key=extract_layer_index)
        found = get_layers_from_vllm_config(vllm_config, Attention, names)
        self.attention = {name: found[name] for name in names if name in found}
        self.reason = self.unfit([layer.impl for layer in self.attention.values()])
        self.planner: Planner | None = None
        if not self.reason:
            self._init_reorder_batch_threshold(1)  # rows that decode come first
            self.planner = self.batch.planners[names[0]] = self._planner(self.options, self.batch)
        self.batch.served[names[0]] = self.reason

    def _planner(
        self, options: SparseOptions, batch: Batch, overhead: worth.Overhead | None = None
    ) -> Planner:
        factors = options.factors(len(self.attention), self.spec.num_kv_heads)
        return self.planner_class(
            options=options, batch=batch, factors=dict(zip(self.attention, factors, strict=True)), page=self.spec.block_size,
            device=self.where, finish=self.finish, measure=(lambda: overhead) if overhead is not None else self._overhead,
            pooled=self.pooled,
        )  # fmt: skip

    def unfit(self, impls: Sequence[Any]) -> str:
        """Why these layers can't decode sparsely ("" if they can)."""
        config, spec = self.config, self.spec
        reasons = {
            "cross or encoder attention": isinstance(spec, CrossAttentionSpec | EncoderOnlyAttentionSpec),
            "a sliding window": any(_windowed(impl) for impl in impls),
            "an 8-bit KV cache": any(
                is_quantized_kv_cache(getattr(impl, "kv_cache_dtype", "auto")) for impl in impls
            ),
            "ALiBi or attention sinks": any(
                getattr(impl, name, None) is not None for impl in impls for name in ("alibi_slopes", "sinks")
            ),
            "no decoder attention": not impls
            or any(getattr(impl, "attn_type", None) != AttentionType.DECODER for impl in impls),
            "speculative decoding": config.speculative_config is not None,
            "decode context parallelism": config.parallel_config.decode_context_parallel_size > 1,
            "R-SWA": getattr(config.model_config, "rswa_window", None) is not None,
        }
        return next((reason for reason, here in reasons.items() if here), "")

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = self.stock(common_prefix_len, common_attn_metadata, fast_build)
        if not self.batch.rows:
            return metadata
        if self.planner is None or metadata.causal is not True:
            warn(
                f"{next(iter(self.attention), 'a layer')} and its like stay dense: {self.reason or 'not causal'}"
            )
            return metadata
        n, starts, lengths, fresh, prefilling = on_host(common_attn_metadata)
        step = self.planner.step(lengths, fresh, prefilling, metadata.block_table)
        if step is not None and step.rows < n:
            step.rest = self.rest(metadata, step.rows, n, starts, lengths)
        metadata.ttc_step = step
        return metadata

    def stock(self, common_prefix_len: int, common: Any, fast_build: bool) -> Any:
        """What vLLM's own builder makes of a step."""
        if self.planner is not None and self.batch.rows:
            self.planner.overhead  # noqa: B018  # measured now: that builds steps, too, and vLLM keeps one step's tensors for the next
        self.made = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        self.made.ttc_step = None
        return self.made

    def finish(self, plan: LayerPlan) -> Any:
        """What this backend's kernel wants for a plan beside its table: the same in all layers."""
        raise NotImplementedError

    def rest(self, metadata: Any, first: int, n: int, starts: list[int], lengths: list[int]) -> Any:
        """What this backend's kernel wants for the rows from ``first`` on, which prefill."""
        raise NotImplementedError

    def blank_cache(self, blocks: int) -> Tensor:
        """A cache of one layer [N, H, page, 2 D] as vLLM lays it out, filled with noise."""
        spec = self.spec
        made = torch.empty(
            blocks,
            spec.num_kv_heads,
            spec.block_size,
            2 * spec.head_size,
            dtype=spec.dtype,
            device=self.where,
        )
        return made.normal_()

    def facts(self) -> dict[str, Any]:
        """What a measurement of this backend holds for."""
        import vllm

        impl, spec = next(iter(self.attention.values())).impl, self.spec
        return {
            "backend": type(self).__module__, "vllm": vllm.__version__, "torch": torch.__version__, "dtype": str(spec.dtype),
            "heads": impl.num_heads, "kv_heads": spec.num_kv_heads, "channels": spec.head_size, "page": spec.block_size,
            "layers": len(self.attention), "threads": torch.get_num_threads(), "selector": self.options.selector,
        }  # fmt: skip

    def _overhead(self) -> worth.Overhead:
        """What choosing costs here, by the engine's options; measured where time decides, once for this machine and shape."""
        if self.options.when == "always":
            return worth.NONE
        if self.options.when == "cheaper":
            return worth.BY_BYTES
        if self.options.overhead is not None:
            return worth.by_time(worth.Overhead(*self.options.overhead))
        if self.config.parallel_config.tensor_parallel_size > 1:
            return worth.BY_BYTES  # each rank would measure for itself, and decide by itself
        facts = self.facts()
        path = worth.stored_path(facts)
        found = worth.stored(path)
        if found is None:
            found = measure(self)
            worth.store(path, found, facts)
        return worth.by_time(found)

    def clock(self, attention: Callable[[], None]) -> float:
        """Seconds that the attention of some layers takes, as it is run here."""
        begun = time.perf_counter()
        attention()
        settle(self.where)
        return time.perf_counter() - begun

    @contextmanager
    def over(self, caches: dict[str, Tensor]) -> Iterator[None]:
        """While open, the layers have these caches."""
        yield

    @contextmanager
    def probing(self, setting: KvSetting) -> Iterator[Batch]:
        """While open, the builder plans for a batch of one row with this setting (and none, when its rows are cleared)."""
        batch = Batch()
        batch.rows[0] = Row(setting, None)
        options = replace(
            self.options, when="always", share_layers=1, share_steps=1, dense_layers=0, budgets=None
        )
        kept = self.batch, self.planner
        self.batch, self.planner = batch, self._planner(options, batch, worth.NONE)
        try:
            yield batch
        finally:
            self.batch, self.planner = kept


class SparseForward:
    """One layer. Chooses pages and calls the stock kernel on them; all else is vLLM's own."""

    cache: Cache | None = None
    num_heads: int
    scale: float

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        step: Step | None = getattr(attn_metadata, "ttc_step", None)
        factors = step.planner.factors.get(layer.layer_name) if step is not None else None
        if step is None or factors is None:
            return super().forward(  # type: ignore[misc,no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if self.cache is None or self.cache.where != (kv_cache.data_ptr(), kv_cache.shape):
            self.cache = self.summaries(kv_cache)
        for kind, ids in step.stale.items():
            self.cache.update(kind, kv_cache, ids)
        plan = step.plan(factors, self.cache.ids)
        table = self._table(layer.layer_name, query, kv_cache, step, plan, factors)
        self.attend(layer, query, kv_cache, output, attn_metadata, step, plan, table)
        return output

    def summaries(self, kv_cache: Tensor) -> Cache:
        raise NotImplementedError

    def select(self, table: Tensor, query: Tensor, step: Step, plan: LayerPlan) -> None:
        """Fill in the table's rows that have a rule. ``query`` [b, H, G, D]."""
        raise NotImplementedError

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, attn_metadata: Any, step: Step, plan: LayerPlan,
        table: Tensor,
    ) -> None:  # fmt: skip
        """The stock kernel on the pages of ``table`` [b * H, W], and on the rows that prefill."""
        raise NotImplementedError

    def _table(
        self, name: str, query: Tensor, kv_cache: Tensor, step: Step, plan: LayerPlan, factors: Factors
    ) -> Tensor:
        """The pages of this layer [b * H, W], its own or shared with a neighbour or an earlier step."""
        if not plan.oracle and not plan.scored:
            return plan.table
        planner = step.planner
        anchor = planner.anchors[name]
        shared = planner.shared.get(anchor) if step.again else step.chosen.get(anchor)
        if shared is not None:
            return shared
        table = plan.table if planner.alone or plan.frame is not None else plan.table.clone()
        heads = len(factors)
        grouped = query[: step.rows].view(step.rows, heads, self.num_heads // heads, -1)
        if plan.scored:
            self.select(table, grouped, step, plan)
        assert self.cache is not None
        for i in plan.oracle:
            ids = step.tables[i, : step.pages[i]].long()
            mass = choose.oracle_scores(
                grouped[i], self.cache.keys(kv_cache, ids), step.lengths[i], self.scale
            )
            own = table[i * heads : (i + 1) * heads]
            choose.fill_scored(own, mass, ids, plan.kept[i], self.cache.ids)
        if not planner.alone:
            step.chosen[anchor] = planner.shared[anchor] = table
        return table


def on_host(common: Any) -> tuple[int, list[int], list[int], list[int], list[bool]]:
    """Rows of a step, and of each its first token, its length, its new tokens and whether it prefills: without asking the GPU."""
    n = common.num_reqs
    known = common.seq_lens if common.seq_lens.is_cpu else common.seq_lens_cpu_upper_bound
    starts = common.query_start_loc_cpu[: n + 1].tolist()
    prefilling = [False] * n if common.is_prefilling is None else common.is_prefilling[:n].tolist()
    return n, starts, known[:n].tolist(), [b - a for a, b in pairwise(starts)], prefilling


def measure(builder: SparseBuilder) -> worth.Overhead:
    """Time the attention of whole steps, dense and sparse, on up to four of the builder's layers over caches of noise, for one
    sequence of few and one of many pages; the least of some repeats. From the four times: a KV token's, a page vector's, and what
    is left."""
    spec = builder.spec
    page, heads = spec.block_size, spec.num_kv_heads
    page_bytes = heads * page * 2 * spec.head_size * spec.dtype.itemsize
    few, many = 8, max(32, min(MEASURED_PAGES, 2**25 // page_bytes))
    layers = list(builder.attention.values())[:4]
    stock = builder.blank_cache(many)
    caches = [stock, *(stock.clone() for _ in layers[1:])]
    query = torch.randn(1, layers[0].impl.num_heads * spec.head_size, dtype=spec.dtype, device=builder.where)
    query = query.view(1, layers[0].impl.num_heads, spec.head_size)
    key = torch.zeros(1, heads, spec.head_size, dtype=spec.dtype, device=builder.where)
    output = torch.empty_like(query)
    before = [getattr(layer.impl, "cache", None) for layer in layers]
    with builder.probing(KvSetting(2 * page)) as batch:
        sparse = dict(batch.rows)

        def once(pages: int, rows: dict[int, Row]) -> float:
            batch.rows.clear()
            batch.rows.update(rows)
            common = _one_row(pages * page - 1, many, builder.where)
            settle(builder.where)
            begun = time.perf_counter()
            metadata = builder.build(0, common)
            planned = time.perf_counter()

            def attention() -> None:
                for layer, cache in zip(layers, caches, strict=True):
                    layer.impl.forward(layer, query, key, key, cache, metadata, output)

            return (planned - begun) / len(builder.attention) + builder.clock(attention) / len(layers)

        with torch.inference_mode(), builder.over(dict(zip(builder.attention, caches, strict=False))):
            cells = [(pages, rows) for pages in (few, many) for rows in ({}, sparse)]
            times = [[once(*cell) for cell in cells] for _ in range(builder.repeats + 2)][2:]
    for layer, cache in zip(layers, before, strict=True):
        layer.impl.cache = cache
    dense_few, sparse_few, dense_many, sparse_many = (min(column) for column in zip(*times, strict=True))
    more, read = (many - few) * page, 2 * page - 1
    token_s = (dense_many - dense_few) / more
    if token_s <= 0:
        return worth.Overhead(worth.BY_BYTES.vector, float("inf"))
    vector_s = max(0.0, (sparse_many - sparse_few) / (many - few))
    fixed_s = sparse_few - dense_few + (few * page - 1 - read) * token_s - few * vector_s
    return worth.Overhead(round(vector_s / token_s, 2), round(max(0.0, fixed_s / token_s)))


def _one_row(length: int, pages: int, device: torch.device) -> Any:
    """What vLLM tells a builder of a step in which one sequence of ``length`` tokens decodes, on the pages 0, 1, …"""
    lengths, starts = torch.tensor([length], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device), query_start_loc_cpu=starts, seq_lens=lengths.to(device), num_reqs=1,
        num_actual_tokens=1, max_query_len=1, max_seq_len=length,
        block_table_tensor=torch.arange(pages, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.tensor([length - 1], device=device), causal=True, seq_lens_cpu_upper_bound=lengths,
        is_prefilling=torch.tensor([False]),
    )  # fmt: skip


def settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """The card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _windowed(impl: Any) -> bool:
    """Whether a layer has a sliding window, in any of the backends' spellings of none."""
    return getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1))


def warn(message: str) -> None:
    """Say it once in this process."""
    if message not in _WARNED:
        _WARNED.add(message)
        log.warning("sparse decoding: %s", message)
