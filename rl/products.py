"""The task rg:products: products of two numbers of 1 to 3 digits, worked out with a scratchpad.

The distribution is reasoning-gym's (products.py, 0.1.25, two terms): both factors have the same number of digits. Styles, weakest
first; one line each for ``47 * 38``::

    direct    56;                                          (one digit only)
    partials  47 * 8 = 376;47 * 30 = 1410;376 + 1410 = 1786;
    columns   47 * 8:56,37 = 376;47 * 30:21,14 = 1410;376 + 1410:6,8,7,1 = 1786;

A column of a partial product is digit × digit + carry; its tens are the next carry. A digit 0 has no partial product.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ttc.rl.chains import Chain, Piece, Value, wrong_number
from ttc.rl.sums import column_work
from ttc.rl.tokenizer import PRODUCT_PHRASES


@dataclass(frozen=True, slots=True)
class Product:
    """Two factors of ``digits`` digits each."""

    left: int
    right_factor: int
    digits: int

    @property
    def expression(self) -> str:
        return f"{self.left} * {self.right_factor}"

    @property
    def key(self) -> str:
        return product_key(self.expression)

    @property
    def answer(self) -> int:
        return self.left * self.right_factor

    @property
    def prompt(self) -> str:
        return f"{PRODUCT_PHRASES[0]}{self.expression}{PRODUCT_PHRASES[1]}"

    @property
    def first(self) -> Mapping[str, float]:
        return {"direct": 0.7, "columns": 0.3} if self.digits == 1 else {"partials": 0.6, "columns": 0.4}

    @property
    def stronger(self) -> Mapping[str, tuple[str, ...]]:
        return {"direct": ("columns",), "partials": ("columns",), "columns": ("columns",)}

    @property
    def unit_style(self) -> str:
        return "partials"

    @property
    def max_tokens(self) -> int:
        return 1000

    def right(self, value: Value) -> bool:
        return value == self.answer

    def other_words(self, rng: random.Random) -> str:
        compact = self.expression.replace(" ", "")
        return rng.choice((f"What is {self.expression}?", f"What is {compact}?", self.expression, compact))

    def work(
        self, rng: random.Random, style: str, mistake: bool = False, previous: Value | None = None
    ) -> Chain:
        """Work it out; with ``mistake`` one number goes wrong and what follows builds on it."""
        if style == "direct":
            value = wrong_number(rng, self.answer, 1) if mistake else self.answer
            return Chain([Piece(str(value), float(not mistake)), Piece(";")], value)
        factors = [
            int(digit) * 10**place
            for place, digit in enumerate(reversed(str(self.right_factor)))
            if digit != "0"
        ]
        steps = max(1, 2 * len(factors) - 1)
        wrong_at = rng.randrange(steps) if mistake else -1
        pieces: list[Piece] = []
        total, step = 0, 0
        partials: list[int] = []
        for factor in factors:
            right = self.left * factor
            value = wrong_number(rng, right, self.digits) if step == wrong_at else right
            work = f":{product_columns(self.left, factor)}" if style == "columns" else ""
            pieces += [
                Piece(f"{self.left} * {factor}"),
                Piece(f"{work} = {value}", float(value == right)),
                Piece(";"),
            ]
            partials.append(value)
            step += 1
        for place, partial in enumerate(partials):
            if not place:
                total = partial
                continue
            right = total + partial
            value = wrong_number(rng, right, self.digits) if step == wrong_at else right
            work = f":{column_work(total, partial)}" if style == "columns" else ""
            pieces += [
                Piece(f"{total} + {partial}"),
                Piece(f"{work} = {value}", float(value == right)),
                Piece(";"),
            ]
            total = value
            step += 1
        if not factors:  # times nothing
            total = wrong_number(rng, 0, 0) if mistake else 0
            pieces = [
                Piece(f"{self.left} * {self.right_factor}"),
                Piece(f" = {total}", float(not mistake)),
                Piece(";"),
            ]
        return Chain(pieces, total)


def product_key(expression: str) -> str:
    """One key for a product and its mirror image."""
    return " * ".join(sorted(expression.split(" * ")))


def product_columns(left: int, factor: int) -> str:
    """Digit × digit + carry from the right, for a ``factor`` of one digit and zeros: ``47, 30 → 21,14``."""
    digit = int(str(factor)[0])
    columns: list[str] = []
    carry = 0
    for place in reversed(str(left)):
        value = int(place) * digit + carry
        columns.append(str(value))
        carry = value // 10
    return ",".join(columns)


def draw(rng: random.Random, data: Mapping[str, Any], progress: float) -> Product:
    """A training problem; ``data["product_digits"]`` are the shares of 1, 2, … digits, which grow over the first half."""
    shares = data["product_digits"]
    count = min(len(shares), max(2, round(len(shares) * (0.4 + 1.2 * progress))))
    digits = rng.choices(range(1, count + 1), shares[:count])[0]
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    return Product(rng.randint(low, high), rng.randint(low, high), digits)
