"""How often 95 % intervals hold the truth: ``python -m ttc.costmodel.intervals_study`` prints the tables of docs/costmodel.md.

Every trial draws P problems from a population whose mean is known exactly and asks each kind of interval for it. ``ttc`` is
``ttc.costmodel.intervals``; beside it the percentile bootstrap, the bootstrap-t (of means on the arcsine scale) and Student's t.
Needs scipy (the ``dev`` extra).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ttc.costmodel.intervals import Array, mean_bounds, paired_bounds

TRIALS, RESAMPLES, SEED = 4000, 400, 0
PROBLEMS = (30, 100, 500)
SHARES = (0.5, 0.8, 0.93, 0.99)
GRID = 20_000
"""Problems of a population; a trial draws from them with replacement."""

Draw = Callable[[np.random.Generator, NDArray[np.int64]], Array]
Bounds = Callable[[Array], tuple[Array, Array]]


class Population(NamedTuple):
    """``draw`` gives the values of problems (their indices), sampling noise included; ``mean`` is the expected value."""

    name: str
    mean: float
    draw: Draw


class Cell(NamedTuple):
    """How often each kind of interval held the mean of ``population`` with ``problems`` drawn, and how wide it was on average."""

    population: str
    problems: int
    held: Mapping[str, float]
    width: Mapping[str, float]


@cache
def difficulties(share: float, alike: float) -> Array:
    """P(a sample is right) of each problem (GRID,), Beta distributed with mean ``share``; large ``alike`` is little spread."""
    middles = (np.arange(GRID) + 0.5) / GRID
    return np.asarray(stats.beta.ppf(middles, share * alike, (1 - share) * alike))


def _vote(difficulty: Array, votes: int) -> Array:
    """P(most of ``votes`` samples are right), odd ``votes``, right against wrong."""
    return np.asarray(stats.binom.sf(votes // 2, votes, difficulty))


def _of_draws(name: str, chance: Array, draws: int) -> Population:
    """The share of ``draws`` that are right; each is with the problem's ``chance``."""
    return Population(
        name, float(chance.mean()), lambda rng, who: np.asarray(rng.binomial(draws, chance[who]) / draws)
    )


def _of_gaps(name: str, first: Array, second: Array, draws: int) -> Population:
    def draw(rng: np.random.Generator, who: NDArray[np.int64]) -> Array:
        return np.asarray(
            (rng.binomial(draws, first[who]) - rng.binomial(draws, second[who])).astype(float) / draws
        )

    return Population(name, float((first - second).mean()), draw)


def _of_sizes(name: str, chances: Sequence[tuple[float, float]]) -> Population:
    """Differences of given sizes with given chances; 0 otherwise."""
    sizes = np.zeros(GRID)
    at = 0
    for chance, size in chances:
        upto = at + round(chance * GRID)
        sizes[at:upto], at = size, upto
    return Population(name, float(sizes.mean()), lambda rng, who: sizes[who])


def means(share: float) -> list[Population]:
    """Values in [0, 1], a sample of them right with ``share``."""
    solved = np.where(np.arange(GRID) < share * GRID, 0.97, 0.0)
    return [
        _of_draws(f"0/1, p = {share:g}", np.full(GRID, share), 1),
        _of_draws(f"8 samples, p = {share:g}", difficulties(share, 2.0), 8),
        _of_draws(f"vote of 9, 40 shuffles, p = {share:g}", _vote(difficulties(share, 1.0), 9), 40),
        _of_draws(f"40 samples, problems alike, p = {share:g}", difficulties(share, 10.0), 40),
        _of_draws(f"40 samples, {share:g} of problems right at 97 %, others never", solved, 40),
    ]


def gaps() -> list[Population]:
    """Paired differences in [-1, 1]."""
    gain = difficulties(0.3, 8.0)
    spread, wide = difficulties(0.6, 1.5), difficulties(0.7, 0.7)
    return [
        _of_gaps("vote of 9 over one sample, 40 shuffles", _vote(difficulties(0.6, 6.0), 9), difficulties(0.6, 6.0), 40),
        Population("all won, by 30 points on average", float(gain.mean()), lambda rng, who: gain[who]),
        _of_sizes("0/1: 20 % won, 10 % lost", [(0.2, 1.0), (0.1, -1.0)]),
        _of_sizes("0/1: 10 % won, none lost", [(0.1, 1.0)]),
        _of_sizes("0/1: 2 % won, 2 % lost", [(0.02, 1.0), (0.02, -1.0)]),
        _of_gaps("votes of 9 and of 3, one run", _vote(spread, 9), _vote(spread, 3), 1),
        _of_gaps("votes of 9 and of 3, 40 shuffles", _vote(spread, 9), _vote(spread, 3), 40),
        _of_gaps("votes of 9 and of 7, 40 shuffles", _vote(wide, 9), _vote(wide, 7), 40),
        _of_sizes(
            "5 % won by 1/2, 20 % differ by 1/20", [(0.05, 0.5), (0.1, 0.05), (0.1, -0.05)]
        ),
        _of_sizes("3 % won fully, 30 % differ by 1/40", [(0.03, 1.0), (0.15, 0.025), (0.15, -0.025)]),
    ]  # fmt: skip


