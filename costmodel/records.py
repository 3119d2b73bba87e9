"""Recorded results in memory: pools of branches, and published accuracy curves. ``pools`` and ``ledgers``
read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttc.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PooledProblem:
    """One problem's branches. Answers are codes: 0 the gold answer, 1.. other answers, -1 none.

    ``tokens`` (S,) lengths; ``final`` (S,) codes of the last answers; ``probes`` (S, K) codes of the
    answers that a branch gives when made to answer after ``(k + 1) * probe_every`` tokens (K = 0: never
    probed). ``heard`` (S,): how many of them were recorded, the rest of a row repeating the last (None: unknown).
    ``confidence``: (S,) of each measure that was recorded of every branch, by the names that requests use.
    """

    id: str
    tokens: Floats
    final: Ints
    probes: Ints
    heard: Ints | None = None
    confidence: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return int(self.tokens.size)

    def answers_at(self, thinking_tokens: float, probe_every: int) -> Ints:
        """Codes (S,) of the answers when thinking is cut at ``thinking_tokens``; a cut branch that was
        never probed has none."""
        if math.isinf(thinking_tokens):
            return self.final
        kept = self.tokens <= thinking_tokens
        column = int(thinking_tokens // probe_every) - 1 if probe_every else -1
        if column < 0 or self.probes.shape[1] == 0:
            return np.where(kept, self.final, -1)
        return np.where(kept, self.final, self.probes[:, min(column, self.probes.shape[1] - 1)])


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Branches of one model on one task, at one KV budget (None: dense). ``thinking_tokens``: the limit on thinking that they were
    sampled under (0: unknown)."""

    name: str
    problems: tuple[PooledProblem, ...]
    model: str | None = None
    task: str | None = None
    probe_every: int = 0
    kv_budget: int | None = None
    kv_block: int | None = None
    lengths_estimated: bool = False
    prompt_tokens: float | None = None
    effort: float | None = None
    thinking_tokens: int = 0

    @property
    def tokens(self) -> Floats:
        return np.concatenate([p.tokens for p in self.problems])

    @property
    def samples(self) -> int:
        """The samples that every problem has."""
        return min(p.samples for p in self.problems)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Accuracy of one model on one task against mean tokens (``tokens``) or KV budget (``kv_budgets``,
    inf: dense)."""

    model: str
    task: str
    x: Floats
    accuracy: Floats
    axis: str
    source: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """What ``ttc simulate --json`` said of a policy on a pool: accuracy with its interval over problems, and means per problem.
    ``model`` is "" where the pool does not tell it."""

    policy: str
    model: str
    task: str | None
    tokens: float
    samples: float
    accuracy: float
    low: float
    high: float
    problems: int
    source: str


def rows_of(text: str, name: str) -> Iterator[dict[str, Any]]:
    for i, line in enumerate(text.split("\n")):  # JSON leaves other separators as they are
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{name}: line {i + 1} is not JSON; each line is one object") from None
        if not isinstance(row, dict):
            raise InputError(f"{name}: line {i + 1} is not an object; each line is one object")
        yield row
