"""``ttc calibrate``: measures the running engine's steps and keeps a profile (``ttc.costmodel.calibrate``
fits it)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ttc.cli.options import AsJson, EngineArgs, KvBlock, KvMethod, finite, shape_of
from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel import ModelShape


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
        str, typer.Option(help="KV budgets to measure too (needs the sparse plugin); --kv-block is the page.")
    ] = "",
    kv_block: KvBlock = None,
    kv_method: KvMethod = None,
    statistic: Annotated[
        str,
        typer.Option(help="What stands for repeats: median, or quiet (10th percentile) on a shared machine."),
    ] = "median",
    rounds: Annotated[int, typer.Option(help="Visits to every point, in a new order each time.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Steps timed at a visit.")] = 9,
    time_limit: Annotated[
        float,
        typer.Option(help="Seconds of measuring (not of start-up) after which no point is visited again."),
    ] = math.inf,
    engine_arg: EngineArgs = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the profile to this JSON file.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Measure the engine's step times, fit a few physical terms, and print the error on points held out."""
    import sys
    import tempfile

    from ttc.costmodel.calibrate import Statistic, design, fit, measure
    from ttc.costmodel.profile import RANDOM

    if statistic not in ("median", "quiet"):
        raise InputError(f"--statistic {statistic}: use median or quiet")
    if engine != "vllm":
        raise InputError(
            f"--engine {engine}: only vllm can be calibrated; a remote engine's steps cannot be timed"
        )
    if not time_limit > 0:
        raise InputError(f"--time-limit {time_limit:g}: give seconds above 0, or leave it out")
    lengths, sizes = _whole("--contexts", contexts), _whole("--batches", batches)
    budgets: list[int] = []
    if kv_budgets:
        budgets, kv_block, kv_method = _sparse(kv_budgets, kv_block, kv_method)
    cells = design(
        batches=sizes,
        contexts=lengths,
        kv_budgets=budgets,
        prefills=_whole("--prefills", prefills),
    )
    room = max(*lengths, *_whole("--prefills", prefills)) + repeats + 16
    from ttc.engine.vllm_args import in_words, read_engine_args

    told = read_engine_args(engine_arg or [])
    if out is not None:
        _check_writable(out)  # before minutes of measuring
    from ttc.attention.settings import DEFAULT_METHOD
    from ttc.engine.model import hollow_model
    from ttc.engine.stepper import ENGINE_ARGS, VLLMStepper
    from ttc.engine.vllm import VLLMEngine

    with tempfile.TemporaryDirectory() as scratch:
        target, extra = model, {}
        if random_weights:
            target, extra = str(hollow_model(model, Path(scratch), room)), {"load_format": "dummy"}
        extra = {**ENGINE_ARGS, **extra, **told}
        running = VLLMEngine(
            target, concurrency=max(sizes), context=room, engine_args=extra,
            kv_page=kv_block if budgets else None, kv_when="always" if budgets else None,
        )  # fmt: skip
        try:
            if budgets and running.info.kv_page is None:
                raise InputError(f"--kv-budgets: {running.info.kv_reason}; leave them out")
            stepper = VLLMStepper(running, repeats=repeats, kv_method=kv_method or DEFAULT_METHOD)
            shape = shape_of(model) if random_weights else running.info.shape
            if shape is None:
                raise InputError(f"--model {model}: its shape is not known; it needs a config.json")
            watched = not quiet and sys.stderr.isatty()

            def say(line: str) -> None:
                if watched:
                    print(f"\r{line:<79}", end="", file=sys.stderr)

            left_out = [c for c in cells if not stepper.fits(c.batch, c.context)]
            cells = [c for c in cells if c not in left_out]
            rows = measure(stepper, cells, say, rounds=rounds, limit_s=time_limit)
            counted = [
                (c, stepper.counters(c.batch, c.context, c.phase)) for c in cells if c.kv_budget is None
            ]
        finally:
            running.close()
    if watched:
        print(file=sys.stderr)
    if left_out and not quiet:
        print(
            f"{len(left_out)} points left out: the KV cache holds {stepper.capacity:,.0f} tokens",
            file=sys.stderr,
        )
    facts: dict[str, Any] = {"machine": _machine(), "versions": _versions(running.info.identity)}
    if told:
        facts["machine"]["engine_args"] = in_words(told)
    facts |= {"kv_block": kv_block, "kv_method": kv_method}
    kinds: tuple[Statistic, ...] = get_args(Statistic)
    both = {kind: fit(shape, rows, statistic=kind, **facts) for kind in kinds}
    profile = next(p for kind, p in both.items() if kind == statistic)
    profile = replace(profile, model=shape.name + RANDOM if random_weights else running.info.model)
    if out is not None:
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
        print(json.dumps(finite(summary)))
        return
    from ttc.cli.render import stdout

    stdout.print(f"{profile.model}: noise of repeats {profile.noise:.0%}", soft_wrap=True)
    for kind, fitted in both.items():
        kept = " (kept)" if kind == statistic else ""
        stdout.print(f"  fit of the {kind}: {fitted.held_out.words()}{kept}", soft_wrap=True)
    for name, value in terms.items():
        if name == "kernel":
            value = ", ".join(f"{factor:.2f} at {batch:g}" for batch, factor in value)
            stdout.print(f"  {name:26} {value}", soft_wrap=True)
        else:
            stdout.print(f"  {name:26} {value:.3g}")
    for row in compared:
        moved = (
            f"{row['bytes_ratio']:.3f}x ({row['bytes_ratio_without_activations']:.3f}x without activations)"
        )
        stdout.print(
            f"  vLLM's counters, {row['phase']}: FLOPs {row['flops_ratio']:.3f}x ours, bytes {moved}",
            soft_wrap=True,
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
    told = {
        "cpu": name,
        "cores": str(os.cpu_count()),
        "omp_threads": threads,
        "python": platform.python_version(),
    }
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        told["accelerator"] = str(current_platform.get_device_name())
    return told


def _versions(identity: Mapping[str, str]) -> dict[str, str]:
    """Of what the steps were made by, with the number type of the weights."""
    import torch

    return {"vllm": identity["vllm"], "torch": str(torch.__version__), "dtype": identity["dtype"]}


def _sparse(text: str, page: int | None, method: str | None) -> tuple[list[int], int, str]:
    """KV budgets, page and method as the plugin has them. Raises InputError for what it would refuse."""
    from ttc.attention.settings import DEFAULT_METHOD, KvSetting

    budgets, page, method = _whole("--kv-budgets", text), page or 64, method or DEFAULT_METHOD
    for budget in budgets:
        KvSetting(budget, method).check_page(page)
    return budgets, page, method


def _check_writable(out: Path) -> None:
    import os

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: can't be written ({error.strerror}); give another file") from None
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"--out {out}: can't be written (a folder, or no permission); give another file")


def _whole(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{name} is {text!r}; write whole numbers with commas, e.g. 1,2,4") from None
    if not values or min(values) < 1:
        raise InputError(f"{name} is {text!r}; every number must be 1 or more")
    return values
