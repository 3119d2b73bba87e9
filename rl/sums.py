"""The task rg:chain_sum: sums and differences, short and long, drawn and worked out in four styles.

The distribution is reasoning-gym's (chain_sum.py, 0.1.25): every term of a problem has the same number of
digits, from 10^(d-1) to 10^d - 1 (one digit: 0 to 9), the first term has no sign, operators are fair coins.
It is drawn here anew because reasoning-gym seeds item i with seed + i, so that neighbouring seeds share
items.

Styles, weakest first; one line each for ``47 + 38 - 58``::

    totals     47,85,27;                                 running totals only
    equations  47 + 38 = 85;85 - 58 = 27;                every step written out
    columns    47 + 38:15,8 = 85;85 - 58:7-,2 = 27;      every step by digit columns from the right
    state      47 + 38 - 58;85 - 58;27;                  what is left to add, written anew after every step

In an addition a column's tens are its carry; in a subtraction "-" marks a borrow. State is for long problems: n terms take
about n² tokens, and no step looks further back than the line before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttc.rl.chains import Chain, Piece, Value
from ttc.rl.tokenizer import CHAIN_SUM_PHRASE

STYLES = ("totals", "equations", "columns")
LONG_TERMS = 13
"""From so many terms on a sum is long: it may be worked out by state, and not by columns."""

LONG_TOKENS = 2600
SHORT_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Sum:
    """A problem: terms without sign, and the sign of each (the first is 1; "- 0" keeps its own)."""

    terms: tuple[int, ...]
    signs: tuple[int, ...]
    digits: int

    @property
    def expression(self) -> str:
        """As reasoning-gym writes it; also the key by which held-out problems are kept out of training."""
        return f"{self.terms[0]}{self.tail(1)}"

    def tail(self, start: int) -> str:
        """The terms from ``start`` on, each with its sign."""
        rest = zip(self.terms[start:], self.signs[start:], strict=True)
        return "".join(f" {_sign(sign)} {term}" for term, sign in rest)

    @property
    def answer(self) -> int:
        return sum(term * sign for term, sign in zip(self.terms, self.signs, strict=True))

    @property
    def key(self) -> str:
        return self.expression

    @property
    def prompt(self) -> str:
        return f"{CHAIN_SUM_PHRASE}{self.expression} ="

    @property
    def long(self) -> bool:
        return len(self.terms) >= LONG_TERMS

    @property
    def first(self) -> Mapping[str, float]:
        if self.long:
            return {"totals": 0.25, "equations": 0.40, "state": 0.35}
        return {"totals": 0.50, "equations": 0.35, "columns": 0.15}

    @property
    def stronger(self) -> Mapping[str, tuple[str, ...]]:
        if self.long:
            return {"totals": ("equations", "state"), "equations": ("state",), "state": ("state",)}
        return {"totals": ("equations", "columns"), "equations": ("columns",), "columns": ("columns",)}

    @property
    def unit_style(self) -> str:
        return "equations"

    @property
    def max_tokens(self) -> int:
        return LONG_TOKENS if self.long else SHORT_TOKENS

    def right(self, value: Value) -> bool:
        return value == self.answer

    def other_words(self, rng: random.Random) -> str:
        compact = self.expression.replace(" ", "")
        return rng.choice(
            (
                f"What is {self.expression}?",
                f"What is {compact}?",
                f"{self.expression} =",
                self.expression,
                compact,
            )
        )

    def work(
        self, rng: random.Random, style: str, mistake: bool = False, previous: Value | None = None
    ) -> Chain:
        """See ``work``; ``previous`` (the conclusion that is checked) does not matter here."""
        return work(rng, self, style, mistake)


def draw(rng: random.Random, data: Mapping[str, Any], progress: float) -> Sum:
    """A training problem. ``progress`` (0 to 1) is the share of training done: terms and digits grow over the
    first half.

    ``data`` is the table of that name in the size's TOML file: max_terms, digit_weights (for 1, 2, … digits),
    max_columns (terms × digits, so that no trace outgrows its budget of tokens).
    """
    reach = min(1.0, 0.2 + 1.6 * progress)
    weights: Sequence[float] = data["digit_weights"]
    count = min(len(weights), max(2, round(len(weights) * (0.4 + 1.6 * progress))))
    digits = rng.choices(range(1, count + 1), weights[:count])[0]
    most = min(2 + round((data["max_terms"] - 2) * reach), data["max_columns"] // digits)
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    terms = tuple(rng.randint(low, high) for _ in range(rng.randint(2, most)))
    return Sum(terms, (1, *(rng.choice((1, -1)) for _ in terms[1:])), digits)


def draw_long(rng: random.Random, data: Mapping[str, Any], progress: float) -> Sum:
    """A long training problem: up to ``data["long_terms"]`` terms (reached at two thirds of training) of 1 or 2 digits, as
    ``data["long_digits"]`` shares them."""
    most = round(LONG_TERMS + 3 + (data["long_terms"] - LONG_TERMS - 3) * min(1.0, 1.5 * progress))
    digits = rng.choices(range(1, len(data["long_digits"]) + 1), data["long_digits"])[0]
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    terms = tuple(rng.randint(low, high) for _ in range(rng.randint(LONG_TERMS, most)))
    return Sum(terms, (1, *(rng.choice((1, -1)) for _ in terms[1:])), digits)


def work(rng: random.Random, problem: Sum, style: str, mistake: bool = False) -> Chain:
    """Work the problem out; with ``mistake`` one step goes wrong and everything after it builds on the wrong
    total."""
    wrong_at = rng.randrange(1, len(problem.terms)) if mistake else -1
    total = problem.terms[0]
    pieces = [Piece(str(total))] if style == "totals" else []
    if style == "state":
        pieces = [Piece(f"{problem.expression};")]
    for index in range(1, len(problem.terms)):
        right = Step(
            problem.terms[index], problem.signs[index], total + problem.terms[index] * problem.signs[index]
        )
        step = _mistake(rng, problem, index, right) if index == wrong_at else right
        weight = float(step == right)
        if style == "totals":
            pieces += [Piece(","), Piece(str(step.value), weight)]
        elif style == "state":
            pieces += [Piece(str(step.value), weight), Piece(f"{problem.tail(index + 1)};")]
        else:
            columns = f":{column_work(total, step.term * step.sign)}" if style == "columns" else ""
            read_right = float(step[:2] == right[:2])
            pieces += [Piece(str(total)), Piece(f" {_sign(step.sign)} {step.term}", read_right)]
            pieces += [Piece(f"{columns} = {step.value}", weight), Piece(";")]
        total = step.value
    if style == "totals":
        pieces.append(Piece(";"))
    return Chain(pieces, total)


def column_work(left: int, right: int) -> str:
    """Digit columns from the right of ``left + right``: sums with their carries, or differences with "-" for
    a borrow."""
    adding = left == 0 or right == 0 or (left < 0) == (right < 0)
    upper, lower = sorted((abs(left), abs(right)), reverse=True)
    columns: list[str] = []
    carry = 0
    while upper or lower or not columns:
        a, b = upper % 10, lower % 10
        if adding:
            value = a + b + carry
            columns.append(str(value))
            carry = value // 10
        else:
            value = a - b - carry
            carry = int(value < 0)
            columns.append(f"{value % 10}{'-' if carry else ''}")
        upper, lower = upper // 10, lower // 10
    return ",".join(columns)


class Step(NamedTuple):
    """One step of a chain: the term and sign that were read, the total that was written."""

    term: int
    sign: int
    value: int


def _mistake(rng: random.Random, problem: Sum, index: int, right: Step) -> Step:
    """A step that goes wrong in one of four ways."""
    term, sign, value = right
    before = value - term * sign
    kind = rng.random()
    if kind < 0.15 and term:  # the sign read wrongly
        return Step(term, -sign, before - term * sign)
    if kind < 0.3 and index + 1 < len(problem.terms) and problem.terms[index + 1] != term:  # a term skipped
        term = problem.terms[index + 1]
        return Step(term, sign, before + term * sign)
    if kind < 0.7:  # a carry lost or won
        return Step(term, sign, value + rng.choice((-1, 1)) * 10 ** rng.randrange(problem.digits + 1))
    digits = list(str(abs(value)))  # a digit wrong
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([digit for digit in "0123456789" if digit != digits[place]])
    wrong = int("".join(digits))
    return Step(term, sign, -wrong if value < 0 else wrong)


def _sign(sign: int) -> str:
    return "+" if sign > 0 else "-"
