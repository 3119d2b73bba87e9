"""``ttc cost``, ``ttc plan``, ``ttc frontier``, ``ttc calibrate``: words and tables around
``ttc.costmodel``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ttc.errors import BudgetTooSmall, InputError

if TYPE_CHECKING:
    from ttc.costmodel import ModelShape
    from ttc.costmodel.points import Point, Tariff
    from ttc.costmodel.records import Curve, Pool

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="A registry, nano or hub name, or a folder; repeat for more."),
]
OneModel = Annotated[
    str, typer.Option("--model", "-m", help="A registry, nano or hub name, or a folder with config.json.")
]
HardwareName = Annotated[str, typer.Option("--hardware", help="Card that gives seconds: h200, b200, a100, …")]
Intensity = Annotated[
    float | None,
    typer.Option(help="FLOP per byte of an eFLOP; default 562.5, the paper's. 'ttc cost' lists others."),
]
KvBudget = Annotated[
    int | None, typer.Option(help="KV tokens that each decoded token attends to; default all.")
]
KvBlock = Annotated[int | None, typer.Option(help="Page size in tokens of a method that searches pages.")]
KvMethod = Annotated[str | None, typer.Option(help="Sparse method: oracle, block, quest, streaming, …")]
Batch = Annotated[float, typer.Option(help="Sequences that share a step, and so a pass over the weights.")]
PromptTokens = Annotated[float, typer.Option(help="Tokens of the prompt.")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="A calibrated profile: seconds are its predictions.")
]
UsdPerHour = Annotated[
    float | None, typer.Option(help="Price of the card for an hour: dollars are shown and budgets allowed.")
]
Convention = Annotated[
    str, typer.Option(help="How eFLOPs are counted: full (ours) or kinetics (the paper's).")
]
Task = Annotated[str | None, typer.Option(help="Only data on this task, e.g. aime24.")]
Rule = Annotated[
    str, typer.Option(help="How recorded branches are joined: vote, or coverage (needs a verifier).")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw to this .png or .svg file (needs matplotlib).")
]


def cost(
    model: OneModel,
    prompt_tokens: PromptTokens = 150,
    generated_tokens: Annotated[float, typer.Option(help="Tokens that each chain generates.")] = 16384,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Chains over the same prompt.")] = 1,
    kv_budget: KvBudget = None,
    kv_block: KvBlock = None,
    kv_method: KvMethod = None,
    batch: Annotated[
        float | None, typer.Option(help="Sequences that share a step; default: the samples.")
    ] = None,
    cached_prompt_tokens: Annotated[
        float, typer.Option(help="Prompt tokens already in the prefix cache.")
    ] = 0,
    kv_bytes: Annotated[float | None, typer.Option(help="Bytes of a KV element, e.g. 1 for FP8.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    intensity: Intensity = None,
    hardware: HardwareName = "kinetics-b200",
    profile: ProfileFile = None,
    usd_per_hour: UsdPerHour = None,
    as_json: AsJson = False,
) -> None:
    """What chains of a model cost: FLOPs, bytes, eFLOPs (both conventions), seconds."""
    from ttc.costmodel import KINETICS_INTENSITY, Hardware, full, kinetics

    shape = shape_of(model)
    if kv_bytes is not None:
        if not kv_bytes > 0:
            raise InputError(f"--kv-bytes is {kv_bytes}; give bytes of an element, e.g. 2 or 1")
        shape = shape.with_kv_bytes(kv_bytes)
    if cached_prompt_tokens > prompt_tokens:
        raise InputError(
            f"--cached-prompt-tokens {cached_prompt_tokens:g} exceeds --prompt-tokens {prompt_tokens:g}"
        )
    card, factor = (
        Hardware.named(hardware),
        KINETICS_INTENSITY if intensity is None else _positive("--intensity", intensity),
    )
    chains: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "samples": samples,
    }
    sparse: dict[str, Any] = {"kv_budget": kv_budget, "kv_block": kv_block, "method": kv_method}
    paper = kinetics(shape, **chains, **sparse)
    ours = full(
        shape,
        **chains,
        **sparse,
        cached_prompt_tokens=cached_prompt_tokens,
        batch=batch,
        tensor_parallel=tensor_parallel,
    )
    seconds, basis = card.roofline_s(ours), f"roofline of {card.name}: a lower bound"
    if profile is not None:
        from ttc.costmodel.profile import Profile

        fitted = Profile.load(profile)
        seconds = fitted.chain_s(shape, **chains, batch=batch or max(samples, 1), kv_budget=kv_budget)
        basis = f"profile of {fitted.model}: {fitted.held_out.words()}"
    result: dict[str, Any] = {
        "kinetics": {"flops": paper.flops, "bytes": paper.bytes, "eflops": paper.eflops(factor)},
        "full": {
            "flops": ours.flops,
            "bytes": ours.bytes,
            "eflops": ours.eflops(factor),
            "seconds": seconds,
            "seconds_basis": basis,
        },
        "model": shape.summary(),
        "hardware": card.name,
        "intensity": factor,
        "batch": batch or max(samples, 1),
    }
    if usd_per_hour is not None:
        result["full"]["usd"] = seconds * _positive("--usd-per-hour", usd_per_hour) / 3600
    if as_json:
        print(json.dumps(result))
        return
    _show_cost(result)


def _show_cost(result: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "FLOPs", "bytes", "eFLOPs", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("kinetics", "full"):
        row = result[name]
        seconds = f"{row['seconds']:.4g}" if "seconds" in row else ""
        table.add_row(name, *(_si(row[k]) for k in ("flops", "bytes", "eflops")), seconds)
    stdout.print(table)
    m = result["model"]
    stdout.print(
        f"{m['name']}: {m['params'] / 1e9:.3g} B parameters ({m['active_params'] / 1e9:.3g} B active), "
        f"{m['kv_bytes_per_token'] / 1024:.4g} KiB of KV a token; {result['intensity']:g} FLOP/byte; "
        f"seconds: {result['full']['seconds_basis']}."
    )


def plan(
    budget: Annotated[str, typer.Option(help="Per problem: '40 TeFLOPs', '20k tokens', '30 s', '$0.05'.")],
    model: Models = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="Measured accuracy: pools, curves, traces, run folders; repeat."),
    ] = None,
    task: Task = None,
    rule: Rule = "vote",
    fits: Annotated[str, typer.Option(help="Read the budget against the mean or the worst case.")] = "mean",
    convention: Convention = "full",
    prompt_tokens: PromptTokens = 150,
    batch: Batch = 64,
    kv_budget: KvBudget = None,
    kv_block: KvBlock = None,
    kv_method: KvMethod = None,
    intensity: Intensity = None,
    hardware: HardwareName = "kinetics-b200",
    profile: ProfileFile = None,
    usd_per_hour: UsdPerHour = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Which model, how many samples, how long, how sparse: the best that a budget buys, by measured
    accuracy."""
    from ttc.budget import Budget
    from ttc.costmodel.planner import cost_only
    from ttc.costmodel.planner import plan as choose

    limit = Budget.parse(budget)
    tariff = _tariff(hardware, intensity, prompt_tokens, batch, kv_method, kv_block, profile, usd_per_hour)
    points = _load(data or [], model or [], tariff, task, rule).points
    shapes = [shape_of(name) for name in model or []]
    wanted = {s.name for s in shapes}
    points = [p for p in points if not wanted or p.model in wanted]
    if kv_budget is not None:
        points = [p for p in points if p.kv_budget == kv_budget]
    unknown = [s for s in shapes if s.name not in {p.model for p in points}]
    points += cost_only(unknown, limit.amount, limit.unit, tariff, convention=convention, kv_budget=kv_budget)
    if not points and shapes:
        least = {s.name: _least(s, limit.unit, tariff, convention) for s in shapes}
        name = min(least, key=lambda s: least[s])
        words = f"the least is {least[name]:.3g} {limit.unit} ({name})"
        raise BudgetTooSmall(f"budget {limit} buys no chain of 250 tokens; {words}", least[name])
    made = choose(
        points,
        limit.amount,
        limit.unit,
        tariff,
        convention=convention,
        fits=fits,
        silent=[s.name for s in unknown],
    )
    if plot is not None:
        from ttc.cli.pictures import draw

        draw(points, made.frontier, tariff, plot, unit=limit.unit, convention=convention, budget=limit.amount)
    if as_json:
        print(json.dumps(made.to_json(tariff)))
        return
    from ttc.cli.render import stdout

    stdout.print(f"[bold]{made.chosen.label()}[/bold]  ({limit})")
    stdout.print(made.why)
    if made.flops_only is not None and made.flops_only.ratio > 1.005:
        other = made.flops_only.point.label()
        stdout.print(f"By FLOPs alone you would have taken {other}: {made.flops_only.ratio:.2f}x the price.")
    rows = [("plan", made.chosen), *(("next", p) for p in made.runners_up)]
    rows += [(f"{amount / limit.amount:g}x", p) for amount, p in made.ladder if amount > limit.amount]
    _table(rows, tariff)
    for note in made.notes:
        stdout.print(f"[dim]note: {note}[/dim]")


