"""``ttc bench decode``: what sparse decoding buys, measured on stock vLLM with the plugin.

A published model's shape with random weights; vLLM's DecodeBenchConnector fills long contexts with random KV, so no prefill is
run. In each cell (context, batch) the arms take turns step by step over the same sequences and the same KV: dense, then each
budget, again and again; whatever else the machine does hits all alike. Each cell is a process of its own. Beside the measured
ratio of whole steps stands the one that bytes allow: (weights + KV of dense) / (weights + KV chosen + page summaries).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ttc.attention.settings import KvSetting
from ttc.costmodel import METHODS, ModelShape
from ttc.errors import EngineError, InputError

MODEL = "Qwen3-0.6B"
WARM = 2
ROOM = 256
"""Tokens that a sequence may grow by while it is measured."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one process measures: ``layers`` of the model, a method at several budgets (tokens), each arm ``steps`` times. Without
    budgets it is vLLM without the plugin, dense alone."""

    context: int
    batch: int
    budgets: tuple[int, ...]
    layers: int
    page: int
    method: str = "block-topk"
    steps: int = 9
    share_layers: int = 1
    share_steps: int = 1
    model: str = MODEL
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv_bytes(self) -> float:
        """Of the whole cache."""
        return self.token_bytes * self.batch * (self.context + ROOM)

    @property
    def token_bytes(self) -> float:
        """Of a token's KV in the cell's layers."""
        return ModelShape.named(self.model).kv_bytes / _all_layers(self.model) * self.layers


def plan(
    contexts: Sequence[int], batches: Sequence[int], memory_gib: float, layers: int | None, **common: Any
) -> list[Cell]:
    """The cells, each with as many layers as leave its KV cache inside ``memory_gib``. Raises InputError if one layer does not."""
    model = common.get("model", MODEL)
    most_layers = min(_all_layers(model), layers or _all_layers(model))
    cells = []
    for context in contexts:
        for batch in batches:
            one = Cell(context, batch, layers=1, **common)
            most = int(memory_gib * 2**30 // one.kv_bytes)
            if most < 1:
                raise InputError(
                    f"memory: {memory_gib:g} GiB does not hold a layer's KV of {batch} × {context} tokens"
                    f" ({one.kv_bytes / 2**30:.1f} GiB); give more, or leave the cell out"
                )
            cells.append(Cell(context, batch, layers=min(most, most_layers), **common))
    return cells


def bytes_read(cell: Cell, budget: int | None) -> float:
    """Bytes that one step has to read: the weights once, and the KV (and page summaries) of every sequence."""
    shape = ModelShape.from_config(_config(cell.model, cell.layers), name=cell.model)
    tokens: float = cell.context
    if budget is not None and budget < cell.context:
        vectors = METHODS[cell.method].summaries
        tokens = budget + cell.context / cell.page * vectors / 2 / cell.share_layers / cell.share_steps
    return float(shape.step_weight_bytes(cell.batch) + cell.batch * tokens * cell.token_bytes)


def _all_layers(model: str) -> int:
    from ttc.costmodel.shapes import published_config

    config = published_config(model)
    if not model.startswith("Qwen3-") or "num_experts" in config:
        raise InputError(f"model: {model!r}; the shapes measured here are those of the dense Qwen3 models")
    return int(config["num_hidden_layers"])


def _config(model: str, layers: int) -> dict[str, Any]:
    from ttc.costmodel.shapes import published_config

    return published_config(model) | {
        "num_hidden_layers": layers, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072, "layer_types": ["full_attention"] * layers, "max_window_layers": layers,
        "hidden_act": "silu", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_bias": False,
    }  # fmt: skip


def measure(cell: Cell) -> dict[str, Any]:
    """Run one cell in this process. Times are seconds of whole engine steps, by arm ("dense" or the budget)."""
    from ttc.engine.vllm_start import import_vllm

    vllm = import_vllm()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_config(cell.model, cell.layers)))
        args: dict[str, Any] = {
            "model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "block_size": cell.page,
            "max_model_len": cell.context + ROOM, "max_num_seqs": cell.batch, "max_num_batched_tokens": max(2048, cell.batch),
            "enforce_eager": True, "enable_prefix_caching": False, "async_scheduling": False,
            "kv_cache_memory_bytes": int(cell.kv_bytes * 1.02) + 2**24,
            "kv_transfer_config": {
                "kv_connector": "DecodeBenchConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {"startup_fill": True, "fill_mean": 0.0, "fill_std": 1.0},
            },
            "additional_config": {"ttc_sparse": {"share_layers": cell.share_layers, "share_steps": cell.share_steps}},
        }  # fmt: skip
        engine = vllm.v1.engine.llm_engine.LLMEngine.from_engine_args(
            vllm.EngineArgs(**(args | dict(cell.engine_args)))
        )
    arms: list[int | None] = [None, *cell.budgets]
    turns = _Turns(engine, cell)
    seconds: dict[str, list[float]] = {_name(arm): [] for arm in arms}
    for round_ in range(cell.steps):
        for arm in arms if round_ % 2 == 0 else arms[::-1]:
            turns.take(arm, WARM if round_ == 0 else 0)
            # a shared selection is made once in share_steps: time whole cycles
            cycle = [turns.take(arm, 1) for _ in range(cell.share_steps)]
            seconds[_name(arm)].append(sum(cycle) / len(cycle))
    return {"cell": asdict(cell), "seconds": seconds, "skipped": turns.skipped, "device": turns.device}


class _Turns:
    """One batch of long sequences, decoded a step at a time under whatever setting is wanted for that step."""

    def __init__(self, engine: Any, cell: Cell) -> None:
        from ttc.attention import rows
        from ttc.attention.backend import device_name

        self.engine, self.cell = engine, cell
        self.batch = rows.batch_of(engine.vllm_config)
        if cell.budgets and "" not in self.batch.served.values():
            reasons = "; ".join(filter(None, self.batch.served.values())) or "see 'ttc doctor'"
            raise EngineError(f"bench: the sparse backend is not in force here: {reasons}")
        self.device = device_name(engine.vllm_config.device_config.device)
        vllm = sys.modules["vllm"]
        for i in range(cell.batch):
            params = vllm.SamplingParams(temperature=0.0, max_tokens=ROOM, ignore_eos=True, detokenize=False)
            ids = [3 + (i + j) % 1000 for j in range(cell.context - 1)]
            engine.add_request(str(i), {"prompt_token_ids": ids}, params)
        started: set[str] = set()
        while len(started) < cell.batch:
            started |= {output.request_id for output in engine.step()}
        self.skipped: dict[str, float] = {}
        self.rows: dict[int, dict[int, Any]] = {}  # by budget: a row knows which of its pages are summarised

    def take(self, budget: int | None, steps: int) -> float:
        """Seconds of ``steps`` steps under a budget (None: dense), set for all rows as their requests would have set it."""
        from ttc.attention.rows import COUNTS, Row

        count = COUNTS.setdefault(-1, [0.0, 0.0, 0.0, 0.0])
        before = count[0]
        if budget is not None and budget not in self.rows:
            setting = KvSetting(budget, self.cell.method)
            self.rows[budget] = {i: Row(setting, -1) for i in range(self.cell.batch)}
        self.batch.rows = {} if budget is None else self.rows[budget]
        begun = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        taken = time.perf_counter() - begun
        if steps and budget is not None:
            self.skipped[str(budget)] = (count[0] - before) / steps / self.cell.batch
        return taken


def _name(arm: int | None) -> str:
    return "dense" if arm is None else str(arm)


def row(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures of one cell: medians, quartiles, ratios of medians, what bytes allow, and the part of that reached."""
    told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in measured["cell"].items()}
    cell = Cell(**told)
    times = {name: sorted(seconds) for name, seconds in measured["seconds"].items()}
    dense = statistics.median(times["dense"])
    arms = []
    for name, seconds in times.items():
        budget = None if name == "dense" else int(name)
        q = statistics.quantiles(seconds, n=4)
        here: dict[str, Any] = {
            "budget": budget, "step_s": statistics.median(seconds), "low_s": q[0], "high_s": q[2], "min_s": seconds[0],
        }  # fmt: skip
        if budget is not None:
            limit = bytes_read(cell, None) / bytes_read(cell, budget)
            ratio = dense / here["step_s"]
            here |= {
                "speedup": ratio,
                "speedup_min": times["dense"][0] / seconds[0],
                "byte_limit": limit,
                "reached": ratio / limit,
            }
            here |= {"stays_dense": not measured["skipped"].get(name)}
        arms.append(here)
    return asdict(cell) | {"device": measured["device"], "arms": arms}


