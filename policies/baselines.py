"""Published policies under the same interface, to be compared with: adaptive self-consistency, early-stopping self-consistency,
confidence-filtered voting, Parallel-Probe. (Self-consistency and best-of-n are in ``fixed``.)

Each follows its paper's or its authors' code; where the two differ the docstring says which. Answers are chosen by ``leader``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb, exp, lgamma
from typing import Literal

import numpy as np

from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.samplers import Parallel, confidences, leader, tally
from ttc.types import Branch, Brief, Generate, Outcome, Problem, Routine, Steer

MAX_SAMPLES = 4096


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"policy: {name}={value:g}; give {low:g} to {high:g}")


@lru_cache(maxsize=4096)
def beta_confidence(first: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(first + 1, second + 1): the probability that the leader beats the runner-up (arXiv 2305.11860,
    section 3). With whole numbers it is P(Binomial(first + second + 1, 1/2) <= first)."""
    n = first + second + 1
    return float(sum(comb(n, k) for k in range(first + 1)) / 2**n)


@lru_cache(maxsize=4096)
def dirichlet_confidence(counts: tuple[int, ...]) -> float:
    """P(the leader's share is the largest) under Dirichlet(counts + 1) (arXiv 2305.11860, section 3), by quadrature over gamma
    variables: the integral of gamma(x; a_1) times the product of Gamma's distribution functions at the other a_i. ``counts``
    in falling order."""
    if len(counts) < 2:
        return beta_confidence(counts[0], 0)
    a = [c + 1 for c in counts]
    x = np.linspace(1e-9, a[0] + 12 * a[0] ** 0.5 + 12, 2000)
    density = np.exp((a[0] - 1) * np.log(x) - x - lgamma(a[0]))
    below = np.ones_like(x)
    for shape, times in Counter(a[1:]).items():  # 1 - exp(-x) sum_{k<shape} x^k / k!
        tail = sum(np.exp(k * np.log(x) - x - lgamma(k + 1)) for k in range(shape))
        below *= np.clip(1 - tail, 0.0, 1.0) ** times
    return float(np.trapezoid(density * below, x))


@dataclass(frozen=True, slots=True)
class AdaptiveConsistency:
    """Adaptive self-consistency (Aggarwal et al., arXiv 2305.11860): one sample at a time, until the leader is the most frequent
    answer with probability above ``confidence``, or ``n`` are drawn. ``rule`` "beta" compares it with the runner-up, "dirichlet"
    with all answers."""

    n: int = 64
    confidence: float = 0.95
    rule: Literal["beta", "dirichlet"] = "beta"
    name = "adaptive-consistency"

    def __post_init__(self) -> None:
        _check("n", self.n, 1, MAX_SAMPLES)
        _check("confidence", self.confidence, 0.5, 1.0)
        if self.rule not in ("beta", "dirichlet"):
            raise InputError(f"policy: unknown rule {self.rule!r}; use beta or dirichlet")

    def _sure(self, votes: Sequence[float]) -> bool:
        counts = sorted((int(v) for v in votes), reverse=True)
        if sum(counts) < 2:
            return False
        if self.rule == "beta":
            return beta_confidence(counts[0], counts[1] if len(counts) > 1 else 0) > self.confidence
        return dirichlet_confidence(tuple(counts)) > self.confidence

    def run(self, problem: Problem, brief: Brief) -> Routine:
        votes: dict[str, float] = {}
        for index in range(self.n):
            reply = yield Generate((brief.request(problem, index),), why="the leader is not sure enough")
            for answer, weight in tally(reply.branches).items():
                votes[answer] = votes.get(answer, 0.0) + weight
            if reply.branches[0].finish == "denied":
                break
            if self._sure(list(votes.values())):
                return Outcome(leader(votes, brief.seed, problem.id), "confident", votes)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Early-stopping self-consistency (Li et al., arXiv 2401.10480): windows of ``window`` samples, the last of what is
    left of ``n``; stops when all answers in one whole window agree, else votes over all ``n``."""

    n: int = 64
    window: int = 8
    name = "early-stopping"

    def __post_init__(self) -> None:
        _check("n", self.n, 1, MAX_SAMPLES)
        _check("window", self.window, 1, self.n)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        drawn: list[Branch] = []
        for start in range(0, self.n, self.window):
            requests = tuple(
                brief.request(problem, i) for i in range(start, min(start + self.window, self.n))
            )
            reply = yield Generate(requests, why=f"a window of {len(requests)}")
            drawn += reply.branches
            votes = tally(reply.branches)
            if len(votes) == 1 and sum(votes.values()) == self.window:
                return Outcome(next(iter(votes)), "confident", tally(drawn))
            if any(branch.finish == "denied" for branch in reply.branches):
                break
        votes = tally(drawn)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(frozen=True, slots=True)
class DeepConf:
    """Confidence-filtered voting (Fu et al., arXiv 2508.15260): of ``n`` branches the ``keep`` most confident share votes, each
    with its confidence. Online: ``warmup`` branches set the threshold, and drawing stops once the leader has ``consensus`` of the
    weight. The measure is the branch's own (``signal``; where no branch has it, votes count alike); the paper's sliding-window
    minimum needs the engine's tokens."""

    n: int = 64
    keep: float = 0.9
    mode: Literal["offline", "online"] = "offline"
    signal: Literal["self-certainty", "mean-logprob"] = "self-certainty"
    warmup: int = 16
    consensus: float = 0.95
    name = "deepconf"

    def __post_init__(self) -> None:
        _check("n", self.n, 1, MAX_SAMPLES)
        _check("keep", self.keep, 0.01, 1.0)
        if self.mode not in ("offline", "online") or self.signal not in ("self-certainty", "mean-logprob"):
            raise InputError(f"policy: deepconf has no mode {self.mode!r} with {self.signal!r}")

    @property
    def traits(self) -> Traits:
        return Traits(needs=(self.signal,))

    def _weights(self, branches: Sequence[Branch]) -> list[float]:
        values = confidences(branches, self.signal) or [0.0 if self.signal == "mean-logprob" else 1.0] * len(
            branches
        )
        return [exp(v) for v in values] if self.signal == "mean-logprob" else values

    def _floor(self, branches: Sequence[Branch], weights: Sequence[float]) -> float:
        """The least weight among the ``keep`` most confident of those that came to their end (the budget may pay for fewer than
        were wanted)."""
        ended = [w for b, w in zip(branches, weights, strict=True) if b.finish in ("stop", "length")]
        return sorted(ended, reverse=True)[max(1, ceil(self.keep * len(ended))) - 1] if ended else 0.0

    def run(self, problem: Problem, brief: Brief) -> Routine:
        if self.mode == "offline":
            branches = yield from Parallel(self.n, signals=(self.signal,)).run(problem, brief)
            weights = self._weights(branches)
            floor = self._floor(branches, weights)
            votes = tally(branches, [w if w >= floor else 0.0 for w in weights])
            return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)
        warm = min(self.warmup, self.n)
        branches = yield from Parallel(warm, signals=(self.signal,)).run(problem, brief)
        weights = self._weights(branches)
        floor = self._floor(branches, weights)
        votes = tally(branches, [w if w >= floor else 0.0 for w in weights])
        for index in range(warm, self.n):
            if votes and max(votes.values()) >= self.consensus * sum(votes.values()):
                return Outcome(leader(votes, brief.seed, problem.id), "confident", votes)
            reply = yield Generate(
                (brief.request(problem, index, signals=(self.signal,)),), why="no consensus yet"
            )
            *_, weight = self._weights([*branches, *reply.branches])
            for answer, share in tally(reply.branches, [weight]).items():
                votes[answer] = votes.get(answer, 0.0) + (share if weight >= floor else 0.0)
            if reply.branches[0].finish == "denied":
                break
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


