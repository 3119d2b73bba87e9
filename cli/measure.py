"""``ttc bench``: measurements, each side by side in one run."""

from __future__ import annotations

from typing import Annotated

import typer

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
    problems: Annotated[int, typer.Option(help="Problems.")] = 40,
    samples: Annotated[int, typer.Option(help="Samples for each.")] = 16,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 3,
    http: Annotated[
        bool, typer.Option("--http/--no-http", help="Also through vLLM's server: plain client and its_hub.")
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
