"""The task rg:countdown: reach a target with all the given numbers, by search with backtracking.

Numbers, operators and targets are drawn as reasoning-gym draws them (games/countdown.py, 0.1.25). Every attempt is a fold: two
numbers are joined, then each further number is joined to the result; all results are whole and positive. Styles, weakest first, for
19, 9, 3 → 13::

    guess   (nothing written; the conclusion is a guess)
    search  19-3=16,16+9=25;19+3=22,22-9=13!               attempts that miss end in ";", the one that hits in "!"

A recheck works out the conclusion it checks; if that misses it goes on searching. Attempts that miss are drawn towards the
target and never repeat inside a chain.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttc.rl.chains import Chain, Piece, Value
from ttc.rl.tokenizer import COUNTDOWN_ENDING, COUNTDOWN_PHRASES

MOST = 999
"""No attempt passes through a larger number."""

MISSES = {2: (0.5, 4), 3: (0.25, 12), 4: (0.15, 16)}
"""By how many numbers: chance that the next attempt of a training search hits, and the most attempts that miss."""


class Fold(NamedTuple):
    """One attempt: its steps as text without the last result, that result, and the expression."""

    steps: str
    value: int
    expression: str


@functools.lru_cache(maxsize=64)
def folds(numbers: tuple[int, ...]) -> tuple[Fold, ...]:
    """All attempts with all ``numbers``; one for each expression."""
    found: dict[str, Fold] = {}
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for sign, value in _joins(a, b, mirror=False):
            if sign in "+*" and i > j:
                continue
            _extend(found, rest, f"{a}{sign}{b}=", value, f"{a}{sign}{b}", sign)
    return tuple(found.values())


def _joins(a: int, b: int, mirror: bool = True) -> Iterator[tuple[str, int]]:
    """Signs and whole, positive results of a ∘ b; ``mirror`` adds b − a and b / a (signs "~" and "\\")."""
    yield "+", a + b
    if a > b:
        yield "-", a - b
    if mirror and b > a:
        yield "~", b - a
    if a * b <= MOST:
        yield "*", a * b
    if b and a % b == 0:
        yield "/", a // b
    if mirror and a and b % a == 0 and a != b:
        yield "\\", b // a


def _extend(
    found: dict[str, Fold], rest: tuple[int, ...], steps: str, value: int, text: str, last: str
) -> None:
    """Join the remaining numbers in every order; ``last`` is the sign outermost in ``text``."""
    if not 0 < value <= MOST:
        return
    if not rest:
        found.setdefault(text, Fold(steps, value, text))
        return
    for place, n in enumerate(rest):
        others = rest[:place] + rest[place + 1 :]
        sums = last in "+-"
        for sign, result in _joins(value, n):
            if sign == "~":
                joined, step, outer = f"{n}-({text})" if sums else f"{n}-{text}", f"{n}-{value}=", "-"
            elif sign == "\\":
                joined, step, outer = f"{n}/({text})", f"{n}/{value}=", "/"
            else:
                wrapped = f"({text})" if sums and sign in "*/" else text
                joined, step, outer = f"{wrapped}{sign}{n}", f"{value}{sign}{n}=", sign
            _extend(found, others, f"{steps}{value},{step}", result, joined, outer)


@dataclass(frozen=True, slots=True)
class Countdown:
    """Numbers and a target that they reach; ``template`` is one of reasoning-gym's three ways to ask."""

    numbers: tuple[int, ...]
    target: int
    template: int

    @property
    def key(self) -> str:
        return countdown_key(self.numbers, self.target)

    @property
    def solutions(self) -> list[Fold]:
        return [fold for fold in folds(self.numbers) if fold.value == self.target]

    @property
    def answer(self) -> str:
        return min(self.solutions, key=lambda fold: len(fold.expression)).expression

    @property
    def prompt(self) -> str:
        numbers = ", ".join(map(str, self.numbers))
        a, b, c = COUNTDOWN_PHRASES[self.template]
        first, second = (numbers, self.target) if self.template == 0 else (self.target, numbers)
        return f"{a}{first}{b}{second}{c}{COUNTDOWN_ENDING}"

    @property
    def first(self) -> Mapping[str, float]:
        return {"guess": 0.35, "search": 0.65}

    @property
    def stronger(self) -> Mapping[str, tuple[str, ...]]:
        return {"guess": ("search",), "search": ("search",)}

    @property
    def unit_style(self) -> str:
        return "search"

    @property
    def max_tokens(self) -> int:
        return 700

    def right(self, value: Value) -> bool:
        return any(fold.expression == value for fold in self.solutions)

    def other_words(self, rng: random.Random) -> str:
        return self.prompt

    def work(
        self, rng: random.Random, style: str, mistake: bool = False, previous: Value | None = None
    ) -> Chain:
        """Guess, or search from what ``previous`` concluded; with ``mistake`` the guess is wrong or a miss is taken for a hit."""
        hit = rng.choice(self.solutions)
        misses = [fold for fold in folds(self.numbers) if fold.value != self.target]
        if style == "guess":
            if mistake and misses:
                return Chain([], self._near(rng, misses).expression, said=0.0)
            return Chain([], hit.expression)
        pieces: list[Piece] = []
        if previous is not None:
            checked = next(fold for fold in folds(self.numbers) if fold.expression == previous)
            if checked.value == self.target:
                return Chain([Piece(f"{checked.steps}{checked.value}!")], checked.expression)
            pieces.append(Piece(f"{checked.steps}{checked.value};"))
            misses = [fold for fold in misses if fold.expression != previous]
        chance, most = MISSES[len(self.numbers)]
        tried: set[str] = set()
        while len(tried) < min(most, len(misses)) and rng.random() > chance:
            fold = self._near(rng, misses)
            if fold.expression not in tried:
                tried.add(fold.expression)
                pieces.append(Piece(f"{fold.steps}{fold.value};"))
        left = [fold for fold in misses if fold.expression not in tried]
        if mistake and left:
            wrong = self._near(rng, left)
            pieces += [Piece(wrong.steps), Piece(f"{self.target}!", 0.0)]
            return Chain(pieces, wrong.expression)
        return Chain([*pieces, Piece(f"{hit.steps}{hit.value}!")], hit.expression)

    def _near(self, rng: random.Random, among: list[Fold]) -> Fold:
        """One of four drawn, the nearest to the target in most cases."""
        drawn = [rng.choice(among) for _ in range(4)]
        return min(drawn, key=lambda f: abs(f.value - self.target)) if rng.random() < 0.7 else drawn[0]


