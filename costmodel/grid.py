"""A grid of (model, N, length, KV budget) points, priced at once: for planners that search, and to time
the formulas."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttc.costmodel.costs import KINETICS_INTENSITY, full, kinetics
from ttc.costmodel.records import Floats
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError


class Grid(NamedTuple):
    """eFLOPs of shape (models, samples, lengths, budgets)."""

    kinetics_eflops: Floats
    full_eflops: Floats


def price_grid(
    shapes: Sequence[ModelShape],
    *,
    samples: Floats,
    generated_tokens: Floats,
    kv_budgets: Floats,
    prompt_tokens: float = 150.0,
    kv_block: int = 32,
    method: str = "block-topk",
    intensity: float = KINETICS_INTENSITY,
) -> Grid:
    """Both conventions on the whole grid; a KV budget of infinity is dense. One formula call per model."""
    if not shapes:
        raise InputError("grid: no models; give at least one shape")
    axes = {
        "samples": np.asarray(samples, float)[:, None, None],
        "generated_tokens": np.asarray(generated_tokens, float)[None, :, None],
        "kv_budget": np.asarray(kv_budgets, float)[None, None, :],
    }
    size = (axes["samples"].size, axes["generated_tokens"].size, axes["kv_budget"].size)
    both: list[list[Floats]] = [[], []]
    for shape in shapes:
        for convention, found in zip((kinetics, full), both, strict=True):
            cost = convention(shape, prompt_tokens=prompt_tokens, kv_block=kv_block, method=method, **axes)
            found.append(np.broadcast_to(cost.eflops(intensity), size))
    return Grid(np.stack(both[0]), np.stack(both[1]))


def time_grid(points: int = 1_000_000, *, rounds: int = 5) -> dict[str, Any]:
    """Prices about ``points`` points (five Qwen3 sizes, dense and with page search) in both conventions; the
    seconds of every round, and of one call with plain numbers."""
    shapes = [ModelShape.named(f"Qwen3-{size}") for size in ("0.6B", "1.7B", "4B", "8B", "14B")]
    lengths = np.linspace(1.0, 32768.0, max(1, points // (len(shapes) * 10 * 20)))
    budgets = np.append(np.geomspace(64, 16384, 19).round(), np.inf)
    axes: dict[str, Any] = {"samples": np.geomspace(1, 512, 10), "generated_tokens": lengths}
    seconds, size = [], 0
    for _ in range(rounds):
        begun = time.perf_counter()
        size = price_grid(shapes, **axes, kv_budgets=budgets).full_eflops.size
        seconds.append(time.perf_counter() - begun)
    calls = 1000
    begun = time.perf_counter()
    for _ in range(calls):
        full(shapes[3], prompt_tokens=150, generated_tokens=16384, samples=8, kv_budget=2048)
    return {"points": size, "seconds": seconds, "seconds_per_call": (time.perf_counter() - begun) / calls}
