"""Distributions of lengths, batches that shrink, deepening's triggers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttc.costmodel import ModelShape, full, kinetics
from ttc.costmodel.lengths import Lengths, batch_cost, deepening_cost, deepening_triggers, kinetics_moments
from ttc.errors import InputError
from ttc.samplers.deepening import checkpoints

SHAPE = ModelShape.named("Qwen3-0.6B")
MOE = ModelShape.named("Qwen3-30B-A3B")


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 40000), min_size=1, max_size=20), n=st.integers(1, 8))
def test_equation_10_from_moments_is_the_mean_over_chains(lengths: list[int], n: int) -> None:
    observed = Lengths(np.array(lengths, float))
    each = observed.expect(lambda t: kinetics(SHAPE, prompt_tokens=150, generated_tokens=t, samples=n))
    moments = kinetics_moments(
        SHAPE, prompt_tokens=150, mean_tokens=observed.mean, second_moment=observed.second_moment, samples=n
    )
    assert each.flops == pytest.approx(moments.flops, rel=1e-9)
    assert each.bytes == pytest.approx(moments.bytes, rel=1e-9)


def test_a_mean_alone_undercharges() -> None:
    observed = Lengths(np.array([2000.0, 30000.0]))
    at_mean = kinetics(SHAPE, prompt_tokens=150, generated_tokens=observed.mean).eflops()
    true = observed.expect(lambda t: kinetics(SHAPE, prompt_tokens=150, generated_tokens=t)).eflops()
    assert observed.spread == pytest.approx(452 / 256)
    assert 1.5 < true / at_mean < observed.spread


def test_cut_chains_pay_for_a_forced_answer() -> None:
    cut = Lengths(np.array([100.0, 5000.0])).capped(1000, 15)
    assert cut.tokens.tolist() == [100, 1015]


@pytest.mark.parametrize("shape", [SHAPE, MOE])
def test_a_batch_reads_the_weights_once_per_step(shape: ModelShape) -> None:
    lengths, prompts = [7, 3, 3, 1], [10, 20, 5, 40]
    ours = batch_cost(shape, prompt_tokens=np.array(prompts), generated_tokens=np.array(lengths))
    moved = flops = 0.0
    for prompt, length in zip(prompts, lengths, strict=True):
        alone = full(shape, prompt_tokens=prompt, generated_tokens=length, weight_reads=0.0)
        moved, flops = moved + alone.bytes, flops + alone.flops
    moved += shape.step_weight_bytes(sum(prompts))
    for step in range(1, max(lengths)):
        moved += shape.step_weight_bytes(sum(length > step for length in lengths))
    assert ours.flops == pytest.approx(flops)
    assert ours.bytes == pytest.approx(moved)


@settings(max_examples=100)
@given(total=st.integers(1, 50000), first=st.integers(1, 5000), growth=st.floats(1.05, 4))
def test_triggers_stand_at_geometric_checkpoints(total: int, first: int, growth: float) -> None:
    count = len({place for k in range(400) if (place := math.ceil(first * growth**k)) < total})
    assert deepening_triggers(total, first, growth) == count == len(checkpoints(first, growth, total))
    if total > first:
        assert count <= 1 + math.floor(math.log(total / first, growth) + 1e-9)


def test_deepening_costs_its_triggers_and_no_second_prefill() -> None:
    assert deepening_triggers(10000, 1000, 1) == 9
    assert deepening_triggers(500, 1000, 2) == 0
    deep = deepening_cost(
        SHAPE, prompt_tokens=100, thinking_tokens=8000, first_tokens=1000, growth=2, trigger_tokens=12
    )
    assert deep == full(SHAPE, prompt_tokens=100, generated_tokens=8000 + 3 * 12)


def test_bad_lengths_get_one_line() -> None:
    with pytest.raises(InputError, match="finite"):
        Lengths(np.array([1.0, np.nan]))
    with pytest.raises(InputError, match="never below"):
        kinetics_moments(SHAPE, prompt_tokens=1, mean_tokens=10, second_moment=50)
    with pytest.raises(InputError, match="growth"):
        deepening_triggers(10, 5, 0.5)
