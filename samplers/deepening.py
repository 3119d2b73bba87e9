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
