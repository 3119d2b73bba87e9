"""One budget for the whole run: ``python -m ttc.simulate budgets POOL…`` replays ``adaptive`` and the published rules under budgets
from 10k to 400k tokens a problem, shared over all problems, and draws accuracy against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttc.budget import Budget
from ttc.costmodel.intervals import Estimate, paired
from ttc.policies import parse
from ttc.simulate import Replay, load, replay

BUDGETS = (10e3, 14e3, 20e3, 30e3, 40e3, 70e3, 100e3, 150e3, 200e3, 300e3, 400e3)
POLICIES = ("adaptive", "adaptive-consistency", "self-consistency?n=64", "early-stopping")
UNBUDGETED = ("parallel-probe?n=4", "parallel-probe?n=8", "parallel-probe?n=16", "parallel-probe?n=32")
"""Rules that start all branches at once have no use for a shared budget: they stand where their own width puts them."""


def budgets(paths: Sequence[Path], *, shuffles: int = 20, say: Any = print) -> dict[str, Any]:
    """For each pool and policy its (budget or spent a problem, accuracy, standard error over shuffles) at each budget. Prints a
    table with ``adaptive``'s lead over each of the others, paired by problem, with its 95 % interval over problems; the last row
    is the lead in the mean over all budgets, one comparison instead of many, and at the end that of all pools' problems."""
    found: dict[str, Any] = {}
    ours, *others = POLICIES
    together: dict[str, list[Any]] = {name: [] for name in others}
    for path in paths:
        pool = load(path)
        lines: dict[str, list[tuple[float, float, float]]] = {name: [] for name in POLICIES}
        leads: dict[str, list[Any]] = {name: [] for name in others}
        heads = [f"{pool.name}: budget", *POLICIES, *(f"over {name.partition('?')[0]}" for name in others)]
        say(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for budget in BUDGETS:
            shared = Budget(budget * len(pool.problems), "tokens", "run")
            runs = {name: replay(pool, parse(name), budget=shared, shuffles=shuffles) for name in POLICIES}
            assert not any(run.overrun for run in runs.values())
            for name, run in runs.items():
                lines[name].append((budget, float(run.right.mean()), _noise(run)))
            for name in others:
                leads[name].append(runs[ours].right.mean(axis=0) - runs[name].right.mean(axis=0))
            cells = [
                f"{100 * runs[n].right.mean():.1f} @ {runs[n].tokens.mean() / 1e3:.0f}k" for n in POLICIES
            ]
            cells += [gap(paired(leads[name][-1])) for name in others]
            say(f"| {budget / 1e3:.0f}k | {' | '.join(cells)} |")
        cells = [f"{100 * sum(point[1] for point in lines[n]) / len(BUDGETS):.1f}" for n in POLICIES]
        for name in others:
            together[name].append(sum(leads[name]) / len(BUDGETS))
        cells += [gap(paired(together[name][-1])) for name in others]
        say(f"| mean | {' | '.join(cells)} |")
        lines["parallel-probe"] = []
        for name in UNBUDGETED:
            run = replay(pool, parse(name), shuffles=max(shuffles // 2, 1))
            lines["parallel-probe"].append((float(run.tokens.mean()), float(run.right.mean()), _noise(run)))
            say(
                f"{pool.name}: {name} without a budget: {100 * run.right.mean():.1f} @ {run.tokens.mean() / 1e3:.0f}k"
            )
        found[pool.name] = lines
    for name, each in together.items():
        whole = paired([lead for pool_leads in each for lead in pool_leads])
        say(f"mean over budgets, all {whole.problems} problems: {ours} over {name}: {gap(whole)}")
    return found


def gap(estimate: Estimate) -> str:
    """A paired difference in points: ``+1.5 (-0.3 to +4.2)``."""
    return f"{100 * estimate.mean:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _noise(run: Replay) -> float:
    return float(run.right.mean(axis=1).std() / len(run.right) ** 0.5)


DASHES = {"self-consistency": (0, (4, 4)), "early-stopping": (0, (1.5, 3))}


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a pool, accuracy against tokens a problem, bands of two standard errors of shuffling. Lines that lie on one another
    show through by their dashes. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(
        1, len(found), figsize=(5.2 * len(found), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (name, lines) in zip(axes[0], found.items(), strict=True):
        for label, points in lines.items():
            x, y, noise = zip(*points, strict=True)
            ours = label == "adaptive"
            colour = "C3" if ours else {"parallel-probe": "C4"}.get(label)
            style: dict[str, Any] = {
                "color": colour,
                "linewidth": 2.2 if ours else 1.4,
                "zorder": 3 if ours else 2,
            }
            style["linestyle"] = DASHES.get(label.partition("?")[0], "-")
            (line,) = axis.plot(
                x, [100 * v for v in y], marker="o", markersize=3.5, label=label.partition("?")[0], **style
            )
            low, high = ([100 * (v + s * e) for v, e in zip(y, noise, strict=True)] for s in (-2, 2))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set(
            xscale="log", xlabel="tokens a problem, one budget for the run", title=name, xlim=(9e3, 450e3)
        )
        axis.xaxis.set_major_locator(FixedLocator([10e3, 20e3, 40e3, 100e3, 200e3, 400e3]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e3:.0f}k"))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9,
        title="bands: ±2 standard errors of shuffling; intervals over problems are far wider", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


__all__ = ["budgets", "draw", "gap"]
