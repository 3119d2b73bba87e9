"""Is an answer right, and are two answers the same? One object answers both, so that votes and verdicts agree
on equality. Owns the seam and the grouping of answers; the verifiers themselves are in ``ttc.verifiers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from ttc import yours
from ttc.errors import InputError
from ttc.types import Problem, Verdict
from ttc.verifiers import LIMIT_S, Exact, Math, ReasoningGym

_PROBE = "1"


@runtime_checkable
class Verifier(Protocol):
    """What every verifier does. All three raise VerifierError, and nothing else, when they break on an
    answer."""

    @property
    def name(self) -> str:
        """The name that ``verifier`` knows it by."""

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Is ``answer`` right?"""

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        """Are two answers to ``problem`` the same answer? Never looks at the gold answer."""

    def close(self) -> None:
        """Free what it holds; using it again is allowed."""


VERIFIERS: dict[str, Callable[[float], Verifier]] = {"exact": Exact, "math": Math, "rg": ReasoningGym}


def verifier(name: str, limit_s: float = LIMIT_S) -> Verifier:
    """The verifier called ``name``: one of ``VERIFIERS``, or a class with no required arguments named
    ``"pkg.mod:Class"``."""
    if name in VERIFIERS:
        return VERIFIERS[name](limit_s)
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"verifier {name!r} is unknown; use {', '.join(VERIFIERS)}, or pkg.mod:Class")
    made = yours.make("verifier", name, yours.load("verifier", name))
    if not isinstance(made, Verifier):
        raise InputError(f"verifier {name!r} is not one: it needs name, verify, equivalent and close")
    return made


def can_verify(problem: Problem) -> bool:
    """True if a verdict on ``problem`` is possible: it has a gold answer, or a verifier that may do without
    one."""
    return problem.gold is not None or problem.verifier not in ("exact", "math")


class Failure(NamedTuple):
    """An answer on which the verifier broke, and how."""

    answer: str
    error: str


class AnswerClasses:
    """The answers to one problem, grouped as they come in; each group is named by the first answer seen in
    it.

    An answer on which the verifier breaks is a group of its own, is listed in ``failures`` and is never
    compared again.
    """

    def __init__(self, verifier: Verifier, problem: Problem) -> None:
        self._verifier = verifier
        self._problem = problem
        self._known: dict[str, str] = {}
        self._open: list[str] = []
        self.failures: list[Failure] = []

    def representative(self, answer: str) -> str:
        """The first-seen member of ``answer``'s group."""
        if answer not in self._known:
            self._known[answer] = self._place(answer)
        return self._known[answer]

    def _place(self, answer: str) -> str:
        for other in tuple(self._open):
            try:
                if self._verifier.equivalent(self._problem, answer, other):
                    return other
            except Exception as error:  # third-party verifiers raise what they like; a vote goes on
                if self._breaks(answer):
                    self.failures.append(Failure(answer, str(error)))
                    return answer
                if self._breaks(other):
                    self.failures.append(Failure(other, str(error)))
                    self._open.remove(other)
        self._open.append(answer)
        return answer

    def _breaks(self, answer: str) -> bool:
        """Is ``answer`` the one to blame? It is if a harmless answer cannot be compared with it either."""
        try:
            self._verifier.equivalent(self._problem, answer, _PROBE)
        except Exception:
            return True
        return False


def classes(problem: Problem, answers: Iterable[str], verifier: Verifier) -> dict[str, tuple[str, ...]]:
    """``answers`` grouped by equality: representative (first seen) to members, in order of arrival."""
    partition = AnswerClasses(verifier, problem)
    groups: dict[str, tuple[str, ...]] = {}
    for answer in answers:
        key = partition.representative(answer)
        groups[key] = (*groups.get(key, ()), answer)
    return groups
