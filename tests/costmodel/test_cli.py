"""The four commands as a user sees them: one JSON object, the documented keys, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from ttc.cli import costs
from ttc.costmodel import ModelShape, full, kinetics
from ttc.costmodel.grid import price_grid, time_grid
from ttc.errors import InputError, TTCError

app = typer.Typer(pretty_exceptions_enable=False)
for name in ("cost", "plan", "frontier", "calibrate"):
    app.command(name)(getattr(costs, name))
QWEN3 = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    if isinstance(result.exception, TTCError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def run_json(*args: str) -> dict[str, Any]:
    lines = run(*args, "--json").strip().splitlines()
    assert len(lines) == 1
    parsed: dict[str, Any] = json.loads(lines[0])
    return parsed


def _pool(folder: Path, model: str = "qwen3-8b", task: str = "aime24") -> Path:
    rng = np.random.default_rng(1)
    rows = []
    for k in range(8):
        branches = []
        for _ in range(16):
            tokens = int(rng.integers(700, 9000))
            answer = "7" if rng.random() < k / 8 else str(rng.integers(10, 13))
            branches.append([["ERR", answer][: tokens // 500 + 1] * (tokens // 1000 + 1), tokens, answer])
        rows.append({"question": f"q{k}", "gold_answer": "7", "probe_freq": 500, "each_branch": branches})
    file = folder / f"{model}_{task}.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize("size", QWEN3)
def test_cost_json_is_the_papers_equation(size: str) -> None:
    args = ("--prompt-tokens", "150", "--generated-tokens", "16384", "--samples", "1", "--intensity", "562.5")
    shown = run_json("cost", "--model", f"Qwen/Qwen3-{size}", *args)
    s = ModelShape.named(f"Qwen3-{size}")
    p, d, r, lin, lout, i = s.kinetics_params, s.kv_elements, s.gqa_ratio, 150, 16384, 562.5
    equation = (
        2 * p * lout + 2 * r * lin * d * lout + r * d * lout**2 + 2 * i * lin * d * lout + i * d * lout**2
    )
    assert shown["kinetics"]["eflops"] == pytest.approx(equation, rel=1e-9)
    assert set(shown["kinetics"]) == {"flops", "bytes", "eflops"}
    assert {"flops", "bytes", "eflops", "seconds"} <= set(shown["full"])
    assert shown["model"]["name"] == f"Qwen3-{size}"
    assert shown["hardware"] == "kinetics-b200"


def test_cost_takes_sparse_and_batch_options() -> None:
    args = ["cost", "-m", "Qwen3-8B", "--kv-budget", "2048", "--kv-block", "64", "-n", "8", "--batch", "32"]
    shown = run_json(*args)
    common: dict[str, Any] = {
        "prompt_tokens": 150,
        "generated_tokens": 16384,
        "samples": 8,
        "kv_budget": 2048,
    }
    shape = ModelShape.named("Qwen3-8B")
    assert shown["kinetics"]["bytes"] == pytest.approx(kinetics(shape, **common, kv_block=64).bytes)
    assert shown["full"]["bytes"] == pytest.approx(full(shape, **common, kv_block=64, batch=32).bytes)
    halved = run_json(*args, "--kv-bytes", "1", "--usd-per-hour", "6")
    assert halved["full"]["bytes"] < shown["full"]["bytes"]
    assert halved["full"]["usd"] == pytest.approx(halved["full"]["seconds"] / 600)
    assert "Qwen3-8B" in run("cost", "-m", "Qwen3-8B")


def test_cost_of_iterative_deepening() -> None:
    """Checkpoints at 2,048, 4,096 and 8,192 tokens: three triggers of 20 tokens, decoded as any others."""
    shown = run_json(
        "cost", "-m", "Qwen3-8B", "--deepen-from", "2048", "--deepen-growth", "2", "--trigger-tokens", "20"
    )
    longer = run_json("cost", "-m", "Qwen3-8B", "--generated-tokens", str(16384 + 60))
    assert (shown["triggers"], shown["generated_tokens"]) == (3, 16384 + 60)
    assert shown["full"] == longer["full"]
    assert "3 triggers" in run("cost", "-m", "Qwen3-8B", "--deepen-from", "2048")


def test_plan_json(tmp_path: Path) -> None:
    data = str(_pool(tmp_path))
    shown = run_json("plan", "--budget", "30 PeFLOPs", "--data", data, "-m", "Qwen3-8B")
    assert shown["budget"] == {"amount": 3e16, "unit": "eflops", "scope": "problem"}
    assert shown["plan"]["eflops"] <= 3e16
    assert shown["plan"]["accuracy_ci95"][0] <= shown["plan"]["accuracy"]
    assert shown["runners_up"]
    assert shown["frontier"]
    assert shown["flops_only"]["cost_ratio"] >= 1
    by_paper = run_json("plan", "--budget", "30 PeFLOPs", "--data", data, "--convention", "kinetics")
    assert by_paper["plan"]["eflops_kinetics"] <= 3e16
    told = run("plan", "--budget", "40k tokens", "--data", data)
    assert "fits" in told
    assert "By FLOPs alone you would have taken" in told
    alone = run_json(
        "plan", "--budget", "$0.01", "-m", "Qwen3-14B", "-m", "Qwen3-1.7B", "--usd-per-hour", "4"
    )
    assert alone["plan"]["accuracy"] is None
    assert alone["plan"]["model"] == "Qwen3-14B"


def test_frontier_json_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = str(_pool(tmp_path))
    for picture in ("f.png", "f.svg"):
        shown = run_json("frontier", data, "--allocate", "1e16", "--plot", str(tmp_path / picture))
        assert (tmp_path / picture).stat().st_size > 1000
    assert {"points", "pareto", "bands", "threshold_model", "exponents", "flops_only", "allocation"} <= set(
        shown
    )
    costs_along = [p["eflops_kinetics"] for p in shown["pareto"]]
    assert costs_along == sorted(costs_along)
    assert len(shown["allocation"]) == 6
    with pytest.raises(InputError, match="--allocate is -1"):
        run("frontier", data, "--allocate", "-1")
    with pytest.raises(InputError, match="flops, seconds or dollars"):
        run("frontier", data, "--unit", "parsecs")
    text = run("frontier", data)
    assert "●" in text
    assert "cost doubles" in text


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["cost", "-m", "Qwen3-8B", "--samples", "-1"], "--samples -1: give 1"),
        (["cost", "-m", "Qwen3-8B", "--samples", "0"], "--samples 0: give 1"),
        (["cost", "-m", "Qwen3-8B", "--generated-tokens", "inf"], "generated_tokens is inf"),
        (["cost", "-m", "Qwen3-8B", "--tensor-parallel", "0"], "tensor_parallel is 0"),
        (["cost", "-m", "Qwen3-8B", "--generated-tokens", "-5"], "generated_tokens is -5"),
        (["cost", "-m", "Qwen3-8B", "--hardware", "H900"], "h100"),
        (["cost", "-m", "Qwen3-8B", "--intensity", "nan"], "--intensity is nan"),
        (["cost", "-m", "Qwen3-8B", "--cached-prompt-tokens", "999"], "exceeds --prompt-tokens"),
        (["cost", "-m", "Qwen3-8B", "--prompt-tokens", "-1"], "prompt_tokens is -1"),
        (["cost", "-m", "Qwen3-8B", "--kv-method", "quest"], "--kv-method quest: needs a budget"),
        (["cost", "-m", "Qwen3-8B", "--kv-bytes", "inf"], "--kv-bytes is inf"),
        (["cost", "-m", "Qwen3-8B", "--deepen-from", "-1"], "first > 0"),
        (["cost", "-m", "nothing-7b"], "not known"),
        (["plan", "--budget", "-5 tokens", "-m", "Qwen3-8B"], "budget"),
        (["plan", "--budget", "3 eflops", "-m", "Qwen3-8B"], "the least is 44.9 TeFLOPs"),
        (["plan", "--budget", "9 PeFLOPs"], "nothing to plan with"),
        (["frontier", "nowhere.json"], "cannot be read"),
        (["calibrate", "-m", "nano-s", "--engine", "openai:x"], "only vllm"),
        (["calibrate", "-m", "nano-s", "--batches", "1,two"], "--batches"),
        (["calibrate", "-m", "nano-s", "--batches", "1,2"], "too small"),
        (["calibrate", "-m", "nano-s", "--time-limit", "nan"], "--time-limit nan"),
        (["calibrate", "-m", "nano-s", "--engine-arg", "eager"], "write it as enforce_eager=true"),
        (["calibrate", "-m", "nano-s", "--out", "/proc/none/p.json"], "can't be written"),
        (["calibrate", "-m", "nano-s", "--out", "/tmp"], "a folder, or no permission"),
        (["calibrate", "-m", "nano-s", "--kv-budgets", "16", "--kv-block", "64"], "under one page of 64"),
    ],
)
def test_bad_input_gets_one_line(args: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        run(*args)
    assert "\n" not in str(caught.value)


def test_mixed_tasks_are_refused(tmp_path: Path) -> None:
    first, second = _pool(tmp_path), _pool(tmp_path, task="aime25")
    with pytest.raises(InputError, match="--task aime24 or aime25"):
        run("frontier", str(first), str(second))
    assert run_json("frontier", str(first), str(second), "--task", "aime25")["points"]
    with pytest.raises(InputError, match="they hold aime24, aime25"):
        run("frontier", str(first), str(second), "--task", "gsm8k")


def test_the_grid_is_the_formulas_and_its_benchmark_counts_points() -> None:
    shapes = [ModelShape.named("Qwen3-8B")]
    lengths, budgets = np.array([10.0, 5000.0]), np.array([64.0, np.inf])
    grid = price_grid(shapes, samples=np.array([1.0, 4.0]), generated_tokens=lengths, kv_budgets=budgets)
    one = full(shapes[0], prompt_tokens=150, generated_tokens=5000, samples=4).eflops()
    assert grid.full_eflops[0, 1, 1, 1] == pytest.approx(one)
    sparse = full(shapes[0], prompt_tokens=150, generated_tokens=5000, kv_budget=64, kv_block=32).eflops()
    assert grid.full_eflops[0, 0, 1, 0] == pytest.approx(sparse)
    timed = time_grid(10_000, rounds=2)
    assert (timed["points"], len(timed["seconds"])) == (10_000, 2)
    with pytest.raises(InputError, match="no models"):
        price_grid([], samples=lengths, generated_tokens=lengths, kv_budgets=budgets)


def test_a_binary_file_is_no_pool(tmp_path: Path) -> None:
    from ttc.costmodel import pools

    file = tmp_path / "pool.json"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="is no text in UTF-8"):
        pools.read(file)