@dataclass(slots=True)
class _Lane:
    vote: str | None = None
    running: bool = True
    pruned: bool = False
    strayed: int = 0


@dataclass(frozen=True, slots=True)
class ParallelProbe:
    """Parallel-Probe (arXiv 2602.03845): ``n`` branches side by side, probed every ``every`` tokens; stops when the majority of the
    anytime answers stayed the same ``stable`` times, and cuts a branch that strayed from it ``patience`` times in a row, after
    ``warmup`` probes. Majority over the branches that were not cut, as in the authors' code for the published table. On an engine
    that can't probe it is self-consistency."""

    n: int = 64
    every: int = 500
    stable: int = 40
    patience: int = 7
    warmup: int = 15
    name = "parallel-probe"

    def __post_init__(self) -> None:
        _check("n", self.n, 1, MAX_SAMPLES)
        _check("every", self.every, 1, 1e9)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        requests = tuple(brief.request(problem, i, probe_every=self.every) for i in range(self.n))
        lanes = {request.index: _Lane() for request in requests}
        winner: str | None = None
        step, same, cut = -1, 0, ()  # type: int, int, tuple[int, ...]
        work = Steer(requests, why=f"{self.n} branches, probed every {self.every} tokens")
        while True:
            reply = yield work
            for branch in reply.branches:
                lane = lanes[branch.index]
                lane.running = False
                lane.vote = branch.vote if branch.usable or lane.pruned else lane.vote
                if branch.finish in ("denied", "error"):
                    lane.pruned = True
            for probe in reply.probes:
                lanes[probe.branch].vote = probe.vote
            if reply.probes:
                step += 1
                winner, same, cut = self._consider(lanes, winner, same, step)
            if not reply.running or (reply.probes and same >= self.stable):
                break
            work = Steer(cancel=cut, why=f"strayed from the majority {self.patience} times")
            cut = ()
        if same < self.stable:
            winner = _majority(lanes) or winner
        votes = Counter(lane.vote for lane in lanes.values() if not lane.pruned and lane.vote is not None)
        return Outcome(
            winner, "confident" if same >= self.stable else "samples", {k: float(v) for k, v in votes.items()}
        )

    def _consider(
        self, lanes: dict[int, _Lane], winner: str | None, same: int, step: int
    ) -> tuple[str | None, int, tuple[int, ...]]:
        """The majority after a probe of all, how long it has stood, and whom to cut. The authors' code takes its first majority at
        the second probe."""
        now, cut = _majority(lanes), []
        if step > self.warmup and sum(not lane.pruned for lane in lanes.values()) > 1:
            for index, lane in lanes.items():
                if lane.running and not lane.pruned:
                    lane.strayed = lane.strayed + 1 if lane.vote != now else 0
                    if lane.strayed >= self.patience:
                        lane.pruned = True
                        cut.append(index)
            now = _majority(lanes)
        return now, same + 1 if step > 1 and now == winner else 0, tuple(cut)


def _majority(lanes: dict[int, _Lane]) -> str | None:
    """The most frequent anytime answer, no answer being one (as published); ties to the earlier branch."""
    counts = Counter(lane.vote for lane in lanes.values() if not lane.pruned)
    return counts.most_common(1)[0][0] if counts else None


__all__ = [
    "AdaptiveConsistency",
    "DeepConf",
    "EarlyStopping",
    "ParallelProbe",
    "beta_confidence",
    "dirichlet_confidence",
]
