"""What can be held of the GPU backends without a GPU. Run by test_gpu.py in a process of its own, with TRITON_INTERPRET=1:
there vLLM's Triton kernels and ours run in Triton's interpreter on CPU tensors. FlashAttention has no such thing: its place is
taken by plain paged attention in torch, which minds the same arguments and strides.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.backends
from torch import Tensor

from tests.attention.models import decode, open_engine, prompts, save_model
from tests.attention.reference import checker, watch
from tests.attention.test_settings import plain_reading
from ttc.attention import choose, select_triton
from ttc.attention.choose import Ids
from ttc.attention.pages import StridedCache
from ttc.attention.settings import METHODS, KvSetting

# vLLM takes its Triton kernels on CPU only from a Triton that compiles for CPU.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of what the interpreter masks
ALL = 100_000
PAGE = 16
WAYS = [
    ("triton", "NHD", ""),
    ("flash", "NHD", ""),
    ("flash", "HND", ""),
    ("triton", "NHD", "fixed"),
    ("flash", "HND", "fixed"),
]
"""Backend, layout of the cache, and whether steps are planned for full CUDA graphs. A step in the interpreter takes a second."""


@pytest.mark.parametrize(("dtype", "ids"), [(torch.bfloat16, Ids(2, 1)), (torch.float32, Ids(64, 2))])
def test_the_triton_selector_equals_a_plain_reading(dtype: torch.dtype, ids: Ids) -> None:
    def select(*args: Tensor) -> None:
        select_triton.select(*args, ids=ids, pages=40)

    plain_reading(select, dtype, ids)


def test_the_selectors_agree_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than what the picking kernel takes in one go, with scores that differ in the last bits or tie."""
    monkeypatch.setattr(select_triton, "CHUNK", 32)
    torch.manual_seed(1)
    heads, channels, pages = 2, 16, 90
    mean = torch.randn(pages, heads, channels).bfloat16()
    mean[50:60] = mean[40:50]
    bounds = torch.stack([mean - 0.5, mean + 0.5], 2)
    query = torch.randn(2, heads, 2, channels).bfloat16()
    tables = torch.arange(pages, dtype=torch.int32).expand(2, pages).contiguous()
    counts = torch.tensor([pages, 61], dtype=torch.int32)
    for most in (3, 30):
        keep = torch.full((2, heads), most, dtype=torch.int32)
        for rules in ([1, 2], [2, 1]):
            told = (query, mean, bounds, tables, counts, keep, torch.tensor(rules, dtype=torch.int32))
            wanted, made = (torch.full((2 * heads, most), -1, dtype=torch.int32) for _ in range(2))
            choose.select(wanted, *told, kind="torch", ids=Ids(5, 2))
            select_triton.select(made, *told, ids=Ids(5, 2), pages=pages)
            assert torch.equal(wanted, made)


