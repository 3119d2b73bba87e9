"""What the sparse benches work out beside measuring: no engine."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttc.bench import decode, fidelity
from ttc.errors import EngineError, InputError

COMMON = {"budgets": (256,), "page": 64}
STUDY = fidelity.Study("nano-s", ("t",), 2, 2, (64,), ("quest",))


def test_a_cell_has_as_many_layers_as_memory_holds() -> None:
    whole, part = decode.plan([32768], [1, 32], 9.0, None, **COMMON)
    assert (whole.layers, part.layers) == (28, 2)
    assert part.kv_bytes <= 9 * 2**30 < part.kv_bytes * 1.5
    [few] = decode.plan([32768], [1], 9.0, 4, **COMMON)
    assert few.layers == 4
    [larger] = decode.plan([4096], [1], 9.0, None, model="Qwen3-8B", **COMMON)
    assert (larger.layers, larger.kv_bytes) == (36, 36 * 8 * 128 * 2 * 2 * (4096 + decode.ROOM))
    with pytest.raises(InputError, match="memory: 1 GiB does not hold a layer's KV of 64 × 32768"):
        decode.plan([32768], [64], 1.0, None, **COMMON)
    with pytest.raises(InputError, match="model"):
        decode.plan([4096], [1], 9.0, None, model="Qwen3-30B-A3B", **COMMON)


def test_the_limit_by_bytes() -> None:
    """At 32k, 28 layers: 1.19 GB of weights; 112 KiB a token; a page of 64 has half a token's bytes of summary."""
    [cell] = decode.plan([32768], [1], 9.0, None, **COMMON)
    dense, sparse = decode.bytes_read(cell, None), decode.bytes_read(cell, 256)
    token = 28 * 8 * 128 * 2 * 2
    assert dense - sparse == pytest.approx((32768 - 256 - 512 / 2) * token)
    assert decode.bytes_read(cell, 40000) == dense
    shared = decode.bytes_read(replace(cell, share_layers=4), 256)
    assert sparse - shared == pytest.approx(512 / 2 * 3 / 4 * token)


def test_a_row_has_medians_and_says_what_stayed_dense() -> None:
    [cell] = decode.plan([32768], [1], 9.0, None, **COMMON)
    seconds = {"dense": [4.0, 5.0, 3.0], "256": [1.0, 2.0, 1.5]}
    for skipped in ({"256": 9.0}, {}):
        made = decode.row({"cell": asdict(cell), "seconds": seconds, "skipped": skipped, "device": "cpu"})
        dense, sparse = made["arms"]
        assert (dense["step_s"], sparse["step_s"], sparse["speedup"]) == (4.0, 1.5, 4.0 / 1.5)
        assert sparse["reached"] == pytest.approx(sparse["speedup"] / sparse["byte_limit"])
        assert sparse["stays_dense"] == (not skipped)


def test_cells_that_were_measured_outlive_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(cell: decode.Cell) -> dict[str, object]:
        if cell.batch == 8:
            raise EngineError("bench: 8 × 4096 failed: killed")
        seconds = {"dense": [2.0] * 3, "256": [1.0] * 3}
        return {"cell": asdict(cell), "seconds": seconds, "skipped": {}, "device": "cpu"}

    monkeypatch.setattr(decode, "_in_process", measured)
    with pytest.raises(EngineError, match="8 × 4096"):
        decode.main(
            contexts=[4096], batches=[1, 8, 32], budgets=[256], method="quest", page=64, layers=1, memory_gib=9.0, steps=3,
            share_layers=1, share_steps=1, as_json=True,
        )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in report["rows"]] == [1, 32]


def test_stock_is_measured_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        told.append(env)
        Path(command[-1]).write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for budgets in ((256,), ()):
        [cell] = decode.plan([4096], [1], 9.0, 1, budgets=budgets, page=64)
        assert decode._in_process(cell) == {}
    assert [env.get("VLLM_PLUGINS") for env in told] == [None, "none"]


def test_a_study_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert fidelity._stored(STUDY, out) == []
    with out.open("a") as file:
        file.write(json.dumps({"arm": "dense"}) + "\n")
    assert fidelity._stored(STUDY, out) == [{"arm": "dense"}]
    with pytest.raises(InputError, match="another study"):
        fidelity._stored(replace(STUDY, seed=1), out)
    whole = out.read_text()
    with out.open("a") as file:
        file.write('{"arm": "que')
    assert fidelity._stored(STUDY, out) == [{"arm": "dense"}]
    assert out.read_text() == whole
    out.write_text("no study\n")
    with pytest.raises(InputError, match="can't be used"):
        fidelity._stored(STUDY, out)


def test_gains_are_paired_by_problem() -> None:
    rows = [{"right": [0.5] * 20 + [1.0] * 20}, {"right": [0.25] * 20 + [0.75] * 20}]
    dense, (mean, low, high) = fidelity.gains(rows)
    assert dense == (0.0, 0.0, 0.0)
    assert low < mean == -0.25 < high < -0.15  # unpaired, problems differ by more than that


def test_arms_are_compared_where_they_cost_the_same() -> None:
    dense = {"arm": "dense", "eflops_per_sample": 4.0,
             "votes": [{"votes": v, "accuracy": a} for v, a in ((1, 0.4), (2, 0.5))]}  # fmt: skip
    half = {"arm": "half", "eflops_per_sample": 2.0,
            "votes": [{"votes": v, "accuracy": a} for v, a in ((1, 0.3), (2, 0.45), (4, 0.7))]}  # fmt: skip
    found = fidelity.at_equal_cost([dense, half])
    assert [(f["dense_votes"], f["accuracy"]) for f in found] == [(1, 0.45), (2, 0.7)]
    assert [round(f["gain"], 9) for f in found] == [0.05, 0.2]
