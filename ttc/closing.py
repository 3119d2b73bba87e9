"""The end of a problem: verdicts, its result, its line in the ledger.

Scorers read text written by models in a child process (``ttc.sandbox``), and on a machine whose cores the engine keeps busy an
answer of the child's can take as long as a step. So verdicts are asked for in a thread, one problem after another, while the engine
works on; results come in the order in which their problems ended, whatever the scorer's haste.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from ttc.books import Books
from ttc.cashier import Cashier
from ttc.errors import named
from ttc.jobs import Job, Judge
from ttc.types import Charge, Problem, Result, Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on the answer, the votes that are right, and what broke ("": nothing)."""

    verdict: Verdict | None = None
    right: tuple[str, ...] = ()
    error: str = ""


def _wrong(problem: Problem) -> Verdict | None:
    """A problem that failed counts as wrong, where there is an answer to be right about."""
    return Verdict(False, 0.0) if problem.gold is not None else None


class Closing:
    """Turns problems that ended into results: ``close`` as they end, ``results`` for those that are ready. Not to be called from
    more than one thread."""

    def __init__(self, judge: Judge, cashier: Cashier, books: Books) -> None:
        self.judge, self.cashier, self.books = judge, cashier, books
        self._queue: deque[tuple[Job | None, Result, Future[Judged] | None]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def close(
        self, job: Job, answer: str | None, stop: str, votes: Mapping[str, float], error: str, *, judged: bool
    ) -> None:
        """The problem has ended and nothing of it runs any more; with ``judged`` a verdict is asked for."""
        shared = [s for s in job.shared_eflops if s]
        if shared:  # the prompt's KV reads, shared over the problem's branches (Kinetics Eq. 10: times the mean length)
            self.books.charge(job, Charge(eflops_kinetics=sum(shared) / len(shared)))
        charge = job.charge
        if self.cashier.budget.scope == "problem":
            charge = replace(charge, seconds=self.cashier.seconds_used(job))
        self.cashier.check_overrun(job)
        result = Result(
            job.problem.id, answer, None, tuple(job.branches), charge, stop, job.brief.seed,
            votes=dict(votes), decisions=tuple(job.decisions), error=error, traceback=job.traceback,
        )  # fmt: skip
        self._queue.append((job, result, self._ask(job, answer) if judged else None))

    def known(self, result: Result) -> None:
        """A result that the ledger has already."""
        self._queue.append((None, result, None))

    def refused(self, problem: Problem, why: str, seed: int) -> None:
        """A problem that could not run."""
        result = Result(problem.id, None, None, (), Charge(), "failed", seed, error=why)
        self.books.ledger.write_result(result)
        self._queue.append((None, result, None))

    def results(self, *, wait: bool = False) -> Iterator[Result]:
        """Results that are ready, in order, each on disk before it is handed out; ``wait`` for all that are still being judged."""
        while self._queue:
            job, result, future = self._queue[0]
            if future is not None and not (wait or future.done()):
                return
            self._queue.popleft()
            if job is not None:
                found = future.result() if future is not None else Judged(_wrong(job.problem))
                result = replace(result, verdict=found.verdict, right=found.right)
                if found.error:
                    result = replace(result, stop="failed", error=found.error)
                self.judge.forget(job.problem)
                self.books.ledger.write_result(result)
            self._count(result, replayed=job is None)
            yield result
        if self._thread is not None and wait:
            self._thread.shutdown()
            self._thread = None

    # -- verdicts ----------------------------------------------------------------------------------------------------------
    def _ask(self, job: Job, answer: str | None) -> Future[Judged]:
        candidates = tuple(dict.fromkeys((answer, *(b.vote for b in job.branches if b.vote is not None))))
        verdict: Callable[[Problem, str | None], Verdict | None] = self.judge.verdict
        if self.judge.slow:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="ttc-verdicts")
            return self._thread.submit(_judged, verdict, job.problem, candidates)
        future: Future[Judged] = Future()
        future.set_result(_judged(verdict, job.problem, candidates))
        return future

    def _count(self, result: Result, *, replayed: bool) -> None:
        status = self.books.status
        status.done += 1
        status.failed += bool(result.error)
        if result.verdict is not None:
            status.scored += 1
            status.correct += result.verdict.correct
        if replayed:
            status.charge = status.charge + result.charge
            status.replayed_tokens += result.charge.tokens
            for branch in self.books.ledger.branches(result.problem_id):
                status.note(branch)


def _judged(
    verdict: Callable[[Problem, str | None], Verdict | None],
    problem: Problem,
    candidates: tuple[str | None, ...],
) -> Judged:
    """Judge the answer (the first candidate) and the other votes. A verifier that breaks costs the verdict, never the run."""
    mine, right, error = None, [], ""
    for place, candidate in enumerate(candidates):
        try:
            found = verdict(problem, candidate)
        except Exception as failure:  # third-party verifiers raise what they like
            if place == 0:
                error = f"verifier: {named(failure)}"
            continue
        if place == 0:
            mine = found
        if found is not None and found.correct and candidate is not None:
            right.append(candidate)
    return Judged(mine, tuple(right), error)
