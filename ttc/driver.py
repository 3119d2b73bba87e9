"""The driver: many problems, one loop. The only place that pays.

It moves work from policies (generators) to one engine and replies to them; checks the budget before anything is submitted, charges
after, writes the ledger, and contains a failing problem. It keeps the engine full: a policy that waits for its own branches never
idles the others'.

How a budget stays hard (DESIGN section 4):
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ttc.budget import Budget, Meter, format_amount
from ttc.cashier import LEASE, Cashier, rounded_up
from ttc.engine.protocol import Engine, Probed, ProbingEngine, StepReport
from ttc.errors import BudgetTooSmall, EngineError
from ttc.jobs import Account, Flight, Job, Judge, Policy, RewardModel, Status
from ttc.ledger import Ledger
from ttc.pricing import Pricer, spent_in
from ttc.types import (
    Branch,
    Brief,
    Charge,
    Completion,
    Decision,
    Generate,
    Outcome,
    Probe,
    Problem,
    Reply,
    Request,
    Result,
    Score,
    Steer,
    Verdict,
    Work,
)

AHEAD = 0.25
"""How much of what is left of a shared budget steered pieces may have under way: the rest waits for what those teach."""
RETRIES = 2
"""How often the driver issues a failed request again (engines retry their own transport errors themselves)."""


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
        self.clock, self.stall_seconds, self.on_step = clock, stall_seconds, on_step
        self.status = Status()
        self.interrupted = False
        self._run_account = Account(Meter(budget.amount)) if budget.scope == "run" else None
        self._flights: dict[int, Flight] = {}
        self._ready: list[tuple[float, int, int, Job]] = []
        self._parked: list[Job] = []
        self._ticket = self._pushes = 0
        self._stop = False
        self._done: deque[Result] = deque()
        self._begun = 0.0
        self._touched: dict[int, Job] = {}  # steered jobs with something new for their policies
        self._next_watch = 0.0

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
            prompt = self.engine.count_prompt(problem, self.base_brief.effort)
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
            )  # fmt: skip
            account = self._run_account or Account(Meter(self.budget.amount))
            job = Job(order, problem, brief, prompt, account)
            least = self.cashier.least(job)
            least_sum, least_max = least_sum + least, max(least_max, least)
            if self._run_account is not None:
                self._run_account.meter.hold(-1 - order, least)
            jobs.append(job)
        least = least_sum if self._run_account is not None else least_max
        if least > self.budget.amount:
            whole = "for one answer to each problem" if self._run_account is not None else "for one answer"
            raise BudgetTooSmall(
                f"budget: {format_amount(self.budget.amount, self.budget.unit)} is too small {whole};"
                f" give at least {rounded_up(least, self.budget.unit)}",
                least,
            )
        return jobs, refused

    # -- the loop ----------------------------------------------------------------------------------------------------------
    def run(self, problems: Sequence[Problem], *, jobs: Sequence[Job] | None = None) -> Iterator[Result]:
        """Results in the order in which problems finish; those already in the ledger come first and cost nothing again.

        Raises EngineError if the engine is gone (the ledger holds all that finished), whatever ``prepare`` raises.
        """
        refused: Mapping[str, str] = {}
        if jobs is None:
            jobs, refused = self.prepare(problems)
        self.status.problems = len(jobs) + len(refused)
        self._begun = self.clock()
        if self._run_account is not None:
            self._run_account.started = self._begun
        by_id = {p.id: p for p in problems}
        for problem_id, why in refused.items():
            self._refuse(by_id[problem_id], why)
        waiting = deque(self._replay_finished(jobs))
        if self.budget.scope == "run":
            while waiting:
                self._open(waiting.popleft())
        while True:
            yield from self._drain_done()
            if self._stop:
                self._interrupt()
                return
            self._fill(waiting)
            yield from self._drain_done()
            if not self._flights:
                if waiting or self._ready or self._parked:
                    self._unpark()
                    continue
                return
            self._turn()

    @property
    def overrun(self) -> float:
        """The largest excess over the budget at the end of any of its scopes, in its unit: 0, or a defect."""
        return self.cashier.overrun

    def stop(self) -> None:
        """End the run after the current step (safe in a signal handler)."""
        self._stop = True

    def _turn(self) -> None:
        before = self.clock()
        try:
            report = self.engine.step()
        except EngineError:
            self._settle_lost("the engine stopped")
            raise
        now = self.clock()
        self.cashier.longest_step = max(self.cashier.longest_step * 0.98, now - before)
        self._take(report, now)
        if self.budget.unit == "seconds":
            self._watch_clock(now)
        if now >= self._next_watch:
            self._watch_stalls(now)
            self._next_watch = now + self.stall_seconds / 50
        status = self.status
        status.running, status.seconds = len(self._flights), now - self._begun
        if self.on_step is not None:
            self.on_step(status)

    def _take(self, report: StepReport, now: float) -> None:
        running = self.status.running_tokens
        for ticket, progress in report.progress.items():
            flight = self._flights.get(ticket)
            if flight is None:
                continue
            running += progress.tokens - flight.tokens
            flight.tokens, flight.moved = progress.tokens, now
            if progress.weight_reads is not None:
                flight.reads = progress.weight_reads
            if flight.lease_end is not None and flight.tokens >= flight.lease_end:
                self._extend(ticket, flight)
        self.status.running_tokens = running
        for probed in report.probes:
            self._hear(probed)
        for ticket, completion in report.finished:
            landed = self._flights.pop(ticket, None)
            if landed is not None:
                self.status.running_tokens -= landed.tokens
                self._land(ticket, landed, completion, now)
        self._wake()

    def _drain_done(self) -> Iterator[Result]:
        while self._done:
            yield self._done.popleft()

    # -- starting work -----------------------------------------------------------------------------------------------------
    def _replay_finished(self, jobs: Sequence[Job]) -> list[Job]:
        """Hand out the results that the ledger already has; returns the jobs that remain."""
        remaining = []
        for job in jobs:
            known = self.ledger.results.get(job.problem.id)
            if known is None:
                remaining.append(job)
                continue
            if self._run_account is not None:
                self._run_account.meter.settle(-1 - job.order, spent_in(self.budget.unit, known.charge))
            self._count(known)
            self._done.append(known)
        return remaining

    def _open(self, job: Job) -> None:
        for charge in self.ledger.interrupted.get(job.problem.id, ()):
            self._pay(job, charge)
            self._add_charge(job, charge)
        try:
            job.routine = self.policy.run(job.problem, job.brief)
            self._advance(job, None)
        except Exception as error:  # a policy's own failure is this problem's, not the run's
            self._fail(job, f"policy {self.policy.name}: {type(error).__name__}: {error}")

    def _advance(self, job: Job, reply: Reply | None) -> None:
        """Send a reply to the job's routine and take its next work; ends the job when the routine returns."""
        assert job.routine is not None
        while True:
            try:
                work: Work = next(job.routine) if reply is None else job.routine.send(reply)
            except StopIteration as end:
                self._finish(job, end.value)
                return
            if isinstance(work, Score):
                reply = self._score(job, work)
                continue
            if isinstance(work, Steer):
                reply = self._steer(job, work)
                if reply is None:
                    return
                continue
            if not work.requests:
                reply = Reply(remaining=job.account.meter.remaining)
                continue
            self._accept(job, work)
            return

    def _accept(self, job: Job, work: Generate) -> None:
        if job.flights or job.pending:
            raise RuntimeError("steered branches are still running; cancel or await them before Generate")
        job.work, job.slots, job.arrived, job.cancelled = work, [None] * len(work.requests), [], False
        job.pending = deque(enumerate(work.requests))
        price = sum(self.cashier.most(job, r, r.thinking_tokens) for r in work.requests)
        self._decide(job, f"generate {len(work.requests)}", work.why, price)
        recorded = [
            (known[0], slot, known[1])
            for slot, request in job.pending
            if (known := self.ledger.branch(job.problem.id, request)) is not None
        ]
        for _, slot, branch in sorted(recorded, key=lambda item: item[:2]):
            job.pending = deque((s, r) for s, r in job.pending if s != slot)
            self._arrive(job, slot, branch, replayed=True)
            if job.work is not work:
                return
        if job.work is work and job.pending:
            self._push(job)

    # -- steered branches --------------------------------------------------------------------------------------------------
    def _steer(self, job: Job, work: Steer) -> Reply | None:
        """Do what ``work`` says and reply if something is new already; None: the policy waits."""
        job.work, job.value, job.waits = work, work.value, True
        for index in work.cancel:
            self._cancel(job, index, work.why)
        for index in work.close:
            if index in job.tickets:
                self._decide(job, f"close branch {index}", work.why, 0.0)
                self.engine.steer(job.tickets[index], "close")
        for index, start, every in work.probe:
            if index in job.tickets:
                self._probe(job, job.tickets[index], start, every, work.why)
        if work.start:
            price = sum(self.cashier.most(job, r, r.thinking_tokens) for r in work.start)
            self._decide(job, f"start {len(work.start)}", work.why, price)
            known = {r.index: self.ledger.branch(job.problem.id, r) for r in work.start}
            slot = len(job.slots)
            job.slots.extend([None] * len(work.start))
            fresh = [(slot + i, r) for i, r in enumerate(work.start) if known[r.index] is None]
            job.pending.extend(fresh)
            for _, branch in sorted((k for k in known.values() if k is not None), key=lambda item: item[0]):
                self._arrive(job, slot, branch, replayed=True)
            if fresh:
                self._push(job)
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

    def _wake(self) -> None:
        """Tell the policies that wait what is new; end the problems whose policies have ended and whose branches have too."""
        while self._touched:
            job = self._touched.pop(min(self._touched))
            if job.outcome is not None and not job.failed:
                if not job.flights:
                    self._finish(job, job.outcome)
                continue
            if not job.waits or job.failed:
                continue
            try:
                reply = self._news(job)
                if reply is not None:
                    self._advance(job, reply)
            except Exception as error:  # a policy's own failure is this problem's, not the run's
                self._fail(job, f"policy {self.policy.name}: {type(error).__name__}: {error}")

    def _cancel(self, job: Job, index: int, why: str) -> None:
        job.quiet.add(index)
        waiting = [(slot, r) for slot, r in job.pending if r.index == index]
        if index in job.tickets:
            self._decide(job, f"cancel branch {index}", why, 0.0)
            self.engine.abort([job.tickets[index]])
        for slot, request in waiting:
            job.pending.remove((slot, request))
            nothing = Completion("", "abort", 0, 0)
            self._arrive(job, slot, Branch(job.problem.id, index, request.seed, nothing, None, None))

    def _probe(self, job: Job, ticket: int, start: int, every: int, why: str) -> None:
        """Have a running branch probed, if the most that this can cost fits."""
        flight, engine = self._flights[ticket], self.engine
        if self.engine.info.probe_tokens is None or not isinstance(engine, ProbingEngine):
            return
        probed = replace(flight.request, probe_from=start, probe_every=every)
        until = flight.lease_end or probed.thinking_tokens
        if not job.account.meter.hold(ticket, self.cashier.most(job, probed, until, flight)):
            self._decide(job, f"no probes of branch {probed.index}", "the budget can't pay for them", 0.0)
            return
        flight.request = probed
        self._decide(
            job, f"probe branch {probed.index} every {every}", why, float(engine.info.probe_tokens or 0)
        )
        engine.probe(ticket, start, every)

    def _hear(self, probed: Probed) -> None:
        flight = self._flights.get(probed.ticket)
        if flight is None:
            return
        job = flight.job
        answer = self.judge.answer(job.problem, probed.text)
        vote = self.judge.vote(job.problem, answer) if answer is not None else None
        probe = Probe(flight.request.index, probed.tokens, vote)
        flight.probes.append(probe)
        job.probed.append(probe)
        self._touched[job.order] = job

    def _too_far_ahead(self, job: Job) -> bool:
        """A steered piece beyond a problem's first waits while much of a shared budget is under way: what that teaches may
        show a better use."""
        account = job.account
        if (
            account is not self._run_account
            or not job.started
            or not isinstance(job.work, Steer)
            or not account.flights
        ):
            return False
        return account.planned + self.cashier.typical_cost(0.0) > AHEAD * account.meter.remaining

    def _push(self, job: Job) -> None:
        first = float(job.started) if self.budget.scope == "run" else 0.0
        if first and isinstance(job.work, Steer):
            first = 1 / (1 + job.value)  # the highest value first, after every problem's first branch
        self._pushes += 1
        heapq.heappush(self._ready, (first, job.order, self._pushes, job))

    def _fill(self, waiting: deque[Job]) -> None:
        while len(self._flights) < self.engine.info.concurrency:
            if not self._ready:
                if not waiting:
                    return
                self._open(waiting.popleft())
                continue
            job = heapq.heappop(self._ready)[3]
            if not job.pending:
                continue
            if self._too_far_ahead(job):
                self._parked.append(job)
            elif self._start_next(job):
                if job.pending:
                    self._push(job)
            elif job.pending:
                self._parked.append(job)
            self._wake()

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for job in parked:
            if job.pending:
                self._push(job)

    def _start_next(self, job: Job) -> bool:
        """Start the job's next request, or deny what is left of its work; False if it must wait for money to come back."""
        slot, request = job.pending[0]
        account, meter = job.account, job.account.meter
        first = not job.flights and not any(branch.usable for branch in job.branches)
        if account is self._run_account:
            meter.settle(
                -1 - job.order, 0.0
            )  # what was set aside for this problem's first answer is its own to use
        thinking = self.cashier.affordable(job, request, first)
        if thinking is None and account.flights:
            if account is self._run_account and first:
                meter.hold(-1 - job.order, self.cashier.least(job))
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
        ticket = self._ticket = self._ticket + 1
        now = self.clock()
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
        self._flights[ticket] = flight
        self.engine.submit(ticket, request)

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
        self._decide(job, "close a thought", "the eFLOPs budget pays for no more thinking", 0.0)

    def _deny(self, job: Job) -> None:
        if not job.denied:
            self._decide(job, f"deny {len(job.pending)}", "the budget pays for no further branch", 0.0)
        job.denied = True
        denied = list(job.pending)
        job.pending.clear()
        for slot, request in denied:
            nothing = Completion("", "denied", 0, 0)
            self._arrive(job, slot, Branch(job.problem.id, request.index, request.seed, nothing, None, None))

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
        self._unpark()
        retry = (
            completion.finish == "error"
            and flight.attempts < RETRIES
            and not (job.cancelled or job.failed or self._stop or job.outcome is not None)
            and flight.request.index not in job.quiet
        )
        if retry and job.account.meter.fits(
            self.cashier.most(job, flight.request, flight.request.thinking_tokens)
        ):
            self._submit(job, flight.slot, flight.request, charge, flight.attempts + 1)
            return
        job.shared_eflops.append(self.pricer.kinetics(flight.request, completion).shared)
        branch = self._branch(flight, completion, charge)
        self.ledger.write_branch(
            branch, flight.request, interrupted=self._stop and completion.finish == "abort"
        )
        self.cashier.learn(branch)
        self._arrive(job, flight.slot, branch)

    def _branch(self, flight: Flight, completion: Completion, charge: Charge) -> Branch:
        problem = flight.job.problem
        answer = vote = None
        if completion.finish in ("stop", "length"):
            answer = self.judge.answer(problem, flight.request.prefix + completion.text)
            vote = self.judge.vote(problem, answer) if answer is not None else None
        return Branch(
            problem.id, flight.request.index, flight.request.seed, completion, answer, vote, charge, tuple(flight.probes)
        )  # fmt: skip

    def _arrive(self, job: Job, slot: int, branch: Branch, *, replayed: bool = False) -> None:
        """A branch of the job's current work is there; replies to the policy when all are."""
        job.slots[slot] = branch
        job.arrived.append(branch)
        job.branches.append(branch)
        self._add_charge(job, branch.charge)
        if branch.finish != "denied":
            self.status.samples += 1
        if replayed:
            self._pay(job, branch.charge)
            job.started += 1
            self.cashier.learn(branch)
        if job.failed:
            if not job.flights:
                self._close_failed(job)
            return
        if isinstance(job.work, Steer):
            job.news.append(branch)
            self._touched[job.order] = job
            return
        try:
            self._consider(job)
        except Exception as error:
            self._fail(job, f"policy {self.policy.name}: {type(error).__name__}: {error}")

    def _consider(self, job: Job) -> None:
        work = job.work
        assert isinstance(work, Generate)
        if work.until is not None and not job.cancelled:
            finished = [b for b in job.arrived if b.finish not in ("denied", "abort")]
            if finished and work.until(finished):
                job.cancelled = True
                rest = len(job.pending) + len(job.flights)
                if rest:
                    self._decide(job, f"cancel {rest}", "the policy has seen enough", 0.0)
                for slot, request in job.pending:
                    nothing = Completion("", "abort", 0, 0)
                    job.slots[slot] = Branch(job.problem.id, request.index, request.seed, nothing, None, None)
                job.pending.clear()
                self.engine.abort(sorted(job.flights))
        if job.pending or job.flights or any(b is None for b in job.slots):
            return
        branches = tuple(b for b in job.slots if b is not None)
        job.work = None
        self._advance(job, Reply(branches=branches, remaining=job.account.meter.remaining))

    def _score(self, job: Job, work: Score) -> Reply:
        """Run the reward model; scores are () where there is none or the budget can't pay for it."""
        remaining = job.account.meter.remaining
        if self.reward is None or not work.branches:
            return Reply(remaining=remaining)
        texts = [b.completion.text for b in work.branches]
        tokens = self.reward.tokens(job.problem, texts)
        charge = Charge(tokens_judge=tokens)
        price = spent_in(self.budget.unit, charge) if self.budget.unit == "tokens" else 0.0
        self._decide(job, f"score {len(texts)}", work.why, price)
        if not job.account.meter.fits(price):
            return Reply(remaining=remaining)
        scores = tuple(self.reward.score(job.problem, texts))
        job.account.meter.spent += price
        self._add_charge(job, charge)
        return Reply(scores=scores, remaining=job.account.meter.remaining)

    # -- the end of a problem ----------------------------------------------------------------------------------------------
    def _finish(self, job: Job, outcome: Outcome) -> None:
        if job.flights or job.pending:  # a policy that steers has had its last word: nothing of it runs on
            job.waits = False
            for index in [r.index for _, r in job.pending] + sorted(job.tickets):
                self._cancel(job, index, "the policy has ended")
            if job.flights:
                job.outcome = outcome
                return
        if self._run_account is not None:
            self._run_account.meter.settle(-1 - job.order, 0.0)
        if outcome.why:
            self._decide(job, f"stop: {outcome.stop}", outcome.why, 0.0)
        verdict, right, error = self._verdicts(job, outcome.answer)
        if outcome.answer is None and not error:
            failures = [b.completion.error for b in job.branches if b.completion.error]
            error = failures[0] if failures else ""
        stop = "budget" if job.denied and outcome.stop == "samples" else outcome.stop
        self._close(job, outcome.answer, verdict, stop, outcome.votes, error, right)

    def _verdicts(self, job: Job, answer: str | None) -> tuple[Verdict | None, tuple[str, ...], str]:
        """The verdict on the answer, the votes that are right, and what broke ("": nothing). A verifier that breaks costs the
        verdict, never the run."""
        verdict, right, error = None, [], ""
        votes = dict.fromkeys(b.vote for b in job.branches if b.vote is not None)
        for candidate in dict.fromkeys((answer, *votes)):
            try:
                found = self.judge.verdict(job.problem, candidate)
            except Exception as failure:
                error = error or (
                    f"verifier: {type(failure).__name__}: {failure}" if candidate == answer else ""
                )
                continue
            if candidate == answer:
                verdict = found
            if found is not None and found.correct and candidate is not None:
                right.append(candidate)
        return verdict, tuple(right), error

    def _fail(self, job: Job, error: str) -> None:
        job.failed = error
        job.pending.clear()
        job.routine = None
        if job.flights:
            self.engine.abort(sorted(job.flights))
        else:
            self._close_failed(job)

    def _close_failed(self, job: Job) -> None:
        if self._run_account is not None:
            self._run_account.meter.settle(-1 - job.order, 0.0)
        self._close(job, None, None, "error", {}, job.failed)

    def _refuse(self, problem: Problem, why: str) -> None:
        result = Result(problem.id, None, None, (), Charge(), "error", self.base_brief.seed, error=why)
        self.ledger.write_result(result)
        self._count(result)
        self._done.append(result)

    def _close(
        self,
        job: Job,
        answer: str | None,
        verdict: Verdict | None,
        stop: str,
        votes: Mapping[str, float],
        error: str,
        right: tuple[str, ...] = (),
    ) -> None:
        shared = [s for s in job.shared_eflops if s]
        if shared:  # the prompt's KV reads, shared over the problem's branches (Kinetics Eq. 10: times the mean length)
            extra = Charge(eflops_kinetics=sum(shared) / len(shared))
            self._add_charge(job, extra)
        seconds = (self.clock() - job.account.started) if job.account.started is not None else 0.0
        charge = replace(job.charge, seconds=seconds if self._run_account is None else job.charge.seconds)
        result = Result(
            job.problem.id, answer, verdict, tuple(job.branches), charge, stop, job.brief.seed,
            votes=dict(votes), right=right, decisions=tuple(job.decisions), error=error,
        )  # fmt: skip
        self.cashier.check_overrun(job)
        self.judge.forget(job.problem)
        self.ledger.write_result(result)
        self._count(result)
        self._done.append(result)

    def _count(self, result: Result) -> None:
        status = self.status
        status.done += 1
        status.failed += bool(result.error)
        if result.verdict is not None:
            status.scored += 1
            status.correct += result.verdict.correct
        if not any(b for b in result.branches) and result.charge.tokens:
            status.charge = status.charge + result.charge  # replayed from the ledger

    def _pay(self, job: Job, charge: Charge) -> None:
        """Charge work that an earlier session of this run did (its seconds are over, and not charged again)."""
        if self.budget.unit != "seconds":
            job.account.meter.spent += spent_in(self.budget.unit, charge)

    def _add_charge(self, job: Job, charge: Charge) -> None:
        job.charge = job.charge + charge
        self.status.charge = self.status.charge + charge

    def _decide(self, job: Job, what: str, why: str, price: float) -> None:
        decision = Decision(job.problem.id, what, why, price, job.account.meter.remaining)
        job.decisions.append(decision)
        self.ledger.write_decision(decision)

    # -- time, stalls, interruption ----------------------------------------------------------------------------------------
    def _watch_clock(self, now: float) -> None:
        late: list[int] = []
        for ticket, flight in self._flights.items():
            left = self.cashier.seconds_left(flight.job)
            if left <= self.cashier.longest_step:
                late.append(ticket)
            elif left <= self.cashier.closing_seconds() and not flight.closing:
                flight.closing = True
                self.engine.steer(ticket, "close")
        if late:
            self.engine.abort(late)

    def _watch_stalls(self, now: float) -> None:
        stalled = [t for t, f in self._flights.items() if now - f.moved > self.stall_seconds]
        if not stalled:
            return
        self.engine.abort(stalled)
        for ticket in stalled:
            self._flights[ticket].moved = now
            self._flights[ticket].attempts = RETRIES
            self._decide(self._flights[ticket].job, "cancel 1", f"no token for {self.stall_seconds:g} s", 0.0)

    def _interrupt(self) -> None:
        """Cancel what runs and record it, so that its tokens are accounted for when the run is resumed."""
        self.interrupted = True
        self.engine.abort(sorted(self._flights))
        for _ in range(100):
            if not self._flights:
                return
            report = self.engine.step()
            for ticket, completion in report.finished:
                flight = self._flights.pop(ticket, None)
                if flight is None:
                    continue
                charge = flight.carried + self.pricer.charge(
                    flight.request, completion, self.clock() - flight.submitted
                )
                branch = self._branch(flight, completion, charge)
                self._add_charge(flight.job, charge)
                self.ledger.write_branch(branch, flight.request, interrupted=completion.finish == "abort")

    def _settle_lost(self, why: str) -> None:
        """The engine is gone: what was running is charged at what was last seen of it."""
        for flight in self._flights.values():
            lost = Completion(
                "", "abort", flight.job.prompt_tokens if flight.tokens else 0, flight.tokens,
                weight_reads=flight.reads, error=why,
            )  # fmt: skip
            charge = flight.carried + self.pricer.charge(
                flight.request, lost, self.clock() - flight.submitted
            )
            self.ledger.write_branch(self._branch(flight, lost, charge), flight.request, interrupted=True)
        self._flights.clear()
