"""Pictures of cost and accuracy: PNG or SVG through matplotlib, and a plot made of characters for the
terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


class Dot(NamedTuple):
    """A configuration in a figure: its cost on the axis, its accuracy and, where it is known, the interval of that."""

    model: str
    sparse: bool
    cost: float
    accuracy: float
    interval: Sequence[float] | None


def draw(
    points: Sequence[Point],
    front: Sequence[Point],
    tariff: Tariff,
    path: Path,
    *,
    unit: str = "eflops",
    convention: str = "kinetics",
    budget: float | None = None,
    title: str = "",
) -> None:
    """The same as a figure: every point, the frontier as a line, the budget as a rule. Raises InputError
    without matplotlib."""
    from ttc.costmodel.frontier import axis

    cost = axis(tariff, unit, convention)
    known = [p for p in points if p.accuracy is not None]
    if not known:
        raise InputError("--plot: no accuracy is known, so there is nothing to draw; give data")

    def dots(some: Sequence[Point]) -> list[Dot]:
        return [
            Dot(p.model, p.kv_budget is not None, cost(p), p.accuracy.mean, p.accuracy.interval)
            for p in some
            if p.accuracy
        ]

    label = LABELS.get(unit, unit) + (f" ({convention})" if "flops" in unit else "")
    figure(
        dots(sorted(known, key=lambda p: p.params)),
        dots(front),
        path,
        label=label,
        title=title,
        budget=budget,
    )


def figure(
    dots: Sequence[Dot],
    front: Sequence[Dot],
    path: Path,
    *,
    label: str,
    title: str = "",
    budget: float | None = None,
) -> None:
    """Accuracy over log cost in a .png or .svg file; the frontier's points have their intervals. Raises InputError without
    matplotlib, or where the file can't be written."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path.name}: give a name that ends in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install 'ttc[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for color, name in enumerate(dict.fromkeys(dot.model for dot in dots)):
        for sparse, marker in ((False, "o"), (True, "s")):
            mine = [dot for dot in dots if dot.model == name and dot.sparse == sparse]
            if mine:
                axes.scatter(
                    [dot.cost for dot in mine], [dot.accuracy for dot in mine], s=14, marker=marker, alpha=0.6,
                    color=f"C{color}", label=f"{name}{', sparse KV' if sparse else ''}",
                )  # fmt: skip
    axes.plot(
        [dot.cost for dot in front], [dot.accuracy for dot in front], color="black", lw=1, label="frontier"
    )
    sure = [(dot.cost, *dot.interval) for dot in front if dot.interval]
    if sure:
        places, lows, highs = zip(*sure, strict=True)
        axes.vlines(
            places, lows, highs, color="black", alpha=0.3, lw=1, label="its 95 % intervals, where known"
        )
    if budget is not None:
        axes.axvline(budget, color="grey", ls="--", lw=1, label="budget")
    axes.set(xscale="log", xlabel=label, ylabel="accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {path}: can't be written ({error.strerror}); give another file") from None
    finally:
        pyplot.close(drawn)
