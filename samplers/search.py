"""Chains grown step by step under a process reward model: what beam search, diverse tree search and particle filtering share.

A step ends behind a delimiter or after so many tokens; a chain goes on from the very tokens it was sampled as, so siblings find
their common beginning in the engine's prefix cache. A process reward model says of each beginning how likely it ends right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttc.types import Branch, Brief, Generate, Problem, Reply, Request, Score, Work


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """A beginning: its text, its tokens, the steps in it, what the reward model says of it (in [0, 1]), and, once it has ended, its
    branch."""

    text: str = ""
    ids: tuple[int, ...] = ()
    steps: int = 0
    score: float = 0.5
    branch: Branch | None = None

    @property
    def ended(self) -> bool:
        return self.branch is not None


@dataclass(slots=True)
class Walk:
    """Grows chains of one problem. ``text`` ("": none) or ``tokens`` end a step; a chain of ``most`` steps runs to its end.
    ``issued`` numbers the requests; ``spare`` are chains that ended with an answer, those that the search dropped too."""

    problem: Problem
    brief: Brief
    text: str
    tokens: int
    most: int
    issued: int = 0
    blind: bool = False  # the budget pays for no more scores
    broke: bool = False  # or for no more steps
    spare: list[Chain] = field(default_factory=list)

    def grow(self, chains: Sequence[Chain], why: str) -> Generator[Work, Reply, list[Chain | None]]:
        """A child of each (unended) chain, one step longer and scored; None for one that the budget denied or that failed. Raises
        ValueError for a score outside [0, 1]."""
        reply = yield Generate(tuple(self._request(chain) for chain in chains), why=why)
        grown = [self._child(parent, branch) for parent, branch in zip(chains, reply.branches, strict=True)]
        self.broke = self.broke or any(branch.finish == "denied" for branch in reply.branches)
        alive = [(i, child, reply.branches[i]) for i, child in enumerate(grown) if child is not None]
        if alive and not self.blind:
            texts = tuple(child.text for _, child, _ in alive)
            answer = yield Score(
                tuple(branch for _, _, branch in alive), why="process reward model", texts=texts
            )
            self.blind = len(answer.scores) < len(alive)
            for (i, child, _), score in zip(alive, answer.scores, strict=False):
                if not 0 <= score <= 1:
                    raise ValueError(f"a process reward model gives chances in [0, 1], not {score:g}")
                grown[i] = Chain(child.text, child.ids, child.steps, score, child.branch)
        self.spare += [c for c in grown if c is not None and c.branch is not None and c.branch.usable]
        return grown

    def finish(self, chain: Chain) -> Generator[Work, Reply, list[Chain]]:
        """Run a beginning to its end, as short as the budget makes it: where it pays for no further step, one chain answers."""
        self.most = 0
        grown = yield from self.grow([chain], "the best beginning answers")
        return [child for child in grown if child is not None]

    def _request(self, chain: Chain) -> Request:
        self.issued += 1
        more: dict[str, Any] = {"prefix": chain.text, "prefix_ids": chain.ids} if chain.ids else {}
        if chain.steps < self.most:
            more |= {"step_text": self.text, "step_tokens": self.tokens}
        thinking = max(self.brief.max_thinking_tokens - len(chain.ids), 1)
        return self.brief.request(self.problem, self.issued - 1, thinking_tokens=thinking, **more)

    def _child(self, parent: Chain, branch: Branch) -> Chain | None:
        completion = branch.completion
        if branch.finish not in ("stop", "length"):
            return None
        ended = None if completion.partial else branch
        return Chain(
            parent.text + completion.text, parent.ids + completion.token_ids, parent.steps + 1, parent.score, ended
        )  # fmt: skip


def logit(score: float) -> float:
    """log(p / (1 - p)), p kept 1e-6 away from 0 and 1."""
    p = min(max(score, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def shares(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """A particle's chance to be copied: softmax of logit(score) / ``temperature`` (arXiv 2502.01618, Algorithm 1)."""
    raised = [logit(score) / temperature for score in scores]
    top = max(raised)
    weights = [math.exp(value - top) for value in raised]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def effective(weights: Sequence[float]) -> float:
    """Effective sample size of weights that sum to 1: 1 / sum w^2, from 1 to their number."""
    return 1 / sum(weight * weight for weight in weights)


def annealed(scores: Sequence[float], progress: float, *, collapse: float = 0.5, early: float = 0.5) -> float:
    """The temperature of entropic particle filtering (arXiv 2510.05825, in the form of its authors' code): where the effective
    sample size is below ``collapse`` of the particles, in the ``early`` part of the steps, max(1, (1 - progress) N / ESS).
    Else 1."""
    ratio = effective(shares(scores)) / len(scores)
    if ratio >= collapse or progress >= early:
        return 1.0
    return max(1.0, (1 - progress) / ratio)


def systematic(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Systematic resampling: one draw u in [0, 1/count), and the places of u, u + 1/count, … in the cumulative weights. Index i
    comes floor(count w_i) or ceil(count w_i) times. ``weights`` sum to 1."""
    start = rng.random()
    picked, index, mass = [], 0, weights[0]
    for k in range(count):
        place = (k + start) / count
        while place >= mass and index < len(weights) - 1:
            index += 1
            mass += weights[index]
        picked.append(index)
    return picked
