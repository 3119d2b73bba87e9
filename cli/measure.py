"""``ttc bench``: measurements, each side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttc.cli.options import EngineArgs
from ttc.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    help="Measure ttc against bare engines and peers, side by side in one run.",
    add_completion=False,
)


@app.command("overhead")
def overhead(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A nano name, a folder or a hub id.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Samples for each.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=1, help="Repetitions of the arms that are held to each other.")
    ] = 12,
    http: Annotated[
        bool,
        typer.Option(
            "--http/--no-http", help="Through vLLM's server instead: over a plain client and its_hub."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens a second of self-consistency through ttc over those of bare vLLM, for the same prompts and lengths."""
    from ttc.bench.overhead import main

    main(model=model, problems=problems, samples=samples, rounds=rounds, http=http, as_json=as_json)


@app.command("steering")
def steering(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A nano name, a folder or a hub id.")
    ] = "nano-s",
    branches: Annotated[int, typer.Option(min=1, help="Branches at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each.")] = 512,
    triggers: Annotated[int, typer.Option(min=1, help="Triggers in each.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are reported.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What steering inside the engine costs: against stop-and-resubmit and against no steering, tokens a second and prefill."""
    from ttc.bench.steering import main

    main(model=model, branches=branches, tokens=tokens, triggers=triggers, rounds=rounds, as_json=as_json)


@app.command("cost")
def cost(
    points: Annotated[
        int, typer.Option(min=1000, help="Points of (model, N, length, KV budget), both conventions.")
    ] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """How long the cost model takes to price a grid, as a planner does, and one call."""
    import json
    import statistics

    from ttc.costmodel.grid import time_grid

    timed = time_grid(points, rounds=rounds)
    if as_json:
        print(json.dumps(timed))
        return
    seconds = timed["seconds"]
    span = f"{min(seconds):.3f} to {max(seconds):.3f}, {rounds} rounds"
    print(
        f"{timed['points']:,} points in {statistics.median(seconds):.3f} s ({span}); "
        f"one call {1e6 * timed['seconds_per_call']:.1f} µs"
    )


@app.command("decode")
def decode(
    contexts: Annotated[
        str, typer.Option(help="Tokens of context, as '4096,16384,32768'.")
    ] = "4096,16384,32768",
    batches: Annotated[str, typer.Option(help="Sequences at once, as '1,8,32'.")] = "1,8,32",
    budgets: Annotated[str, typer.Option(help="KV tokens read per decoded token.")] = "256,512,1024,2048",
    method: Annotated[
        str, typer.Option(help="block-topk, quest, streaming, power or oracle-topk.")
    ] = "block-topk",
    page: Annotated[int, typer.Option(help="Tokens of a KV page.")] = 64,
    layers: Annotated[int | None, typer.Option(help="Layers of the model (as many as memory holds).")] = None,
    memory: Annotated[float, typer.Option(help="GiB for the KV cache.")] = 5.0,
    steps: Annotated[int, typer.Option(min=3, help="Steps of each arm; medians are reported.")] = 9,
    share_layers: Annotated[int, typer.Option(min=1, help="Neighbouring layers that share a choice.")] = 1,
    share_steps: Annotated[int, typer.Option(min=1, help="Steps that a choice lasts.")] = 1,
    model: Annotated[str, typer.Option("--model", "-m", help="A Qwen3 of the registry.")] = "Qwen3-0.6B",
    engine_arg: EngineArgs = None,
    stock: Annotated[
        bool, typer.Option(help="vLLM without the plugin, dense alone: what staying dense costs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Sparse against dense decoding, step by step over the same KV, on a published model's shape with random weights."""
    from ttc.bench.decode import main
    from ttc.engine.vllm_args import read_engine_args

    main(
        contexts=_numbers("contexts", contexts), batches=_numbers("batches", batches),
        budgets=[] if stock else _numbers("budgets", budgets), method=method, page=page, layers=layers, memory_gib=memory,
        steps=steps, share_layers=share_layers,
        share_steps=share_steps, as_json=as_json, model=model, engine_args=read_engine_args(engine_arg or []),
    )  # fmt: skip


@app.command("fidelity")
def fidelity(
    model: Annotated[str, typer.Option("--model", "-m", help="An embedded reasoner.")] = "nano-s",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Tasks (the model's first if not given).")
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Problems of each task.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 8,
    budgets: Annotated[str, typer.Option(help="KV tokens read per decoded token.")] = "64,96,128,192",
    methods: Annotated[str, typer.Option(help="Methods.")] = "block-topk,quest,streaming,power,oracle-topk",
    caps: Annotated[str | None, typer.Option(help="Also with thoughts capped at these lengths.")] = None,
    thinking: Annotated[int, typer.Option(min=1, help="Thoughts are closed at this length.")] = 1024,
    page: Annotated[int, typer.Option(help="Tokens of a KV page.")] = 32,
    seed: Annotated[int, typer.Option(help="Of problems and samples.")] = 0,
    extras: Annotated[bool, typer.Option(help="Shared choices, a dense layer, calibrated budgets.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Rows as they end; one of the same study is gone on with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Accuracy against KV budget for every method, and dense against sparse at equal cost, on an embedded reasoner."""
    from ttc.bench.fidelity import main

    main(
        model=model, tasks=task or [], problems=problems, samples=samples, budgets=_numbers("budgets", budgets),
        methods=methods.split(","), caps=_numbers("caps", caps) if caps else [], thinking=thinking, page=page,
        seed=seed, extras=extras, out=out, as_json=as_json,
    )  # fmt: skip


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"{name}: {text!r} is no list of positive whole numbers; write them as '256,1024'")
    return found


@app.command("study")
def study(
    part: Annotated[str, typer.Argument(help="deepening, forcing, anytime or search.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="An embedded reasoner, a folder or a hub id.")
    ] = "nano-s",
    problems: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Run seeds.")] = 3,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Of each problem (deepening).")
    ] = "256 tokens",
    thinking: Annotated[int, typer.Option(min=1, help="The longest thought, in tokens.")] = 256,
    reward: Annotated[
        str, typer.Option(help="The process reward model (search): a name or a folder.")
    ] = "nano-s-process",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Tasks, easy to hard (sums, if not given).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File of what is done; the same command goes on from there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What steering and search buy on an embedded reasoner, at equal token budgets: the tables of docs/steering.md."""
    from ttc.bench.study import main

    main(
        part=part, model=model, problems=problems, seeds=seeds, budget=budget, thinking=thinking, reward=reward,
        tasks=task or (), as_json=as_json, out=out,
    )  # fmt: skip


@app.command("policies")
def policies(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A nano name, a folder or a hub id.")
    ] = "nano-s",
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="The model's first task if not given.")
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Problems.")] = 100,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Rules, the first is what others are compared with."),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Of each problem.")] = "100k tokens",
    seed: Annotated[int, typer.Option(help="Of problems and samples.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="So many seeds from --seed on, each with its own problems.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Stopping rules live on one engine: accuracy, tokens, eFLOPs, time, the replay of their own ledgers, the cost of deciding."""
    from ttc.bench.policies import POLICIES, main

    main(
        model=model,
        task=task,
        problems=problems,
        policies=policy or POLICIES,
        budget=budget,
        seed=seed,
        seeds=seeds,
        as_json=as_json,
    )
