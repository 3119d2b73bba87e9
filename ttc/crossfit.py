"""No tuning on the test: ``python -m ttc.simulate fit POOL POOL`` fits ``adaptive`` on each pool and reports it on the other.

Fitted on the training pool: the prior's three numbers (maximum likelihood) and the price (the highest whose accuracy there is
within half a point of the best price's). Everything else is the shipped default. The same is done with a fifth of all pools'
problems held out at a time: what is fitted on the other four fifths is reported on it. Beside it: the shipped defaults, the
published baselines, the frontier over prices, and the frontier of an oracle that knows for each problem, though not for each draw,
which price is best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttc.costmodel import intervals
from ttc.costmodel.intervals import Estimate
from ttc.costmodel.records import Pool
from ttc.jobs import Policy
from ttc.policies import Adaptive, describe, parse
from ttc.policies.posterior import fit
from ttc.simulate import Replay, load, replay
from ttc.sweep import budgets, draw, gap

PRICES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1, 0.15)
WIDTHS = (1, 2, 4, 8)
FOLDS = 5
BASELINES = (
    "self-consistency?n=64", "adaptive-consistency", "adaptive-consistency?rule=dirichlet", "early-stopping", "parallel-probe",
)  # fmt: skip
OURS = (
    "adaptive",
    "adaptive?price=0.02",
    "adaptive?width=3",
    "adaptive?width=16",
    "adaptive?width=24&price=0&early=1",
)
SLACK = 0.005
"""The accuracy that a fitted price may give up against the best one."""


class Row(NamedTuple):
    """A line of the table: accuracy with its interval over problems and its standard error over shuffles."""

    pool: str
    policy: str
    accuracy: float
    low: float
    high: float
    shuffle_se: float
    against_sc: Estimate | None
    tokens: float
    sequential: float
    probes: float
    samples: float


def row(pool: str, name: str, run: Replay, reference: Replay) -> Row:
    """``against_sc``: the difference to ``reference``, paired by problem, with its 95 % interval; None for itself."""
    own = run.right.mean(axis=0)
    about, paired = intervals.mean(own), None
    if run is not reference:
        paired = intervals.paired(own - reference.right.mean(axis=0))
    return Row(
        pool, name, about.mean, about.low, about.high, float(run.right.mean(axis=1).std() / len(run.right) ** 0.5), paired,
        float(run.tokens.mean()), float(run.chain.mean()), float(run.probes.mean()), float(run.samples.mean()),
    )  # fmt: skip


def fitted(train: Sequence[Pool], shuffles: int) -> Adaptive:
    """``adaptive`` with prior and price learnt on ``train``: the highest price within ``SLACK`` of the best price's accuracy."""
    problems = [(p, _limit(pool)) for pool in train for p in pool.problems]
    level, slope, spread = fit(
        [p.final.tolist() for p, _ in problems], [float(p.tokens.mean()) / limit for p, limit in problems]
    )
    policy = changed(Adaptive(), level=round(level, 2), slope=round(slope, 2), spread=round(spread, 2))
    reached = {
        price: sum(
            float(
                replay(pool, changed(policy, price=price), shuffles=shuffles, seed=10_000)
                .right.mean(axis=0)
                .sum()
            )
            for pool in train
        )
        / len(problems)
        for price in PRICES
    }
    return changed(
        policy, price=max(p for p, accuracy in reached.items() if accuracy >= max(reached.values()) - SLACK)
    )


def _limit(pool: Pool) -> int:
    return pool.thinking_tokens or max(int(p.tokens.max()) for p in pool.problems)


