"""What users and requests say of sparse decoding, and the page choice on plain tensors: no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ttc.attention import choose
from ttc.attention.choose import Ids
from ttc.attention.compiled import selector
from ttc.attention.settings import METHODS, KvSetting, SparseOptions, read_setting
from ttc.attention.worth import BY_BYTES, NONE, Overhead, by_time, store, stored, stored_path
from ttc.costmodel import METHODS as PRICED
from ttc.errors import InputError


@pytest.mark.parametrize(
    ("budget", "method", "words"),
    [
        (0, None, "kv-budget: 0"),
        (-5, "quest", "kv-budget: -5"),
        (64, "best", "kv-method: 'best'"),
        (64, "meanmax", "kv-method: 'meanmax' is called quest;"),
        (
            64,
            "oracle",
            "kv-method: 'oracle' is called token-topk, in the cost model only; use one of block-topk",
        ),
        (None, "quest", "add --kv-budget"),
    ],
)
def test_bad_settings_are_named(budget: int | None, method: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        KvSetting.asked(budget, method)


def test_a_budget_under_a_page_is_refused() -> None:
    with pytest.raises(InputError, match="under one page of 128; give 128 or more"):
        KvSetting(64).check_page(128)
    KvSetting(128).check_page(128)


@pytest.mark.parametrize(
    "told",
    ["no json", 7, {}, {"budget": 0}, {"budget": 64, "colour": 1}, {"budget": 64, "method": "x"}, {"budget": "64"}],
)  # fmt: skip
def test_bad_extra_args_are_refused(told: Any) -> None:
    with pytest.raises(InputError):
        read_setting({"ttc_kv": told})


def test_a_setting_survives_the_way_to_the_worker() -> None:
    setting = KvSetting(96, "quest")
    assert read_setting(setting.extra_args(3)) == (setting, 3)
    assert read_setting({"ttc_kv": json.dumps(setting.extra_args()["ttc_kv"])}) == (setting, None)
    assert read_setting(None) is read_setting({"other": 1}) is None
    assert len({KvSetting(b, m).salt for b in (64, 96) for m in METHODS}) == 2 * len(METHODS)


def test_every_method_has_a_price() -> None:
    assert set(METHODS) <= set(PRICED)
    assert {m: PRICED[m].summaries for m in METHODS} == {
        "block-topk": 1, "quest": 2, "streaming": 0, "power": 0, "oracle-topk": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "told", [{"dense_layers": -1}, {"share_layers": 0}, {"share_steps": "2"}, {"selector": "fast"}, {"colour": 1},
     {"when": "often"}, {"overhead": [1]}, {"overhead": "x"}, {"overhead": [1, -2]}]
)  # fmt: skip
def test_bad_engine_options_are_named(told: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(told))):
        SparseOptions.of(told)


def test_calibrated_budgets(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"factors": [None, [1.5, 0.5]]}))
    options = SparseOptions(budgets=str(file))
    assert options.factors(2, 2) == [None, (1.5, 0.5)]
    for layers, heads in ((3, 2), (2, 4)):
        with pytest.raises(InputError, match="calibrate this model"):
            options.factors(layers, heads)
    for factors in ([None, [1.5, 0.6]], [None, [1.0, -1.0]], "x"):
        file.write_text(json.dumps({"factors": factors}))
        with pytest.raises(InputError, match="budgets"):
            options.factors(2, 2)


@pytest.mark.parametrize("kind", ["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selectors_equal_a_plain_reading(kind: str, dtype: torch.dtype) -> None:
    """Random pages, exact ties (small whole numbers), every keep from 1 to all, both rules in one batch."""
    if kind == "compiled" and selector() is None:
        pytest.skip("no C++ compiler here")

    def select(*args: torch.Tensor) -> None:
        choose.select(*args, kind=kind)

    plain_reading(select, dtype, Ids(2, 1))


def plain_reading(select: Callable[..., None], dtype: torch.dtype, ids: Ids) -> None:
    """Hold a selector against a plain reading of two KV heads; ``ids`` are those of its tables."""
    torch.manual_seed(0)
    heads, group, channels, total = 2, 3, 32, 90
    mean = torch.randint(-2, 3, (total, heads, channels)).to(dtype)
    bounds = torch.randint(-2, 3, (total, heads, 2, channels)).to(dtype).sort(2).values
    query = torch.randint(-2, 3, (4, heads, group, channels)).to(dtype)
    counts = torch.tensor([40, 1, 2, 17], dtype=torch.int32)
    tables = torch.stack([torch.randperm(total)[:40] for _ in counts]).to(torch.int32)
    for rules in ([1, 2, 1, 2], [2, 1, 2, 1], [0, 1, 0, 2]):
        for most in (1, 2, 3, 9, 17, 40):
            keep = counts[:, None].clamp(max=most).expand(4, heads).contiguous()
            out = torch.full((4 * heads, 40), -1, dtype=torch.int32)
            select(out, query, mean, bounds, tables, counts, keep, torch.tensor(rules, dtype=torch.int32))
            for b, rule in enumerate(rules):
                for h in range(heads):
                    got = [i for i in out[b * heads + h].tolist() if i >= 0]
                    if rule == 0:
                        assert got == []
                        continue
                    pages = tables[b, : counts[b]].tolist()
                    values = [_value(rule, query[b, h], mean[i, h], bounds[i, h]) for i in pages]
                    best = _best(values, int(keep[b, h]))
                    assert got == [pages[p] * ids.block + h * ids.head for p in best]


def _value(rule: int, query: torch.Tensor, mean: torch.Tensor, bounds: torch.Tensor) -> float:
    if rule == 1:
        return sum(float((q.float() * mean.float()).sum()) for q in query)
    return max(
        float(torch.maximum(q.float() * bounds[0].float(), q.float() * bounds[1].float()).sum())
        for q in query
    )


def _best(values: list[float], keep: int) -> list[int]:
    """First, last, and the best between them, the earlier one of two that tie."""
    last = len(values) - 1
    if keep > last:
        return list(range(last + 1))
    if keep == 1:
        return [last]
    order = sorted(range(1, last), key=lambda p: (-values[p], p))
    return [0, *sorted(order[: keep - 2]), last]


def test_pages_by_head_keep_to_the_whole() -> None:
    pytest.importorskip("vllm")
    from ttc.attention.steps import pages_kept

    setting = KvSetting(320)
    assert pages_kept(setting, 40, 32, (1.0, 1.0), BY_BYTES) == [10, 10]
    assert pages_kept(setting, 40, 32, (1.55, 0.45), BY_BYTES) in ([15, 5], [16, 4])
    assert pages_kept(setting, 40, 32, (1.9, 0.01), BY_BYTES) == [19, 1]
    assert pages_kept(setting, 12, 32, (1.9, 0.1), BY_BYTES) == [12, 1]
    assert pages_kept(setting, 10, 32, (1.0, 1.0), BY_BYTES) == [10, 10]
    # its bounds would cost more than the rest of the keys
    assert pages_kept(KvSetting(2048, "quest"), 66, 32, (1.0,), BY_BYTES) == [66]
    assert pages_kept(KvSetting(2048, "streaming"), 66, 32, (1.0,), BY_BYTES) == [64]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "overhead", [BY_BYTES, Overhead(1.5, 700.0), NONE, Overhead(32.0), Overhead(0.5, float("inf"))]
)
def test_a_row_is_dense_up_to_where_choosing_pays(method: str, overhead: Overhead) -> None:
    setting = KvSetting(256, method)
    most = overhead.dense_below(setting, 32)
    for pages in range(1, 200):
        assert overhead.dense(setting, pages, 32) == (pages * 32 <= most)
    assert overhead is not NONE or most == 0


def test_the_measured_cost_is_kept_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = stored_path({"page": 32})
    assert path.parent == tmp_path / "ttc"
    assert path != stored_path({"page": 64})
    assert stored(path) is None
    store(path, Overhead(1.25, 300.0), {"page": 32})
    assert stored(path) == Overhead(1.25, 300.0)
    path.write_text("torn")
    assert stored(path) is None
    assert by_time(Overhead(0.1, -5.0)) == BY_BYTES  # never under the bytes


@pytest.mark.engine
def test_a_step_for_a_graph_pads_its_batch_and_keeps_rows_that_prefill_dense() -> None:
    """Three rows of a graph of four: a sparse one, one that prefills its last token, a dense one; the fourth reads the null page.
    A later step fills the same tensors."""
    from ttc.attention.fixed import FixedPlanner, Layers, Room
    from ttc.attention.rows import Batch, Row

    class NoLayers(Layers):
        def __init__(self) -> None:
            self.ids = Ids(2, 1)

    batch, even = Batch(), (1.0, 1.0)
    batch.rows.update({i: Row(KvSetting(64, "streaming"), None) for i in (0, 1)})
    planner = FixedPlanner(
        options=SparseOptions(when="cheaper"), batch=batch, factors={"layers.0": even}, page=32, device=torch.device("cpu"),
        finish=lambda plan: None, measure=lambda: BY_BYTES,
    )  # fmt: skip
    planner.room, planner.frames = Room(4, 8), {}
    tables = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12] * 7, [13] * 7, [0] * 7], dtype=torch.int32)
    found = planner.decode(
        [200, 70, 70, 0], [1, 1, 1, 0], [False, True, False, False], tables, NoLayers()
    ).plans[even]
    assert found.lengths.tolist() == [40, 40, 70, 70, 70, 70, 1, 1]
    assert found.table[:2, :2].tolist() == [[10, 22], [11, 23]]
    assert found.table[2:, 0].tolist() == [24, 25, 26, 27, 0, 1]
    assert found.rules.tolist() == [0] * 4
    again = planner.decode([33, 71, 71, 40], [1] * 4, [False] * 4, tables, NoLayers()).plans[even]
    assert again.lengths.tolist() == [33, 33, 39, 39, 71, 71, 40, 40]
    assert again.table.data_ptr() == found.table.data_ptr()
    assert found.lengths.tolist() == again.lengths.tolist()
