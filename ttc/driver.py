"""The driver: many problems, one loop. The only place that pays.

It moves work from policies (generators) to one engine and replies to them; checks the budget before anything is submitted, charges
after, writes the ledger, and contains a failing problem. It keeps the engine full: a policy that waits for its own branches never
idles the others'.

How a budget stays hard:
- tokens, dollars: the most that a branch can use is held before it is submitted, and what it did not use is freed when it ends.
- eFLOPs on an engine that can be steered: what the next ``LEASE`` tokens can cost, with closing and answering, is held; at its
  end the lease is extended, or the thought is made to close inside what is held. (The price depends on how many sequences share a
  step, so holding the worst case of a whole branch would leave most of a budget unused.) On other engines: as for tokens.
- seconds: when the time that closing takes is all that is left, thoughts are made to close; what still runs at the end of time is
  cancelled. Overshoot is at most one engine step.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ttc.books import Books
from ttc.budget import Budget
from ttc.cashier import Cashier
from ttc.closing import Closing
from ttc.engine.protocol import Engine, StepReport
from ttc.errors import EngineError, InputError, LedgerError, named, place
from ttc.flights import Flights
from ttc.jobs import Flight, Job, Judge, Policy, RewardModel, Status
from ttc.ledger import Ledger
from ttc.opening import Opened, open_jobs
from ttc.pricing import Pricer, spent_in
from ttc.scoring import Scoring
from ttc.starts import Starts
from ttc.steering import Steering
from ttc.types import (
    Branch,
    Brief,
    Completion,
    Generate,
    Outcome,
    Problem,
    Reply,
    Request,
    Result,
    Score,
    Steer,
    Work,
)
from ttc.watch import RETRIES, Watch

LOOK_SECONDS = 0.2
"""How often the driver reads where branches are, on an engine that can tell at any time and a budget without leases."""

_DRIVEN: dict[int, Engine] = {}


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """An engine tells one driver where its branches are: a second run on it waits its turn. Raises InputError."""
    if id(engine) in _DRIVEN:
        raise InputError(
            "engine: another run is under way on it; let that one end (or close its iterator), or open a second engine"
        )
    _DRIVEN[id(engine)] = engine
    try:
        yield
    finally:
        del _DRIVEN[id(engine)]


class Driver:
    """Runs a policy over problems on an engine under a budget.

    ``clock`` is monotonic seconds (the fake engine brings its own). A request that brings no token for ``stall_seconds`` is
    cancelled and counts as failed. Use: ``for result in driver.run(problems): ...``; ``stop()`` from a signal handler ends the run
    after the current step, with everything so far in the ledger.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        budget: Budget,
        judge: Judge,
        ledger: Ledger,
        pricer: Pricer,
        *,
        brief: Brief,
        reward: RewardModel | None = None,
        clock: Callable[[], float] = time.monotonic,
        stall_seconds: float = 300.0,
        on_step: Callable[[Status], None] | None = None,
    ) -> None:
        self.engine, self.policy, self.budget, self.brief = engine, policy, budget, brief
        self.clock, self.on_step = clock, on_step
        self.status = Status()
        self.cashier = Cashier(budget, pricer, engine, clock)
        self.books = Books(ledger, self.status, budget.unit)
        self.flights = Flights(engine, self.cashier, self.books, judge, clock)
        self.closing = Closing(judge, self.cashier, self.books)
        self.starts = Starts(self, self.flights, self.cashier, self.books)
        self.steering = Steering(self, self.starts, self.flights, self.cashier, self.books, judge)
        self.scoring = Scoring(self, reward, self.cashier, self.books)
        self.watch = Watch(self.flights, self.cashier, self.books, stall_seconds)
        self.interrupted = False
        self.crowded: str | None = None
        """Once a run has begun: why the engine has less to do than it could ("": it is as busy as it can be)."""
        self._stop = False
        self._begun = 0.0

    # -- the loop ----------------------------------------------------------------------------------------------------------
    def run(self, problems: Sequence[Problem]) -> Generator[Result]:
        """Results in the order in which problems finish; those already in the ledger come first and cost nothing again.

        Raises EngineError if the engine is gone (the ledger holds all that finished), and BudgetTooSmall as ``open_jobs``.
        """
        with _alone(self.engine):
            yield from self._run(open_jobs(problems, self.policy, self.brief, self.cashier))

    def run_opened(self, opened: Opened) -> Generator[Result]:
        """``run``, where ``open_jobs`` has been asked already."""
        with _alone(self.engine):
            yield from self._run(opened)

    def _run(self, opened: Opened) -> Iterator[Result]:
        self.status.problems = len(opened.jobs) + len(opened.refused)
        self._begun = self.clock()
        if opened.account is not None:
            opened.account.started = self._begun
        for problem, why in opened.refused:
            self.closing.refused(problem, why, self.brief.seed)
        try:
            waiting = deque(self._replay_finished(opened.jobs))
            if self.budget.scope == "run":
                while waiting:
                    self._open(waiting.popleft())
            while not self._stop:
                yield from self.closing.results()
                self.scoring.look()
                self._fill(waiting)
                if self.crowded is None:
                    self.crowded = self.starts.crowding()
                yield from self.closing.results()
                if self.flights.aloft:
                    self._turn()
                elif self.scoring.open:
                    self.scoring.look(wait_s=LOOK_SECONDS)
                    self._step_done()
                elif waiting or self.starts.open:
                    self.starts.last_call()
                else:
                    break
            else:
                self.interrupted = True
                self.watch.interrupt()
            self.scoring.close()
            yield from self.closing.results(wait=True)
        except EngineError:
            self.watch.settle_lost("the engine stopped")
            raise
        finally:  # the engine is gone, or the caller has seen enough: nothing runs on, and what has ended is kept all the same
            try:
                self.watch.interrupt()
            finally:
                self.scoring.close()
                for _ in self.closing.results(wait=True):
                    pass

    @property
    def overrun(self) -> float:
        """The largest excess over the budget at the end of any of its scopes, in its unit: 0, or a defect."""
        return self.cashier.overrun

    def stop(self) -> None:
        """End the run after the current step (safe in a signal handler)."""
        self._stop = True

    def _turn(self) -> None:
        before = self.clock()
        report = self.engine.step()
        now = self.clock()
        self.cashier.stepped(now - before)
        self._take(report, now)
        self.watch.look(now)
        self._step_done()

    def _step_done(self) -> None:
        status = self.status
        status.running, status.seconds = len(self.flights.aloft), self.clock() - self._begun
        if self.on_step is not None:
            self.on_step(status)

    def _take(self, report: StepReport, now: float) -> None:
        flights = self.flights
        if not report.standing or self.cashier.leased or now - flights.followed >= LOOK_SECONDS:
            flights.follow(report.progress, now)
        flights.standing = report.progress if report.standing else {}
        for probed in report.probes:
            self.steering.hear(probed)
        for ticket, completion in report.finished:
            flight = flights.aloft.get(ticket)
            if flight is not None:
                self._land(ticket, flight, completion, now)
        self.steering.wake()

    # -- starting work -----------------------------------------------------------------------------------------------------
    def _replay_finished(self, jobs: Sequence[Job]) -> list[Job]:
        """Hand out the results that the ledger already has; returns the jobs that remain."""
        remaining = []
        for job in jobs:
            known = self.books.ledger.results.get(job.problem.id)
            if known is None:
                remaining.append(job)
                continue
            if self.budget.scope == "run":
                job.account.meter.release(job.order)
                job.account.meter.spent += spent_in(self.budget.unit, known.charge)
            self.closing.known(known)
        return remaining

    def _open(self, job: Job) -> None:
        for charge in self.books.ledger.interrupted.get(job.problem.id, ()):
            self.books.replay(job, charge)
        try:
            job.routine = self.policy.run(job.posed, job.brief)
            self.advance(job, None)
        except Exception as error:
            self.blame(job, error)

    def advance(self, job: Job, reply: Reply | None) -> None:
        """Send a reply to the job's routine and take its next work; ends the job when the routine returns."""
        assert job.routine is not None
        while True:
            try:
                work = next(job.routine) if reply is None else job.routine.send(reply)
            except StopIteration as end:
                if not isinstance(end.value, Outcome):
                    raise TypeError(f"its run returned {end.value!r}, which is no Outcome") from None
                self.finish(job, end.value)
                return
            reply = self._do(job, work)
            if reply is None:
                return

    def _do(self, job: Job, work: Work) -> Reply | None:
        """Take on a piece of work; the reply, if it is there at once."""
        if isinstance(work, Score):
            return self.scoring.ask(job, work)
        if isinstance(work, Steer):
            return self.steering.do(job, work)
        if not isinstance(work, Generate):
            raise TypeError(f"its run yielded {work!r}, which is no Generate, Score or Steer")
        return self._accept(job, work) if work.requests else Reply(remaining=job.account.meter.remaining)

    def _accept(self, job: Job, work: Generate) -> Reply | None:
        """Take on ``work``; a reply, if an earlier session has done all of it."""
        if job.flights or job.pending:
            raise RuntimeError("steered branches are still running; cancel or await them before Generate")
        job.work, job.slots, job.arrived, job.cancelled = work, [None] * len(work.requests), [], False
        job.open, job.failures = len(job.slots), {}
        job.pending = deque(enumerate(work.requests))
        price = sum(self.cashier.most(job, r, r.thinking_tokens) for r in work.requests)
        self.books.decide(job, f"generate {len(work.requests)}", work.why, price)
        recorded = [
            (known[0], slot, known[1])
            for slot, request in job.pending
            if (known := self.books.ledger.branch(job.problem.id, request)) is not None
        ]
        known_slots = {slot for _, slot, _ in recorded}
        job.pending = deque((s, r) for s, r in job.pending if s not in known_slots)
        for _, slot, branch in sorted(recorded, key=lambda item: item[:2]):
            self._note(job, slot, branch, work.requests[slot])
            reply = self._consider(job)
            if reply is not None:
                return reply
        if job.pending:
            if self.budget.scope == "run" and job.started and not any(b.usable for b in job.branches):
                least = self.cashier.answer_after(job, job.pending[0][1], 0)
                least = max(least, job.account.meter.reserved(job.order))
                job.account.meter.reserve(job.order, least)  # no other problem may spend what it answers with
            self.starts.push(job)
        return None

    def _fill(self, waiting: deque[Job]) -> None:
        while len(self.flights.aloft) < self.engine.info.concurrency:
            if not self.starts.ready:
                if not waiting:
                    return
                self._open(waiting.popleft())
            elif self.starts.next():
                self.steering.wake()

    # -- work that ended ---------------------------------------------------------------------------------------------------
    def _land(self, ticket: int, flight: Flight, completion: Completion, now: float) -> None:
        job = flight.job
        if (
            flight.closing and completion.finish == "abort"
        ):  # time ran out while it was answering: what it wrote counts
            completion = replace(completion, finish="length")
        charge = self.flights.settle(ticket, completion, now)
        branch = self.flights.branch(flight, completion, charge)
        again = (
            completion.finish == "error"
            and flight.attempts < RETRIES
            and not (job.cancelled or job.failed or self._stop or job.outcome is not None)
            and flight.request.index not in job.quiet
        )
        self.books.ledger.write_branch(
            branch, flight.request, interrupted=again or (self._stop and completion.finish == "abort")
        )
        self._gone(ticket)
        self.cashier.set_aside(job, flight.request, branch)
        if again:
            self.books.charge(job, charge)
            self.starts.again(job, flight, completion.error)
            return
        job.shared_eflops.append(self.cashier.pricer.kinetics(flight.request, completion).shared)
        self.cashier.learn(branch)
        self.arrive(job, flight.slot, branch)

    def _gone(self, ticket: int) -> None:
        """A flight has landed, and is on record: what waits for its money may try again."""
        self.flights.remove(ticket)
        self.starts.unpark()

    def arrive(self, job: Job, slot: int, branch: Branch, *, replayed: Request | None = None) -> None:
        """A branch of the job's current work is there (``replayed``: what it was asked for in an earlier session); replies to the
        policy when all are."""
        self._note(job, slot, branch, replayed)
        if job.failed:
            if not job.flights:
                self._close(job, None, "failed", {}, job.failed)
            return
        if isinstance(job.work, Steer):
            job.news.append(branch)
            self.steering.touch(job)
            return
        try:
            reply = self._consider(job)
            if reply is not None:
                self.advance(job, reply)
        except Exception as error:
            self.blame(job, error)

    def _note(self, job: Job, slot: int, branch: Branch, replayed: Request | None) -> None:
        job.slots[slot] = branch
        job.open -= 1
        job.arrived.append(branch)
        job.branches.append(branch)
        self.status.note(branch)
        if replayed is None:
            self.books.charge(job, branch.charge)
        else:
            self.books.replay(job, branch.charge)
            self.cashier.set_aside(job, replayed, branch)
            job.started += 1
            self.cashier.learn(branch)

    def _consider(self, job: Job) -> Reply | None:
        """Cancel the rest of the job's work if its policy has seen enough; the reply, once all of it is there."""
        work = job.work
        assert isinstance(work, Generate)
        if work.until is not None and not job.cancelled:
            finished = [b for b in job.arrived if b.finish not in ("denied", "abort")]
            if finished and work.until(finished):
                job.cancelled = True
                rest = len(job.pending) + len(job.flights)
                if rest:
                    self.books.decide(job, f"cancel {rest}", "the policy has seen enough", 0.0)
                for slot, request in job.pending:
                    nothing = Completion("", "abort", 0, 0)
                    job.slots[slot] = Branch(job.problem.id, request.index, request.seed, nothing, None, None)
                job.open -= len(job.pending)
                job.pending.clear()
                self.flights.cancel(sorted(job.flights))
        if job.pending or job.flights or job.open:
            return None
        branches = tuple(b for b in job.slots if b is not None)
        job.work = None
        return Reply(branches=branches, remaining=job.account.meter.remaining)

    # -- the end of a problem ----------------------------------------------------------------------------------------------
    def finish(self, job: Job, outcome: Outcome) -> None:
        if job.flights or job.pending:  # a policy that steers has had its last word: nothing of it runs on
            self.steering.end(job)
            if job.flights:
                job.outcome = outcome
                return
        if outcome.why:
            self.books.decide(job, f"stop: {outcome.stop}", outcome.why, 0.0)
        error = ""
        if outcome.answer is None:
            error = next((b.completion.error for b in job.branches if b.completion.error), "")
        error = error or job.trouble
        stop = "budget" if job.denied and outcome.stop == "samples" else outcome.stop
        if error:
            stop = "failed"
        elif outcome.answer is None and (error := self.cashier.too_late(job)):
            stop = "budget"
        self._close(job, outcome.answer, stop, outcome.votes, error)

    def blame(self, job: Job, error: Exception) -> None:
        """The problem's own failure: its policy (or what that called) raised. It ends with that as its error, when nothing of it
        runs any more. An engine that is gone, or a ledger that can't be written, is the run's failure, and raised again."""
        if isinstance(error, EngineError | LedgerError):
            raise error
        where = place(error, self.policy, job.routine)
        job.failed = f"policy {self.policy.name}: {named(error)}" + (f" ({where})" if where else "")
        job.traceback = "".join(traceback.format_exception(error))
        job.pending.clear()
        job.routine = None
        if job.flights:
            self.flights.cancel(sorted(job.flights))
        else:
            self._close(job, None, "failed", {}, job.failed)

    def _close(self, job: Job, answer: str | None, stop: str, votes: Mapping[str, float], error: str) -> None:
        if self.budget.scope == "run":
            job.account.meter.release(job.order)
        self.closing.close(job, answer, stop, votes, error, judged=not job.failed)
