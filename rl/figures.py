"""The family side by side, from its cards: ``python -m ttc.rl.figures`` writes docs/nano_tables.md, draws docs/nano_curves.png and,
from the study, docs/nano_family_0.png and so on.

Nothing is measured here: ``ttc.rl.evaluate`` writes the cards, training the loss curves beside them, ``ttc.rl.family`` the study
of size × samples × length (docs/nano_family.json).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ttc.nano
from ttc.rl import card, heldout

Cards = Mapping[str, Mapping[str, Any]]


def cards() -> dict[str, dict[str, Any]]:
    """The cards of all measured reasoners, smallest first."""
    found = {model.name: card.read(model.path) for model in ttc.nano.catalog()}
    return {name: info for name, info in found.items() if info["evaluation"]}


def training(found: Cards) -> list[str]:
    """Size, tokens, minutes and loss of each."""
    lines = [
        "| model | parameters | targets | minutes (shared machine) | final loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, info in found.items():
        t = info["training"]
        lines.append(
            f"| {name} | {info['params']:,} | {t['tokens'] / 1e6:.1f} M | {t['minutes']:.0f} | {t['final_loss']:.3f} |"
        )
    return lines


def by_size(found: Cards) -> list[str]:
    """pass@1 of each size on each task."""
    lines = [f"| task | {' | '.join(found)} |", "|" + " --- |" * (len(found) + 1)]
    for task in (task for tasks in heldout.GRADED.values() for task in tasks):
        cells = []
        for info in found.values():
            row = next((row for row in info["evaluation"]["by_difficulty"] if row["task"] == task), None)
            cells.append(card.percent(row["pass@1"]) if row else "")
        lines.append(f"| {card.short(task)} | {' | '.join(cells)} |")
    return lines


def by_triggers(found: Cards) -> list[str]:
    """pass@1 on the hard half after 0, 1, 2 triggers, and the gain on all problems."""
    lines = [
        "| model | task | k = 0 | k = 1 | k = 2 | gain of two, all problems |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, info in found.items():
        for task, rows in info["evaluation"]["triggers"].items():
            first = [row for row in rows if row["trigger"] == rows[0]["trigger"]]
            cells = [card.percent(row["hard half"]) for row in first]
            lines.append(
                f"| {name} | {card.short(task)} | {' | '.join(cells)} | {card.percent(first[-1]['gain'])} |"
            )
    return lines


def by_samples(found: Cards) -> list[str]:
    """Where 16 samples buy most for each size: coverage and vote over pass@1, from the cards and the family study."""
    lines = [
        "| model | task | pass@1 | majority@16 | gain, points | coverage@16 | gain, points |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, info in found.items():
        for task, rows in info["evaluation"]["by_samples"].items():
            at = {row["k"]: row for row in rows}
            one, many = at[1]["coverage"], at[16]
            gains = [f"{100 * (many[what]['mean'] - one['mean']):+.1f}" for what in ("majority", "coverage")]
            cells = [
                card.percent(one),
                card.percent(many["majority"]),
                gains[0],
                card.percent(many["coverage"]),
                gains[1],
            ]
            lines.append(f"| {name} | {card.short(task)} | {' | '.join(cells)} |")
    return lines


def by_length(found: Cards) -> list[str]:
    """pass@1 when the thought is closed by force after so many tokens."""
    lines: list[str] = []
    for task in next(iter(found.values()))["evaluation"]["forced_close"]:
        tables = {name: info["evaluation"]["forced_close"][task] for name, info in found.items()}
        budgets = [row["budget"] for row in next(iter(tables.values()))]
        lines += [
            "",
            f"{card.short(task)}, at most so many thinking tokens:",
            "",
            f"| model | {' | '.join(map(str, budgets))} |",
            "|" + " --- |" * (len(budgets) + 1),
            *(
                f"| {name} | {' | '.join(card.percent(row['pass@1']) for row in rows)} |"
                for name, rows in tables.items()
            ),
        ]
    return lines[1:]


def speeds(study: Mapping[str, Any]) -> list[str]:
    """Tokens a second of each size."""
    return [
        "| model | parameters | branches | tokens a second (least and most of the rounds) |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['model']} | {row['params']:,} | {row['branches']} | {row['tokens_per_s']:,} "
            f"({row['spread'][0]:,}–{row['spread'][1]:,}) |"
            for row in study.get("speed", ())
        ),
    ]


SECTIONS: Mapping[str, Callable[[Cards], list[str]]] = {
    "Training": training,
    "Size: pass@1, percent": by_size,
    "Samples": by_samples,
    "Length: the thought closed by force, pass@1": by_length,
    "Triggers behind the first conclusion: pass@1 on the hard half": by_triggers,
}


def tables(found: Cards, study: Mapping[str, Any]) -> str:
    """All tables, in Markdown."""
    methods = {info["evaluation"].get("intervals", card.BOOTSTRAP) for info in found.values()}
    lines = [
        "# The nano family in figures",
        "",
        "Written by `python -m ttc.rl.figures` from the models' cards (`ttc/nano/*/card.json`, by `python -m ttc.rl.evaluate`)",
        "and the family study (`python -m ttc.rl.family`). Held-out problems, three seeds, temperature 1, in vLLM; brackets are",
        "95 % intervals over problems (cards: " + "; ".join(sorted(methods)) + ").",
        "What it means is told in [nano.md](nano.md).",
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", *section(found)]
    if "speed" in study:
        lines += ["", "## Speed in vLLM", "", *speeds(study)]
    if "study" in study:
        from ttc.rl.family import tables as family_tables

        lines += ["", "## Size × samples × length against cost", family_tables(study["study"])]
    return "\n".join(lines) + "\n"


def draw(found: Cards, out: Path) -> Path:
    """Loss by targets; accuracy by samples; accuracy by forced thinking length; effort. Bands are the cards' 95 % intervals over
    problems. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    demo = card.short(heldout.GRADED["sums"][0])
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.8), layout="constrained")

    def curve(place: int, xs: list[float], cells: list[dict[str, Any]], color: str, name: str) -> None:
        axes[place].plot(
            xs, [cell["mean"] for cell in cells], color=color, label=name, marker="o", markersize=3
        )
        low, high = zip(*(cell["ci95"] for cell in cells), strict=True)
        axes[place].fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)

    for number, (name, info) in enumerate(found.items()):
        color, told = f"C{number}", info["evaluation"]
        losses = json.loads((ttc.nano.ROOT / name / "loss.json").read_text())
        axes[0].plot(
            [p["tokens"] / 1e6 for p in losses], [p["loss"] for p in losses], color=color, label=name
        )
        rows = told["by_samples"][info["tasks"][0]]
        curve(1, [r["k"] for r in rows], [r["majority"] for r in rows], color, name)
        axes[1].plot(
            [r["k"] for r in rows], [r["coverage"]["mean"] for r in rows], color=color, linestyle=":"
        )
        rows = told["forced_close"][info["tasks"][0]]
        curve(2, [max(8, r["budget"]) for r in rows], [r["pass@1"] for r in rows], color, name)
        rows = told["efforts"]
        curve(3, [r["thinking_tokens"]["mean"] for r in rows], [r["pass@1"] for r in rows], color, name)
    for axis, title, label, side in zip(
        axes,
        (
            "training",
            f"vote (coverage dotted)\n{demo}",
            f"thought closed by force\n{demo}",
            f"effort 0.25 to 1\n{demo}",
        ),
        ("targets (M)", "samples", "thinking tokens at most", "mean thinking tokens"),
        ("loss", *("accuracy",) * 3),
        strict=True,
    ):
        axis.set(title=title, xlabel=label, ylabel=side)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for axis, ticks in zip(
        axes[1:], ((1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64, 128, 256, 512), (16, 32, 64, 128)), strict=True
    ):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0].legend(frameon=False)
    file = out / "nano_curves.png"
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
    return file


