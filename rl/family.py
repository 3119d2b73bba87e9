"""The family as a laboratory of scaling: size × samples × length against cost, from real runs in vLLM.

``python -m ttc.rl.family`` samples every embedded reasoner on held-out problems, cuts each chain at several lengths, lets it
answer there, and gives the pools to ``ttc.costmodel``: Pareto set and which size rules at which cost (Kinetics' convention), as
``ttc frontier`` does for recorded models. ``--speed`` measures tokens a second of each size instead. Writes docs/nano_family.json
and draws one picture a task; everything else is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ttc.nano
from ttc.costmodel.frontier import report
from ttc.costmodel.hardware import Hardware
from ttc.costmodel.points import Point, Tariff, pool_points
from ttc.costmodel.records import Pool, PooledProblem
from ttc.costmodel.shapes import ModelShape
from ttc.rl import card, heldout, tokenizer
from ttc.rl.evaluate import SEEDS, Answers, Bench, joined
from ttc.rl.generate import Sampler, VllmSampler

TASKS = (heldout.GRADED["sums"][0], heldout.GRADED["sums"][3], heldout.GRADED["products"][0])
"""Tasks with one right answer each, so that votes mean what they say; the demo first."""

PROBE_EVERY = 32
LENGTHS = (32, 64, 128, 256)
SAMPLES = (1, 2, 4, 8, 16)
BRANCHES, SPEED_TOKENS, ROUNDS = 64, 256, 3


def pool_of(sampler: Sampler, name: str, task: str, n: int, samples: int, seeds: Sequence[int]) -> Pool:
    """``n`` held-out problems × ``samples`` for each seed, uncut and cut at ``LENGTHS`` tokens of thinking."""
    uncut: list[Answers] = []
    cut: dict[int, list[Answers]] = {length: [] for length in LENGTHS}
    for seed in seeds:
        bench = Bench(sampler, task, n, samples, seed)
        thoughts = bench.think()
        uncut.append(bench.answer(thoughts))
        for length in LENGTHS:
            cut[length].append(bench.answer([thought[:length] for thought in thoughts]))
    whole = joined(uncut)
    at = {length: joined(parts) for length, parts in cut.items()}
    problems = []
    for row in range(n):
        known: dict[str, int] = {}
        probes = np.full((whole.right.shape[1], max(LENGTHS) // PROBE_EVERY), -1)
        for length, answers in at.items():
            probes[:, length // PROBE_EVERY - 1] = _codes(answers, row, known)
        final = _codes(whole, row, known)
        tokens = whole.thinking[row] + np.array([len(answer) + 2 for answer in whole.answers[row]])
        problems.append(PooledProblem(f"{task}/{row}", tokens.astype(float), final, probes))
    return Pool(name, tuple(problems), model=name, task=task, probe_every=PROBE_EVERY)


def _codes(answers: Answers, row: int, known: dict[str, int]) -> np.ndarray:
    """0 for right answers, -1 for none, 1, 2 … for wrong ones."""
    return np.array(
        [
            0 if right else -1 if not answer else known.setdefault(answer, len(known) + 1)
            for answer, right in zip(answers.answers[row], answers.right[row], strict=True)
        ]
    )


def study(
    models: Sequence[ttc.nano.NanoModel],
    tasks: Sequence[str],
    n: int,
    samples: int,
    seeds: Sequence[int] = SEEDS,
    show: Callable[[str], None] = print,
) -> dict[str, list[Point]]:
    """For each task the points of all sizes."""
    points: dict[str, list[Point]] = {task: [] for task in tasks}
    for model in models:
        sampler = VllmSampler(model.path)
        shape = ModelShape.load(model.path)
        for task in tasks:
            started = time.monotonic()
            pool = pool_of(sampler, model.name, task, n, samples, seeds)
            found = pool_points(
                pool, shape, tariff(task), samples=[k for k in SAMPLES if k <= samples * len(seeds)],
                lengths=(*map(float, LENGTHS), float("inf")),
            )  # fmt: skip
            points[task] += found
            best = max(found, key=lambda p: p.accuracy.mean if p.accuracy else 0.0)
            show(
                f"{model.name} {card.short(task)}: best {best.accuracy} with {best.label()} ({time.monotonic() - started:.0f} s)"
            )
        sampler.close()
    return points


def tariff(task: str) -> Tariff:
    """Kinetics' intensity, 64 branches a step, and the task's mean prompt."""
    lengths = [len(tokenizer.encode(tokenizer.prompt(item.prompt))) for item in heldout.items(task, 50)]
    return Tariff(
        Hardware.named("b200"), prompt_tokens=float(np.mean(lengths)), batch=BRANCHES, answer_tokens=4.0
    )


def clear(front: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a Pareto set that are a point better than the one before: less is noise, not progress."""
    kept: list[dict[str, Any]] = []
    for point in front:
        if not kept or point["accuracy"] >= kept[-1]["accuracy"] + 0.01:
            kept.append(point)
    return kept


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The Pareto set and who rules, in Markdown."""
    lines: list[str] = []
    for task, data in found.items():
        lines += [
            "",
            f"**{card.short(task)}**, Pareto set:",
            "",
            "| kinetics eFLOPs | configuration | accuracy |",
            "| --- | --- | --- |",
        ]
        for point in clear(data["pareto"]):
            low, high = point["accuracy_ci95"]
            lines.append(
                f"| {point['eflops_kinetics']:.2e} | {point['label']} |"
                f" {100 * point['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] |"
            )
        lines += ["", "Who rules (its own frontier is the highest there):", ""]
        for band in data["bands"]:
            (low, high), (cheap, dear) = band["accuracy"], band["cost"]
            lines.append(
                f"- {band['model']}: {cheap:.2e} to {dear:.2e} eFLOPs, accuracy {low:.2f} to {high:.2f}"
            )
    return "\n".join(lines)


def speed(models: Sequence[ttc.nano.NanoModel]) -> list[dict[str, Any]]:
    """Generated tokens a second of each size in vLLM: ``BRANCHES`` branches of ``SPEED_TOKENS`` tokens, median of the rounds."""
    texts = [tokenizer.encode(tokenizer.prompt(item.prompt)) for item in heldout.items(TASKS[0], BRANCHES)]
    rows = []
    for model in models:
        sampler = VllmSampler(model.path, concurrency=BRANCHES)
        sampler(texts, 8, (), 0)
        rates = []
        for seed in range(ROUNDS):
            started = time.monotonic()
            written = sum(map(len, sampler(texts, SPEED_TOKENS, (), seed)))
            rates.append(written / (time.monotonic() - started))
        sampler.close()
        rows.append({
            "model": model.name, "params": model.params, "branches": BRANCHES, "tokens_per_s": round(statistics.median(rates)),
            "spread": [round(min(rates)), round(max(rates))],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.rl.family", description=__doc__)
    parser.add_argument("--model", action="append", help="only these (repeatable)")
    parser.add_argument("--task", action="append", help="only these (repeatable)")
    parser.add_argument("--n", type=int, default=200, help="problems per task")
    parser.add_argument("--samples", type=int, default=6, help="for each of the three seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="where nano_family.json and the pictures go"
    )
    parser.add_argument("--speed", action="store_true", help="only measure tokens a second")
    args = parser.parse_args(argv)
    models = [model for model in ttc.nano.catalog() if not args.model or model.name in args.model]
    file = args.out / "nano_family.json"
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.speed:
        data["speed"] = speed(models)
    else:
        from ttc.rl.figures import draw_family

        found = study(models, args.task or TASKS, args.n, args.samples)
        data["study"] = {task: report(points, tariff(task)) for task, points in found.items()}
        draw_family(data["study"], args.out)
        print(tables(data["study"]))
    file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
