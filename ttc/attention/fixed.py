"""Decode steps for full CUDA graphs: a graph replays fixed launches on fixed addresses, so all that changes from step to step lies
in tensors that are made once, and every row goes the same way.

A dense row is one that keeps all its pages; so one graph serves dense and sparse rows alike, and what a row reads is decided as
ever, on the host, before the step. Page choice is part of the graph (rows without a rule leave its kernels at once); page
summaries are made before it, for all layers in one launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttc.attention.choose import Ids, static_pages
from ttc.attention.pages import StridedCache
from ttc.attention.rows import Row
from ttc.attention.steps import Factors, LayerPlan, Planner, Step
from ttc.attention.worth import VECTORS


@dataclass(frozen=True, slots=True)
class Room:
    """The most that a graph has to hold: ``rows``, each of ``pages`` pages."""

    rows: int
    pages: int


class Frame:
    """What the layers with the same factors read, for up to ``room.rows`` rows of H KV heads: one copy a step fills it."""

    def __init__(self, room: Room, heads: int, device: torch.device) -> None:
        rows = -(-room.rows // 4) * 4  # so that each part begins at a multiple of 16 bytes
        sizes = {"counts": rows, "rules": rows, "keep": rows * heads, "lengths": rows * heads}
        total = sum(sizes.values())
        self.host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.there = torch.zeros(total, dtype=torch.int32, device=device)
        here = torch.split(self.host, list(sizes.values()))
        self.told = {name: part.numpy() for name, part in zip(sizes, here, strict=True)}
        self.counts, self.rules, self.keep, self.lengths = torch.split(self.there, list(sizes.values()))
        self.table = torch.zeros(rows * heads, room.pages, dtype=torch.int32, device=device)
        self.scores = torch.empty(rows * heads, room.pages, dtype=torch.float32, device=device)
        self.starts = torch.arange(rows * heads + 1, dtype=torch.int32, device=device)
        self.heads = torch.arange(heads, dtype=torch.int32, device=device)[None, :, None]
        self.schedule = torch.zeros(1 + 4 * rows * heads, dtype=torch.int32, device=device)

    def fill(
        self,
        counts: Sequence[int],
        rules: Sequence[int],
        keep: Sequence[Sequence[int]],
        lengths: Sequence[int],
        page: int,
    ) -> None:
        """Put the rows' numbers on the device, in one copy."""
        n, heads = len(counts), self.heads.shape[1]
        self.told["counts"][:n], self.told["rules"][:n] = counts, rules
        self.told["rules"][n:] = 0
        kept = self.told["keep"][: n * heads].reshape(n, heads)
        kept[:] = keep
        left = self.told["lengths"][: n * heads].reshape(n, heads)
        left[:] = kept
        left -= self.told["counts"][:n, None]
        left *= page
        left += torch.tensor(lengths, dtype=torch.int32).numpy()[:, None]
        self.there.copy_(self.host, non_blocking=True)

    def hold(self, schedule: Tensor) -> Tensor:
        """The same schedule at the frame's own address. What follows it is zeroed, as vLLM does for its own."""
        size = schedule.shape[0]
        self.schedule[:size] = schedule
        self.schedule[size:] = 0
        return self.schedule[:size]


@dataclass(slots=True)
class FixedStep(Step):
    """A step whose plans are frames."""

    most: int = 0

    @property
    def widest(self) -> int:
        return self.most


class Layers:
    """The caches of a group's layers and their summaries, by address: what is summarised in one launch."""

    def __init__(self, impls: Mapping[str, Any], caches: Mapping[str, Tensor]) -> None:
        self.at = [(cache.data_ptr(), cache.shape) for cache in caches.values()]
        self.one = next(iter(caches.values()))
        assert all(cache.stride() == self.one.stride() for cache in caches.values())
        made: list[StridedCache] = []
        for name, cache in caches.items():
            impls[name].cache = StridedCache(cache)
            made.append(impls[name].cache)
        self.ids: Ids = made[0].ids
        self.kept = [{kind: cache.room(kind, self.one) for kind in ("mean", "bounds")} for cache in made]

        def addresses(tensors: Sequence[Tensor]) -> Tensor:
            return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=self.one.device)

        self.sources = addresses(list(caches.values()))
        self.targets = {kind: addresses([kept[kind] for kept in self.kept]) for kind in ("mean", "bounds")}

    def summarise(self, stale: Mapping[str, Tensor]) -> None:
        from ttc.attention import select_triton

        for kind, ids in stale.items():
            select_triton.summarise(
                kind, ids, self.sources, self.targets[kind], self.one, self.kept[0][kind], len(self.kept)
            )


