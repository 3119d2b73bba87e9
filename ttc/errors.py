"""The errors of ttc: one root, each also the stdlib type it replaces.

TTCError
 ├─ InputError(ValueError)      bad input from a user: a field, its value and the mend (CLI exit code 2)
 ├─ BudgetTooSmall(InputError)  a budget that cannot buy one answer; carries the least that would do
 ├─ EngineError(RuntimeError)   an engine that failed, could not start or cannot be reached
 ├─ LedgerError(RuntimeError)   a run directory that can't be written any more (a full disk)
 └─ VerifierError(RuntimeError) a verifier that broke or ran out of its time on one answer
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Generator
from typing import Any


class TTCError(Exception):
    """Root of every error that ttc raises on purpose."""


class InputError(TTCError, ValueError):
    """Bad input: one line that names the field, the value and the mend."""


class BudgetTooSmall(InputError):
    """The budget cannot buy a single answer; ``least`` is the smallest amount that would, in the budget's unit."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least

    def __reduce__(self) -> tuple[type[BudgetTooSmall], tuple[str, float]]:
        return type(self), (str(self), self.least)


class EngineError(TTCError, RuntimeError):
    """The engine failed; ``retryable`` says whether the same request may succeed when issued again."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class LedgerError(TTCError, RuntimeError):
    """A line of the ledger could not be written."""


class VerifierError(TTCError, RuntimeError):
    """A verifier broke, or did not finish in its time, on one answer."""


def named(error: BaseException) -> str:
    """An exception of somebody else's code: its type and what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def place(error: BaseException, owner: object, routine: Generator[Any, Any, Any] | None = None) -> str:
    """Where in the code of ``owner``'s class ``error`` arose, as ``file:line``: the innermost frame there, else where its
    ``routine`` stands; "" if neither is known."""
    modules = (sys.modules.get(kind.__module__) for kind in type(owner).__mro__ if kind is not object)
    files = {getattr(module, "__file__", None) for module in modules}
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    if own:
        return f"{shortened(own[-1].filename)}:{own[-1].lineno}"
    frame = getattr(routine, "gi_frame", None)
    return f"{shortened(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def shortened(path: str) -> str:
    """A path as seen from the working directory, where it lies below that."""
    within = os.path.join(os.getcwd(), "")
    return path.removeprefix(within)
