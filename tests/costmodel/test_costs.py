"""Closed forms against brute force: every sum is recomputed by a loop over decoded tokens."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttc.costmodel import METHODS, Cost, Hardware, ModelShape, SparseMethod, full, kinetics
from ttc.costmodel.costs import sparse_steps
from ttc.errors import InputError

SHAPES = [ModelShape.named(n) for n in ("Qwen3-0.6B", "Gemma-3-1B", "DeepSeek-V3", "Qwen3-30B-A3B")]
QWEN3 = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
TABLE_TERA = [8873, 8915, 11549, 11685, 13192, 21514]  # dense, L_in 150, L_out 16,384, N 1, I 562.5


def close(a: Cost, b: Cost) -> bool:
    return math.isclose(a.flops, b.flops, rel_tol=1e-9) and math.isclose(a.bytes, b.bytes, rel_tol=1e-9)


@pytest.mark.parametrize(("size", "tera"), list(zip(QWEN3, TABLE_TERA, strict=True)))
def test_dense_kinetics_is_equation_4_and_the_table(size: str, tera: int) -> None:
    s = ModelShape.named(f"Qwen3-{size}")
    lin, lout, n, i = 150, 16384, 1, 562.5
    p, d, r = s.kinetics_params, s.kv_elements, s.q_heads / s.kv_heads
    equation = 2 * n * p * lout + 2 * r * n * lin * d * lout + r * n * d * lout**2
    equation += 2 * i * lin * d * lout + i * n * d * lout**2
    ours = kinetics(s, prompt_tokens=lin, generated_tokens=lout, samples=n).eflops(i)
    assert ours == pytest.approx(equation, rel=1e-12)
    assert round(ours / 1e12) == tera


def test_equations_8_and_9_where_the_paper_states_them() -> None:
    """L_in >= B. The compute term of (9) is printed without r; the authors' code has the query heads
    there, and so have we."""
    s, lin, lout, n, b, block, i = SHAPES[0], 4096, 1000, 4, 1024, 64, 562.5
    p, d, r = s.kinetics_params, s.kv_elements, s.gqa_ratio
    sparse = 2 * n * p * lout + 2 * r * n * d * b * lout + 2 * i * n * d * b * lout
    search = (2 * r * n * lin * d * lout + r * n * d * lout**2) / (2 * block)
    search += (2 * i * lin * d * lout + i * n * d * lout**2) / (2 * block)
    common: dict[str, Any] = {"prompt_tokens": lin, "generated_tokens": lout, "samples": n, "kv_budget": b}
    assert kinetics(s, **common).eflops(i) == pytest.approx(sparse, rel=1e-12)
    assert kinetics(s, **common, kv_block=block).eflops(i) == pytest.approx(sparse + search, rel=1e-12)


def _kv_tokens(lin: int, lout: int, budget: int) -> float:
    """KV tokens that one sparse chain reads, recovered from its bytes."""
    s = SHAPES[0]
    return float(kinetics(s, prompt_tokens=lin, generated_tokens=lout, kv_budget=budget).bytes) / (
        2 * s.kv_elements
    )


@pytest.mark.parametrize(
    ("lout", "public_oracle", "public_block"), [(600, 11.2, -2.1), (2000, 2.57, None), (14000, 1.13, None)]
)
def test_three_regimes_where_the_public_code_errs(
    lout: int, public_oracle: float, public_block: float | None
) -> None:
    lin, budget = 150, 2048
    exact = sum(min(lin + t, budget) for t in range(1, lout + 1))
    ours = _kv_tokens(lin, lout, budget)
    assert (
        abs(ours - exact) <= lout / 2 + 1e-6
    )  # the paper's integral: half a token a step apart, in every regime
    warmup = 0.5 * (budget - lin) ** 2
    assert (budget * lout + warmup) / exact == pytest.approx(public_oracle, rel=0.01)
    if public_block is not None:
        assert (budget * lout - warmup) / exact == pytest.approx(public_block, rel=0.02)
    assert _kv_tokens(4096, lout, budget) == budget * lout


@settings(max_examples=200)
@given(
    lin=st.integers(0, 3000),
    lout=st.integers(0, 3000),
    n=st.integers(1, 8),
    budget=st.integers(1, 4000),
    cut=st.floats(0, 1),
)
def test_kinetics_integral_additivity_and_limits(
    lin: int, lout: int, n: int, budget: int, cut: float
) -> None:
    s = SHAPES[0]
    common: dict[str, Any] = {"prompt_tokens": lin, "samples": n, "kv_budget": budget, "kv_block": 32}
    whole = kinetics(s, generated_tokens=lout, **common)
    a = int(cut * lout)
    parts = kinetics(s, generated_tokens=a, **common) + kinetics(
        s, generated_tokens=lout - a, start_tokens=a, **common
    )
    assert close(whole, parts)
    dense = kinetics(s, prompt_tokens=lin, generated_tokens=lout, samples=n)
    if budget >= lin + lout:
        assert close(whole, dense)
    sparse_reads = _kv_tokens(lin, lout, budget)
    exact = sum(min(lin + t, budget) for t in range(1, lout + 1))
    assert abs(sparse_reads - exact) <= lout / 2 + 1e-6 * exact


def _chosen(context: int, budget: int, block: int, m: SparseMethod) -> tuple[bool, int]:
    """Whether a step over this context stays dense, and what a sparse one reads."""
    cap = budget + m.extra_tokens
    if not m.paged:
        return context <= cap, cap
    # as ttc/attention has it (pages kept and the reduced length)
    pages, kept = math.ceil(context / block), max(1, budget // block) * block + m.extra_tokens
    return pages * block <= kept + pages * m.summaries / 2, context - pages * block + kept


def _loop(
    s: ModelShape,
    lin: int,
    lout: int,
    n: int,
    batch: float,
    cached: int,
    start: int,
    budget: int | None,
    block: int,
    m: SparseMethod,
) -> Cost:
    """What ``full`` must equal: every forward pass of every token, one by one."""
    flops = moved = 0.0
    element, fresh = s.kv_bytes_per_element, lin - cached
    if start == 0 and fresh:
        for i in range(cached + 1, lin + 1):
            for layers, window in s.attention:
                flops += layers * s.prefill_pair_flops_per_layer * min(i, window or i)
        flops += fresh * (s.token_flops - 2 * s.head_params) + 2 * s.head_params
        moved += fresh * s.kv_bytes + cached * s.kv_bytes
        moved += s.step_weight_bytes(max(fresh, batch) if s.experts else batch) / batch
    for token in range(max(2, start + 1), start + lout + 1):
        context = lin + token - 1
        f, b = s.token_flops, s.kv_bytes + 2 * s.state_elements * element
        for layers, window in s.attention:
            for layer in range(layers):
                read = context if window is None else min(context, window)
                if window is None and budget is not None and layer >= m.dense_layers:
                    pages, (stays, cap) = math.ceil(context / block), _chosen(context, budget, block, m)
                    if not stays:
                        read, scored = cap, m.summaries * m.searches * pages
                        f += s.key_pair_flops_per_layer * scored
                        b += s.key_elements_per_layer * element * scored
                f += s.pair_flops_per_layer * read
                b += s.kv_elements_per_layer * element * read
        flops += n * f
        moved += n * (b + s.step_weight_bytes(batch) / batch)
    return Cost(flops, moved)


@settings(max_examples=150)
@given(data=st.data())
def test_full_is_the_sum_over_every_forward_pass(data: st.DataObject) -> None:
    s = data.draw(st.sampled_from(SHAPES))
    lin, lout = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    n, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    cached, start = data.draw(st.integers(0, lin)), data.draw(st.integers(0, 40))
    budget, block = data.draw(st.one_of(st.none(), st.integers(1, 90))), data.draw(st.integers(1, 20))
    m = SparseMethod(
        "any",
        summaries=data.draw(st.integers(0, 2)),
        dense_layers=data.draw(st.integers(0, 3)),
        extra_tokens=data.draw(st.integers(0, 9)),
        paged=data.draw(st.booleans()),
        searches=data.draw(st.sampled_from([1.0, 0.5, 0.125])),
    )
    ours = full(
        s, prompt_tokens=lin, generated_tokens=lout, samples=n, cached_prompt_tokens=cached,
        start_tokens=start, batch=batch, kv_budget=budget, kv_block=block, method=m,
    )  # fmt: skip
    assert close(ours, _loop(s, lin, lout, n, batch, cached, start, budget, block, m))
    sparse = sparse_steps(
        prompt_tokens=lin, generated_tokens=lout, kv_budget=budget, kv_block=block, method=m
    )
    steps = range(lin + 1, lin + lout)
    assert sparse == (0 if budget is None else sum(not _chosen(c, budget, block, m)[0] for c in steps))


@settings(max_examples=60)
@given(
    lin=st.integers(0, 500),
    a=st.integers(1, 300),
    b=st.integers(0, 300),
    budget=st.one_of(st.none(), st.integers(1, 600)),
)
def test_full_is_additive_in_start_tokens(lin: int, a: int, b: int, budget: int | None) -> None:
    common: dict[str, Any] = {"prompt_tokens": lin, "kv_budget": budget, "kv_block": 16, "method": "quest"}
    for s in SHAPES[:2]:
        whole = full(s, generated_tokens=a + b, **common)
        assert close(
            whole,
            full(s, generated_tokens=a, **common) + full(s, generated_tokens=b, start_tokens=a, **common),
        )


def test_weight_reads_replace_the_batch() -> None:
    s = SHAPES[0]
    forwards = 1 + 99
    by_batch = full(s, prompt_tokens=50, generated_tokens=100, batch=4)
    assert close(by_batch, full(s, prompt_tokens=50, generated_tokens=100, weight_reads=forwards / 4))
    unread = full(s, prompt_tokens=50, generated_tokens=100, weight_reads=0)
    assert by_batch.bytes - unread.bytes == pytest.approx(forwards / 4 * s.step_weight_bytes(4))
    moe = SHAPES[3]
    assert full(moe, prompt_tokens=5, generated_tokens=9, weight_reads=0).bytes > 0


def test_arrays_equal_numbers_and_broadcast() -> None:
    rng = np.random.default_rng(0)
    for s in SHAPES:
        for method in ("token-topk", "block-topk", "quest"):
            lin, lout = rng.integers(0, 900, 50), rng.integers(0, 900, 50)
            budget = np.where(rng.random(50) < 0.3, math.inf, rng.integers(1, 900, 50))
            for convention in (kinetics, full):
                many = convention(
                    s,
                    prompt_tokens=lin,
                    generated_tokens=lout,
                    samples=2,
                    kv_budget=budget,
                    kv_block=16,
                    method=method,
                )
                for k in range(50):
                    one = convention(
                        s, prompt_tokens=int(lin[k]), generated_tokens=int(lout[k]), samples=2,
                        kv_budget=None if math.isinf(budget[k]) else float(budget[k]),
                        kv_block=16, method=method,
                    )  # fmt: skip
                    assert close(one, Cost(float(many.flops[k]), float(many.bytes[k])))
    grid = full(SHAPES[0], prompt_tokens=np.ones((3, 1)), generated_tokens=np.ones((1, 4)))
    assert grid.flops.shape == grid.bytes.shape == (3, 4)


def test_methods_and_tensor_parallel() -> None:
    s, common = SHAPES[0], {"prompt_tokens": 100, "generated_tokens": 4000, "kv_budget": 512}
    price = {m: full(s, **common, method=m, kv_block=32).eflops() for m in METHODS}
    # a paged method's last page is filled in part, so it reads half a page less than its budget
    assert (
        price["streaming"]
        == price["power"]
        == price["oracle-topk"]
        < price["token-topk"]
        == price["token-window"]
    )
    assert price["streaming"] < price["block-topk"] < price["quest"]
    assert close(full(s, **common, method="dense"), full(s, prompt_tokens=100, generated_tokens=4000))
    sinks = SparseMethod("sinks", extra_tokens=4)
    assert full(s, **common, method=sinks).bytes > full(s, **common, method="token-topk").bytes
    one, two, wide = (full(s, prompt_tokens=1, generated_tokens=100, tensor_parallel=t) for t in (1, 8, 16))
    assert one.bytes == two.bytes < wide.bytes


def test_a_method_takes_the_plugins_options() -> None:
    """dense_layers, share_layers and share_steps as ``additional_config["ttc_sparse"]`` has them; sinks on top."""
    s, common = SHAPES[0], {"prompt_tokens": 100, "generated_tokens": 4000, "kv_budget": 512, "kv_block": 32}

    def moved(method: str) -> float:
        return float(full(s, **common, method=method, weight_reads=0.0).bytes)

    dense = float(full(s, prompt_tokens=100, generated_tokens=4000, weight_reads=0.0).bytes)
    assert moved("quest") < moved("quest?dense_layers=2") < moved("quest?dense_layers=27") < dense
    assert moved("quest?dense_layers=28") == pytest.approx(dense)
    search = moved("quest") - moved("quest?share_layers=4&share_steps=2")
    assert moved("quest?share_layers=2") == pytest.approx(moved("quest") - search * (1 / 2) / (7 / 8))
    assert moved("streaming?sinks=4") > moved("streaming")
    for bad in ("quest?dense=1", "quest?share_layers=0", "quest?sinks=-1", "quest?dense_layers"):
        with pytest.raises(InputError, match="whole numbers for dense_layers"):
            moved(bad)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens is -1"),
        ({"generated_tokens": math.nan}, "generated_tokens is nan"),
        ({"samples": np.array([1, -2])}, "samples is -2"),
        ({"kv_budget": 0}, "kv_budget is 0"),
        ({"kv_budget": 9, "kv_block": -3}, "kv_block is -3"),
        ({"kv_budget": 9, "method": "magic"}, "known: dense, block-topk"),
        ({"kv_budget": 9, "method": "block"}, "'block' is called 'block-topk'"),
        ({"kv_budget": 9, "method": "oracle?sinks=4"}, "'oracle' is called 'token-topk'"),
    ],
)
def test_bad_arguments_get_one_line(bad: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {"prompt_tokens": 1, "generated_tokens": 1} | bad
    for convention in (kinetics, full):
        with pytest.raises(InputError, match=told):
            convention(SHAPES[0], **arguments)


def test_full_checks_its_own_arguments() -> None:
    common: dict[str, Any] = {"prompt_tokens": 10, "generated_tokens": 5}
    for bad in (
        {"cached_prompt_tokens": 11},
        {"cached_prompt_tokens": -1},
        {"batch": 0},
        {"weight_reads": -1.0},
    ):
        with pytest.raises(InputError, match="must be"):
            full(SHAPES[0], **common, **bad)


def test_costs_add_scale_and_convert() -> None:
    cost = 2 * (Cost(1.0, 2.0) + Cost(3.0, 4.0)) - Cost(1.0, 1.0)
    assert cost == Cost(7.0, 11.0)
    assert cost.eflops(10.0) == 117.0
    assert cost.eflops(Hardware.named("kinetics-b200")) == 7 + 562.5 * 11


def test_scalar_calls_need_no_numpy() -> None:
    code = "import sys, ttc.costmodel as c; s = c.ModelShape.named('Qwen3-8B');"
    code += "c.full(s, prompt_tokens=1, generated_tokens=9);"
    code += "sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
