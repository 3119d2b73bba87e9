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

import heapq
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from ttc.budget import Budget, Meter, format_amount
from ttc.cashier import LEASE, Cashier, efforts, rounded_up
from ttc.closing import Closing
from ttc.engine.protocol import Engine, Progress, StepReport
from ttc.errors import BudgetTooSmall, EngineError, InputError, LedgerError, named, place
from ttc.jobs import Account, Flight, Job, Judge, Policy, RewardModel, Status
from ttc.ledger import Ledger
from ttc.pricing import Pricer, spent_in
from ttc.scoring import Scoring
from ttc.steering import Steering
from ttc.types import (
    Branch,
    Brief,
    Charge,
    Completion,
    Decision,
    Generate,
    Outcome,
    Problem,
    Reply,
    Request,
    Result,
    Score,
    Steer,
)
from ttc.watch import RETRIES, Watch

LOOK_SECONDS = 0.2
"""How often the driver reads where branches are, on an engine that can tell at any time and a budget without leases."""

_TICKETS = count(1)
"""Tickets are of all drivers: a late word on a branch of one run means nothing to the next run on the same engine."""

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
        self.engine, self.policy, self.budget, self.judge = engine, policy, budget, judge
        self.cashier = Cashier(budget, pricer, engine, clock)
        self.ledger, self.pricer, self.base_brief, self.reward = ledger, pricer, brief, reward
        self.clock, self.on_step = clock, on_step
        self.status = Status()
        self.closing = Closing(judge, ledger, self.cashier, self.status)
        self.steering, self.scoring, self.watch = Steering(self), Scoring(self), Watch(self, stall_seconds)
        self.interrupted = False
        self.run_account = Account(Meter(budget.amount)) if budget.scope == "run" else None
        self.flights: dict[int, Flight] = {}
        self._ready: list[tuple[float, int, int, Job]] = []
        self._parked: list[Job] = []
        self.crowded: str | None = None
        """Once a run has begun: why the engine has less to do than it could ("": it is as busy as it can be)."""
        self._pushes = 0
        self._stop = False
        self._begun = self._followed = 0.0
        self.standing: Mapping[int, Progress] = {}

    # -- before anything runs ----------------------------------------------------------------------------------------------
    def prepare(self, problems: Sequence[Problem]) -> tuple[list[Job], dict[str, str]]:
        """Price every problem's least answer. Returns the jobs and, by id, the problems that can't run (prompt too long).

        Raises BudgetTooSmall if the budget can't buy one answer for each, and says the least that would do.
        """
        info, room = self.engine.info, self.engine.room_tokens
        jobs: list[Job] = []
        refused: dict[str, str] = {}
        least_sum = least_max = 0.0
        for order, problem in enumerate(problems):
            prompts = {
                effort: self.engine.count_prompt(problem, effort)
                for effort in efforts(self.policy, self.base_brief.effort)
            }
            prompt = max(prompts.values())
            longest = info.context - prompt - room
            if longest < 1:
                refused[problem.id] = (
                    f"prompt: {problem.id} has {prompt} tokens, and with {room} kept for the answer that is more than the"
                    f" model's context of {info.context}; shorten it or use a model with a longer context"
                )
                continue
            thinking = min(longest, self.base_brief.max_thinking_tokens)
            brief = replace(
                self.base_brief, max_thinking_tokens=thinking, budget_amount=self.budget.amount,
                budget_unit=self.budget.unit, budget_scope=self.budget.scope, probe_tokens=info.probe_tokens,
                budget_share=self.budget.amount / (len(problems) if self.budget.scope == "run" else 1),
            )  # fmt: skip
            account = self.run_account or Account(Meter(self.budget.amount))
            job = Job(order, problem, brief, prompts, account)
            least = self.cashier.least(job)
            least_sum, least_max = least_sum + least, max(least_max, least)
            if self.run_account is not None:
                self.run_account.meter.reserve(order, least)
            jobs.append(job)
        least = least_sum if self.run_account is not None else least_max
        if least > self.budget.amount:
            whole = "for one answer to each problem" if self.run_account is not None else "for one answer"
            raise BudgetTooSmall(
                f"budget: {format_amount(self.budget.amount, self.budget.unit)} is too small {whole};"
                f" give at least {rounded_up(least, self.budget.unit)}",
                least,
            )
        return jobs, refused

    # -- the loop ----------------------------------------------------------------------------------------------------------
    def run(self, problems: Sequence[Problem], *, jobs: Sequence[Job] | None = None) -> Generator[Result]:
        """Results in the order in which problems finish; those already in the ledger come first and cost nothing again.

        Raises EngineError if the engine is gone (the ledger holds all that finished), whatever ``prepare`` raises.
        """
        with _alone(self.engine):
            yield from self._run(problems, jobs)

    def _run(self, problems: Sequence[Problem], jobs: Sequence[Job] | None) -> Iterator[Result]:
        refused: Mapping[str, str] = {}
        if jobs is None:
            jobs, refused = self.prepare(problems)
        self.status.problems = len(jobs) + len(refused)
        self._begun = self.clock()
        if self.run_account is not None:
            self.run_account.started = self._begun
        by_id = {p.id: p for p in problems}
        for problem_id, why in refused.items():
            self.closing.refused(by_id[problem_id], why, self.base_brief.seed)
        try:
            waiting = deque(self._replay_finished(jobs))
            if self.budget.scope == "run":
                while waiting:
                    self._open(waiting.popleft())
            while not self._stop:
                yield from self.closing.results()
                self.scoring.look()
                self._fill(waiting)
                if self.crowded is None:
                    self.crowded = self._crowding()
                yield from self.closing.results()
                if self.flights:
                    self._turn()
                elif self.scoring.open:
                    self.scoring.look(wait_s=LOOK_SECONDS)
                    self._step_done()
                elif waiting or self._ready or self._parked:
                    self._unpark()
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
        self.cashier.longest_step = max(self.cashier.longest_step * 0.98, now - before)
        self._take(report, now)
        self.watch.look(now)
        self._step_done()

    def _step_done(self) -> None:
        status = self.status
        status.running, status.seconds = len(self.flights), self.clock() - self._begun
        if self.on_step is not None:
            self.on_step(status)

    def _take(self, report: StepReport, now: float) -> None:
        if not report.standing or self.cashier.leased or now - self._followed >= LOOK_SECONDS:
            self.follow(report.progress, now)
        self.standing = report.progress if report.standing else {}
        for probed in report.probes:
            self.steering.hear(probed)
        for ticket, completion in report.finished:
            landed = self.flights.get(ticket)
            if landed is not None:
                self._land(ticket, landed, completion, now)
        self.steering.wake()

    def follow(self, places: Mapping[int, Progress], now: float, *, gone: bool = False) -> None:
        """Note where running branches are; extend the leases that have run out (unless the engine is ``gone``)."""
        running = self.status.running_tokens
        for ticket, progress in places.items():
            flight = self.flights.get(ticket)
            if flight is None:
                continue
            if progress.tokens != flight.tokens:
                running += progress.tokens - flight.tokens
                flight.tokens, flight.moved = progress.tokens, now
            if progress.weight_reads is not None:
                flight.reads = progress.weight_reads
            if flight.lease_end is not None and flight.tokens >= flight.lease_end and not gone:
                self._extend(ticket, flight)
        self.status.running_tokens, self._followed = running, now

    # -- starting work -----------------------------------------------------------------------------------------------------
    def _replay_finished(self, jobs: Sequence[Job]) -> list[Job]:
        """Hand out the results that the ledger already has; returns the jobs that remain."""
        remaining = []
        for job in jobs:
            known = self.ledger.results.get(job.problem.id)
            if known is None:
                remaining.append(job)
                continue
            if self.run_account is not None:
                self.run_account.meter.release(job.order)
                self.run_account.meter.spent += spent_in(self.budget.unit, known.charge)
            self.closing.known(known)
        return remaining

    def _open(self, job: Job) -> None:
        for charge in self.ledger.interrupted.get(job.problem.id, ()):
            self.pay(job, charge)
            self.closing.charge(job, charge)
            self.status.replayed_tokens += charge.tokens
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
            if isinstance(work, Score):
                reply = self.scoring.ask(job, work)
                if reply is None:
                    return
                continue
            if isinstance(work, Steer):
                reply = self.steering.do(job, work)
                if reply is None:
                    return
                continue
            if not isinstance(work, Generate):
                raise TypeError(f"its run yielded {work!r}, which is no Generate, Score or Steer")
            if not work.requests:
                reply = Reply(remaining=job.account.meter.remaining)
                continue
            reply = self._accept(job, work)
            if reply is None:
                return

    def _accept(self, job: Job, work: Generate) -> Reply | None:
        """Take on ``work``; a reply, if an earlier session has done all of it."""
        if job.flights or job.pending:
            raise RuntimeError("steered branches are still running; cancel or await them before Generate")
        job.work, job.slots, job.arrived, job.cancelled = work, [None] * len(work.requests), [], False
        job.open = len(job.slots)
        job.pending = deque(enumerate(work.requests))
        price = sum(self.cashier.most(job, r, r.thinking_tokens) for r in work.requests)
        self.decide(job, f"generate {len(work.requests)}", work.why, price)
        recorded = [
            (known[0], slot, known[1])
            for slot, request in job.pending
            if (known := self.ledger.branch(job.problem.id, request)) is not None
        ]
        for _, slot, branch in sorted(recorded, key=lambda item: item[:2]):
            job.pending = deque((s, r) for s, r in job.pending if s != slot)
            self._note(job, slot, branch, work.requests[slot])
            reply = self._consider(job)
            if reply is not None:
                return reply
        if job.pending:
            if job.account is self.run_account and job.started and not any(b.usable for b in job.branches):
                least = self.cashier.answer_after(job, job.pending[0][1], 0)
                least = max(least, job.account.meter.reserved(job.order))
                job.account.meter.reserve(job.order, least)  # no other problem may spend what it answers with
            self.push(job)
        return None

    def push(self, job: Job) -> None:
        first = float(job.started) if self.budget.scope == "run" else 0.0
        if first and isinstance(job.work, Steer):
            first = 1 / (1 + job.value)  # the highest value first, after every problem's first branch
        self._pushes += 1
        heapq.heappush(self._ready, (first, job.order, self._pushes, job))

    def _fill(self, waiting: deque[Job]) -> None:
        while len(self.flights) < self.engine.info.concurrency:
            if not self._ready:
                if not waiting:
                    return
                self._open(waiting.popleft())
                continue
            job = heapq.heappop(self._ready)[3]
            if not job.pending:
                continue
            if self.steering.too_far_ahead(job):
                self._parked.append(job)
            elif self._start_next(job):
                if job.pending:
                    self.push(job)
            elif job.pending:
                self._parked.append(job)
            self.steering.wake()

    def _crowding(self) -> str:
        """What keeps the first branches from filling the engine, where that is the money that is held for them."""
        free = self.engine.info.concurrency - len(self.flights)
        waiting = [job for job in self._parked if job.pending and not self.steering.too_far_ahead(job)]
        if free <= 0 or not waiting or not self.flights:
            return ""
        if len(self.flights) >= sum(len(job.pending) for job in waiting):
            return ""  # most of what is wanted runs
        account = waiting[0].account
        pending = sum(len(job.pending) for job in waiting if job.account is account)
        return self.cashier.crowding(waiting[0], len(self.flights), account.flights + min(pending, free))

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for job in parked:
            if job.pending:
                self.push(job)

    def _start_next(self, job: Job) -> bool:
        """Start the job's next request, or deny what is left of its work; False if it must wait for money to come back."""
        slot, request = job.pending[0]
        account, meter = job.account, job.account.meter
        first = not job.flights and not any(branch.usable for branch in job.branches)
        kept = meter.reserved(job.order)
        if first:
            meter.release(job.order)  # what was set aside for this problem's first answer is its own to use
        thinking = self.cashier.affordable(job, request, first)
        if thinking is None and first and request.probe_every and not account.flights:
            request = replace(request, probe_every=0)
            thinking = self.cashier.affordable(job, request, first)
            if thinking is not None:
                why = "the budget can't pay for them"
                self.decide(job, f"no probes of branch {request.index}", why, 0.0)
        if thinking is None and account.flights:
            if first:
                meter.reserve(job.order, kept)
            return False
        if thinking is None:
            self._deny(job)
            return True
        job.pending.popleft()
        if thinking != request.thinking_tokens:
            request = replace(request, thinking_tokens=thinking)
        self._submit(job, slot, request, Charge(), 0)
        return True

    def _submit(self, job: Job, slot: int, request: Request, carried: Charge, attempts: int) -> None:
        ticket, now = self.new_ticket(), self.clock()
        if request.problem is job.posed and job.posed is not job.problem:
            request = replace(request, problem=job.problem)
        lease = min(LEASE, request.thinking_tokens) if self.cashier.leased else request.thinking_tokens
        flight = Flight(job, slot, request, now, moved=now, attempts=attempts, carried=carried)
        flight.lease_end = lease if self.cashier.leased and lease < request.thinking_tokens else None
        flight.expected = self.cashier.typical_cost(0.0)
        job.account.planned += flight.expected
        job.account.meter.hold(ticket, self.cashier.most(job, request, lease))
        if job.account.started is None:
            job.account.started = now
        job.account.flights += 1
        job.flights.add(ticket)
        job.tickets[request.index] = ticket
        job.started += 1
        self.flights[ticket] = flight
        self.engine.submit(ticket, request)

    def new_ticket(self) -> int:
        return next(_TICKETS)

    def _extend(self, ticket: int, flight: Flight) -> None:
        """A lease has run out: hold the price of the next tokens, or end the thought inside what is held."""
        job, end, whole = flight.job, flight.lease_end or 0, flight.request.thinking_tokens
        for more in (LEASE, LEASE // 4, 1):
            target = min(end + more, whole)
            if job.account.meter.hold(ticket, self.cashier.most(job, flight.request, target, flight)):
                flight.lease_end = target if target < whole else None
                return
        flight.lease_end = None
        self.engine.steer(ticket, "close")
        self.decide(job, "close a thought", "the eFLOPs budget pays for no more thinking", 0.0)

    def _deny(self, job: Job) -> None:
        if not job.denied:
            self.decide(job, f"deny {len(job.pending)}", "the budget pays for no further branch", 0.0)
        job.denied = True
        denied = list(job.pending)
        job.pending.clear()
        for slot, request in denied:
            nothing = Completion("", "denied", 0, 0)
            self.arrive(job, slot, Branch(job.problem.id, request.index, request.seed, nothing, None, None))

    # -- work that ended ---------------------------------------------------------------------------------------------------
    def _land(self, ticket: int, flight: Flight, completion: Completion, now: float) -> None:
        job = flight.job
        if (
            flight.closing and completion.finish == "abort"
        ):  # time ran out while it was answering: what it wrote counts
            completion = replace(completion, finish="length")
        charge = flight.carried + self.pricer.charge(flight.request, completion, now - flight.submitted)
        attempt = spent_in(self.budget.unit, charge) - spent_in(self.budget.unit, flight.carried)
        if self.budget.unit == "seconds":
            attempt = 0.0  # branches run side by side; the scope's clock counts
        job.account.meter.settle(ticket, attempt)
        job.account.flights -= 1
        job.account.planned -= flight.expected
        job.flights.discard(ticket)
        job.tickets.pop(flight.request.index, None)
        thinking = flight.request.thinking_tokens
        retry = (
            completion.finish == "error"
            and flight.attempts < RETRIES
            and not (job.cancelled or job.failed or self._stop or job.outcome is not None)
            and flight.request.index not in job.quiet
        )
        if retry and job.account.meter.fits(
            self.cashier.most(job, flight.request, min(LEASE, thinking) if self.cashier.leased else thinking)
        ):
            self._gone(ticket, flight)
            self.status.retried_samples += 1
            self._submit(job, flight.slot, flight.request, charge, flight.attempts + 1)
            return
        job.shared_eflops.append(self.pricer.kinetics(flight.request, completion).shared)
        branch = self.branch(flight, completion, charge)
        self.ledger.write_branch(
            branch, flight.request, interrupted=self._stop and completion.finish == "abort"
        )
        self._gone(ticket, flight)
        self.cashier.learn(branch)
        self.cashier.set_aside(job, flight.request, branch)
        self.arrive(job, flight.slot, branch)

    def _gone(self, ticket: int, flight: Flight) -> None:
        """A flight has landed, and is on record: what waits for its money may try again."""
        del self.flights[ticket]
        self.status.running_tokens -= flight.tokens
        self._unpark()

    def branch(self, flight: Flight, completion: Completion, charge: Charge) -> Branch:
        """What a flight became, with its answer and vote."""
        problem = flight.job.problem
        answer = vote = None
        if completion.finish in ("stop", "length"):
            answer = self.judge.answer(problem, flight.request.prefix + completion.text)
            vote = self.judge.vote(problem, answer) if answer is not None else None
        return Branch(
            problem.id, flight.request.index, flight.request.seed, completion, answer, vote, charge, tuple(flight.probes)
        )  # fmt: skip

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
        self.closing.charge(job, branch.charge)
        self.status.note(branch)
        if replayed is not None:
            self.pay(job, branch.charge)
            self.cashier.set_aside(job, replayed, branch)
            self.status.replayed_tokens += branch.charge.tokens
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
                    self.decide(job, f"cancel {rest}", "the policy has seen enough", 0.0)
                for slot, request in job.pending:
                    nothing = Completion("", "abort", 0, 0)
                    job.slots[slot] = Branch(job.problem.id, request.index, request.seed, nothing, None, None)
                job.open -= len(job.pending)
                job.pending.clear()
                self.engine.abort(sorted(job.flights))
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
            self.decide(job, f"stop: {outcome.stop}", outcome.why, 0.0)
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
            self.engine.abort(sorted(job.flights))
        else:
            self._close(job, None, "failed", {}, job.failed)

    def _close(self, job: Job, answer: str | None, stop: str, votes: Mapping[str, float], error: str) -> None:
        if self.run_account is not None:
            self.run_account.meter.release(job.order)
        self.closing.close(job, answer, stop, votes, error, judged=not job.failed)

    def pay(self, job: Job, charge: Charge) -> None:
        """Charge work that an earlier session of this run did (its seconds are over, and not charged again)."""
        if self.budget.unit != "seconds":
            job.account.meter.spent += spent_in(self.budget.unit, charge)

    def decide(self, job: Job, what: str, why: str, price: float) -> None:
        decision = Decision(job.problem.id, what, why, price, job.account.meter.remaining)
        job.decisions.append(decision)
        self.ledger.write_decision(decision)
