"""From branches to an answer: votes, weighted votes, the best by a score. Pure; ties are broken by a seeded rule: the least hash
of (run seed, problem id, answer), so that no answer is favoured over a run's problems ("True" of "True" and "False").

Answers are compared through ``Branch.vote``, the representative of each class of equal answers, so that a vote uses the verifier's
own notion of equality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ttc.types import Branch


def tally(branches: Sequence[Branch], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Weight of each answer among the usable branches, in order of first arrival; ``weights`` (default 1 each) per branch."""
    votes: dict[str, float] = {}
    for branch, weight in zip(branches, weights or [1.0] * len(branches), strict=True):
        if branch.usable and branch.vote is not None:
            votes[branch.vote] = votes.get(branch.vote, 0.0) + weight
    return votes


def leader(votes: Mapping[str, float], seed: int, problem_id: str) -> str | None:
    """The answer with the most weight (any finite number); among equals, up to rounding, by the seeded rule. None without votes."""
    if not votes:
        return None
    top = max(votes.values())
    tied = [answer for answer, weight in votes.items() if weight >= top - 1e-12 * abs(top)]
    return min(
        tied, key=lambda answer: hashlib.sha256(f"{seed}\x1f{problem_id}\x1f{answer}".encode()).digest()
    )


def best(branches: Sequence[Branch], scores: Sequence[float], seed: int) -> Branch | None:
    """The usable branch with the highest score (ties: by the seeded rule over their answers, then the earlier one)."""
    ranked = [(score, branch) for score, branch in zip(scores, branches, strict=True) if branch.usable]
    if not ranked:
        return None
    top = max(score for score, _ in ranked)
    tied = [branch for score, branch in ranked if score == top]
    chosen = leader({branch.vote or "": 1.0 for branch in tied}, seed, tied[0].problem_id)
    return next(branch for branch in tied if branch.vote == chosen)


def confidences(branches: Sequence[Branch], signal: str) -> list[float]:
    """A confidence per branch: ``mean-logprob`` (nats a token, at most 0) or ``self-certainty`` (nats, at least 0).

    A branch without the measure gets the lowest value, so that it never wins. []: none has it (a server that keeps its
    log-probabilities to itself), and there is nothing to choose by.
    """
    field = {"mean-logprob": "mean_logprob", "self-certainty": "self_certainty"}[signal]
    values = [getattr(branch.completion, field) for branch in branches]
    if all(value is None for value in values):
        return []
    floor = float("-inf") if signal == "mean-logprob" else 0.0
    return [floor if value is None else float(value) for value in values]
