"""The GPU backends: on a GPU against stock vLLM and the reference; without one, what ``gpu_cases`` can hold of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.models import (
    add_requests,
    cached_tokens,
    decode,
    open_engine,
    open_stock,
    prompts,
    save_model,
)
from tests.attention.reference import checker, replayed, watch
from tests.attention.test_settings import plain_reading
from ttc.attention import choose
from ttc.attention.choose import Ids
from ttc.attention.settings import METHODS, KvSetting

pytestmark = [pytest.mark.engine, pytest.mark.slow]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ALL = 100_000
PAGE = 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU shows more")
def test_what_can_be_held_without_a_gpu() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name("gpu_cases.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-4000:]


@on_gpu
@pytest.mark.parametrize(("dtype", "ids"), [(torch.bfloat16, Ids(2, 1)), (torch.float32, Ids(64, 2))])
def test_the_triton_selector_equals_a_plain_reading(dtype: Any, ids: Ids) -> None:
    from ttc.attention import select_triton

    def select(out: Any, *args: Any) -> None:
        made = out.cuda()
        select_triton.select(made, *(arg.cuda() for arg in args), ids=ids, pages=40)
        out.copy_(made)

    plain_reading(select, dtype, ids)


@on_gpu
@pytest.mark.parametrize("rule", [1, 2])
@pytest.mark.parametrize("pages", [100, 512, 2048, 9000])
def test_the_triton_selector_keeps_the_best_of_many_pages(rule: int, pages: int) -> None:
    """Long contexts of a Qwen3 shape: what is kept scores no less than what is left (sums may round apart)."""
    from ttc.attention import select_triton

    torch.manual_seed(0)
    rows, heads, group, channels = 3, 8, 2, 128
    mean = torch.randn(pages, heads, channels, device="cuda").bfloat16()
    bounds = torch.stack([mean - 0.5, mean + 0.5], 2)
    query = torch.randn(rows, heads, group, channels, device="cuda").bfloat16()
    tables = torch.stack([torch.randperm(pages) for _ in range(rows)]).int().cuda()
    counts = torch.tensor([pages, pages - 1, pages // 2 + 1]).int().cuda()
    for most in (2, 16, 64):
        keep = torch.full((rows, heads), most).int().cuda()
        rules = torch.full((rows,), rule).int().cuda()
        out = torch.full((rows * heads, most), -1).int().cuda()
        select_triton.select(
            out, query, mean, bounds, tables, counts, keep, rules, ids=Ids(heads, 1), pages=pages
        )
        for row in range(rows):
            count = int(counts[row])
            own = tables[row, :count].long()
            values = choose.scores(rule, query[row].float(), (mean if rule == 1 else bounds)[own].float())
            position = {int(p): i for i, p in enumerate(own)}
            for head in range(heads):
                got = [position[i // heads] for i in out[row * heads + head].tolist()[: min(most, count)]]
                assert got == sorted(set(got))
                assert got[0] == 0
                assert got[-1] == count - 1
                inner = torch.ones(count, dtype=torch.bool)
                inner[got], inner[0], inner[-1] = False, False, False
                slack = 1e-4 * float(values[head].abs().max())
                if 2 < most < count:
                    assert values[head][got[1:-1]].min() >= values[head][inner.cuda()].max() - slack


@dataclass
class Way:
    """One of vLLM's GPU backends, one layout of the cache, and whether rows that decode together are replayed as a CUDA graph."""

    backend: str
    graphs: bool
    folder: Path
    stock: Any
    ours: Any
    options: dict[str, Any]


