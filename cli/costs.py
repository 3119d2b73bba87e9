"""``ttc cost``, ``ttc plan``, ``ttc frontier``, ``ttc calibrate``: words and tables around
``ttc.costmodel``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttc.cli.calibration import calibrate
from ttc.cli.options import (
    AsJson,
    Batch,
    Convention,
    HardwareName,
    Intensity,
    KvBlock,
    KvBudget,
    KvMethod,
    Models,
    OneModel,
    Plot,
    ProfileFile,
    PromptTokens,
    Rule,
    Task,
    UsdPerHour,
    finite,
    positive,
    shape_of,
    si,
)
from ttc.errors import BudgetTooSmall, InputError

__all__ = ["calibrate", "cost", "frontier", "plan"]

if TYPE_CHECKING:
    from ttc.costmodel import ModelShape
    from ttc.costmodel.points import Point, Tariff
    from ttc.costmodel.records import Curve, Pool, Replayed


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
    deepen_from: Annotated[
        float | None,
        typer.Option(help="Iterative deepening: tokens before the first trigger of a chain."),
    ] = None,
    deepen_growth: Annotated[
        float, typer.Option(help="Iterative deepening: how much the budget grows to the next trigger.")
    ] = 2.0,
    trigger_tokens: Annotated[
        int, typer.Option(min=0, help="Iterative deepening: tokens of a trigger.")
    ] = 16,
    intensity: Intensity = None,
    hardware: HardwareName = "kinetics-b200",
    profile: ProfileFile = None,
    usd_per_hour: UsdPerHour = None,
    as_json: AsJson = False,
) -> None:
    """What chains of a model cost: FLOPs, bytes, eFLOPs (both conventions), seconds."""
    from ttc.costmodel import KINETICS_INTENSITY, Hardware, full, kinetics
    from ttc.costmodel.lengths import deepening_triggers

    shape = shape_of(model)
    if kv_bytes is not None:
        if not 0 < kv_bytes <= 8:
            raise InputError(f"--kv-bytes is {kv_bytes}; give bytes of an element, e.g. 2 or 1")
        shape = shape.with_kv_bytes(kv_bytes)
    for name, value in (("--kv-block", kv_block), ("--kv-method", kv_method)):
        if value is not None and kv_budget is None:
            raise InputError(f"{name} {value}: needs a budget; add --kv-budget TOKENS")
    if cached_prompt_tokens > prompt_tokens >= 0:
        raise InputError(
            f"--cached-prompt-tokens {cached_prompt_tokens:g} exceeds --prompt-tokens {prompt_tokens:g}"
        )
    if samples < 1:
        raise InputError(f"--samples {samples}: give 1 chain or more")
    triggers = 0
    if deepen_from is not None:
        triggers = deepening_triggers(generated_tokens, deepen_from, deepen_growth)
    card, factor = (
        Hardware.named(hardware),
        KINETICS_INTENSITY if intensity is None else positive("--intensity", intensity),
    )
    chains: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens + triggers * trigger_tokens,
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
        seconds = fitted.chain_s(
            shape, **chains, **sparse, batch=batch or samples, cached_prompt_tokens=cached_prompt_tokens
        )
        basis = fitted.basis(shape.name)
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
        "triggers": triggers,
        "generated_tokens": chains["generated_tokens"],
    }
    if usd_per_hour is not None:
        result["full"]["usd"] = seconds * positive("--usd-per-hour", usd_per_hour) / 3600
    if as_json:
        print(json.dumps(result))
        return
    _show_cost(result)


def _show_cost(result: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import show, stdout

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "FLOPs", "bytes", "eFLOPs", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("kinetics", "full"):
        row = result[name]
        seconds = f"{row['seconds']:.4g}" if "seconds" in row else ""
        table.add_row(name, *(si(row[k]) for k in ("flops", "bytes", "eflops")), seconds)
    show(table)
    m = result["model"]
    stdout.print(
        f"{m['name']}: {_count(m['params'])} parameters ({_count(m['active_params'])} active), "
        f"{m['kv_bytes_per_token'] / 1024:.4g} KiB of KV a token; {result['intensity']:g} FLOP/byte; "
        f"seconds: {result['full']['seconds_basis']}."
    )
    if result["triggers"]:
        words = f"{result['triggers']} triggers in a chain make it {result['generated_tokens']:g} tokens"
        stdout.print(f"Iterative deepening: {words}; nothing is prefilled again.")


def _count(parameters: float) -> str:
    """A model's size in the letters of its name: 8.2 B, 820 k."""
    return si(parameters).replace("G", "B")


