"""Budgets as people write them, and the meter that keeps them hard.

Owns amounts, units and reservations; knows no prices (``ttc.pricing``) and no engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ttc.errors import InputError

Unit = Literal["tokens", "eflops", "seconds", "dollars"]
Scope = Literal["problem", "run"]

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_LONG_PREFIXES = {"kilo": "k", "mega": "M", "giga": "G", "tera": "T", "peta": "P", "exa": "E"}
_UNITS: dict[str, Unit] = {
    "token": "tokens", "tokens": "tokens", "tok": "tokens",
    "eflop": "eflops", "eflops": "eflops",
    "s": "seconds", "sec": "seconds", "second": "seconds", "seconds": "seconds",
    "$": "dollars", "usd": "dollars", "dollar": "dollars", "dollars": "dollars",
}  # fmt: skip
_SCALED_SECONDS = {"ms": 1e-3, "min": 60.0, "minutes": 60.0, "minute": 60.0, "h": 3600.0, "hours": 3600.0}
_NUMBER = r"(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)"
_WRITTEN = re.compile(rf"^{_NUMBER}\s*(?P<prefix>[kKMGTPE]?)\s*(?P<unit>[A-Za-z$-]*)$")
_EXAMPLES = "write it as '20k tokens', '3e15 eflops', '40 TeFLOPs', '30 s' or '$0.05'"


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount that is never exceeded, for each problem or for the whole run (``scope``)."""

    amount: float
    unit: Unit
    scope: Scope = "problem"

    def __post_init__(self) -> None:
        if not self.amount > 0:  # NaN too
            raise InputError(f"budget: {self.amount:g} {self.unit} buys nothing; give an amount above 0")
        if self.amount == float("inf"):
            raise InputError("budget: an infinite amount is no budget; give a finite one")
        if self.unit not in get_args(Unit):
            raise InputError(f"budget: unknown unit {self.unit!r}; use one of {', '.join(get_args(Unit))}")
        if self.scope not in get_args(Scope):
            raise InputError(f"budget scope: unknown scope {self.scope!r}; use 'problem' or 'run'")

    @staticmethod
    def parse(text: str, scope: str = "problem") -> Budget:
        """Read ``20k tokens``, ``3e15 eflops``, ``40 TeFLOPs``, ``30 s``, ``$0.05``; k, M, G, T, P, E are powers of ten.

        Raises InputError, naming the text and how to write it.
        """
        written = text.strip()
        if written.startswith("$"):
            written = written[1:].strip() + " $"
        match = _WRITTEN.match(written)
        if match is None:
            raise InputError(f"budget: can't read {text!r}; {_EXAMPLES}")
        scale, unit = _scale_and_unit(match["prefix"], match["unit"], text)
        number = float(match["number"].replace("_", "").replace(",", ""))
        return Budget(number * scale, unit, cast(Scope, scope))

    def __str__(self) -> str:
        return f"{format_amount(self.amount, self.unit)} {'a problem' if self.scope == 'problem' else 'for the run'}"


def _scale_and_unit(prefix: str, word: str, text: str) -> tuple[float, Unit]:
    """Resolve the letters after the number; the first may be an SI prefix of the unit (TeFLOPs) or part of it (tokens)."""
    if not word:
        raise InputError(f"budget: {text!r} has no unit; {_EXAMPLES}")
    for candidate_prefix, name in ((prefix, word.lower()), ("", (prefix + word).lower())):
        if name in _UNITS:
            return PREFIXES[candidate_prefix], _UNITS[name]
        if name in _SCALED_SECONDS:
            return PREFIXES[candidate_prefix] * _SCALED_SECONDS[name], "seconds"
        for long, short in _LONG_PREFIXES.items():
            rest = name.removeprefix(long).lstrip("-")
            if rest != name and rest in _UNITS:
                return PREFIXES[candidate_prefix] * PREFIXES[short], _UNITS[rest]
    raise InputError(f"budget: unknown unit {prefix + word!r} in {text!r}; {_EXAMPLES}")


def format_amount(amount: float, unit: str) -> str:
    """``amount`` in its unit as a person would write it: ``20k tokens``, ``3.1 PeFLOPs``, ``30 s``, ``$0.05``."""
    if unit == "dollars":
        return f"${amount:.4g}"
    if unit == "seconds":
        return f"{amount:.3g} s"
    for prefix in ("E", "P", "T", "G", "M", "k"):
        if abs(amount) >= PREFIXES[prefix]:
            scaled, letter = amount / PREFIXES[prefix], prefix
            break
    else:
        scaled, letter = amount, ""
    number = f"{scaled:.4g}" if unit == "tokens" else f"{scaled:.3g}"
    return f"{number} {letter}eFLOPs" if unit == "eflops" else f"{number}{letter} {unit}"


class Meter:
    """One scope's account: ``spent`` is settled, ``held`` is the most that running work may still settle at.

    The invariant ``spent + held <= limit`` is kept by ``hold`` refusing; ``settle`` may only lower it. Floating amounts are
    compared with a relative slack of 1e-12, which absorbs rounding of sums and no more. Beside the tickets of running work (above
    0) a problem, by its ``order``, may have an amount reserved: what an answer to it costs, which nothing else may spend.
    """

    __slots__ = ("_holds", "held", "limit", "spent")

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.spent = 0.0
        self.held = 0.0
        self._holds: dict[int, float] = {}

    @property
    def remaining(self) -> float:
        return self.limit - self.spent

    @property
    def available(self) -> float:
        """What may still be promised: the limit less what is spent and what is held."""
        return self.limit - self.spent - self.held

    def fits(self, amount: float) -> bool:
        return amount <= self.available + 1e-12 * self.limit

    def hold(self, ticket: int, amount: float) -> bool:
        """Promise ``amount`` to a ticket; False, and nothing changes, if it does not fit."""
        extra = amount - self._holds.get(ticket, 0.0)
        if extra > 0 and not self.fits(extra):
            return False
        self._holds[ticket] = amount
        self.held = sum(self._holds.values()) if len(self._holds) < 64 else self.held + extra
        return True

    def settle(self, ticket: int, amount: float) -> None:
        """The ticket is done and cost ``amount``; what was held beyond it is free again."""
        released = self._holds.pop(ticket, 0.0)
        self.held = sum(self._holds.values()) if len(self._holds) < 64 else self.held - released
        self.spent += amount

    def reserve(self, order: int, amount: float) -> bool:
        """Keep ``amount`` for a problem's answer (in place of what was kept); False, and nothing changes, if it does not fit."""
        return self.hold(_reservation(order), amount)

    def reserved(self, order: int) -> float:
        """What is kept for a problem's answer."""
        return self._holds.get(_reservation(order), 0.0)

    def release(self, order: int) -> None:
        """Nothing is kept for the problem any more."""
        self.settle(_reservation(order), 0.0)


def _reservation(order: int) -> int:
    """The ticket of a problem's reservation: below 0, where no running work has its own."""
    return -1 - order
