"""The sparse backend for vLLM's FLASH_ATTN (FlashAttention 2, 3 and 4). See ``gpu``."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from vllm import envs
from vllm.v1.attention.backends import flash_attn as base

from ttc.attention.gpu import GpuBuilder, GpuImpl
from ttc.attention.steps import LayerPlan


class FlashBuilder(GpuBuilder, base.FlashAttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is not type-checked here
    """FlashAttention 3 is given a schedule, made once a step: lengths are the same in all layers. How long it is depends on the
    number of splits, and where that is left to it (0) on the longest length: schedule and call must be told the same."""

    def finish(self, plan: LayerPlan) -> dict[str, Any]:
        one = copy.copy(self)
        one.num_heads_q, one.num_heads_kv = self.num_heads_q // self.num_heads_kv, 1
        made = one._schedule(plan.starts, 1, plan.lengths, plan.longest)
        return {"scheduler_metadata": made if made is None or plan.frame is None else plan.frame.hold(made)}

    def rest(
        self, metadata: Any, first: int, n: int, starts: list[int], lengths: list[int]
    ) -> tuple[Any, int]:
        made, token = super().rest(metadata, first, n, starts, lengths)
        made.scheduler_metadata = self._schedule(
            made.query_start_loc, made.max_query_len, made.seq_lens, made.max_seq_len
        )
        return made, token

    def _schedule(self, starts: Tensor, most: int, lengths: Tensor, longest: int) -> Tensor | None:
        """As vLLM's builder makes it for whole rows, with the number of splits that it put into the step's metadata."""
        if not self.aot_schedule or envs.VLLM_BATCH_INVARIANT:
            return None
        made: Tensor = base.get_scheduler_metadata(
            batch_size=len(lengths), max_seqlen_q=most, max_seqlen_k=longest, num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv, headdim=self.headdim, cache_seqlens=lengths, qkv_dtype=self.kv_cache_dtype,
            cu_seqlens_q=starts, page_size=self.block_size, causal=True, window_size=(-1, -1), num_splits=self.made.max_num_splits,
        )  # fmt: skip
        return made


class FlashImpl(GpuImpl, base.FlashAttentionImpl):  # type: ignore[misc]
    stock = base.FlashAttentionImpl


class FlashBackend(base.FlashAttentionBackend):  # type: ignore[misc]
    """What vLLM is given in the place of its FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        return FlashBuilder
