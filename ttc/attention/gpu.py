"""What the two GPU backends share. vLLM's own ``forward`` is called twice in a sparse step, with metadata of fewer rows: once on a
view of the cache with one KV head, in which every (row, KV head) is a sequence, and once for the rows that prefill.

Read against vLLM 0.32.0 and 0.26.0. The plan, the views, the metadata and the Triton kernels are tested on CPU (in Triton's
interpreter), and tests/attention/test_gpu.py holds all of it where a GPU is; what has run on one is in docs/sparse.md.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.config import CUDAGraphMode

from ttc.attention import choose, worth
from ttc.attention.backend import MEASURED_PAGES, SparseBuilder, SparseForward, device_name, on_host, settle
from ttc.attention.fixed import FixedPlanner, Layers, Room
from ttc.attention.pages import StridedCache
from ttc.attention.rows import Batch
from ttc.attention.settings import CONFIG_KEY, ENVIRONMENT, SparseOptions
from ttc.attention.steps import LayerPlan, Planner, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

REPLAYS = 10


class GpuBuilder(SparseBuilder):
    """Adds the sparse part of a step to vLLM's metadata."""

    supports_update_block_table = False  # a step holds its group's tables: each group plans its own
    planner_class = FixedPlanner
    pooled = True
    caches: dict[str, Tensor] | None = None
    layers: Layers | None = None

    def full_graphs(self) -> bool:
        """Whether steps in which all rows decode are replayed whole."""
        return bool(self.config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL)

    def _planner(
        self, options: SparseOptions, batch: Batch, overhead: worth.Overhead | None = None
    ) -> Planner:
        made = super()._planner(options, batch, overhead)
        assert isinstance(made, FixedPlanner)
        most = self.config.scheduler_config.max_num_seqs
        captured = self.config.compilation_config.max_cudagraph_capture_size or 0
        pages = -(-self.config.model_config.max_model_len // self.spec.block_size)
        made.room = Room(max(most, captured), max(pages, MEASURED_PAGES))
        made.frames = self.frames = getattr(self, "frames", {})
        return made

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """In full graphs every step of rows that all decode goes one way, also without sparse rows and outside of a graph."""
        common = common_attn_metadata
        planner = self.planner
        if isinstance(planner, FixedPlanner) and self.full_graphs():
            self._layers()  # before any step: what it summarises must lie where steps of graphs look for it
        if (
            not isinstance(planner, FixedPlanner) or not self.full_graphs() or common.max_query_len != 1
            or common.causal is not True or common.num_reqs > planner.room.rows
        ):  # fmt: skip
            return super().build(common_prefix_len, common, fast_build)
        metadata = self.stock(common_prefix_len, common, fast_build)
        _, _, lengths, fresh, prefilling = on_host(common)
        metadata.ttc_step = planner.decode(lengths, fresh, prefilling, metadata.block_table, self._layers())
        return metadata

    def _layers(self) -> Layers:
        caches = self.caches or {name: layer.kv_cache for name, layer in self.attention.items()}
        if self.layers is None or self.layers.at != [(c.data_ptr(), c.shape) for c in caches.values()]:
            self.layers = Layers({name: self.attention[name].impl for name in caches}, caches)
        return self.layers

    @contextmanager
    def over(self, caches: dict[str, Tensor]) -> Iterator[None]:
        kept = self.caches, self.layers
        self.caches, self.layers = caches, None
        if self.full_graphs():
            self.repeats = 1  # each is the least of some replays
        try:
            yield
        finally:
            self.caches, self.layers = kept

    def clock(self, attention: Callable[[], None]) -> float:
        if self.where.type != "cuda" or not self.full_graphs():
            return super().clock(attention)
        attention()
        settle(self.where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attention()
        times = []
        for _ in range(REPLAYS):
            settle(self.where)
            begun = time.perf_counter()
            graph.replay()
            settle(self.where)
            times.append(time.perf_counter() - begun)
        return min(times)

    def unfit(self, impls: Sequence[Any]) -> str:
        config, spec = self.config, self.spec
        mode, full = config.compilation_config.cudagraph_mode, self.full_graphs()
        asked = CONFIG_KEY in (config.additional_config or {}) or ENVIRONMENT in os.environ
        reasons = {
            "full CUDA graphs of batches that also prefill (take another cudagraph_mode)": (
                mode.mixed_mode() == CUDAGraphMode.FULL
            ),
            f"full CUDA graphs captured without page choice (start vLLM with {ENVIRONMENT}='{{}}', or cudagraph_mode PIECEWISE)": (
                full and not asked
            ),
            "full CUDA graphs with a choice that lasts several steps, or made in torch": full
            and (self.options.share_steps > 1 or self.options.selector == "torch"),
            "Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 takes the first)": config.use_v2_model_runner,
            "micro-batches (dual batch overlap)": config.parallel_config.use_ubatching,
            "a prefix that sees itself both ways": config.model_config.is_mm_prefix_lm,
            "cascade attention (vLLM 0.26; off by default)": not getattr(
                config.model_config, "disable_cascade_attn", True
            ),
            "values of another size than keys": getattr(spec, "head_size_v", None)
            not in (None, spec.head_size),
            "FlashAttention 4's kernel for 256 channels": any(
                getattr(impl, "fa4_hd256", False) for impl in impls
            ),
        }
        return super().unfit(impls) or next((reason for reason, here in reasons.items() if here), "")

    def blank_cache(self, blocks: int) -> Tensor:
        spec, layout = self.spec, self._layout()
        by_head = layout.index("H") < layout.index("N")
        inner = (spec.num_kv_heads, spec.block_size) if by_head else (spec.block_size, spec.num_kv_heads)
        made = torch.empty(blocks, *inner, 2 * spec.head_size, dtype=spec.dtype, device=self.where).normal_()
        return made if by_head else made.transpose(1, 2)

    def _layout(self) -> str:
        """vLLM's name for the order of the cache's dimensions: heads (H) before a page's tokens (N), or after."""
        named = getattr(self.config.cache_config, "kv_cache_layout", None)
        return str(named or envs.VLLM_KV_CACHE_LAYOUT or "NHD")

    def facts(self) -> dict[str, Any]:
        told = {"device": device_name(self.where), "layout": self._layout(), "graphs": self.full_graphs()}
        return super().facts() | told

    def finish(self, plan: LayerPlan) -> dict[str, Any]:
        """Fields of the metadata that change beside those that all GPU backends have."""
        return {}

    def rest(
        self, metadata: Any, first: int, n: int, starts: list[int], lengths: list[int]
    ) -> tuple[Any, int]:
        """The metadata of the rows that prefill, and their first token."""
        cut = metadata.query_start_loc[first : n + 1] - starts[first]
        made = replace(
            metadata, num_actual_tokens=starts[n] - starts[first], query_start_loc=cut, seq_lens=metadata.seq_lens[first:n],
            max_seq_len=max(lengths[first:n]), block_table=metadata.block_table[first:n],
            slot_mapping=metadata.slot_mapping[starts[first] :],
        )  # fmt: skip
        return made, starts[first]


class GpuImpl(SparseForward):
    """One layer. ``stock`` is vLLM's class for it."""

    stock: ClassVar[Any]
    num_kv_heads: int

    @cached_property
    def of_one_head(self) -> Any:
        """This layer, as if it had one KV head and its group of query heads."""
        made = copy.copy(self)
        made.num_heads, made.num_kv_heads = self.num_heads // self.num_kv_heads, 1
        return made

    def summaries(self, kv_cache: Tensor) -> StridedCache:
        return StridedCache(kv_cache)

    def select(self, table: Tensor, query: Tensor, step: Step, plan: LayerPlan) -> None:
        assert self.cache is not None
        kept, ids = self.cache.kept, self.cache.ids
        args = (
            table,
            query,
            kept.get("mean"),
            kept.get("bounds"),
            step.tables,
            step.counts,
            plan.keep,
            plan.rules,
        )
        if step.planner.options.selector == "torch":
            choose.select(*args, kind="torch", ids=ids)
        else:
            from ttc.attention import select_triton

            scores = None if plan.frame is None else plan.frame.scores
            select_triton.select(*args, ids=ids, pages=step.widest, scores=scores)

    def narrow(self, metadata: Any, plan: LayerPlan) -> Any:
        """The step's metadata for the call in which every (row, KV head) is a sequence; its table changes from layer to layer."""
        rows = len(plan.lengths)
        return replace(
            metadata, num_actual_tokens=rows, max_query_len=1, query_start_loc=plan.starts, max_seq_len=plan.longest,
            seq_lens=plan.lengths, **plan.backend,
        )  # fmt: skip

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, attn_metadata: Any, step: Step, plan: LayerPlan,
        table: Tensor,
    ) -> None:  # fmt: skip
        assert isinstance(self.cache, StridedCache)
        if plan.narrow is None:
            plan.narrow = self.narrow(attn_metadata, plan)
        plan.narrow.block_table = table
        own = query[: step.rows].reshape(len(table), self.num_heads // self.num_kv_heads, -1)
        into = output[: step.rows].view(own.shape)
        self._stock(self.of_one_head, layer, own, self.cache.view, plan.narrow, into)
        if step.rest is not None:
            metadata, first = step.rest
            end = first + metadata.num_actual_tokens
            self._stock(self, layer, query[first:end], kv_cache, metadata, output[first:end])

    def _stock(
        self, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        """vLLM's forward; what is attended to is in the cache by now, so it gets no keys and values."""
        self.stock.forward(impl, layer, query, None, None, kv_cache, metadata, output)
