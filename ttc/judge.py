"""What the driver needs to know of answers: extraction, classes of equal answers, verdicts.

One verifier per kind, started at its first use or by ``start``; equality for votes and the verdict are the same verifier's.
"""

from __future__ import annotations

from collections.abc import Iterable

from ttc.answers import extract
from ttc.types import AnswerFormat, Problem, Verdict
from ttc.verifiers import HURRIED_LIMIT_S, LIMIT_S, VOTE_LIMIT_S, Math, ReasoningGym
from ttc.verify import AnswerClasses, Verifier, can_verify, verifier


class Jury:
    """Judges the answers of a run. ``failures`` counts answers on which a verifier broke (each is then a class of its own).

    Votes and verdicts have verifiers of their own, so that a vote never waits for a verdict in another thread. ``hurried``: the run
    has a budget of seconds, of which votes may take little.
    """

    slow = True

    def __init__(self, format: AnswerFormat, *, hurried: bool = False) -> None:
        self.format, self.hurried = format, hurried
        self.failures = 0
        self._voting: dict[str, Verifier] = {}
        self._judging: dict[str, Verifier] = {}
        self._classes: dict[str, AnswerClasses] = {}

    def start(self, problems: Iterable[Problem]) -> None:
        """Start what will judge these problems, where verdicts need a process: the first is not kept waiting for it. What compares
        votes is waited for where the run is hurried: its clock has not begun yet."""
        for problem in {(p.verifier, _algebra(p)): p for p in problems}.values():
            judging, voting = self._judge(problem), self._voter(problem)
            if isinstance(judging, ReasoningGym) or (isinstance(judging, Math) and _algebra(problem)):
                judging.start()
            if isinstance(voting, Math | ReasoningGym) and (self.hurried or _algebra(problem)):
                voting.start(ready=self.hurried)

    def answer(self, problem: Problem, text: str) -> str | None:
        """The answer in a branch's text, or None."""
        return extract(text, self.format)

    def vote(self, problem: Problem, answer: str) -> str:
        """The representative of the answer's class: the first answer of this problem that equals it."""
        classes = self._classes.get(problem.id)
        if classes is None:
            classes = self._classes[problem.id] = AnswerClasses(self._voter(problem), problem)
        before = len(classes.failures)
        representative = classes.representative(answer)
        self.failures += len(classes.failures) - before
        return representative

    def verdict(self, problem: Problem, answer: str | None) -> Verdict | None:
        """Right or wrong; None where nothing is known to judge by. Raises VerifierError if the verifier breaks on it."""
        if not can_verify(problem):
            return None
        if answer is None:
            return Verdict(False, 0.0, "no answer")
        return self._judge(problem).verify(problem, answer)

    def forget(self, problem: Problem) -> None:
        """The problem is done; drop its classes."""
        self._classes.pop(problem.id, None)

    def _judge(self, problem: Problem) -> Verifier:
        return _of(self._judging, problem, LIMIT_S)

    def _voter(self, problem: Problem) -> Verifier:
        return _of(self._voting, problem, HURRIED_LIMIT_S if self.hurried else VOTE_LIMIT_S)

    def close(self) -> None:
        for each in (*self._voting.values(), *self._judging.values()):
            each.close()


def _algebra(problem: Problem) -> bool:
    return problem.verifier == Math.name and problem.gold is not None and Math.needs_algebra(problem.gold)


def _of(verifiers: dict[str, Verifier], problem: Problem, limit_s: float) -> Verifier:
    if problem.verifier not in verifiers:
        verifiers[problem.verifier] = verifier(problem.verifier, limit_s)
    return verifiers[problem.verifier]