def plan(
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Per problem: '40 TeFLOPs', '20k tokens', '30 s', '$0.05'.")
    ],
    model: Models = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="Measured accuracy: pools, curves, traces, run folders, output of ttc simulate --json; repeat.",
        ),
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
    """Which model, how many samples, how long, how sparse: what a budget buys best, by measured accuracy."""
    from ttc.budget import Budget, format_amount
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
        words = f"the least is {format_amount(least[name], limit.unit)} ({name})"
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

        draw(
            points, made.frontier, tariff, plot, unit=limit.unit, convention=convention, budget=limit.amount,
            title=_tasks(points),
        )  # fmt: skip
    if as_json:
        print(json.dumps(made.to_json(tariff)))
        return
    from ttc.cli.render import stdout

    stdout.print(f"[bold]{made.chosen.label()}[/bold]  ({limit})")
    stdout.print(made.why)
    if made.flops_only is not None:
        other, ratio = made.flops_only.point.label(), made.flops_only.ratio
        told = (
            f"you would have taken {other}: {ratio:.2f}x the price"
            if ratio > 1.005
            else "you would have taken the same"
        )
        stdout.print(f"By FLOPs alone {told}.")
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
    """Accuracy against cost of every configuration: Pareto set, model-size threshold, exponents."""
    from ttc.costmodel.frontier import axis, pareto, report

    for limit in allocate or ():
        positive("--allocate", limit)
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

        draw(points, front, tariff, plot, unit=unit, convention=convention, title=_tasks(points))
    if as_json:
        print(json.dumps(finite(result)))
        return
    _show_frontier(result, points, front, tariff, unit, convention)


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
    stdout.print(f"Who rules up to which accuracy and cost in {unit}:")
    for band in result["bands"]:
        stdout.print(f"  {band['model']} to {band['accuracy'][1]:.2f} ({si(band['cost'][1]).strip()})")
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
            f"{g['resource']} x{g['per_doubling']:.2f}"
            + (" [{:.2f}, {:.2f}]".format(*g["per_doubling_ci95"]) if g["per_doubling_ci95"] else "")
            for g in grown
        ]
        if words:
            stdout.print(f"When the cost doubles, {name}: {', '.join(words)}.")
    for row in result["kv_budgets"]:
        change = f"{100 * row['accuracy_change']:+.1f} points"
        stdout.print(f"KV {row['kv_budget']} on {row['model']}: {row['cheaper']:.2f}x cheaper, {change}.")
    for row in result.get("allocation", []):
        stdout.print(
            f"{row['grid']}, limit {si(row['limit'])}eFLOPs: {row['procedure']}: {row['accuracy']:.3f}"
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


def _tasks(points: Sequence[Point]) -> str:
    return ", ".join(sorted({p.task for p in points if p.task}))


def _table(rows: Sequence[tuple[str, Point]], tariff: Tariff) -> None:
    from rich.table import Table

    from ttc.cli.render import show

    table = Table(box=None, padding=(0, 2, 0, 0))
    named = any(name for name, _ in rows)
    for heading in ("",) * named + ("configuration", "accuracy", "tokens", "eFLOPs", "by Kinetics"):
        left = heading in ("", "configuration")
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=heading != "configuration"
        )  # on a narrow terminal labels wrap, figures don't
    for name, point in rows:
        shown = point.to_json(tariff)
        accuracy = "?" if point.accuracy is None else f"{point.accuracy.mean:.1%}"
        if shown["accuracy_ci95"]:
            accuracy += " [{:.0f}, {:.0f}]".format(*(100 * end for end in shown["accuracy_ci95"]))
        numbers = (si(shown[k]) for k in ("tokens", "eflops", "eflops_kinetics"))
        table.add_row(*([name] if named else []), point.label(), accuracy, *numbers)
    show(table)


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
        intensity=KINETICS_INTENSITY if intensity is None else positive("--intensity", intensity),
        prompt_tokens=prompt_tokens,
        batch=positive("--batch", batch),
        kv_method=kv_method,
        kv_block=kv_block,
        profile=Profile.load(profile) if profile else None,
        usd_per_hour=None if usd_per_hour is None else positive("--usd-per-hour", usd_per_hour),
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    pools: list[Pool]
    sources: list[Pool | Curve | Replayed]
    points: list[Point]


def _load(
    data: Sequence[Path], models: Sequence[str], tariff: Tariff, task: str | None, rule: str
) -> _Loaded:
    """The sources and their points; names the one task that they must share."""
    from ttc.costmodel.points import all_points
    from ttc.costmodel.pools import read_all

    pools, curves = read_all(data)
    nameless = [str(getattr(x, "name", getattr(x, "source", ""))) for x in (*pools, *curves) if not x.model]
    if nameless and len(models) != 1:
        raise InputError(f"{nameless[0]}: which model made it is not said; give one --model")
    pools = [replace(p, model=models[0]) if p.model is None else p for p in pools]
    curves = [replace(c, model=models[0]) if not c.model else c for c in curves]
    sources: list[Pool | Curve | Replayed] = [*pools, *curves]
    tasks = sorted({x.task for x in sources if x.task})
    if task is not None and tasks and task not in tasks:
        raise InputError(f"--task {task!r} is in none of the files; they hold {', '.join(tasks)}")
    if task is None and len(tasks) > 1:
        raise InputError(
            f"the files hold several tasks, which can't be mixed; add --task {' or '.join(tasks)}"
        )
    shapes = {m: shape_of(m) for m in {str(x.model) for x in sources}}
    return _Loaded(pools, sources, all_points(pools, curves, tariff, shapes=shapes, task=task, rule=rule))


def _least(shape: ModelShape, unit: str, tariff: Tariff, convention: str) -> float:
    return float(tariff.price(shape, 250, 1, None).amount(unit, tariff, convention))
