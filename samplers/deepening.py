"""Where a chain is told to think again: the checkpoints of iterative deepening (ID-Sampling, arXiv 2502.05449) and of its baseline.

The paper gives an initial budget, a growth factor and a trigger sentence; what it leaves open (whether a budget counts total or new
tokens, what happens to finished chains) is a parameter here.
"""

from __future__ import annotations

import math


def checkpoints(
    first: int, growth: float, limit: int, *, incremental: bool = False, most: int = 4096
) -> tuple[int, ...]:
    """Positions of triggers for a chain of at most ``limit`` tokens.

    Total (default): checkpoint k lies at ceil(first * growth^k) tokens of output, triggers included. Incremental: the k-th
    number is how many new tokens follow the trigger before. ``growth`` 1 puts one every ``first`` tokens: the uniform baseline.
    """
    if growth == 1:
        return (
            (first,) * min(most, -(-limit // first))
            if incremental
            else tuple(range(first, limit, first))[:most]
        )
    found: list[int] = []
    position = k = 0
    while len(found) < most:
        size = math.ceil(min(first * growth**k, limit))
        if not incremental and found and size <= found[-1]:  # on to where it is more
            k = max(k + 1, int(math.log(found[-1] / first) / math.log(growth)))
            continue
        position = position + size if incremental else size
        if position >= limit:
            break
        found.append(size)
        k += 1
    return tuple(found)


def most_triggers(
    first: int, growth: float, limit: int, *, trigger_tokens: int = 1, incremental: bool = False
) -> int:
    """A bound on the triggers in a thought of at most ``limit`` tokens (so overhead is at most this times the trigger's length).

    Total, growth g > 1: the k-th checkpoint lies at ceil(B0 g^k) >= B0 g^k, and is used only if it is below ``limit``; so
    k < log_g(limit / B0), and there are at most 1 + floor(log_g(limit / B0)). Total, g = 1: a checkpoint every B0 tokens,
    floor((limit - 1) / B0). Incremental: before the K-th trigger lie sum_{k<K} B0 g^k = B0 (g^K - 1) / (g - 1) new tokens (B0 K for
    g = 1) and K - 1 triggers; so K <= log_g(1 + (limit / B0)(g - 1)) (limit / (B0 + t) + 1 for g = 1, t the trigger's tokens).
    As a share of the thought, the overhead of total checkpoints falls as log(L) / L; that of the uniform baseline stays at t / B0.
    """
    if limit <= first:
        return 0
    if growth == 1:
        return (limit + trigger_tokens) // (first + trigger_tokens) if incremental else (limit - 1) // first
    if incremental:
        return math.floor(math.log(1 + limit / first * (growth - 1), growth) + 1e-9)
    return 1 + math.floor(math.log(limit / first, growth) + 1e-9)
