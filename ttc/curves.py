"""What more samples buy, read off finished results: accuracy by number of votes, with intervals over problems.

The curves themselves (unbiased, seeded) are ``ttc.costmodel``'s; this module only turns results into their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ttc.types import Result


class Gain(NamedTuple):
    mean: float
    low: float
    high: float


class VotePoint(NamedTuple):
    """Accuracy of the majority of ``votes`` samples with its 95 % interval; ``gain`` over one sample, paired by problem (of one
    sample over itself: none)."""

    votes: int
    accuracy: float
    low: float
    high: float
    gain: Gain


def vote_curve(results: Sequence[Result], sizes: Sequence[int], *, seed: int = 0) -> list[VotePoint]:
    """One point per size that every scored problem has branches for, the same samples at every size."""
    import numpy as np

    from ttc.costmodel import intervals
    from ttc.costmodel.accuracy import vote

    codes = [_codes(result) for result in results if result.verdict is not None]
    if not codes:
        return []
    fewest = min(len(c) for c in codes)
    rows = {}
    for size in (s for s in sizes if s <= fewest):
        rows[size] = np.array([vote(np.array(c), size, seed=seed + i) for i, c in enumerate(codes)])
    points = []
    for size, row in rows.items():
        estimate, first = intervals.mean(row), rows[min(rows)]
        gain = Gain(0.0, 0.0, 0.0) if row is first else Gain(*intervals.paired(row - first)[:3])
        points.append(VotePoint(size, estimate.mean, estimate.low, estimate.high, gain))
    return points


def _codes(result: Result) -> list[int]:
    """Each sampled branch's answer as a small integer: 0 right, 1… wrong ones, -1 none."""
    classes: dict[str, int] = {}
    codes = []
    for branch in result.branches:
        if branch.finish == "denied":
            continue
        if not branch.usable or branch.vote is None:
            codes.append(-1)
        elif branch.vote in result.right:
            codes.append(0)
        else:
            codes.append(classes.setdefault(branch.vote, len(classes) + 1))
    return codes
