"""Pictures of cost and accuracy: PNG or SVG through matplotlib, and a plot made of characters for the
terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel.points import Point, Tariff

MARKS = "●▲■◆✚★○△□◇"
LABELS = {
    "eflops": "eFLOPs a problem",
    "flops": "FLOPs a problem",
    "tokens": "generated tokens a problem",
    "seconds": "device seconds a problem",
    "dollars": "dollars a problem",
}


def terminal(
    points: Sequence[Point],
    front: Sequence[Point],
    cost: Callable[[Point], float],
    label: str,
    *,
    width: int = 72,
    height: int = 18,
) -> str:
    """Accuracy over log cost: a dot for each point, a mark per model for those on the frontier."""
    known = [p for p in points if p.accuracy is not None and cost(p) > 0]
    if not known:
        return "(nothing to draw: no accuracy is known)"
    logs = [math.log10(cost(p)) for p in known]
    low, high = min(logs), max(logs)
    span = max(high - low, 1e-9)
    top = max(p.accuracy.mean for p in known if p.accuracy) or 1.0
    grid = [[" "] * width for _ in range(height)]

    def place(point: Point, mark: str) -> None:
        accuracy = point.accuracy.mean if point.accuracy else 0.0
        column = round((math.log10(cost(point)) - low) / span * (width - 1))
        row = round((1 - max(accuracy, 0.0) / top) * (height - 1))
        grid[row][column] = mark

    for point in known:
        place(point, "·")
    models = list(dict.fromkeys(p.model for p in front))
    for point in front:
        place(point, MARKS[models.index(point.model) % len(MARKS)])
    lines = []
    for number, row in enumerate(grid):
        level = top * (1 - number / (height - 1))
        lines.append(
            f"{level:5.2f} ┤{''.join(row).rstrip()}" if number % 4 == 0 else f"      │{''.join(row).rstrip()}"
        )
    lines.append("      └" + "─" * width)
    left, right = f"{10**low:.2g}", f"{10**high:.2g}"
    lines.append(f"       {left}{label:^{max(1, width - len(left) - len(right))}}{right}")
    legend = [""]
    for entry in (*(f"{MARKS[k % len(MARKS)]} {name}" for k, name in enumerate(models)), "· dominated"):
        if legend[-1] and len(legend[-1]) + 3 + len(entry) > width:
            legend.append("")
        legend[-1] += ("   " if legend[-1] else "") + entry
    return "\n".join([*lines, *(f"       {line}" for line in legend)])


def draw(
    points: Sequence[Point],
    front: Sequence[Point],
    tariff: Tariff,
    path: Path,
    *,
    unit: str = "eflops",
    convention: str = "kinetics",
    budget: float | None = None,
) -> None:
    """The same as a figure: every point, the frontier as a line, the budget as a rule. Raises InputError
    without matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path.name}: give a name that ends in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install 'ttc[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ttc.costmodel.frontier import axis

    cost = axis(tariff, unit, convention)
    known = [p for p in points if p.accuracy is not None]
    if not known:
        raise InputError("--plot: no accuracy is known, so there is nothing to draw; give data")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    models = sorted({p.model for p in known}, key=lambda m: min(p.params for p in known if p.model == m))
    for color, name in enumerate(models):
        for sparse, marker in ((False, "o"), (True, "s")):
            mine = [p for p in known if p.model == name and (p.kv_budget is not None) == sparse]
            if mine:
                axes.scatter(
                    [cost(p) for p in mine],
                    [p.accuracy.mean for p in mine if p.accuracy],
                    s=14,
                    marker=marker,
                    alpha=0.6,
                    color=f"C{color}",
                    label=f"{name}{', sparse KV' if sparse else ''}",
                )
    axes.plot(
        [cost(p) for p in front],
        [p.accuracy.mean for p in front if p.accuracy],
        color="black",
        lw=1,
        label="frontier",
    )
    if budget is not None:
        axes.axvline(budget, color="grey", ls="--", lw=1, label="budget")
    axes.set_xscale("log")
    axes.set_xlabel(LABELS.get(unit, unit) + (f" ({convention})" if "flops" in unit else ""))
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
