"""Options and small helpers that the cost commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel import ModelShape

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
    typer.Option(
        help="FLOP per byte of an eFLOP; default 562.5, the paper's; the same card in BF16 has 281.25."
    ),
]
KvBudget = Annotated[
    int | None, typer.Option(help="KV tokens that each decoded token attends to; default all.")
]
KvBlock = Annotated[int | None, typer.Option(help="Page size in tokens of a method that searches pages.")]
KvMethod = Annotated[
    str | None,
    typer.Option(help="block-topk, quest, streaming, power, oracle-topk; bounds: token-topk, token-window."),
]
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

EngineArgs = Annotated[
    list[str] | None,
    typer.Option("--engine-arg", help="An argument of vLLM's engine as NAME=VALUE; repeat for more."),
]


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


def positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} is {value:g}; give a positive number")
    return value


def si(value: float) -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g} "


def finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