def countdown_key(numbers: tuple[int, ...] | list[int], target: int) -> str:
    """Numbers in order of size and the target."""
    return f"{sorted(numbers)}={target}"


def draw(rng: random.Random, data: Mapping[str, Any], progress: float) -> Countdown:
    """A training problem: ``data["countdown_numbers"]`` are the shares of 2, 3, 4 numbers (two only in the first half),
    values up to ``data["countdown_value"]``, targets within ``data["countdown_target"]``."""
    shares = list(data["countdown_numbers"])
    shares[0] *= max(0.0, 1 - 2 * progress)
    low, high = data["countdown_target"]
    while True:
        count = rng.choices((2, 3, 4), shares)[0]
        numbers = [rng.randint(1, data["countdown_value"]) for _ in range(count)]
        total = numbers[0]
        for place in range(1, count):
            sign = rng.choice("+-*/")
            if sign == "/":
                divisors = [n for n in numbers[place:] if total % n == 0]
                if divisors:
                    numbers[place] = rng.choice(divisors)
                    total //= numbers[place]
                    continue
                sign = "-"
            n = numbers[place]
            total = total + n if sign == "+" else total - n if sign == "-" else total * n
        if not low <= total <= high:
            continue
        rng.shuffle(numbers)
        problem = Countdown(tuple(numbers), total, rng.randrange(3))
        if problem.solutions:
            return problem
