"""The sparse backend for vLLM's TRITON_ATTN. See ``gpu``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.attention.backends import triton_attn as base

from ttc.attention.gpu import GpuBuilder, GpuImpl
from ttc.attention.steps import LayerPlan


class TritonBuilder(GpuBuilder, base.TritonAttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is not type-checked here
    pass


class TritonImpl(GpuImpl, base.TritonAttentionImpl):  # type: ignore[misc]
    stock = base.TritonAttentionImpl

    def narrow(self, metadata: Any, plan: LayerPlan) -> Any:
        """The scratch of the kernel that splits sequences is [rows, query heads, …]: the same memory has room for as many
        (row, KV head) with a group of query heads each, so the kernel is chosen as it would be for the whole rows."""
        group = self.num_heads // self.num_kv_heads

        def regrouped(scratch: Any) -> Any:
            return scratch.view(-1, group, *scratch.shape[2:])

        return replace(
            super().narrow(metadata, plan), seq_threshold_3D=metadata.seq_threshold_3D * self.num_kv_heads,
            softmax_segm_output=regrouped(metadata.softmax_segm_output), softmax_segm_max=regrouped(metadata.softmax_segm_max),
            softmax_segm_expsum=regrouped(metadata.softmax_segm_expsum),
        )  # fmt: skip


class TritonBackend(base.TritonAttentionBackend):  # type: ignore[misc]
    """What vLLM is given in the place of its TRITON_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[TritonImpl]:
        return TritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonBuilder]:
        return TritonBuilder
