"""Which request starts next, and whether the budget pays for it now, later or not at all."""

from __future__ import annotations

import heapq
from dataclasses import replace

from ttc.books import Books
from ttc.cashier import Cashier
from ttc.flights import Flights
from ttc.jobs import Desk, Failure, Flight, Job
from ttc.types import Branch, Completion, Steer

AHEAD = 0.25
"""How much of what is left of a shared budget steered pieces may have under way: the rest waits for what those teach."""


class Starts:
    """The jobs with requests to start. In a budget that all share, every problem's first branch goes first, and steered pieces by
    their value; else problems in their order. A job whose money is held by others is parked until some comes back (``unpark``); a
    request that has failed waits like any other (``again``), and is given up when nothing is left that could free money."""

    def __init__(self, desk: Desk, flights: Flights, cashier: Cashier, books: Books) -> None:
        self.desk, self.flights, self.cashier, self.books = desk, flights, cashier, books
        self._shared = cashier.budget.scope == "run"
        self._ready: list[tuple[float, int, int, Job]] = []
        self._parked: list[Job] = []
        self._pushes = 0
        self._last = False

    @property
    def ready(self) -> bool:
        return bool(self._ready)

    @property
    def open(self) -> bool:
        return bool(self._ready or self._parked)

    def push(self, job: Job) -> None:
        """The job has requests to start."""
        first = float(job.started) if self._shared else 0.0
        if first and isinstance(job.work, Steer):
            first = 1 / (1 + job.value)  # the highest value first, after every problem's first branch
        self._pushes += 1
        heapq.heappush(self._ready, (first, job.order, self._pushes, job))

    def again(self, job: Job, flight: Flight, error: str) -> None:
        """A request of the job has failed and is to be made again, before the job's other requests."""
        job.failures[flight.slot] = Failure(flight.attempts + 1, error)
        job.pending.appendleft((flight.slot, flight.request))
        job.started -= 1
        self.push(job)

    def last_call(self) -> None:
        """Nothing runs that could free money: of what still waits for it the first may start with less, or is given up."""
        self._last = True
        self.unpark()

    def unpark(self) -> None:
        """Money may have come back: what waited for it may try again."""
        parked, self._parked = self._parked, []
        for job in parked:
            if job.pending:
                self.push(job)

    def next(self) -> bool:
        """Start, deny or park the next request; False if its job wants none any more."""
        job = heapq.heappop(self._ready)[3]
        if not job.pending:
            return False
        if self._too_far_ahead(job):
            self._parked.append(job)
        elif self._start(job):
            self._last = False
            if job.pending:
                self.push(job)
        elif job.pending:
            self._parked.append(job)
        return True

    def _too_far_ahead(self, job: Job) -> bool:
        """A steered piece beyond a problem's first waits while much of a shared budget is under way: what that teaches may
        show a better use."""
        account = job.account
        if not (self._shared and job.started and isinstance(job.work, Steer) and account.flights):
            return False
        return account.planned + self.cashier.typical_cost(0.0) > AHEAD * account.meter.remaining

    def _start(self, job: Job) -> bool:
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
                self.books.decide(job, f"no probes of branch {request.index}", why, 0.0)
        waits = account.flights or (slot in job.failures and self._shared and not self._last)
        if thinking is None and waits:
            if first:
                meter.reserve(job.order, kept)
            return False
        if thinking is None:
            self._deny(job)
            return True
        job.pending.popleft()
        if thinking != request.thinking_tokens:
            request = replace(request, thinking_tokens=thinking)
        failure = job.failures.pop(slot, Failure(0, ""))
        self.books.status.retried_samples += failure.attempts > 0
        self.flights.submit(job, slot, request, failure.attempts)
        return True

    def _deny(self, job: Job) -> None:
        if not job.denied:
            self.books.decide(job, f"deny {len(job.pending)}", "the budget pays for no further branch", 0.0)
        job.denied = True
        denied = list(job.pending)
        job.pending.clear()
        for slot, request in denied:
            nothing, failure = Completion("", "denied", 0, 0), job.failures.pop(slot, None)
            if failure is not None:
                why = f"{failure.error} (and the budget pays for no other attempt)"
                nothing = Completion("", "error", 0, 0, error=why)
            branch = Branch(job.problem.id, request.index, request.seed, nothing, None, None)
            if failure is not None:
                self.books.ledger.write_branch(branch, request)
            self.desk.arrive(job, slot, branch)

    def crowding(self) -> str:
        """What keeps the first branches from filling the engine, where that is the money that is held for them."""
        if self.cashier.budget.unit == "seconds":
            return ""  # of time nothing is held
        running = len(self.flights.aloft)
        free = self.flights.engine.info.concurrency - running
        waiting = [job for job in self._parked if job.pending and not self._too_far_ahead(job)]
        if free <= 0 or not waiting or not running:
            return ""
        if running >= sum(len(job.pending) for job in waiting):
            return ""  # most of what is wanted runs
        account = waiting[0].account
        pending = sum(len(job.pending) for job in waiting if job.account is account)
        return self.cashier.crowding(waiting[0], running, account.flights + min(pending, free))
