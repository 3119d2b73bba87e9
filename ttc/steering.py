"""``Steer`` work: branches that a policy starts, cancels, closes, probes and puts text into one at a time while others run.

Here is what a steering policy asks for and what it is told; ``flights`` has the branches.
"""

from __future__ import annotations

from ttc.books import Books
from ttc.cashier import Cashier
from ttc.engine.protocol import Probed
from ttc.flights import Flights
from ttc.jobs import Desk, Job, Judge
from ttc.starts import Starts
from ttc.types import Branch, Completion, Probe, Reply, Steer


class Steering:
    """Does what ``Steer`` says, and wakes the policies that wait for news."""

    def __init__(
        self, desk: Desk, starts: Starts, flights: Flights, cashier: Cashier, books: Books, judge: Judge
    ) -> None:
        self.desk, self.starts, self.flights = desk, starts, flights
        self.cashier, self.books, self.judge = cashier, books, judge
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
                self.books.decide(job, f"close branch {index}", work.why, 0.0)
                self.flights.close(job.tickets[index])
        for index, start, every in work.probe:
            if index in job.tickets:
                self.flights.probe(job.tickets[index], start, every, work.why)
        for index, text in work.insert:
            if index in job.tickets:
                self.flights.insert(job.tickets[index], text, work.why)
        if work.start:
            price = sum(self.cashier.most(job, r, r.thinking_tokens) for r in work.start)
            self.books.decide(job, f"start {len(work.start)}", work.why, price)
            asked = {r.index: r for r in work.start}
            known = {r.index: self.books.ledger.branch(job.problem.id, r) for r in work.start}
            slot = len(job.slots)
            job.slots.extend([None] * len(work.start))
            fresh = [(slot + i, r) for i, r in enumerate(work.start) if known[r.index] is None]
            job.pending.extend(fresh)
            for _, branch in sorted((k for k in known.values() if k is not None), key=lambda item: item[0]):
                self.desk.arrive(job, slot, branch, replayed=asked[branch.index])
            if fresh:
                self.starts.push(job)
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
                    self.desk.finish(job, job.outcome)
                continue
            if not job.waits or job.failed:
                continue
            try:
                reply = self._news(job)
                if reply is not None:
                    self.desk.advance(job, reply)
            except Exception as error:
                self.desk.blame(job, error)

    def _cancel(self, job: Job, index: int, why: str) -> None:
        job.quiet.add(index)
        waiting = [(slot, r) for slot, r in job.pending if r.index == index]
        if index in job.tickets:
            self.books.decide(job, f"cancel branch {index}", why, 0.0)
            self.flights.cancel([job.tickets[index]])
        for slot, request in waiting:
            job.pending.remove((slot, request))
            nothing = Completion("", "abort", 0, 0)
            self.desk.arrive(job, slot, Branch(job.problem.id, index, request.seed, nothing, None, None))

    def hear(self, probed: Probed) -> None:
        flight = self.flights.aloft.get(probed.ticket)
        if flight is None:
            return
        job = flight.job
        answer = self.judge.answer(job.problem, probed.text)
        vote = self.judge.vote(job.problem, answer) if answer is not None else None
        probe = Probe(flight.request.index, probed.tokens, vote)
        flight.probes.append(probe)
        job.probed.append(probe)
        self.touch(job)
