"""Carries each request's KV setting to the attention backend: which row of the batch reads how much.

A ``LogitsProcessor`` that touches no logits: vLLM tells those of every row that comes, goes and moves, before the step's attention
metadata are built. This is its public way to give per-request settings to a worker.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ttc.attention.settings import KvSetting, read_setting

if TYPE_CHECKING:
    import torch

    from ttc.attention.steps import Planner

COUNTS: dict[int, list[float]] = {}
"""Counter key -> KV tokens skipped, page vectors scored (see ``Row.count``), and of these what the last step added."""
_BATCHES: dict[int, Batch] = {}


class Row:
    """A request that decodes sparsely. ``done``: for each group of layers, how many of its leading pages are summarised."""

    __slots__ = ("done", "key", "setting")

    def __init__(self, setting: KvSetting, key: int | None) -> None:
        self.setting, self.key = setting, key
        self.done: dict[str, int] = {}

    def count(self, skipped: float, scored: float) -> None:
        """Add a step's KV tokens left unread and page vectors scored, each the mean over the layers (and KV heads)."""
        counts = COUNTS.get(self.key or 0)
        if counts is not None:
            counts[0] += skipped
            counts[1] += scored
            counts[2:] = skipped, scored


class Batch:
    """The rows of one engine; ``version`` changes with their make-up. ``served`` names each group of layers that the backend took
    over and why it stays dense ("": it does not); ``planners`` are those of the groups that don't."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.version = 0
        self.served: dict[str, str] = {}
        self.planners: dict[str, Planner] = {}

    def dense_below(self, setting: KvSetting) -> float:
        """The context, in tokens, up to which a branch with this setting reads everything (infinity: at any)."""
        return max((planner.dense_below(setting) for planner in self.planners.values()), default=math.inf)

    @property
    def layers(self) -> int:
        """Layers of all groups that the backend serves."""
        return sum(len(planner.layers) for planner in self.planners.values())

    @property
    def part(self) -> float:
        """The part of those layers that may decode sparsely: the others are dense by the engine's options."""
        sparse = sum(f is not None for planner in self.planners.values() for f in planner.layers)
        return sparse / max(1, self.layers)


def batch_of(vllm_config: Any) -> Batch:
    """The batch of the engine with this config (several may live in one process)."""
    return _BATCHES.setdefault(id(vllm_config.cache_config), Batch())


class KvProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not type-checked here
    """Mirrors the batch's rows into ``Batch``."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        read_setting(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.batch = batch_of(vllm_config)
        self.batch.rows.clear()  # of an engine that had this id before

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        batch = self.batch
        batch.version += 1
        for index in batch_update.removed:
            batch.rows.pop(index, None)
        for index, params, _, _ in batch_update.added:
            batch.rows.pop(index, None)
            found = read_setting(params.extra_args)
            if found is not None:
                batch.rows[index] = Row(*found)
        for source, target, direction in batch_update.moved:
            swap = direction is MoveDirectionality.SWAP
            moved, other = batch.rows.pop(source, None), batch.rows.pop(target, None)
            if moved is not None:
                batch.rows[target] = moved
            if swap and other is not None:
                batch.rows[source] = other