def cell(
    population: Population, problems: int, ours: Bounds, *, trials: int = TRIALS, seed: int = SEED, rivals: bool = True
) -> Cell:  # fmt: skip
    """Coverage over ``trials`` draws of ``problems``; without ``rivals`` only of ``ours``."""
    rng = np.random.default_rng((seed, problems))
    values = population.draw(rng, rng.integers(0, GRID, (trials, problems)))
    found = {"ttc": ours(values)}
    if rivals:
        weights = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
        draws = values @ weights.T
        low, high = np.percentile(draws, [2.5, 97.5], axis=1)
        found["percentile"] = (low, high)
        spread = np.sqrt(np.maximum(np.square(values) @ weights.T - draws**2, 0.0) / problems)
        found["bootstrap-t"] = _studentised(values, draws, spread, arcsine=ours is mean_bounds)
        half = stats.t.ppf(0.975, problems - 1) * values.std(axis=1, ddof=1) / problems**0.5
        found["Student"] = (values.mean(axis=1) - half, values.mean(axis=1) + half)
    slack = 1e-12  # of a mean that the interval ends on
    return Cell(
        population.name,
        problems,
        {k: float(np.mean((a <= population.mean + slack) & (b >= population.mean - slack))) for k, (a, b) in found.items()},
        {k: float(np.mean(b - a)) for k, (a, b) in found.items()},
    )  # fmt: skip


def _studentised(values: Array, draws: Array, spread: Array, *, arcsine: bool) -> tuple[Array, Array]:
    """The bootstrap-t interval; a resample has at least a tenth of the sample's own standard error."""
    count = values.shape[1]
    mean, error = values.mean(axis=1), values.std(axis=1) / count**0.5

    def scale(m: Array) -> tuple[Array, Array]:
        """The mean on the scale of the interval, and that scale's slope."""
        if not arcsine:
            return m, np.ones_like(m)
        inner = (m * count + 0.5) / (count + 1)
        return np.arcsin(np.sqrt(inner)), 0.5 / np.sqrt(inner * (1 - inner))

    centre, slope = scale(mean)
    centres, slopes = scale(draws)
    least = np.maximum(0.1 * error * slope, 1e-12)[:, None]
    ratio = (centres - centre[:, None]) / np.maximum(spread * slopes, least)
    low, high = np.percentile(ratio, [2.5, 97.5], axis=1)
    ends = centre - high * error * slope, centre - low * error * slope
    if not arcsine:
        return ends
    a, b = (np.square(np.sin(np.clip(end, 0.0, np.pi / 2))) for end in ends)
    return a, b


def tables(trials: int = TRIALS, seed: int = SEED) -> str:
    """Both tables, in Markdown: percent and points with 30 / 100 / 500 problems."""
    lines: list[str] = []
    parts: list[tuple[str, list[Population], Bounds]] = [
        ("a mean over problems", [p for share in SHARES for p in means(share)], mean_bounds),
        ("a paired difference", gaps(), paired_bounds),
    ]
    for title, populations, ours in parts:
        heads = (
            f"{title}: values",
            "`ttc`",
            "percentile bootstrap",
            "bootstrap-t",
            "Student's t",
            "width: `ttc`",
            "percentile",
        )
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for population in populations:
            cells = [cell(population, n, ours, trials=trials, seed=seed) for n in PROBLEMS]
            held = [[c.held[k] for c in cells] for k in ("ttc", "percentile", "bootstrap-t", "Student")]
            wide = [[c.width[k] for c in cells] for k in ("ttc", "percentile")]
            words = (" / ".join(f"{100 * v:.1f}" for v in row) for row in (*held, *wide))
            lines.append(f"| {population.name} | {' | '.join(words)} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.costmodel.intervals_study", description=__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args(arguments)
    print(tables(given.trials, given.seed))


if __name__ == "__main__":
    main()