def main(
    *, contexts: Sequence[int], batches: Sequence[int], budgets: Sequence[int], method: str, page: int, layers: int | None,
    memory_gib: float, steps: int, share_layers: int, share_steps: int, as_json: bool,
    model: str = MODEL, engine_args: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Measure every cell in a process of its own; print a table, or one JSON object."""
    from rich.console import Console

    for budget in budgets:
        KvSetting(budget, method).check_page(page)
    if page < 16 or page % 16:
        raise InputError(f"page: {page} tokens; pages are multiples of 16 (on CPU: of 32)")
    cells = plan(
        contexts, batches, memory_gib, layers, budgets=tuple(budgets), page=page, method=method, steps=steps,
        share_layers=share_layers, share_steps=share_steps, model=model, engine_args=dict(engine_args or {}),
    )  # fmt: skip
    say = Console(stderr=True, highlight=False).print
    rows, failed = [], []
    for cell in cells:
        try:
            rows.append(row(_in_process(cell)))
        except EngineError as error:
            failed.append(str(error))
            say(failed[-1])
            continue
        best = max((arm["speedup"] for arm in rows[-1]["arms"] if arm["budget"] is not None), default=None)
        say(f"{cell.batch} × {cell.context:,}: " + ("stock" if best is None else f"{best:.1f}×"))
    report = {
        "model": model,
        "rows": rows,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": _processor(),
                    "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None, "load": os.getloadavg()[0]},
    }  # fmt: skip
    if as_json:
        print(json.dumps(report))
    elif rows:
        _print(report)
    if failed:
        raise EngineError("; ".join(failed))


def _in_process(cell: Cell) -> dict[str, Any]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        made = subprocess.run(
            [sys.executable, "-m", "ttc.bench.decode", json.dumps(asdict(cell)), str(out)], text=True, capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": threads} | ({} if cell.budgets else {"VLLM_PLUGINS": "none"}),
        )  # fmt: skip
        if made.returncode:
            words = "killed, perhaps for want of memory" if made.returncode == -9 else _last_line(made.stderr)
            raise EngineError(f"bench: {cell.batch} × {cell.context} failed: {words}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def _last_line(text: str) -> str:
    """The error that a process ended with."""
    lines = [line for line in text.strip().splitlines() if line and not line[0].isspace()]
    return lines[-1] if lines else "no word"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    table = Table(title=f"whole decode steps, {report['model']} shape, random weights", title_justify="left")
    for heading in (
        "batch × context",
        "layers",
        "budget",
        "step",
        "quartiles",
        "speed-up",
        "bytes allow",
        "reached",
    ):
        table.add_column(heading, justify="right")
    for each in report["rows"]:
        for arm in each["arms"]:
            digits = 0 if arm["step_s"] > 0.1 else 2
            spread = f"{arm['low_s'] * 1e3:,.{digits}f} to {arm['high_s'] * 1e3:,.{digits}f}"
            ratios = ("", "", "")
            if arm["budget"] is not None:
                word = " (stays dense)" if arm["stays_dense"] else ""
                ratios = (
                    f"{arm['speedup']:.2f}×{word}",
                    f"{arm['byte_limit']:.2f}×",
                    f"{arm['reached']:.0%}",
                )
            table.add_row(
                f"{each['batch']} × {each['context']:,}", str(each["layers"]), _name(arm["budget"]),
                f"{arm['step_s'] * 1e3:,.{digits}f} ms", spread, *ratios,
            )  # fmt: skip
    stdout.print(table)
    machine = report["machine"]
    first = report["rows"][0]
    where = first["device"]
    if where == "cpu":
        where = f"{machine['processor']}, {machine['threads'] or 'half the cores'} thread(s)"
    what = first["method"] if first["budgets"] else "vLLM without the plugin"
    stdout.print(f"{what}, pages of {first['page']}; {where}")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(measure(Cell(**(given | {"budgets": tuple(given["budgets"])})))))