def folds(pools: Sequence[Pool], *, shuffles: int, count: int = FOLDS) -> list[tuple[str, str, Replay]]:
    """For each pool (its name, the prices that the folds chose, the replay put together from held-out problems): every problem is
    replayed with what was fitted on the problems of other folds, of all pools. Problems are dealt to folds in seeded order."""
    limited = [changed(pool, thinking_tokens=_limit(pool)) for pool in pools]
    places = [(i, j) for i, pool in enumerate(pools) for j in range(len(pool.problems))]
    np.random.default_rng(0).shuffle(places)
    arrays = [np.zeros((5, shuffles, len(pool.problems))) for pool in pools]
    prices = []
    for fold in range(count):
        held = {(int(i), int(j)) for i, j in places[fold::count]}
        learnt = fitted([part for part in _without(limited, held) if part.problems], max(shuffles // 3, 1))
        prices.append(learnt.price)
        everything = {(i, j) for i, pool in enumerate(pools) for j in range(len(pool.problems))}
        for i, part in enumerate(_without(limited, everything - held)):
            if part.problems:
                run = replay(part, learnt, shuffles=shuffles)
                own = sorted(j for k, j in held if k == i)
                arrays[i][:, :, own] = [run.right, run.tokens, run.chain, run.probes, run.samples]
    label = ", ".join(f"{price:g}" for price in prices)
    return [
        (pool.name, label, Replay(array[0], array[1], array[2], array[3], array[4], {}, 0.0, {}, 0))
        for pool, array in zip(pools, arrays, strict=True)
    ]


def _without(pools: Sequence[Pool], held: set[tuple[int, int]]) -> list[Pool]:
    return [
        changed(pool, problems=tuple(p for j, p in enumerate(pool.problems) if (i, j) not in held))
        for i, pool in enumerate(pools)
    ]


class Point(NamedTuple):
    tokens: float
    accuracy: float


def oracle(runs: Sequence[Replay]) -> list[Point]:
    """The frontier if each problem had the best of ``runs``' policies for itself: maximises accuracy less a multiple of tokens,
    problem by problem. An upper bound that no policy can know; it is biased upwards by choosing on the same shuffles."""
    right = np.stack([run.right.mean(axis=0) for run in runs])
    tokens = np.stack([run.tokens.mean(axis=0) for run in runs])
    points = set()
    for multiplier in np.exp(np.linspace(np.log(1e-8), np.log(1e-4), 80)):
        best: Any = (right - multiplier * tokens).argmax(axis=0)
        each = np.arange(right.shape[1])
        points.add(Point(float(tokens[best, each].mean()), float(right[best, each].mean())))
    return sorted(points)


def crossfit(paths: Sequence[Path], *, shuffles: int = 100, say: Any = print) -> dict[str, Any]:
    """The whole comparison on each pool, fitted on the one before it in ``paths`` (cyclically)."""
    pools = [load(path) for path in paths]
    rows: list[Row] = []
    frontiers: dict[str, dict[str, list[Point]]] = {}
    references = [replay(pool, parse(BASELINES[0]), shuffles=shuffles) for pool in pools]
    for i, (pool, reference) in enumerate(zip(pools, references, strict=True)):
        name = pool.name

        def add(label: str, run: Replay, name: str = name, reference: Replay = reference) -> Replay:
            rows.append(row(name, label, run, reference))
            say(text(rows[-1]))
            return run

        add(BASELINES[0], reference)
        for baseline in BASELINES[1:]:
            add(baseline, replay(pool, parse(baseline), shuffles=shuffles))
        published = replay(pool, parse("parallel-probe"), shuffles=shuffles, free_probes=True)
        add("parallel-probe (published accounting)", published)
        for text_of in OURS:
            add(text_of, replay(pool, parse(text_of), shuffles=shuffles))
        other = pools[i - 1]
        learnt = fitted([other], shuffles)
        add(f"{_short(learnt)} (fitted on {other.name})", replay(pool, learnt, shuffles=shuffles))
        runs = [replay(pool, Adaptive(price=price), shuffles=shuffles) for price in PRICES]
        wide = [replay(pool, Adaptive(width=width), shuffles=shuffles) for width in WIDTHS]
        frontiers[name] = {
            "adaptive over prices": [_point(run) for run in runs],
            "adaptive over widths, sequential tokens": [
                Point(float(r.chain.mean()), float(r.right.mean())) for r in wide
            ],
            "oracle over prices": oracle([*runs, reference]),
            "self-consistency": _self_consistency(pool, shuffles),
        }
        for label, points in frontiers[name].items():
            say(
                f"{name}: {label}: "
                + "  ".join(
                    f"{100 * p.accuracy:.1f} @ {p.tokens / 1e3:.1f}k"
                    for p in points[:: max(1, len(points) // 14)]
                )
            )
    for (name, prices, run), reference in zip(folds(pools, shuffles=shuffles), references, strict=True):
        rows.append(row(name, f"adaptive, fitted on other fifths (price {prices})", run, reference))
        say(text(rows[-1]))
    return {
        "shuffles": shuffles,
        "rows": [r._asdict() for r in rows],
        "frontiers": {n: {k: [list(p) for p in v] for k, v in f.items()} for n, f in frontiers.items()},
    }


def _point(run: Replay) -> Point:
    return Point(float(run.tokens.mean()), float(run.right.mean()))


def _self_consistency(pool: Pool, shuffles: int) -> list[Point]:
    return [
        _point(replay(pool, parse(f"self-consistency?n={n}"), shuffles=shuffles))
        for n in (1, 2, 3, 4, 5, 8, 12, 16)
    ]


def _short(policy: Policy) -> str:
    """A policy with only the options that are not the defaults."""
    plain = set(describe(Adaptive()).partition("?")[2].split("&"))
    name, _, options = describe(policy).partition("?")
    own = [o for o in options.split("&") if o not in plain]
    return f"{name}?{'&'.join(own)}" if own else name


def text(r: Row) -> str:
    against = "" if r.against_sc is None else gap(r.against_sc)
    return (
        f"| {r.pool} | {r.policy} | {100 * r.accuracy:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f}) ±{100 * r.shuffle_se:.2f} | "
        f"{against} | {r.tokens / 1e3:.1f}k | {r.sequential / 1e3:.1f}k | "
        f"{r.probes:.0f} | {r.samples:.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ttc.simulate", description=__doc__)
    parser.add_argument("command", choices=["fit", "budgets"])
    parser.add_argument(
        "pools",
        nargs="+",
        type=Path,
        help="two pools or more; each is tested with what the one before it taught",
    )
    parser.add_argument("--shuffles", type=int, help="100 for fit, 20 for budgets, if not given")
    parser.add_argument(
        "--out", type=Path, help="a folder for crossfit.json, or for budgets.json and policies.png"
    )
    given = parser.parse_args(arguments)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)

    if given.command == "budgets":
        swept = budgets(given.pools, shuffles=given.shuffles or 20, say=say)
        if given.out is not None:
            (given.out / "budgets.json").write_text(json.dumps(swept, indent=1) + "\n")
            draw(swept, given.out / "policies.png")
        return
    heads = (
        "pool",
        "policy",
        "accuracy, % (95 % over problems) ± se of shuffling",
        "against self-consistency, paired",
    )
    print(f"| {' | '.join(heads)} | tokens | sequential | probes | branches |")
    print("|---|---|---|---|---|---|---|---|")
    found = crossfit(given.pools, shuffles=given.shuffles or 100, say=say)
    if given.out is not None:
        (given.out / "crossfit.json").write_text(json.dumps(found, indent=1) + "\n")


__all__ = ["Point", "Row", "crossfit", "fitted", "folds", "main", "oracle"]
