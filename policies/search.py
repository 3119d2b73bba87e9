"""Search with a process reward model: beam, diverse verifier tree search, particle filtering.

All grow ``n`` chains side by side, a step (to ``step``, a delimiter, if one is given; ``tokens`` long at the most) at a time, and
choose among those that ended. ``select``: ``weighted`` adds up the scores behind each answer, ``best`` takes the chain with the
highest, ``vote`` counts chains. What the reward model reads is charged as judge tokens (one that keeps what it has read, as the
embedded ones do, reads each step once). Where the budget pays for no further step, the best beginning so far is made to answer.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.policies.fixed import MAX_SAMPLES
from ttc.samplers import best, leader, tally
from ttc.samplers.search import Chain, Walk, annealed, shares, systematic
from ttc.types import Brief, Outcome, Problem, Reply, Routine, Work

Select = Literal["weighted", "best", "vote"]
MAX_STEPS = 1 << 16


def _check(policy: _Trees | Particles) -> None:
    for field, least, most in (("n", 1, MAX_SAMPLES), ("tokens", 1, 1 << 20), ("most", 1, MAX_STEPS)):
        value = getattr(policy, field)
        if not least <= value <= most:
            raise InputError(f"policy: {field}={value}; give {least} to {most}")
    if policy.select not in get_args(Select):
        raise InputError(
            f"policy: unknown select {policy.select!r}; use one of {', '.join(get_args(Select))}"
        )


def _traits(policy: _Trees | Particles) -> Traits:
    return Traits(needs=("steps", "reward"), step=policy.step)


def _best(chains: Sequence[Chain]) -> list[Chain]:
    """By score, best first (ties: the earlier one)."""
    return sorted(chains, key=lambda chain: -chain.score)


def _chosen(chains: Sequence[Chain], select: Select, seed: int, problem_id: str) -> Outcome:
    """The answer of chains that have ended."""
    branches = [chain.branch for chain in chains if chain.branch is not None]
    scores = [chain.score for chain in chains if chain.branch is not None]
    votes = tally(branches, None if select == "vote" else scores)
    if select == "best":
        favourite = best(branches, scores, seed)
        return Outcome(favourite.vote if favourite is not None else None, "samples", votes)
    return Outcome(leader(votes, seed, problem_id), "samples", votes)


def _ended(
    walk: Walk, ended: list[Chain], begun: Sequence[Chain], select: Select
) -> Generator[Work, Reply, Outcome]:
    """The outcome; where nothing has ended usably, the best beginning is run to its end first; where the budget does not pay for
    that, chains that the search had dropped answer."""
    if not _usable(ended) and begun:
        ended = ended + (yield from walk.finish(_best(begun)[0]))
    ended = ended if _usable(ended) else walk.spare
    return _chosen(ended, select, walk.brief.seed, walk.problem.id)


def _usable(chains: Sequence[Chain]) -> bool:
    return any(chain.branch is not None and chain.branch.usable for chain in chains)


@dataclass(frozen=True, slots=True)
class _Trees:
    """Searches that try ``width`` candidates for each next step."""

    n: int = 8
    width: int = 4
    step: str = ""
    tokens: int = 48
    most: int = 40
    select: Select = "weighted"

    @property
    def traits(self) -> Traits:
        return _traits(self)

    def __post_init__(self) -> None:
        _check(self)
        if not 2 <= self.width <= self.n or self.n % self.width:
            raise InputError(
                f"policy: n={self.n} and width={self.width}; give a width of 2 or more that divides n"
            )


@dataclass(frozen=True, slots=True)
class Beam(_Trees):
    """Beam search over steps (Snell et al., arXiv 2408.03314, section 5.2): of ``n`` candidates the best n / ``width`` are kept,
    and each is continued ``width`` times. A candidate that ends takes its place in ``n`` with it."""

    name = "beam"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        walk = Walk(problem, brief, self.step, self.tokens, self.most)
        ended: list[Chain] = []
        kept: list[Chain] = [Chain()]
        asked = [Chain()] * self.n
        while asked:
            grown = [child for child in (yield from walk.grow(asked, f"{len(asked)} candidates")) if child]
            ended += [child for child in grown if child.ended]
            begun = [child for child in grown if not child.ended]
            kept = begun or kept
            if walk.broke or walk.blind:
                break
            places = self.n - len(ended)
            keep = _best(begun)[: max(places // self.width, 1)] if places > 0 else []
            asked = [chain for chain in keep for _ in range(min(self.width, places))]
        return (yield from _ended(walk, ended, kept, self.select))


@dataclass(frozen=True, slots=True)
class Dvts(_Trees):
    """Diverse verifier tree search (Beeching et al., 2024, "Scaling test-time compute with open models"): n / ``width`` independent
    trees, each a greedy search that continues its best of ``width`` candidates."""

    name = "dvts"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        walk = Walk(problem, brief, self.step, self.tokens, self.most)
        ended: list[Chain] = []
        trees: list[Chain] = [Chain()] * (self.n // self.width)
        kept: list[Chain] = [Chain()]
        while trees:
            asked = [chain for chain in trees for _ in range(self.width)]
            grown = yield from walk.grow(asked, f"{len(trees)} trees, {self.width} candidates each")
            tops = [
                _best([child for child in grown[i : i + self.width] if child])[:1]
                for i in range(0, len(grown), self.width)
            ]
            ended += [chain for top in tops for chain in top if chain.ended]
            trees = [chain for top in tops for chain in top if not chain.ended]
            kept = trees or kept
            if walk.broke or walk.blind:
                break
        return (yield from _ended(walk, ended, kept, self.select))


@dataclass(frozen=True, slots=True)
class Particles:
    """Particle filtering (Puri et al., arXiv 2502.01618, Algorithm 1): ``n`` chains each take a step, and are then drawn anew, in
    proportion to softmax(logit(score)), by systematic resampling; ended ones take part. ``entropic`` flattens weights that
    collapse early (arXiv 2510.05825; its annealing, not its look-ahead): an effective sample size below ``collapse`` of ``n`` in
    the first ``early`` of ``most`` steps. Where scores lie so close that this never happens, it is plain particle filtering."""

    n: int = 8
    step: str = ""
    tokens: int = 48
    most: int = 40
    entropic: bool = False
    collapse: float = 0.5
    early: float = 0.5
    select: Select = "weighted"
    name = "particles"

    @property
    def traits(self) -> Traits:
        return _traits(self)

    def __post_init__(self) -> None:
        _check(self)
        for field in ("collapse", "early"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"policy: {field}={getattr(self, field):g}; give a share, 0 to 1")

    def run(self, problem: Problem, brief: Brief) -> Routine:
        walk = Walk(problem, brief, self.step, self.tokens, self.most)
        rng = random.Random(f"{brief.seed}/{problem.id}/particles")
        particles: list[Chain] = [Chain()] * self.n
        done = 0
        while any(not chain.ended for chain in particles):
            moving = [chain for chain in particles if not chain.ended]
            grown = yield from walk.grow(moving, f"{len(moving)} particles")
            stayed = [chain for chain in particles if chain.ended]
            moved = [child for child in grown if child is not None]
            if walk.broke or walk.blind or not moved:
                particles = stayed + (moved or moving)
                break
            particles, done = stayed + moved, done + 1
            if all(chain.ended for chain in particles):
                break
            scores = [chain.score for chain in particles]
            heat = 1.0
            if self.entropic:
                heat = annealed(scores, done / self.most, collapse=self.collapse, early=self.early)
            particles = [particles[i] for i in systematic(shares(scores, heat), self.n, rng)]
        ended = [chain for chain in particles if chain.ended]
        return (yield from _ended(walk, ended, [c for c in particles if not c.ended], self.select))