def test_the_view_has_each_heads_part_of_a_page_as_a_page() -> None:
    """Layouts of the cache by vLLM's names (C: channels), and one with room between pages, as when layers share them."""
    blocks, heads, page, both = 5, 3, 4, 6
    plain = torch.arange(blocks * heads * page * both).view(blocks, heads, page, both)
    padded = torch.zeros(blocks, 2, heads, page, both, dtype=plain.dtype)[:, 1]
    padded.copy_(plain)
    nhd = plain.transpose(1, 2).contiguous().transpose(1, 2)
    for cache, wanted in (
        (plain, Ids(heads, 1)),
        (nhd, Ids(page * heads, 1)),
        (padded, Ids(2 * heads, 1)),
        (plain[:, :1], Ids(1, 0)),
    ):
        made = StridedCache(cache)
        assert made.ids == wanted
        for b in range(blocks):
            for h in range(cache.shape[1]):
                assert torch.equal(made.view[b * made.ids.block + h * made.ids.head, 0], cache[b, h])
        some = torch.tensor([3, 0])
        assert torch.equal(made.keys(cache, some), cache[some][..., : both // 2])


@pytest.mark.parametrize(("kind", "dtype"), [("mean", torch.bfloat16), ("bounds", torch.float32)])
def test_one_launch_summarises_the_pages_of_all_layers(kind: str, dtype: torch.dtype) -> None:
    from ttc.attention.fixed import Layers

    torch.manual_seed(2)
    caches = [
        torch.randn(6, 5, 2, 2 * 24).to(dtype).transpose(1, 2) for _ in range(3)
    ]  # pages of 5 tokens, 24 channels
    layers = {str(i): cache for i, cache in enumerate(caches)}
    made = Layers({name: SimpleNamespace() for name in layers}, layers)
    ids = torch.tensor([4, 1, 2])
    made.summarise({kind: ids})
    for cache, kept in zip(caches, made.kept, strict=True):
        wanted = StridedCache(cache)
        wanted.update(kind, cache, ids)
        torch.testing.assert_close(kept[kind], wanted.kept[kind])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """One of WAYS."""
    from ttc.attention.fixed import Frame
    from ttc.attention.gpu import GpuBuilder

    if request.param[2]:
        monkeypatch.setattr(GpuBuilder, "full_graphs", lambda _: True)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", request.param[1])
    if request.param[0] == "triton":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    else:
        from vllm.v1.attention.backends import flash_attn

        monkeypatch.setattr(Frame, "hold", lambda _, made: made)  # ``schedule`` makes no tensor
        monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
        for name, made in (
            ("flash_attn_varlen_func", paged_attention), ("reshape_and_cache_flash", write_cache),
            ("get_scheduler_metadata", schedule),
        ):  # fmt: skip
            monkeypatch.setattr(flash_attn, name, made, raising=False)
    kind, layout, fixed = request.param
    return kind, layout, fixed


def schedule(**told: Any) -> dict[str, Any]:
    """In the place of FlashAttention 3's: what it was asked for, so that the kernel can see that it is for this call."""
    return told


def write_cache(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
    page = keys.shape[1]
    keys[slots // page, slots % page] = key[: len(slots)]
    values[slots // page, slots % page] = value[: len(slots)]


def paged_attention(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor, max_seqlen_k: int,
    softmax_scale: float, causal: bool, block_table: Tensor, scheduler_metadata: dict[str, Any], **rest: Any,
) -> None:  # fmt: skip
    """FlashAttention's paged call: q [T, Hq, D], k and v [N, page, H, D]."""
    page, heads, group = k.shape[1], k.shape[2], q.shape[1] // k.shape[2]
    assert causal
    assert rest["k_descale"].shape == (len(seqused_k), heads)
    assert scheduler_metadata["batch_size"] == len(seqused_k) == len(cu_seqlens_q) - 1
    assert (scheduler_metadata["num_heads_q"], scheduler_metadata["num_heads_kv"]) == (q.shape[1], heads)
    assert scheduler_metadata["cache_seqlens"] is seqused_k
    assert (scheduler_metadata["max_seqlen_q"], scheduler_metadata["max_seqlen_k"]) == (
        max_seqlen_q,
        max_seqlen_k,
    )
    for i, length in enumerate(seqused_k.tolist()):
        start, end = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1])
        new = end - start
        assert new <= max_seqlen_q
        assert length <= max_seqlen_k
        pages = block_table[i, : -(-length // page)].long()
        keys, values = (t[pages].flatten(0, 1)[:length].float() for t in (k, v))
        own = q[start:end].view(new, heads, group, -1).float()
        logits = torch.einsum("nhgd,shd->hgns", own, keys) * softmax_scale
        later = torch.arange(length)[None] > torch.arange(length - new, length)[:, None]
        weight = logits.masked_fill(later, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hgns,shd->nhgd", weight, values).reshape(new, heads * group, -1)


def backend(kind: str, tiny: Path, *, ours: bool, **changes: Any) -> Any:
    """An engine on CPU with the GPU backend in the place of the CPU's."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from ttc.attention import plugin

    load_general_plugins()
    name = {"triton": "TRITON_ATTN", "flash": "FLASH_ATTN"}[kind]
    path = plugin.ON_GPU[name] if ours else AttentionBackendEnum[name].get_path()
    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    selector._cached_get_attn_backend.cache_clear()
    told: dict[str, Any] = {
        "dtype": "float32" if kind == "triton" else "auto",  # Triton's interpreter multiplies bfloat16 matrices by their bits
        "max_num_seqs": 3, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 20, "block_size": PAGE, "max_model_len": 160,
    }  # fmt: skip
    return open_engine(tiny, **(told | changes))


def asked() -> list[list[int]]:
    return [ids[:length] for ids, length in zip(prompts(2, shared=0), (44, 70), strict=True)]


@pytest.fixture(scope="module")
def stock() -> dict[tuple[str, str], list[list[int]]]:
    """What stock vLLM said, by backend and layout."""
    return {}


def test_reading_everything_through_the_per_head_path_is_stock(
    tiny: Path, way: tuple[str, str, str], stock: dict[tuple[str, str], list[list[int]]]
) -> None:
    """Beside a dense row, and while another prompt is read in pieces."""
    settings = [KvSetting(ALL, "quest"), None]
    if way[:2] not in stock:
        stock[way[:2]] = decode(backend(way[0], tiny, ours=False), asked(), tokens=4)
    made = decode(backend(way[0], tiny, ours=True, sparse={"when": "always"}), asked(), settings, 4)
    assert made == stock[way[:2]]


def test_every_choice_and_output_equals_the_reference(
    tiny: Path, way: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods and a dense row in mixed batches; a row grows into the next page; evicted pages are reused."""
    from ttc.attention.flash_attn import FlashImpl
    from ttc.attention.triton_attn import TritonImpl

    engine = backend(way[0], tiny, ours=True, num_gpu_blocks_override=12)
    tally: Counter[str] = Counter()
    settings = [*(KvSetting(48, method) for method in METHODS), None]
    with watch(monkeypatch, checker(tally), {"triton": TritonImpl, "flash": FlashImpl}[way[0]]):
        for i in (0, 2, 4):
            decode(engine, [asked()[1][i : i + 62], asked()[1][i:]], settings[i : i + 2], tokens=4)
    assert set(tally) == set(METHODS)
