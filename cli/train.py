"""``ttc train``: the reasoners and reward models that ttc ships, made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train what ttc ships.", add_completion=False)


@app.command("reasoner")
def reasoner(
    size: Annotated[str, typer.Option(help="xs, s, m or l (rl/sizes/).")] = "s",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Checkpoint, curve and model; resumed if it is there. Default: runs/reasoner-SIZE-SEED.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Targets to train on (default: the size's file).")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="End after so long, the schedule squeezed to fit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the data and the initial weights.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Ignore a checkpoint in --out.")] = False,
    start: Annotated[
        str | None,
        typer.Option("--from", help="A model (name or folder) whose schedule is continued from its weights."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")
    ] = None,
    ship: Annotated[
        bool, typer.Option("--ship", help="Put the model into the package as nano-SIZE.")
    ] = False,
) -> None:
    """Train an embedded reasoner from nothing."""
    from ttc.rl import reasoner

    folder = reasoner.train(
        size,
        out,
        minutes=minutes,
        tokens=tokens,
        seed=seed,
        restart=restart,
        start=start,
        device=device,
        ship=ship,
    )
    print(folder)


@app.command("reward")
def reward(
    base: Annotated[
        str, typer.Option(help="The reasoner whose weights and shape they start from.")
    ] = "nano-s",
    reasoners: Annotated[
        list[str] | None,
        typer.Option("--reasoner", help="Whose samples they learn from (repeatable; default: the base)."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Samples and models go here.")] = Path(
        "runs/reward"
    ),
    n: Annotated[int, typer.Option(help="Training problems for each reasoner.", min=1)] = 1500,
    samples: Annotated[int, typer.Option(help="Chains a problem.", min=2)] = 8,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    evaluate: Annotated[
        int, typer.Option(help="Held-out problems a task to measure on (0: none).", min=0)
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of problems, samples and training.")] = 0,
    ship: Annotated[bool, typer.Option("--ship", help="Put the models into the package.")] = False,
) -> None:
    """Train an outcome and a process reward model on a reasoner's own samples."""
    from ttc.rl import train_reward

    folders = train_reward.train(
        base,
        reasoners or (),
        out=out,
        n=n,
        samples=samples,
        epochs=epochs,
        evaluate=evaluate,
        seed=seed,
        ship=ship,
    )
    for folder in folders:
        print(folder)
