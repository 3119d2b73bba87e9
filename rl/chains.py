"""What a task gives to ``ttc.rl.traces``: problems that can be worked out in styles, and chains of pieces.

Tasks: ``ttc.rl.sums`` (short and long), ``ttc.rl.products``, ``ttc.rl.countdown``. Values (answers) are compared and
printed, nothing else is asked of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple, Protocol

Value = int | str
"""An answer: a number, or countdown's expression."""


class Piece(NamedTuple):
    """Text and the weight of its tokens in the loss (0: read, never imitated)."""

    text: str
    weight: float = 1.0


class Chain(NamedTuple):
    """One way through a problem: what is written, and the value it ends at (wrong if a mistake was planted).

    ``said`` is the weight of the value in the conclusion: 0 where it does not follow from what is written (a wrong guess).
    """

    pieces: list[Piece]
    value: Value
    said: float = 1.0


class Worked(Protocol):
    """A problem that can be worked out.

    ``first`` gives the shares of styles for a first chain, ``stronger`` the styles that may recheck a style;
    ``unit_style`` is the style whose length is one unit of effort; ``max_tokens`` bounds the thinking; ``key`` is what
    held-out problems are told by.
    """

    @property
    def key(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> Value: ...
    @property
    def first(self) -> Mapping[str, float]: ...
    @property
    def stronger(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def unit_style(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...

    def right(self, value: Value) -> bool: ...
    def other_words(self, rng: random.Random) -> str: ...
    def work(
        self, rng: random.Random, style: str, mistake: bool = False, previous: Value | None = None
    ) -> Chain: ...


def wrong_number(rng: random.Random, value: int, digits: int) -> int:
    """``value`` with a carry lost or won (up to the place ``digits``), or with one digit wrong."""
    if rng.random() < 0.6:
        return value + rng.choice((-1, 1)) * int(10 ** rng.randrange(digits + 1))
    text = list(str(abs(value)))
    place = rng.randrange(len(text))
    text[place] = rng.choice([digit for digit in "0123456789" if digit != text[place]])
    wrong = int("".join(text))
    return -wrong if value < 0 else wrong
