"""Held-out problems: reasoning-gym's own generator and scorer, by seed, kept out of training by their key.

reasoning-gym seeds item i of a data set with seed + i, so a task's data sets of all seeds below ``SEEDS`` share their items:
they are excluded from training. So is what ``ttc solve --task`` draws for the tasks of the cards (each item from a hashed
seed of its own).
Problems of one digit (all 100 products) can't be held out and are in no card.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from ttc.rg_tasks import parse_spec
from ttc.rl.countdown import countdown_key
from ttc.rl.products import product_key
from ttc.types import seed_for

SEEDS = 3000
EVAL_SEED = 1000
"""Evaluations use items EVAL_SEED, EVAL_SEED + 1, …; small seeds are left to demos."""

DRAWN_SEEDS, DRAWN_ITEMS = (0, 1, 2), 250
"""``--seed`` and the items drawn with it that training must not see either."""


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


def product(digits: int) -> str:
    """The query of products of two factors of so many digits."""
    return f"rg:products?min_digits={digits}&max_digits={digits}"


def countdown(numbers: int) -> str:
    """The query of countdown with so many numbers up to 20 and targets of two digits."""
    return (
        f"rg:countdown?min_numbers={numbers}&max_numbers={numbers}&max_value=20&min_target=10&max_target=99"
    )


GRADED = {
    "sums": (
        between((3, 6), (2, 2)), between((4, 8), (1, 1)), between((8, 12), (1, 1)), between((6, 10), (2, 2)),
        between((4, 6), (3, 3)),
    ),
    "long": (between((16, 24), (1, 1)), between((24, 32), (1, 1)), between((16, 24), (2, 2)), between((24, 32), (2, 2))),
    "products": (product(2), product(3)),
    "countdown": (countdown(3), countdown(4)),
}  # fmt: skip
"""The tasks of the cards by family; the first is the demo."""

TASKS = (
    "rg:chain_sum",
    *(between((t, t), (d, d)) for d in (1, 2, 3, 4) for t in range(2, 25) if 4 <= t * d <= 32),
    *(between(terms, (d, d)) for d in (1, 2, 3) for terms in ((3, 6), (4, 6), (4, 8), (6, 10), (8, 12))),
    *(between((4, terms), (2, 3)) for terms in (6, 8)),
    *GRADED["long"],
    product(2),
    product(3),
)
"""Queries whose problems no training run ever sees. Countdown, slow to draw, is held out for fewer seeds (``keys``)."""


def dataset(task: str, seed: int, n: int) -> Any:
    """reasoning-gym's data set for a query ``rg:NAME?key=value&…``."""
    import reasoning_gym

    name, _, query = task.removeprefix("rg:").partition("?")
    options = {key: int(value) for key, value in parse_qsl(query)}
    return reasoning_gym.create_dataset(name, seed=seed, size=n, **options)


def items(task: str, n: int, seed: int = EVAL_SEED) -> list[Item]:
    """``n`` held-out problems of a task."""
    return [Item(entry["question"], entry["answer"], entry) for entry in dataset(task, seed, n)]


def key(metadata: dict[str, Any]) -> str:
    """What a problem is told by, from the metadata of reasoning-gym's entry."""
    if metadata["source_dataset"] == "countdown":
        return countdown_key(metadata["numbers"], metadata["target"])
    if metadata["source_dataset"] == "products":
        return product_key(metadata["expression"])
    return str(metadata["expression"])


def expressions(tasks: Iterable[str] = TASKS, seeds: int = SEEDS) -> frozenset[str]:
    """The key of every problem that a seed below ``seeds`` gives for the tasks: what training must not draw."""
    return frozenset(key(entry["metadata"]) for task in tasks for entry in dataset(task, 0, seeds))


def keys() -> frozenset[str]:
    """Everything that training must not draw."""
    found = set(expressions())
    for task in GRADED["countdown"]:
        found |= {key(entry["metadata"]) for entry in dataset(task, EVAL_SEED, 700)}
    for task in (task for tasks in GRADED.values() for task in tasks):
        text = parse_spec(task).text
        for seed in DRAWN_SEEDS:
            for index in range(DRAWN_ITEMS):
                item_seed = seed_for(seed, text, index) % 2**31
                random.seed(item_seed)
                found.add(key(dataset(task, item_seed, 1)[0]["metadata"]))
    return frozenset(found)
