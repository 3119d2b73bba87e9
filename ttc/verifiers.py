"""The verifiers that come with ttc. ``exact`` compares normal forms here; ``math`` (math-verify) and ``rg``
(reasoning-gym's scorers) work in a child process under a time limit (``ttc.sandbox``)."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from ttc.answers import canonical, number, plain
from ttc.errors import InputError, VerifierError
from ttc.rg_tasks import CORRECT
from ttc.sandbox import Sandbox, leave, take
from ttc.types import Problem, Verdict

LIMIT_S = 5.0
"""Seconds by the clock that one answer may take, whatever else the machine does (a common one takes a few milliseconds)."""
VOTE_LIMIT_S = 2.0
HURRIED_LIMIT_S = 0.25
"""The same for comparing two answers of a vote, which the engine waits for (the second: on a budget of seconds). One that takes
longer is an answer of its own."""
LONGEST_ANSWER = 20_000
LONGEST_EXPRESSION = 2_000
"""Characters, of any answer and of one that needs algebra. Longer text is a model gone astray, and would
only run into the time limit."""

_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'-]+[^\W\d_]+)*")


class Exact:
    """Equal after normalisation: white space, case, ``$``, final period; numbers by exact value (1/2 == 0.5,
    1,000 == 1e3)."""

    name = "exact"

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        del limit_s  # cannot hang

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return _verdict(self.equivalent(problem, answer, _gold(problem)))

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        return canonical(a) == canonical(b)

    def close(self) -> None:
        pass


class Math:
    """Equal mathematically, by math-verify. Equal normal forms, different integers and different words need
    no algebra and are decided here (math-verify reads words as products of letters, in which "stop" equals
    "post")."""

    name = "math"

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        _require("math_verify", self.name)
        self._limit_s = limit_s
        self._sandbox = Sandbox("math")

    def start(self, *, ready: bool = False) -> None:
        """Start the algebra's process now rather than at the first answer that needs it; see ``Sandbox.start``."""
        self._sandbox.start(ready=ready)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        gold = _gold(problem)
        decided = self._plainly(gold, answer)
        if decided is None:
            _check_length(LONGEST_EXPRESSION, answer)
            decided = bool(_call(self._sandbox, "verdict", self._limit_s, gold=gold, answer=answer))
        return _verdict(decided)

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        decided = self._plainly(a, b)
        if decided is None:
            _check_length(LONGEST_EXPRESSION, a, b)
            decided = bool(_call(self._sandbox, "equal", self._limit_s, a=a, b=b))
        return decided

    def close(self) -> None:
        self._sandbox.close()

    @staticmethod
    def needs_algebra(gold: str) -> bool:
        """Are answers like ``gold`` more than whole numbers and words?"""
        text = plain(gold)
        value = number(text)
        return not (value is not None and value.denominator == 1) and not _WORDS.fullmatch(text)

    @staticmethod
    def _plainly(a: str, b: str) -> bool | None:
        if canonical(a) == canonical(b):
            return True
        pair = plain(a), plain(b)
        if all(len(text) <= 200 and _WORDS.fullmatch(text) for text in pair):
            return False
        values = [number(text) for text in pair]
        return False if all(value is not None and value.denominator == 1 for value in values) else None


class ReasoningGym:
    """Reasoning-gym's own scorer for the problem's task; right is a score of 1. Where many answers are right
    (countdown), any right one verifies, yet two different ones are two answers to a vote: see
    ``ttc.rg_tasks.equal``."""

    name = "rg"

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        _require("reasoning_gym", self.name)
        self._limit_s = limit_s
        self._sandbox = take("rg")

    def start(self, *, ready: bool = False) -> None:
        """Start the scorer's process now rather than at the first verdict; see ``Sandbox.start``."""
        self._sandbox.start(ready=ready)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        task, entry = self._task(problem), problem.meta["entry"]
        _check_length(LONGEST_ANSWER, answer)
        score, note = _call(
            self._sandbox,
            "score",
            self._limit_s,
            task=task,
            entry=entry,
            question=problem.text,
            answer=answer,
        )
        return Verdict(score >= CORRECT, min(1.0, max(0.0, score)), note)

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        if a == b:
            return True
        if _different_integers(a, b):  # no scorer takes one for the other, and most wrong answers are such
            return False
        _check_length(LONGEST_ANSWER, a, b)
        return bool(_call(self._sandbox, "equal", self._limit_s, task=self._task(problem), a=a, b=b))

    def close(self) -> None:
        leave(self._sandbox)
        self._sandbox = Sandbox("rg")

    @staticmethod
    def _task(problem: Problem) -> str:
        if "task" not in problem.meta or "entry" not in problem.meta:
            raise VerifierError(
                f"problem {problem.id!r} is not from a rg: task: verifier 'rg' has no entry to score by"
            )
        return str(problem.meta["task"])


_INTEGER = re.compile(r"\s*-?\d{1,18}\s*")


def _different_integers(a: str, b: str) -> bool:
    return bool(_INTEGER.fullmatch(a) and _INTEGER.fullmatch(b)) and int(a) != int(b)


def _call(sandbox: Sandbox, op: str, limit_s: float, **arguments: Any) -> Any:
    try:
        return sandbox.call(op, limit_s, **arguments)
    except InputError as error:  # a task that is not known here, a library that does not load
        raise VerifierError(str(error)) from None


def _gold(problem: Problem) -> str:
    if problem.gold is None:
        raise VerifierError(f"problem {problem.id!r} has no gold answer to compare with")
    return problem.gold


def _verdict(correct: bool) -> Verdict:
    return Verdict(correct, float(correct))


def _check_length(most: int, *answers: str) -> None:
    if (longest := max(map(len, answers))) > most:
        raise VerifierError(f"an answer of {longest} characters is not read (at most {most})")


def _require(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"verifier {name!r} needs {module}, which is not installed: pip install 'ttc[tasks]'"
        )