def frontier(
    data: Annotated[list[Path], typer.Argument(help="Pools, curves, Kinetics traces, run folders of ttc.")],
    model: Models = None,
    task: Task = None,
    rule: Rule = "vote",
    unit: Annotated[str, typer.Option(help="Cost axis: eflops, flops, tokens, seconds, dollars.")] = "eflops",
    convention: Convention = "kinetics",
    prompt_tokens: PromptTokens = 150,
    batch: Batch = 64,
    kv_budget: KvBudget = None,
    kv_block: KvBlock = None,
    kv_method: KvMethod = None,
    intensity: Intensity = None,
    hardware: HardwareName = "kinetics-b200",
    profile: ProfileFile = None,
    usd_per_hour: UsdPerHour = None,
    allocate: Annotated[
        list[float] | None,
        typer.Option(
            help="Compare the paper's per-task oracle with honest choices at this eFLOPs limit; repeat."
        ),
    ] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy against cost of every configuration: the Pareto set, the model-size threshold, the
    exponents."""
    from ttc.costmodel.frontier import axis, pareto, report

    tariff = _tariff(hardware, intensity, prompt_tokens, batch, kv_method, kv_block, profile, usd_per_hour)
    loaded = _load(data, model or [], tariff, task, rule)
    points = loaded.points
    wanted = {shape_of(m).name for m in model or []}
    points = [p for p in points if not wanted or p.model in wanted]
    if kv_budget is not None:
        points = [p for p in points if p.kv_budget == kv_budget]
    if not points:
        have = sorted({str(x.task) for x in loaded.sources})
        raise InputError(f"no data is left to draw; tasks in these files: {', '.join(have) or 'none'}")
    result = report(points, tariff, unit=unit, convention=convention)
    if allocate:
        result["allocation"] = _allocations(loaded.pools, tariff, allocate, task)
    front = pareto(points, axis(tariff, unit, convention))
    if plot is not None:
        from ttc.cli.pictures import draw

        draw(points, front, tariff, plot, unit=unit, convention=convention)
    if as_json:
        print(json.dumps(_finite(result)))
        return
    _show_frontier(result, points, front, tariff, unit, convention)


def calibrate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A nano name, a folder, a hub id; or see --random-weights.")
    ],
    engine: Annotated[
        str, typer.Option(help="Only vllm can be calibrated: its steps are ours to time.")
    ] = "vllm",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Shape from the registry or a config.json, weights drawn by vLLM."
        ),
    ] = False,
    batches: Annotated[str, typer.Option(help="Batch sizes; the largest is held out.")] = "1,2,4,8,16,32",
    contexts: Annotated[
        str, typer.Option(help="Context lengths; the longest is held out.")
    ] = "128,256,512,1024,2048",
    prefills: Annotated[str, typer.Option(help="Prefill lengths.")] = "64,128,256,384,512,768,1024,1536",
    kv_budgets: Annotated[
        str, typer.Option(help="KV budgets to measure too (needs the sparse plugin).")
    ] = "",
    kv_block: KvBlock = None,
    kv_method: KvMethod = None,
    statistic: Annotated[
        str,
        typer.Option(help="What stands for repeats: median, or quiet (10th percentile) on a shared machine."),
    ] = "median",
    rounds: Annotated[int, typer.Option(help="Visits to every point, in a new order each time.")] = 5,
    repeats: Annotated[int, typer.Option(help="Steps timed at a visit.")] = 9,
    out: Annotated[Path | None, typer.Option("--out", help="Write the profile to this JSON file.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Measure the engine's step times, fit a few physical terms, and print the error on points held out."""
    import sys
    import tempfile

    from ttc.costmodel.calibrate import Statistic, design, fit, measure

    if statistic not in ("median", "quiet"):
        raise InputError(f"--statistic {statistic}: use median or quiet")
    if engine != "vllm":
        raise InputError(
            f"--engine {engine}: only vllm can be calibrated; a remote engine's steps cannot be timed"
        )
    lengths, sizes = _whole("--contexts", contexts), _whole("--batches", batches)
    cells = design(
        batches=sizes,
        contexts=lengths,
        kv_budgets=_whole("--kv-budgets", kv_budgets) if kv_budgets else (),
        prefills=_whole("--prefills", prefills),
    )
    room = max(*lengths, *_whole("--prefills", prefills)) + repeats + 16
    from ttc.engine.stepper import VLLMStepper
    from ttc.engine.vllm import VLLMEngine

    with tempfile.TemporaryDirectory() as scratch:
        target, extra = model, {}
        if random_weights:
            target, extra = str(_hollow_model(model, Path(scratch), room)), {"load_format": "dummy"}
        running = VLLMEngine(target, concurrency=max(sizes), context=room, engine_args=extra)
        try:
            stepper = VLLMStepper(running, repeats=repeats)
            shape = shape_of(model) if random_weights else running.info.shape
            if shape is None:
                raise InputError(f"--model {model}: its shape is not known; it needs a config.json")
            say = (
                (lambda _: None) if quiet else (lambda line: print(f"\r{line:<79}", end="", file=sys.stderr))
            )
            rows = measure(stepper, cells, say, rounds=rounds)
            counted = [
                (c, stepper.counters(c.batch, c.context, c.phase)) for c in cells if c.kv_budget is None
            ]
        finally:
            running.close()
    if not quiet:
        print(file=sys.stderr)
    facts: dict[str, Any] = {"machine": _machine(), "versions": {"vllm": running.info.identity["vllm"]}}
    facts |= {"kv_block": kv_block, "kv_method": kv_method}
    kinds: tuple[Statistic, ...] = get_args(Statistic)
    both = {kind: fit(shape, rows, statistic=kind, **facts) for kind in kinds}
    profile = next(p for kind, p in both.items() if kind == statistic)
    name = f"{shape.name} (random weights)" if random_weights else running.info.model
    profile = replace(profile, model=name)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        profile.save(out)
    compared = _compare_counters(shape, counted)
    errors = {name: getattr(profile.held_out, name) for name in profile.held_out.__slots__}
    terms = {name: getattr(profile.terms, name) for name in profile.terms.__slots__}
    if as_json:
        summary = {"model": profile.model, "terms": terms, "held_out": errors, "noise": profile.noise}
        summary |= {"statistic": statistic}
        summary["held_out_by_statistic"] = {
            k: {name: getattr(p.held_out, name) for name in p.held_out.__slots__} for k, p in both.items()
        }
        summary |= {
            "points": list(profile.measurements),
            "vllm_counters": compared,
            "out": str(out) if out else None,
        }
        print(json.dumps(_finite(summary)))
        return
    from ttc.cli.render import stdout

    stdout.print(f"{profile.model}: noise of repeats {profile.noise:.0%}", soft_wrap=True)
    for kind, fitted in both.items():
        kept = " (kept)" if kind == statistic else ""
        stdout.print(f"  fit of the {kind}: {fitted.held_out.words()}{kept}", soft_wrap=True)
    for name, value in terms.items():
        stdout.print(f"  {name:26} {value:.3g}")
    for row in compared:
        stdout.print(
            f"  vLLM's counters, {row['phase']}: FLOPs {row['flops_ratio']:.3f}x ours, bytes {row['bytes_ratio']:.3f}x"
        )
    if out is not None:
        stdout.print(f"written to {out}")


def _compare_counters(shape: ModelShape, counted: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """vLLM's estimate over ours, summed over the measured cells of each phase; activations (not ours)
    apart."""
    from ttc.costmodel import full

    rows = []
    for phase in ("decode", "prefill"):
        pairs = [(cell, got) for cell, got in counted if cell.phase == phase and got is not None]
        if not pairs:
            continue
        ours = []
        for cell, _ in pairs:
            if phase == "prefill":
                ours.append(full(shape, prompt_tokens=cell.context, generated_tokens=0))
            else:
                step = {"prompt_tokens": cell.context - 1, "start_tokens": 1, "generated_tokens": 1}
                ours.append(full(shape, **step, samples=cell.batch, weight_reads=1.0))
        flops, moved = sum(c.flops for c in ours), sum(c.bytes for c in ours)
        theirs = sum(got.bytes for _, got in pairs)
        kept = theirs - sum(got.activation_bytes for _, got in pairs)
        row: dict[str, Any] = {"phase": phase, "flops_ratio": sum(got.flops for _, got in pairs) / flops}
        row |= {"bytes_ratio": theirs / moved, "bytes_ratio_without_activations": kept / moved}
        rows.append(row)
    return rows


def _hollow_model(model: str, folder: Path, context: int) -> Path:
    """A folder that vLLM loads with drawn weights: the model's config and a nano model's tokenizer."""
    import shutil

    from ttc import nano
    from ttc.costmodel.shapes import published_config

    file = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    config = json.loads(file.read_text()) if file.is_file() else published_config(model)
    architectures = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    kind = str(config.get("model_type"))
    if "architectures" not in config and kind not in architectures:
        raise InputError(
            f"--random-weights: {model} is {kind}; dense qwen2, qwen3 and llama shapes can be drawn"
        )
    config = {
        "architectures": [architectures.get(kind, "")],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **config,
    }
    config |= {"hidden_act": "silu", "max_position_embeddings": max(context, 4096)}
    (folder / "config.json").write_text(json.dumps(config))
    donor = next(iter(nano.catalog()), None)
    if donor is None:
        raise InputError("--random-weights borrows a tokenizer from a nano model, and none is installed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(donor.path) / name, folder / name)
    return folder


def _machine() -> dict[str, str]:
    """What the measurement ran on, as far as it matters to time; no host name."""
    import os
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(
            (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), ""
        )
    except OSError:
        name = platform.processor()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {
        "cpu": name,
        "cores": str(os.cpu_count()),
        "omp_threads": threads,
        "python": platform.python_version(),
    }


def _whole(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{name} is {text!r}; write whole numbers with commas, e.g. 1,2,4") from None
    if not values or min(values) < 1:
        raise InputError(f"{name} is {text!r}; every number must be 1 or more")
    return values


def _show_frontier(
    result: dict[str, Any],
    points: Sequence[Point],
    front: Sequence[Point],
    tariff: Tariff,
    unit: str,
    convention: str,
) -> None:
    from ttc.cli.pictures import terminal
    from ttc.cli.render import stdout
    from ttc.costmodel.frontier import GAIN, axis, pareto

    clean = pareto(points, axis(tariff, unit, convention), gain=GAIN)
    stdout.print(terminal(points, clean, axis(tariff, unit, convention), f"{unit} ({convention})"))
    _table([("", p) for p in clean], tariff)
    where = "; ".join(
        f"{b['model']} to {b['accuracy'][1]:.2f} ({_si(b['cost'][1])})" for b in result["bands"]
    )
    stdout.print(f"Who rules up to which accuracy and cost: {where}.")
    stdout.print(
        f"Model-size threshold: {result['threshold_model']} (by FLOPs: {result['threshold_model_by_flops']})."
    )
    paid = result["flops_only"]
    if paid:
        stdout.print(
            f"Choosing by FLOPs costs {paid['mean_ratio']:.2f}x on average, {paid['worst_ratio']:.2f}x at worst "
            f"(accuracy {paid['at_accuracy']:.2f}: {paid['chosen']} instead of {paid['cheapest']})."
        )
    for name, grown in result["exponents"].items():
        words = [
            "{} x{:.2f} [{:.2f}, {:.2f}]".format(g["resource"], g["per_doubling"], *g["per_doubling_ci95"])
            for g in grown
        ]
        if words:
            stdout.print(f"When the cost doubles, {name}: {', '.join(words)}.")
    for row in result["kv_budgets"]:
        change = f"{100 * row['accuracy_change']:+.1f} points"
        stdout.print(f"KV {row['kv_budget']} on {row['model']}: {row['cheaper']:.2f}x cheaper, {change}.")
    for row in result.get("allocation", []):
        stdout.print(
            f"{row['grid']}, limit {_si(row['limit'])}eFLOPs: {row['procedure']}: {row['accuracy']:.3f}"
        )


def _allocations(
    pools: Sequence[Pool], tariff: Tariff, limits: Sequence[float], task: str | None
) -> list[dict[str, Any]]:
    from ttc.costmodel.allocation import PROCEDURES, best_of_n, long_cot, table
    from ttc.costmodel.points import pool_points

    rows = []
    for pool in (p for p in pools if task is None or p.task in (None, task)):
        shape = shape_of(str(pool.model))
        trials = best_of_n(pool_points(pool, shape, tariff, rule="coverage"))
        chains = long_cot(pool_points(pool, shape, tariff, samples=(1,)))
        grids = {"Algorithm 1 (Best-of-N, coverage)": trials, "Algorithm 2 (long CoT)": chains}
        for name, grid in grids.items():
            filled = table(grid, tariff)
            for limit in limits:
                for procedure in PROCEDURES:
                    found = procedure(filled, limit)
                    rows.append(
                        {
                            "pool": pool.name,
                            "grid": name,
                            "limit": limit,
                            "procedure": found.procedure,
                            "accuracy": found.accuracy,
                            "eflops_kinetics": found.cost,
                        }
                    )
    return rows


def _table(rows: Sequence[tuple[str, Point]], tariff: Tariff) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "configuration", "accuracy", "tokens", "eFLOPs", "by Kinetics"):
        table.add_column(
            heading, justify="left" if heading in ("", "configuration") else "right", no_wrap=True
        )
    for name, point in rows:
        shown = point.to_json(tariff)
        accuracy = "?" if point.accuracy is None else f"{point.accuracy.mean:.1%}"
        if shown["accuracy_ci95"]:
            accuracy += " [{:.0%}, {:.0%}]".format(*shown["accuracy_ci95"])
        numbers = (_si(shown[k]) for k in ("tokens", "eflops", "eflops_kinetics"))
        table.add_row(name, point.label(), accuracy, *numbers)
    stdout.print(table, width=max(stdout.width, 120), crop=False)


def _tariff(
    hardware: str,
    intensity: float | None,
    prompt_tokens: float,
    batch: float,
    kv_method: str | None,
    kv_block: int | None,
    profile: Path | None,
    usd_per_hour: float | None,
) -> Tariff:
    from ttc.costmodel import KINETICS_INTENSITY, Hardware
    from ttc.costmodel.points import Tariff
    from ttc.costmodel.profile import Profile

    return Tariff(
        hardware=Hardware.named(hardware),
        intensity=KINETICS_INTENSITY if intensity is None else _positive("--intensity", intensity),
        prompt_tokens=prompt_tokens,
        batch=_positive("--batch", batch),
        kv_method=kv_method,
        kv_block=kv_block,
        profile=Profile.load(profile) if profile else None,
        usd_per_hour=None if usd_per_hour is None else _positive("--usd-per-hour", usd_per_hour),
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    pools: list[Pool]
    sources: list[Pool | Curve]
    points: list[Point]


def _load(
    data: Sequence[Path], models: Sequence[str], tariff: Tariff, task: str | None, rule: str
) -> _Loaded:
    """The sources and their points; names the one task that they must share."""
    from ttc.costmodel.points import all_points
    from ttc.costmodel.pools import read_all

    pools, curves = read_all(data)
    nameless = [p for p in pools if p.model is None]
    if nameless and len(models) != 1:
        raise InputError(f"{nameless[0].name}: which model made it is not said; give one --model")
    pools = [replace(p, model=models[0]) if p.model is None else p for p in pools]
    sources: list[Pool | Curve] = [*pools, *curves]
    tasks = sorted({x.task for x in sources if x.task})
    if task is not None and tasks and task not in tasks:
        raise InputError(f"--task {task!r} is in none of the files; they hold {', '.join(tasks)}")
    if task is None and len(tasks) > 1:
        raise InputError(
            f"the files hold several tasks, which can't be mixed; add --task {' or '.join(tasks)}"
        )
    shapes = {m: shape_of(m) for m in {str(x.model) for x in sources}}
    return _Loaded(pools, sources, all_points(pools, curves, tariff, shapes=shapes, task=task, rule=rule))


def shape_of(model: str) -> ModelShape:
    """A shape from a registry name, a nano name, a folder or config.json, or a hub id in the local cache."""
    from ttc.costmodel import ModelShape

    if Path(model).exists():
        return ModelShape.load(model)
    from ttc import nano

    folder = nano.resolve(model)
    if folder is not None:
        return ModelShape.load(folder)
    return ModelShape.named(model)


def _least(shape: ModelShape, unit: str, tariff: Tariff, convention: str) -> float:
    return float(tariff.price(shape, 250, 1, None).amount(unit, tariff, convention))


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} is {value:g}; give a positive number")
    return value


def _si(value: float) -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g} "


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
