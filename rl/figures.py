"""The family side by side, from its cards: ``python -m ttc.rl.figures`` prints the tables of docs/nano.md and draws its figures.

Nothing is measured here: ``ttc.rl.evaluate`` writes the cards, training the loss curves beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ttc.nano
from ttc.rl import card, heldout

Cards = Mapping[str, Mapping[str, Any]]


def cards() -> dict[str, dict[str, Any]]:
    """The cards of all measured reasoners, smallest first."""
    found = {model.name: card.read(model.path) for model in ttc.nano.catalog()}
    return {name: info for name, info in found.items() if info["evaluation"]}


def cell(value: Mapping[str, Any]) -> str:
    """``61.9 [58.3, 65.2]``, in percent."""
    low, high = value["ci95"]
    return f"{100 * value['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


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
            cells.append(cell(row["pass@1"]) if row else "")
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
            cells = [cell(row["hard half"]) for row in first]
            lines.append(f"| {name} | {card.short(task)} | {' | '.join(cells)} | {cell(first[-1]['gain'])} |")
    return lines


def draw(found: Cards, out: Path) -> list[Path]:
    """Loss by targets; accuracy by samples; accuracy by forced thinking length; effort. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for color, (name, info) in enumerate(found.items()):
        style = {"color": f"C{color}", "label": name, "marker": "o", "markersize": 3}
        curve = json.loads((ttc.nano.ROOT / name / "loss.json").read_text())
        axes[0].plot(
            [p["tokens"] / 1e6 for p in curve], [p["loss"] for p in curve], color=f"C{color}", label=name
        )
        rows = info["evaluation"]["by_samples"]
        axes[1].plot([r["k"] for r in rows], [r["majority"]["mean"] for r in rows], **style)
        axes[1].plot(
            [r["k"] for r in rows], [r["coverage"]["mean"] for r in rows], color=f"C{color}", linestyle=":"
        )
        rows = info["evaluation"]["forced_close"][info["tasks"][0]]
        axes[2].plot([max(8, r["budget"]) for r in rows], [r["pass@1"]["mean"] for r in rows], **style)
        rows = info["evaluation"]["efforts"]
        axes[3].plot(
            [r["thinking_tokens"]["mean"] for r in rows], [r["pass@1"]["mean"] for r in rows], **style
        )
    demo = card.short(heldout.GRADED["sums"][0])
    titles = (
        "training loss",
        f"vote (coverage dotted)\n{demo}",
        f"thought closed by force\n{demo}",
        f"effort 0.25 to 1\n{demo}",
    )
    labels = ("targets (M)", "samples", "thinking tokens at most", "mean thinking tokens")
    for each, title, label in zip(axes, titles, labels, strict=True):
        each.set(title=title, xlabel=label)
        each.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_xscale("log", base=2)
    axes[2].set_xscale("log", base=2)
    axes[3].set_xscale("log", base=2)
    axes[0].legend(frameon=False)
    file = out / "nano_curves.png"
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
    return [file]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.rl.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the figures go")
    args = parser.parse_args(argv)
    found = cards()
    for lines in (training(found), by_size(found), by_triggers(found)):
        print("\n".join(lines), end="\n\n")
    for file in draw(found, args.out):
        print(file)


if __name__ == "__main__":
    main()