class FixedPlanner(Planner):
    """Plans both kinds of steps: those of graphs, into frames, and all others as ``Planner`` does."""

    room: Room
    frames: dict[Factors, Frame]

    def decode(
        self,
        lengths: Sequence[int],
        fresh: Sequence[int],
        prefilling: Sequence[bool],
        tables: Tensor,
        layers: Layers,
    ) -> FixedStep:
        """Plan a step of rows with at most one new token each: rows that pad the batch have none; rows that prefill are dense."""
        n = len(lengths)
        settings = [
            self.graphable(self.batch.rows.get(i)) if fresh[i] == 1 and not prefilling[i] else None
            for i in range(n)
        ]
        lengths = [max(1, length) for length in lengths]  # padding reads the null page
        pages = [-(-length // self.page) for length in lengths]
        kept = self._kept(settings, lengths, pages)
        self._count(settings, pages, kept, again=False)
        step = FixedStep(self, n, lengths, pages, tables, settings, kept, tables, {}, most=self.room.pages)
        layers.summarise(self._stale(step, ahead=1))
        for factors, each in kept.items():
            step.plans[factors] = self._framed(step, factors, each, layers.ids)
        return step

    def graphable(self, row: Row | None) -> Row | None:
        """The oracle chooses on the host, which no graph can hold: its rows are dense."""
        from ttc.attention.backend import warn

        if row is not None and row.setting.method == "oracle-topk":
            warn(
                "oracle-topk can't be part of a CUDA graph and stays dense; start vLLM with enforce_eager to measure it"
            )
            return None
        return row

    def _framed(self, step: FixedStep, factors: Factors, kept: list[list[int]], ids: Ids) -> LayerPlan:
        n, heads = step.rows, len(factors)
        frame = self.frames.get(factors)
        if frame is None:
            frame = self.frames[factors] = Frame(self.room, heads, self.device)
        rules, still = [0] * n, []
        for i, row in enumerate(step.settings):
            if row is None or min(kept[i]) >= step.pages[i]:
                continue
            rules[i] = VECTORS.get(row.setting.method, 0)
            if not rules[i]:
                still.append(i)
        frame.fill(step.pages, rules, kept, step.lengths, self.page)
        table = frame.table[: n * heads]
        width = min(self.room.pages, step.tables.shape[1])
        whole = table.view(n, heads, -1)[:, :, :width]
        torch.add(frame.heads * ids.head, step.tables[:, None, :width], alpha=ids.block, out=whole)
        if still:
            widest = max(max(kept[i]) for i in still)
            at = torch.zeros(len(still), heads, widest, dtype=torch.int64)
            for j, i in enumerate(still):
                method = step.settings[i].setting.method  # type: ignore[union-attr]
                for k in set(kept[i]):
                    positions = torch.as_tensor(static_pages(method, step.pages[i], k))
                    at[j, [h for h in range(heads) if kept[i][h] == k], :k] = positions
            rows = torch.tensor(still).to(self.device, non_blocking=True)
            chosen = step.tables[rows].gather(1, at.view(len(still), -1).to(self.device)).view(at.shape)
            table.view(n, heads, -1)[rows, :, :widest] = (chosen * ids.block + frame.heads * ids.head).to(
                torch.int32
            )
        step.counts = frame.counts[:n]
        plan = LayerPlan(
            kept, frame.keep[: n * heads].view(n, heads), frame.lengths[: n * heads], self.room.pages * self.page, table,
            frame.rules[:n], True, [], frame.starts[: n * heads + 1], frame=frame,
        )  # fmt: skip
        plan.backend = self.finish(plan)
        return plan