WAYS = [
    "FLASH_ATTN-NHD",
    "FLASH_ATTN-HND",
    "TRITON_ATTN-NHD",
    "FLASH_ATTN-HND-graphs",
    "TRITON_ATTN-NHD-graphs",
]
GRAPHS = {
    "enforce_eager": False, "kernel_config": {"enable_jit_warmup": False},
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 6]},
}  # fmt: skip


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    backend, layout, *graphs = request.param.split("-")
    folder = save_model(
        tmp_path_factory.mktemp("tiny"), head_dim=128, num_attention_heads=8, num_key_value_heads=4
    )
    options = {"attention_backend": backend, "block_size": PAGE, "gpu_memory_utilization": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        made = options | (GRAPHS if graphs else {})
        stock = open_stock(folder, backend, **made)
        ours = open_engine(folder, sparse={"when": "always", "overhead": [1, 0]}, **made)
        yield Way(backend, bool(graphs), folder, stock, ours, options)


@on_gpu
@pytest.mark.parametrize("method", METHODS)
def test_reading_everything_through_the_per_head_path_is_stock(way: Way, method: str) -> None:
    """Rows that decode together; with VLLM_BATCH_INVARIANT=1 also in mixed batches. Without it stock vLLM itself rounds a row that
    decodes otherwise when another one prefills (it picks another kernel, or other splits, for the whole batch)."""
    way.stock.reset_prefix_cache(), way.ours.reset_prefix_cache()
    together = [ids[:15] for ids in prompts(6, shared=0)]
    assert decode(way.ours, together, KvSetting(ALL, method)) == decode(way.stock, together)
    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        for _ in ("cold", "warm"):
            assert decode(way.ours, prompts(), KvSetting(ALL, method)) == decode(way.stock, prompts())


@on_gpu
def test_dense_and_sparse_rows_share_batches(way: Way) -> None:
    way.stock.reset_prefix_cache(), way.ours.reset_prefix_cache()
    together = [ids[:15] for ids in prompts(6, shared=0)]
    settings = [(None, KvSetting(ALL, "quest"), KvSetting(PAGE, "streaming"))[i % 3] for i in range(6)]
    wanted, made = decode(way.stock, together), decode(way.ours, together, settings)
    assert [made[i] for i in (0, 1, 3, 4)] == [wanted[i] for i in (0, 1, 3, 4)]
    assert [made[i] for i in (2, 5)] != [wanted[i] for i in (2, 5)]


@on_gpu
def test_pages_written_under_a_budget_are_never_read_as_dense(way: Way) -> None:
    [prompt], setting = prompts(1, seed=5), KvSetting(96)
    way.stock.reset_prefix_cache(), way.ours.reset_prefix_cache()
    [said] = decode(way.ours, [prompt], setting, tokens=200)
    follow = prompt + said
    assert cached_tokens(way.ours, follow, None) == 0
    way.ours.reset_prefix_cache()
    decode(way.ours, [prompt], setting, tokens=200)
    assert decode(way.ours, [follow]) == decode(way.stock, [follow])
    assert cached_tokens(way.ours, follow, setting) >= len(follow) // PAGE * PAGE - PAGE


@on_gpu
def test_every_choice_and_output_equals_the_reference(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods and dense rows mixed, in a pool so small that pages are evicted, reused and recomputed."""
    from ttc.attention.flash_attn import FlashImpl
    from ttc.attention.triton_attn import TritonImpl

    if way.graphs:
        pytest.skip("a replayed step runs no Python to look at: see the next test")
    engine = open_engine(way.folder, **way.options, num_gpu_blocks_override=150)
    tally: Counter[str] = Counter()
    settings: list[KvSetting | None] = [*(KvSetting(160, method) for method in METHODS), None]
    check: Callable[..., None] = checker(tally)
    with watch(monkeypatch, check, {"FLASH_ATTN": FlashImpl, "TRITON_ATTN": TritonImpl}[way.backend]):
        for turn in range(3):
            decode(engine, prompts(6, seed=turn // 2), settings[turn:] + settings[:turn], tokens=25)
        for method in ("block-topk", "quest"):
            decode(engine, [prompts(1, seed=9)[0][:90]], KvSetting(160, method), tokens=110)
    assert set(tally) == set(METHODS)
    assert min(tally.values()) > 100


@on_gpu
def test_replayed_steps_equal_the_reference(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row and layer of graphs with six rows and with four of which one is padding: their queries, tables and outputs are
    copied within the graph. Pages that fill up while decoding are chosen from, too."""
    if not way.graphs:
        pytest.skip("there are no graphs here")
    tally: Counter[str] = Counter()
    with replayed(monkeypatch, checker(tally)) as take:
        engine = open_engine(way.folder, **way.options | GRAPHS)
        for count in (6, 3):
            methods = ["block-topk", "quest", "streaming", None, "power", "quest"][:count]
            settings = [KvSetting(96, method) if method else None for method in methods]
            asked = [(ids * 9)[: 150 + 41 * i] for i, ids in enumerate(prompts(count, shared=0, seed=3))]
            add_requests(engine, asked, settings, tokens=2 * PAGE)
            while engine.has_unfinished_requests():
                take(engine)
    assert set(tally) == {"block-topk", "quest", "streaming", "power"}
    assert min(tally.values()) > 100
