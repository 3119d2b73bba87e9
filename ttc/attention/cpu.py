"""The sparse backend for vLLM's CPU attention.

The cache [N, H, page, 2D] is viewed as [N*H, 1, page, 2D]. The kernel's schedule depends on lengths alone, so it is made once for
all layers of a step. Read and run against vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends import cpu_attn as base

from ttc.attention import choose
from ttc.attention.backend import SparseBuilder, SparseForward
from ttc.attention.compiled import Selection, library_path, processor
from ttc.attention.pages import PackedCache, key_order
from ttc.attention.steps import LayerPlan, Step


class Rest(NamedTuple):
    """The rows that prefill, for a stock call of their own; ``first``: their first token."""

    schedule: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    first: int


class CpuBuilder(SparseBuilder, base.CPUAttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is not type-checked here
    """Adds the sparse part of a step to vLLM's metadata."""

    order: Tensor | None = None

    def unfit(self, impls: Sequence[Any]) -> str:
        reason = super().unfit(impls)
        if not reason:
            self.order = key_order(self.isa, self.block_size, self.head_dim, self.dtype)
            if self.order is None:
                return f"keys packed for {self.isa} in a way that can't be read back"
            for impl in impls:
                impl.order = self.order
        return reason

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"isa": self.isa, "processor": processor(), "library": library_path().stem}

    def finish(self, plan: LayerPlan) -> Tensor:
        heads = plan.keep.shape[1]
        return self._schedule(self.num_heads // heads, 1, plan.lengths, plan.starts)

    def rest(self, metadata: Any, first: int, n: int, starts: list[int], lengths: list[int]) -> Rest:
        cut = metadata.query_start_loc[first : n + 1] - starts[first]
        left = metadata.seq_lens[first:n].contiguous()
        schedule = self._schedule(self.num_heads, self.num_kv_heads, left, cut)
        return Rest(schedule, cut, left, metadata.block_table[first:n], starts[first])

    def _schedule(self, heads: int, kv_heads: int, lengths: Tensor, starts: Tensor) -> Tensor:
        made: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=heads, num_kv_heads=kv_heads, head_dim=self.head_dim, seq_lens=lengths,
            dtype=self.dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip
        return made


class CpuImpl(SparseForward, base.CPUAttentionBackendImpl):  # type: ignore[misc]
    """One layer on CPU."""

    order: Tensor

    def summaries(self, kv_cache: Tensor) -> PackedCache:
        return PackedCache(kv_cache, self.order)

    def select(self, table: Tensor, query: Tensor, step: Step, plan: LayerPlan) -> None:
        assert self.cache is not None
        kept, kind = self.cache.kept, step.planner.options.selector
        library = choose.compiled(kind)
        if library is None:
            told = step.tables, step.counts, plan.keep, plan.rules
            choose.select(table, query, kept.get("mean"), kept.get("bounds"), *told, kind=kind)
            return
        if plan.selection is None:
            plan.selection = Selection(
                library, step.tables, step.counts, plan.keep, plan.rules, table.shape[1], *query.shape[1:]
            )
        plan.selection(table, query, kept.get("mean"), kept.get("bounds"))

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, attn_metadata: Any, step: Step, plan: LayerPlan,
        table: Tensor,
    ) -> None:  # fmt: skip
        assert isinstance(self.cache, PackedCache)
        heads, channels = self.cache.heads, self.cache.channels
        keys, values = self.cache.by_head
        asked = query[: step.rows].reshape(step.rows * heads, -1, channels)
        made = output[: step.rows].view(asked.shape)
        self._attend(layer, asked, keys, values, made, plan.starts, plan.lengths, table, plan.backend)
        if step.rest is not None:
            schedule, starts, lengths, tables, first = step.rest
            keys, values = kv_cache.view(len(kv_cache), heads, -1, channels).chunk(2, dim=2)
            end = attn_metadata.num_actual_tokens
            self._attend(
                layer, query[first:end], keys, values, output[first:end], starts, lengths, tables, schedule
            )

    def _attend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, starts: Tensor, lengths: Tensor,
        table: Tensor, schedule: Tensor,
    ) -> None:  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts, seq_lens=lengths,
            scale=self.scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table,
            softcap=self.logits_soft_cap, scheduler_metadata=schedule, s_aux=None, k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float, kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip


class CpuBackend(base.CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM is given in the place of its CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[CpuImpl]:
        return CpuImpl

    @staticmethod
    def get_builder_cls() -> type[CpuBuilder]:
        return CpuBuilder
