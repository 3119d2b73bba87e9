"""Policies that decide beforehand how many branches to draw: greedy, best-of-n, self-consistency, weighted vote.

The budget may pay for fewer than ``n``; the answer is then chosen among those, and the result says that the budget stopped it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal, get_args

from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.samplers import Parallel, best, confidences, leader, tally
from ttc.types import Branch, Brief, Outcome, Problem, Reply, Routine, Score, Work

Signal = Literal["mean-logprob", "self-certainty"]
MAX_SAMPLES = 4096


def _check_n(n: int) -> None:
    if not 1 <= n <= MAX_SAMPLES:
        raise InputError(f"policy: n={n} samples; give 1 to {MAX_SAMPLES}")


def _choose(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"policy: unknown {field} {value!r}; use one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Greedy:
    """One branch at temperature 0."""

    name = "greedy"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        branches = yield from Parallel(1, temperature=0.0).run(problem, brief, why="one greedy branch")
        votes = tally(branches)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """Draw ``n`` branches and take the answer with the most votes (Wang et al., arXiv 2203.11171)."""

    n: int = 8
    name = "self-consistency"

    def __post_init__(self) -> None:
        _check_n(self.n)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        branches = yield from Parallel(self.n).run(problem, brief)
        votes = tally(branches)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(frozen=True, slots=True)
class WeightedVote:
    """Draw ``n`` branches; each votes with its confidence: exp(mean log-probability), the geometric-mean token probability, or
    its self-certainty (Kang et al., arXiv 2502.18581), or the reward model's score (weighted best-of-N). Scores that are added up
    are 0 or more: a problem whose reward model gives less fails (ValueError). Where the budget can't pay for the reward model, or
    no branch has the confidence, votes count alike."""

    n: int = 8
    weight: Literal["mean-logprob", "self-certainty", "reward"] = "self-certainty"
    name = "weighted-vote"

    def __post_init__(self) -> None:
        _check_n(self.n)
        _choose("weight", self.weight, (*get_args(Signal), "reward"))

    @property
    def traits(self) -> Traits:
        return Traits(needs=(self.weight,))

    def run(self, problem: Problem, brief: Brief) -> Routine:
        signals = () if self.weight == "reward" else (self.weight,)
        branches = yield from Parallel(self.n, signals=signals).run(problem, brief)
        usable = [branch for branch in branches if branch.usable]
        scores = yield from _scores(usable, self.weight)
        if self.weight == "mean-logprob":
            scores = [exp(score) for score in scores]
        if min(scores, default=0.0) < 0:
            raise ValueError(
                f"a vote weighs 0 or more, and the reward model gives {min(scores):g}; let it give chances (the sigmoid of logits),"
                " or use best-of-n?score=reward"
            )
        votes = tally(usable, scores)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Draw ``n`` branches and keep the one with the best score: a confidence that needs no verifier, or the reward model's.

    Where the budget can't pay for the reward model, or no branch has the confidence, the answer with the most votes is taken
    instead.
    """

    n: int = 8
    score: Literal["mean-logprob", "self-certainty", "reward"] = "self-certainty"
    name = "best-of-n"

    def __post_init__(self) -> None:
        _check_n(self.n)
        _choose("score", self.score, (*get_args(Signal), "reward"))

    @property
    def traits(self) -> Traits:
        return Traits(needs=(self.score,))

    def run(self, problem: Problem, brief: Brief) -> Routine:
        signals = () if self.score == "reward" else (self.score,)
        branches = yield from Parallel(self.n, signals=signals).run(problem, brief)
        usable = [branch for branch in branches if branch.usable]
        scores = yield from _scores(usable, self.score)
        if len(scores) < len(usable):
            votes = tally(usable)
            return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)
        chosen = best(usable, scores, brief.seed)
        top: dict[str, float] = {}
        for branch, score in zip(usable, scores, strict=True):
            vote = branch.vote or ""
            if score > float("-inf"):
                top[vote] = max(score, top.get(vote, score))
        return Outcome(chosen.vote if chosen is not None else None, "samples", top)


def _scores(branches: Sequence[Branch], by: str) -> Generator[Work, Reply, list[float]]:
    """A score per branch, from its own confidence or from the reward model. []: none has one, or the budget can't pay for that."""
    if by != "reward":
        return confidences(branches, by)
    reply = yield Score(tuple(branches), why="reward model")
    return list(reply.scores)
