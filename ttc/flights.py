"""The branches inside the engine: handed over with their money held, followed, extended, and settled when they end.

An engine tells one driver where its branches are. The money rules are the cashier's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count

from ttc.books import Books
from ttc.cashier import LEASE, Cashier, asks
from ttc.engine.protocol import Engine, InsertingEngine, ProbingEngine, Progress
from ttc.jobs import Flight, Job, Judge
from ttc.pricing import spent_in
from ttc.types import Branch, Charge, Completion, Fork, Request

_TICKETS = count(1)
"""Tickets are of all drivers: a late word on a branch of one run means nothing to the next run on the same engine."""


def new_ticket() -> int:
    return next(_TICKETS)


class Flights:
    """``aloft`` are the branches in the engine by ticket; ``standing`` is where they are, as the engine last told (of one that
    tells at any time). ``followed`` is when that was last read."""

    def __init__(
        self, engine: Engine, cashier: Cashier, books: Books, judge: Judge, clock: Callable[[], float]
    ) -> None:
        self.engine, self.cashier, self.books, self.judge, self.clock = engine, cashier, books, judge, clock
        self.aloft: dict[int, Flight] = {}
        self.standing: Mapping[int, Progress] = {}
        self.followed = 0.0

    # -- into the engine ---------------------------------------------------------------------------------------------------
    def submit(self, job: Job, slot: int, request: Request, attempts: int = 0) -> None:
        """Hold what the request may cost and hand it over, after so many ``attempts`` at it that failed."""
        ticket, now = new_ticket(), self.clock()
        lease = min(LEASE, request.thinking_tokens) if self.cashier.leased else request.thinking_tokens
        flight = Flight(job, slot, request, now, moved=now, attempts=attempts)
        flight.lease_end = lease if self.cashier.leased and lease < request.thinking_tokens else None
        flight.expected = self.cashier.typical_cost(0.0)
        account = job.account
        account.planned += flight.expected
        account.meter.hold(ticket, self.cashier.most(job, request, lease))
        if account.started is None:
            account.started = now
        account.flights += 1
        job.flights.add(ticket)
        job.tickets[request.index] = ticket
        job.started += 1
        self.aloft[ticket] = flight
        self.engine.submit(ticket, request)

    # -- on their way ------------------------------------------------------------------------------------------------------
    def follow(self, places: Mapping[int, Progress], now: float, *, gone: bool = False) -> None:
        """Note where running branches are; extend the leases that have run out (unless the engine is ``gone``)."""
        status = self.books.status
        running = status.running_tokens
        seconds, written = 0.0, 0
        for ticket, progress in places.items():
            flight = self.aloft.get(ticket)
            if flight is None:
                continue
            if progress.tokens != flight.tokens:
                running += progress.tokens - flight.tokens
                if flight.tokens:
                    seconds, written = seconds + now - flight.moved, written + progress.tokens - flight.tokens
                flight.tokens, flight.moved = progress.tokens, now
            if progress.weight_reads is not None:
                flight.reads = progress.weight_reads
            if flight.lease_end is not None and flight.tokens >= flight.lease_end and not gone:
                self._extend(ticket, flight)
        status.running_tokens, self.followed = running, now
        self.cashier.paced(seconds, written)

    def _extend(self, ticket: int, flight: Flight) -> None:
        """A lease has run out: hold the price of the next tokens, or end the thought inside what is held."""
        job, end, whole = flight.job, flight.lease_end or 0, flight.request.thinking_tokens
        for more in (LEASE, LEASE // 4, 1):
            target = min(end + more, whole)
            if job.account.meter.hold(ticket, self.cashier.most(job, flight.request, target, flight)):
                flight.lease_end = target if target < whole else None
                return
        flight.lease_end = None
        self.close(ticket)
        self.books.decide(job, "close a thought", "the eFLOPs budget pays for no more thinking", 0.0)

    def close(self, ticket: int) -> None:
        """Make a branch end its thought and answer."""
        self.engine.steer(ticket, "close")

    def cancel(self, tickets: Sequence[int]) -> None:
        self.engine.abort(tickets)

    def probe(self, ticket: int, start: int, every: int, why: str) -> None:
        """Have a branch give anytime answers, if the engine can and the most that this may cost fits."""
        flight, engine = self.aloft[ticket], self.engine
        if engine.info.probe_tokens is None or not isinstance(engine, ProbingEngine):
            return
        job, probed = flight.job, replace(flight.request, probe_from=start, probe_every=every)
        self.follow(self.standing, self.clock())
        until = flight.lease_end or probed.thinking_tokens
        before = flight.asked
        flight.asked = max(len(flight.probes), before + asks(flight.request, 0, flight.tokens))
        if not job.account.meter.hold(ticket, self.cashier.most(job, probed, until, flight)):
            flight.asked = before
            why = "the budget can't pay for them"
            self.books.decide(job, f"no probes of branch {probed.index}", why, 0.0)
            return
        flight.request = probed
        price = float(engine.info.probe_tokens or 0)
        self.books.decide(job, f"probe branch {probed.index} every {every}", why, price)
        engine.probe(ticket, start, every)

    def insert(self, ticket: int, text: str, why: str) -> None:
        """Put text into a branch: it stays inside the branch's cap, so nothing more is held. Raises TypeError where the engine
        can't (a policy that needs "insert" is refused before the run)."""
        engine, flight = self.engine, self.aloft[ticket]
        if not isinstance(engine, InsertingEngine):
            raise TypeError(f"the {engine.info.name} engine can't put text into a running branch")
        self.books.decide(flight.job, f"insert {text!r} into branch {flight.request.index}", why, 0.0)
        engine.insert(ticket, text)

    # -- out of it ---------------------------------------------------------------------------------------------------------
    def settle(self, ticket: int, completion: Completion, now: float) -> Charge:
        """A branch has ended: what it cost is spent, and what was held beyond that is free. Returns its charge."""
        flight = self.aloft[ticket]
        job, unit = flight.job, self.books.unit
        charge = self.cashier.pricer.charge(flight.request, completion, now - flight.submitted)
        # under a budget of seconds branches run side by side: the scope's clock counts
        job.account.meter.settle(ticket, spent_in(unit, charge) if unit != "seconds" else 0.0)
        job.account.flights -= 1
        job.account.planned -= flight.expected
        job.flights.discard(ticket)
        job.tickets.pop(flight.request.index, None)
        return charge

    def remove(self, ticket: int) -> None:
        """A branch has ended, and is on record."""
        self.books.status.running_tokens -= self.aloft.pop(ticket).tokens

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

    def so_far(self, ticket: int, why: str) -> Branch:
        """A running branch as it was last seen, cut for that reason, at its price; an anytime answer at the most that one costs."""
        flight, info = self.aloft[ticket], self.engine.info
        prompt = self.cashier.prompt(flight.job, flight.request) if flight.tokens else 0
        each, behind = info.probe_tokens or 0, [prompt + probe.tokens for probe in flight.probes]
        forks: tuple[Fork, ...] = ()
        if (again := info.probe_prefill) is not None:
            forks = tuple(Fork(begun, max(begun - again, 0), each, float(each)) for begun in behind)
        cut = Completion(
            "", "abort", prompt, flight.tokens, weight_reads=flight.reads, error=why,
            forks=forks, probe_tokens=each * len(behind),
        )  # fmt: skip
        return self.branch(flight, cut, self._price(flight, cut))

    def _price(self, flight: Flight, completion: Completion) -> Charge:
        seconds = self.clock() - flight.submitted
        return self.cashier.pricer.charge(flight.request, completion, seconds)

    def record(self, ticket: int, completion: Completion) -> None:
        """A branch has ended whose problem will not go on in this session: charge it and write it down."""
        flight = self.aloft[ticket]
        self._write(ticket, self.branch(flight, completion, self._price(flight, completion)))

    def record_lost(self, ticket: int, why: str) -> None:
        """What became of a branch is not known: it is charged and written down at what was last seen of it."""
        self._write(ticket, self.so_far(ticket, why))

    def _write(self, ticket: int, branch: Branch) -> None:
        flight = self.aloft[ticket]
        self.books.charge(flight.job, branch.charge)
        cut = branch.finish not in ("stop", "length")
        self.books.ledger.write_branch(branch, flight.request, interrupted=cut)
        del self.aloft[ticket]