def draw_family(study: Mapping[str, Mapping[str, Any]], out: Path) -> list[Path]:
    """The family study's pictures, one a task: accuracy against Kinetics eFLOPs, intervals on the frontier. Returns the files."""
    from ttc.cli import pictures
    from ttc.rl.family import clear

    def dots(rows: Sequence[Mapping[str, Any]]) -> list[pictures.Dot]:
        return [
            pictures.Dot(r["model"], False, r["eflops_kinetics"], r["accuracy"], r["accuracy_ci95"])
            for r in rows
        ]

    files = []
    for number, (task, told) in enumerate(study.items()):
        files.append(out / f"nano_family_{number}.png")
        pictures.figure(
            dots(told["points"]), dots(clear(told["pareto"])), files[-1], label=pictures.LABELS["eflops"] + " (kinetics)",
            title=card.short(task),
        )  # fmt: skip
    return files


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.rl.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the figures go")
    args = parser.parse_args(argv)
    found = cards()
    family = args.out / "nano_family.json"
    known = json.loads(family.read_text()) if family.exists() else {}
    file = args.out / "nano_tables.md"
    file.write_text(tables(found, known))
    print(file, draw(found, args.out), *draw_family(known.get("study", {}), args.out), sep="\n")


if __name__ == "__main__":
    main()
