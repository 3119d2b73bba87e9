"""Held-out problems: reasoning-gym's own generator and scorer, by seed, kept out of training by expression.

reasoning-gym seeds item i of a data set with seed + i, so a task's data sets of all seeds below ``SEEDS``
share their items. Everything that those seeds can produce for the graded tasks is excluded from training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

SEEDS = 3000
EVAL_SEED = 1000
"""Evaluations use items EVAL_SEED, EVAL_SEED + 1, …; small seeds are left to demos."""


class Item(NamedTuple):
    """A held-out problem: the prompt verbatim, the answer, and the entry that reasoning-gym's scorer
    wants."""

    prompt: str
    answer: str
    entry: dict[str, Any]


def between(terms: tuple[int, int], digits: tuple[int, int]) -> str:
    """The query of chain_sum with terms and digits in these ranges, ends included."""
    (a, b), (c, d) = terms, digits
    return f"rg:chain_sum?min_terms={a}&max_terms={b}&min_digits={c}&max_digits={d}"


TASKS = (
    "rg:chain_sum",
    *(between((t, t), (d, d)) for d in (1, 2, 3, 4) for t in range(2, 25) if 4 <= t * d <= 32),
    *(between(terms, (d, d)) for d in (1, 2, 3) for terms in ((3, 6), (4, 6), (4, 8), (6, 10), (8, 12))),
    *(between((4, terms), (2, 3)) for terms in (6, 8)),
)
"""Queries whose problems no training run ever sees."""


def dataset(task: str, seed: int, n: int) -> Any:
    """reasoning-gym's data set for a query ``rg:NAME?key=value&…``."""
    import reasoning_gym

    name, _, query = task.removeprefix("rg:").partition("?")
    options = {key: int(value) for key, value in parse_qsl(query)}
    return reasoning_gym.create_dataset(name, seed=seed, size=n, **options)


def items(task: str, n: int, seed: int = EVAL_SEED) -> list[Item]:
    """``n`` held-out problems of a task."""
    return [Item(entry["question"], entry["answer"], entry) for entry in dataset(task, seed, n)]


def expressions(tasks: Iterable[str] = TASKS, seeds: int = SEEDS) -> frozenset[str]:
    """Every expression that a seed below ``seeds`` gives for the tasks: what training must not draw."""
    return frozenset(entry["metadata"]["expression"] for task in tasks for entry in dataset(task, 0, seeds))
