"""Sparse decoding on real vLLM: equal to stock where all is read, and to an independent reference where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attention.models import cached_tokens, decode, open_engine, prompts
from tests.attention.reference import checker, watch
from ttc.attention.settings import METHODS, KvSetting

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ALL = 100_000
Outputs = list[list[int]]


@pytest.fixture(scope="module")
def dense(stock: Callable[..., Any]) -> tuple[Outputs, Outputs]:
    """What stock vLLM says to the prompts, with a cold prefix cache and with a warm one (rounding differs between the two)."""
    engine = stock()
    cold, warm = decode(engine, prompts()), decode(engine, prompts())
    return cold, warm


@pytest.mark.parametrize("method", METHODS)
def test_reading_everything_through_the_per_head_path_is_stock(
    sparse: Any, dense: tuple[Outputs, Outputs], method: str
) -> None:
    sparse.reset_prefix_cache()
    setting = KvSetting(ALL, method)
    assert decode(sparse, prompts(), setting) == dense[0]
    assert decode(sparse, prompts(), setting) == dense[1]


def test_a_budget_changes_what_is_said(sparse: Any, dense: tuple[Outputs, Outputs]) -> None:
    assert decode(sparse, prompts(), KvSetting(128)) != dense[0]


def test_dense_and_sparse_rows_share_batches(sparse: Any, dense: tuple[Outputs, Outputs]) -> None:
    sparse.reset_prefix_cache()
    mixed = [(None, KvSetting(ALL, "quest"), KvSetting(128, "power"))[i % 3] for i in range(10)]
    said = decode(sparse, prompts(shared=0), mixed)
    alone = [decode(sparse, [ids], setting)[0] for ids, setting in zip(prompts(shared=0), mixed, strict=True)]
    full = [i for i, setting in enumerate(mixed) if setting is None or setting.budget == ALL]
    wanted = decode(sparse, prompts(shared=0))
    assert [said[i] for i in full] == [wanted[i] for i in full]
    assert (
        sum(a == b for a, b in zip(said, alone, strict=True)) >= 9
    )  # prefills share other batches: rounding


def test_without_a_budget_the_plugin_is_stock(tiny: Path, dense: tuple[Outputs, Outputs]) -> None:
    engine = open_engine(tiny)
    assert decode(engine, prompts()) == dense[0]
    assert decode(engine, prompts()) == dense[1]


def test_preempted_and_recomputed(tiny: Path, stock: Callable[..., Any]) -> None:
    """A pool of 40 pages for six branches: some are thrown out and computed again."""
    small = {"num_gpu_blocks_override": 40, "enable_prefix_caching": False}
    bare, ours = stock(**small), open_engine(tiny, sparse={"when": "always"}, **small)
    asked = prompts(6, seed=3)
    wanted = decode(bare, asked, tokens=60)
    assert decode(ours, asked, KvSetting(ALL), tokens=60) == wanted


def test_pages_written_under_a_budget_are_never_read_as_dense(sparse: Any, stock: Callable[..., Any]) -> None:
    """The cache salt keeps settings apart. Without it the dense request would find the sparse pages (the leak is real)."""
    vllm_engine, setting = sparse, KvSetting(96)
    [prompt] = prompts(1, seed=5)
    vllm_engine.reset_prefix_cache()
    [said] = decode(vllm_engine, [prompt], setting, tokens=200)
    follow = prompt + said
    bare = stock()
    assert decode(vllm_engine, [follow]) == decode(bare, [follow])
    assert (
        cached_tokens(vllm_engine, [*follow, 7], None) >= len(follow) // 32 * 32 - 32
    )  # its own dense pages
    vllm_engine.reset_prefix_cache()
    decode(vllm_engine, [prompt], setting, tokens=200)
    assert cached_tokens(vllm_engine, follow, None) == 0
    assert cached_tokens(vllm_engine, follow, setting) >= len(follow) // 32 * 32 - 32
    vllm_engine.reset_prefix_cache()
    decode(vllm_engine, [prompt], setting, tokens=200, salted=False)
    assert cached_tokens(vllm_engine, follow, None) >= len(follow) // 32 * 32 - 32


@pytest.mark.parametrize("page", [32, 64])
def test_every_choice_and_output_equals_the_reference(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """All methods and dense rows mixed, in a pool so small that pages are evicted, reused and recomputed."""
    from ttc.attention.cpu import CpuImpl

    engine = open_engine(tiny, block_size=page, num_gpu_blocks_override=2400 // page)
    tally: Counter[str] = Counter()
    settings: list[KvSetting | None] = [*(KvSetting(160, method) for method in METHODS), None]
    with watch(monkeypatch, checker(tally), CpuImpl):
        for turn in range(3):
            decode(engine, prompts(6, seed=turn // 2), settings[turn:] + settings[:turn], tokens=70)
        for method in ("block-topk", "quest"):  # alone, growing from dense into sparse
            decode(engine, [prompts(1, seed=9)[0][:90]], KvSetting(160, method), tokens=160)
    assert set(tally) == set(METHODS)
    assert min(tally.values()) > 200
