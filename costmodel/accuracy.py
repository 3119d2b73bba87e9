"""Accuracy from recorded branches: coverage and vote curves (their intervals: ``ttc.costmodel.intervals``).

Sources: the unbiased coverage 1 - C(S-c, K)/C(S, K) of Brown et al. (arXiv 2407.21787), as used by
Kinetics for Best-of-N.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ttc.costmodel.records import Floats, Ints, Pool
from ttc.errors import InputError


def coverage(correct: NDArray[np.int64] | int, samples: int, draws: int) -> Floats:
    """P(at least one of ``draws`` is correct) for problems with ``correct`` right answers in ``samples``:
    1 - C(S-c,K)/C(S,K).

    Unbiased, in [0, 1]. Raises InputError when K exceeds S.
    """
    if not 1 <= draws <= samples:
        raise InputError(f"coverage at {draws} of {samples} samples; draw between 1 and {samples}")
    c = np.atleast_1d(np.asarray(correct, dtype=np.float64))
    i = np.arange(draws, dtype=np.float64)
    missing = np.clip((samples - c[:, None] - i) / (samples - i), 0.0, None)  # C(S-c,K)/C(S,K) as a product
    return np.asarray(1.0 - np.prod(missing, axis=1))


def vote(codes: Ints, draws: int, *, rounds: int = 200, seed: int = 0, right: int = 1) -> float:
    """P(the majority of ``draws`` branches, drawn without replacement, is right: a code below ``right``); -1
    abstains.

    Ties count as their fair share. Averages over ``rounds`` seeded draws; exact for draws = 1 and for all
    branches.
    """
    if not 1 <= draws <= codes.size:
        raise InputError(f"vote of {draws} of {codes.size} samples; draw between 1 and {codes.size}")
    if draws == 1:
        return float(np.mean((codes >= 0) & (codes < right)))
    classes = int(codes.max()) + 1
    if classes <= 0:
        return 0.0
    if draws == codes.size:
        picked = codes[None, :]
    else:
        order = _orders(codes.size, rounds, seed)
        picked = codes[order[:, :draws]]
    rows = picked.shape[0]
    flat = (np.arange(rows)[:, None] * (classes + 1) + np.where(picked < 0, classes, picked)).ravel()
    counts = np.bincount(flat, minlength=rows * (classes + 1)).reshape(rows, classes + 1)[:, :classes]
    top = counts.max(axis=1)
    leaders = (counts == top[:, None]).sum(axis=1)
    good = (counts[:, :right] == top[:, None]).sum(axis=1)
    return float(np.mean(np.where(top > 0, good / leaders, 0.0)))


@lru_cache(maxsize=64)
def _orders(size: int, rounds: int, seed: int) -> NDArray[np.int64]:
    """``rounds`` seeded permutations of ``size`` branches, shared by all N so that curves are smooth."""
    return np.asarray(np.random.default_rng(seed).random((rounds, size)).argsort(axis=1))


RULES: dict[str, str] = {"vote": "majority of the answers", "coverage": "any answer right (needs a verifier)"}


def pool_accuracy(
    pool: Pool, *, samples: int, thinking_tokens: float = math.inf, rule: str = "vote", rounds: int = 200
) -> Floats:
    """Accuracy of each problem (P,) with ``samples`` branches cut at ``thinking_tokens`` and joined by
    ``rule``."""
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is not known; use {' or '.join(RULES)}")
    scores = []
    for problem in pool.problems:
        codes = problem.answers_at(thinking_tokens, pool.probe_every)
        if rule == "coverage":
            scores.append(float(coverage(int((codes == 0).sum()), codes.size, samples)[0]))
        else:
            scores.append(vote(codes, samples, rounds=rounds, seed=0))
    return np.array(scores)
