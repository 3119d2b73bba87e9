"""``ttc simulate``: replay a policy against recorded branches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def simulate(
    pool: Annotated[Path, typer.Option("--pool", help="A run directory of ttc, a pool of probed branches, or a Kinetics trace.")],
    policy: Annotated[str, typer.Option("--policy", "-p", help="As in 'ttc solve', such as 'adaptive?price=0.004'.")] = "adaptive",
    budget: Annotated[str | None, typer.Option("--budget", "-b", help="'20k tokens'; without limit if not given.")] = None,
    budget_scope: Annotated[str, typer.Option("--budget-scope", help="'problem', or 'run': all problems share it.")] = "problem",
    shuffles: Annotated[int, typer.Option(help="How often, each with the branches in another order.")] = 100,
    max_branches: Annotated[int, typer.Option("--max-branches", help="Branches of a problem that may be drawn.")] = 64,
    free_probes: Annotated[bool, typer.Option("--free-probes", help="The published accounting: anytime answers are free.")] = False,
    abstain: Annotated[
        bool, typer.Option("--abstain", help="A branch without an answer does not vote (published replays count it as one).")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the first shuffle.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:  # fmt: skip
    """Replay a policy against recorded branches: accuracy and cost, without a model.

    The policy and the driver are those of a live run; branches are cut, cancelled and probed as recorded, and every token counts.
    """
    from ttc.simulate import simulate as run

    found = run(
        pool, policy, budget=budget, scope=budget_scope, shuffles=shuffles, max_branches=max_branches,
        free_probes=free_probes, abstain=abstain, seed=seed,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    (low, high), noise = found["accuracy_ci95"], found["accuracy_shuffle_se"]
    stopped = ", ".join(f"{name} {count}" for name, count in sorted(found["stopped"].items()))
    print(f"{policy} on {pool.name}: {found['problems']} problems, {found['shuffles']} shuffles")
    print(
        f"  accuracy    {found['accuracy']:.1%}  ({low:.1%} to {high:.1%} over problems; ±{noise:.2%} of shuffling)"
    )
    print(
        f"  tokens      {found['tokens_per_problem']:,.0f} a problem, {found['probe_tokens_per_problem']:,.0f} of them for probes"
    )
    print(f"  sequential  {found['sequential_tokens_per_problem']:,.0f} tokens, the longest dependent chain")
    print(
        f"  samples     {found['samples_per_problem']:.2f} a problem; overrun {found['overrun']:g}; stopped: {stopped}"
    )
    for problem, why in found["errors"].items():
        typer.echo(f"ttc: {problem} failed: {why}", err=True)
