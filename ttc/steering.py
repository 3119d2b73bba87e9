"""``Steer`` work: branches that a policy starts, cancels, closes, probes and puts text into one at a time while others run.

A part of the driver, which owns the flights and the money; here is what a steering policy asks for and what it is told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ttc.cashier import asks
from ttc.engine.protocol import InsertingEngine, Probed, ProbingEngine
from ttc.jobs import Job
from ttc.types import Branch, Completion, Probe, Reply, Steer

if TYPE_CHECKING:
    from ttc.driver import Driver

AHEAD = 0.25
"""How much of what is left of a shared budget steered pieces may have under way: the rest waits for what those teach."""


class Steering:
    """Does what ``Steer`` says, and wakes the policies that wait for news."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._touched: dict[int, Job] = {}  # jobs with something new for their policies

    def touch(self, job: Job) -> None:
        """There is something new for the job's policy."""
        self._touched[job.order] = job

    def end(self, job: Job) -> None:
        """The job's policy has had its last word: cancel what is left of its work."""
        job.waits = False
        for index in [r.index for _, r in job.pending] + sorted(job.tickets):
            self._cancel(job, index, "the policy has ended")

    def do(self, job: Job, work: Steer) -> Reply | None:
        """Do what ``work`` says and reply if something is new already; None: the policy waits."""
        job.work, job.value, job.waits = work, work.value, True
        for index in work.cancel:
            self._cancel(job, index, work.why)
        for index in work.close:
            if index in job.tickets:
                self.driver.decide(job, f"close branch {index}", work.why, 0.0)
                self.driver.engine.steer(job.tickets[index], "close")
        for index, start, every in work.probe:
            if index in job.tickets:
                self._probe(job, job.tickets[index], start, every, work.why)
        for index, text in work.insert:
            if index in job.tickets:
                self._insert(job, index, text, work.why)
        if work.start:
            price = sum(self.driver.cashier.most(job, r, r.thinking_tokens) for r in work.start)
            self.driver.decide(job, f"start {len(work.start)}", work.why, price)
            asked = {r.index: r for r in work.start}
            known = {r.index: self.driver.ledger.branch(job.problem.id, r) for r in work.start}
            slot = len(job.slots)
            job.slots.extend([None] * len(work.start))
            fresh = [(slot + i, r) for i, r in enumerate(work.start) if known[r.index] is None]
            job.pending.extend(fresh)
            for _, branch in sorted((k for k in known.values() if k is not None), key=lambda item: item[0]):
                self.driver.arrive(job, slot, branch, replayed=asked[branch.index])
            if fresh:
                self.driver.push(job)
        return self._news(job)

    def _news(self, job: Job) -> Reply | None:
        """What a waiting policy has to know now, if anything."""
        idle = not job.pending and not job.flights
        loud = any(branch.index not in job.quiet for branch in job.news)
        if not (loud or job.probed or idle):
            return None
        reply = Reply(
            branches=tuple(job.news), probes=tuple(job.probed), remaining=job.account.meter.remaining,
            running=len(job.flights) + len(job.pending),
        )  # fmt: skip
        job.news, job.probed, job.waits = [], [], False
        return reply

    def wake(self) -> None:
        """Tell the policies that wait what is new; end the problems whose policies have ended and whose branches have too."""
        while self._touched:
            job = self._touched.pop(min(self._touched))
            if job.outcome is not None and not job.failed:
                if not job.flights:
                    self.driver.finish(job, job.outcome)
                continue
            if not job.waits or job.failed:
                continue
            try:
                reply = self._news(job)
                if reply is not None:
                    self.driver.advance(job, reply)
            except Exception as error:
                self.driver.blame(job, error)

    def _cancel(self, job: Job, index: int, why: str) -> None:
        job.quiet.add(index)
        waiting = [(slot, r) for slot, r in job.pending if r.index == index]
        if index in job.tickets:
            self.driver.decide(job, f"cancel branch {index}", why, 0.0)
            self.driver.engine.abort([job.tickets[index]])
        for slot, request in waiting:
            job.pending.remove((slot, request))
            nothing = Completion("", "abort", 0, 0)
            self.driver.arrive(job, slot, Branch(job.problem.id, index, request.seed, nothing, None, None))

    def _probe(self, job: Job, ticket: int, start: int, every: int, why: str) -> None:
        """Have a running branch probed, if the most that this can cost fits."""
        flight, engine = self.driver.flights[ticket], self.driver.engine
        if self.driver.engine.info.probe_tokens is None or not isinstance(engine, ProbingEngine):
            return
        probed = replace(flight.request, probe_from=start, probe_every=every)
        self.driver.follow(self.driver.standing, self.driver.clock())
        until = flight.lease_end or probed.thinking_tokens
        before = flight.asked
        flight.asked = max(len(flight.probes), before + asks(flight.request, 0, flight.tokens))
        if not job.account.meter.hold(ticket, self.driver.cashier.most(job, probed, until, flight)):
            flight.asked = before
            self.driver.decide(
                job, f"no probes of branch {probed.index}", "the budget can't pay for them", 0.0
            )
            return
        flight.request = probed
        self.driver.decide(
            job, f"probe branch {probed.index} every {every}", why, float(engine.info.probe_tokens or 0)
        )
        engine.probe(ticket, start, every)

    def _insert(self, job: Job, index: int, text: str, why: str) -> None:
        """Put text into a running branch: it stays inside the branch's cap, so nothing more is held. Raises TypeError where the
        engine can't (a policy that ``needs`` "insert" is refused before the run)."""
        engine = self.driver.engine
        if not isinstance(engine, InsertingEngine):
            raise TypeError(f"the {engine.info.name} engine can't put text into a running branch")
        self.driver.decide(job, f"insert {text!r} into branch {index}", why, 0.0)
        engine.insert(job.tickets[index], text)

    def hear(self, probed: Probed) -> None:
        flight = self.driver.flights.get(probed.ticket)
        if flight is None:
            return
        job = flight.job
        answer = self.driver.judge.answer(job.problem, probed.text)
        vote = self.driver.judge.vote(job.problem, answer) if answer is not None else None
        probe = Probe(flight.request.index, probed.tokens, vote)
        flight.probes.append(probe)
        job.probed.append(probe)
        self.touch(job)

    def too_far_ahead(self, job: Job) -> bool:
        """A steered piece beyond a problem's first waits while much of a shared budget is under way: what that teaches may
        show a better use."""
        account = job.account
        if (
            account is not self.driver.run_account
            or not job.started
            or not isinstance(job.work, Steer)
            or not account.flights
        ):
            return False
        return account.planned + self.driver.cashier.typical_cost(0.0) > AHEAD * account.meter.remaining
