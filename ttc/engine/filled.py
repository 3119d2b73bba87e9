"""Contexts without prefill: what ``ttc calibrate`` decodes over.

vLLM's DecodeBenchConnector hands a request the KV of its whole prompt as random numbers, so that a decode step over any context
can be timed at once. Here it does so for requests that ask for it, and prefill can be timed in the same engine. Loaded by vLLM
through ``kv_connector_module_path``.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

from ttc.engine.stepper import ASKED


class FilledContexts(DecodeBenchConnector):  # type: ignore[misc]  # vLLM is not type-checked here
    """DecodeBenchConnector for the requests whose ``kv_transfer_params`` say ``ttc_filled``."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get(ASKED):
            return 0, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found
