"""What a run can afford: prices requests for the driver, and keeps what has been learnt of lengths and costs.

Owns the rules by which a branch is started, shortened, postponed or refused under a budget; moves no work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor, log10

from ttc.budget import Budget, format_amount
from ttc.engine.protocol import Engine
from ttc.jobs import Flight, Job, Policy, traits_of
from ttc.pricing import Pricer, spent_in
from ttc.types import Branch, Request

LEASE = 32
"""Tokens of thinking that an eFLOPs lease is extended by."""


class Cashier:
    """Prices in the budget's unit. ``overrun`` is the largest excess seen at the end of any scope (0 is the promise)."""

    def __init__(self, budget: Budget, pricer: Pricer, engine: Engine, clock: Callable[[], float]) -> None:
        pricer.check(budget.unit)
        self.budget, self.pricer, self.engine, self.clock = budget, pricer, engine, clock
        self.leased = budget.unit == "eflops" and engine.info.steerable
        self.overrun = 0.0
        self.longest_step = 0.0
        self._steps: list[float] = []  # the first two steps' seconds
        self._pace = [
            0.0,
            0.0,
        ]  # seconds that running branches took, and the tokens that they wrote in them; the latest count most
        self._lengths: list[float] = [
            0.0,
            0.0,
        ]  # sum and count of output tokens of branches that ended by themselves
        self._costs: list[float] = [0.0, 0.0]  # the same for what they cost, in the budget's unit

    def least(self, job: Job) -> float:
        return max(self.most(job, job.brief.request(job.problem, 0, effort=e), 1) for e in job.prompts)

    def prompt(self, job: Job, request: Request) -> int:
        """The most tokens that the request's own prompt has, at its effort and with what it goes on from."""
        if request.problem is not job.problem and request.problem is not job.posed:
            own = self.engine.count_prompt(request.problem, request.effort)
        else:
            if request.effort not in job.prompts:
                job.prompts[request.effort] = self.engine.count_prompt(job.problem, request.effort)
            own = job.prompts[request.effort]
        return own * self.engine.info.prompt_error + _begun(request)

    def most(self, job: Job, request: Request, thinking: int, flight: Flight | None = None) -> float:
        """The most that ``request`` can still cost in all if its thought ends at ``thinking`` tokens, probes included, and for a
        step that pauses also the least answer after it."""
        info, unit = self.engine.info, self.budget.unit
        if unit == "seconds":  # the clock is watched
            return 0.0
        if request.pauses:
            thinking = min(thinking, request.step_tokens)
        done, reads = (flight.tokens, flight.reads) if flight is not None else (0, 0.0)
        probes = max(len(flight.probes), flight.asked) if flight is not None else 0
        if info.probe_tokens:
            probes += asks(request, done, thinking)
        passes = info.prompt_passes
        if passes > 1 and request.control is not None:
            passes += request.control.most_insertions(thinking)
        prompt = self.prompt(job, request)
        tokens, forks = thinking + self.engine.room_tokens, 0.0
        if info.probe_tokens and info.probe_prefill is not None and (probes or request.probe_every):
            probes += 1  # one may be under way
            whole = prompt + thinking + self.engine.room_tokens  # a closing span may stand in its prompt
            forks = probes * self.pricer.most_fork(unit, whole, info.probe_prefill, info.probe_tokens)
        else:
            tokens += probes * (info.probe_tokens or 0)
        return (
            forks
            + self.pricer.most(
                unit, request, passes * prompt + (passes - 1) * tokens, tokens, done=done, reads=reads
            )
            + (self.answer_after(job, request, request.step_tokens) if request.pauses else 0.0)
        )

    def answer_after(self, job: Job, request: Request, tokens: int) -> float:
        """The least price of an answer that goes on ``tokens`` tokens behind the request's beginning."""
        begun = (0,) * (_begun(request) + tokens)
        return self.most(job, replace(request, prefix_ids=begun, step_tokens=0, probe_every=0), 1)

    def set_aside(self, job: Job, request: Request, branch: Branch) -> None:
        """A branch has ended: while the problem has no answer, what one costs behind the longest beginning that it has is kept, so
        that nothing else is bought for it (what was held for the branch had that in it)."""
        meter = job.account.meter
        if branch.usable or any(each.usable for each in job.branches):
            meter.release(job.order)
            return
        done = branch.completion
        least = self.answer_after(job, request, done.output_tokens if done.partial else 0)
        if least > meter.reserved(job.order):
            meter.reserve(job.order, least)

    def affordable(self, job: Job, request: Request, first: bool) -> int | None:
        """The thinking cap that the budget can pay for now; None: nothing worth starting (or not yet).

        The whole cap, or, where nothing is running that could free money, what fits: any length for a problem's first answer, and
        for later ones no less than a typical branch needs, since a thought cut short seldom votes well.
        """
        meter, want = job.account.meter, request.thinking_tokens
        if self.budget.unit == "seconds":
            left = self.seconds_left(job)
            if left <= self.longest_step:
                return None  # time is up, for first answers too: a step more would be past the budget
            return want if first or left > self.closing_seconds() + self.typical_cost(0.0) else None
        if self.leased:
            typical = self.typical_cost(0.0)
            crowded = meter.spent + job.account.planned + typical > meter.limit
            if meter.fits(self.most(job, request, min(LEASE, want))) and (first or not crowded):
                return want
        elif meter.fits(self.most(job, request, want)):
            return want
        if job.account.flights:
            return None
        if request.pauses:  # it is run to its end at once: there would be no money for an answer after it
            want = request.step_tokens
            request = replace(request, step_tokens=0)
        fits = self._longest_that_fits(job, request, want)
        enough = 1 if first else self._typical_tokens()
        return fits if fits >= min(enough, want) else None

    def _longest_that_fits(self, job: Job, request: Request, want: int, share: float | None = None) -> int:
        """Of a thought, in tokens, with what the meter has left, or with ``share`` of the budget."""
        low, high = 0, want
        while low < high:
            middle = (low + high + 1) // 2
            most = self.most(job, request, middle)
            if job.account.meter.fits(most) if share is None else most <= share:
                low = middle
            else:
                high = middle - 1
        return low

    def crowding(self, job: Job, running: int, wanted: int) -> str:
        """What to say of a run that begins with ``running`` branches because money is held for them, where one scope of the budget
        wants ``wanted`` at once."""
        request = job.pending[0][1]
        most = min(self.most(job, request, request.thinking_tokens), self.budget.amount)
        held = format_amount(most, self.budget.unit)
        cap = self._longest_that_fits(job, request, request.thinking_tokens, self.budget.amount / wanted)
        whose = " of each problem" if self.budget.scope == "problem" else ""
        mend = f"--max-thinking {cap} lets {wanted}{whose} run, and so does" if cap >= 16 else "give"
        return (
            f"budget: {running} branch{'es begin' if running > 1 else ' begins'} at once where the engine has room for"
            f" {self.engine.info.concurrency}, since each holds the most that it can use, {held} for a thought of up to"
            f" {request.thinking_tokens:,} tokens; {mend} a larger budget"
        )

    def _typical_tokens(self) -> int:
        total, count = self._lengths
        return int(1.25 * total / count) if count else 1

    def typical_cost(self, default: float) -> float:
        total, count = self._costs
        return 1.25 * total / count if count else default

    def learn(self, branch: Branch) -> None:
        if branch.finish == "stop" and not branch.completion.closed:
            self._lengths[0] += branch.completion.output_tokens
            self._lengths[1] += 1
            self._costs[0] += spent_in(self.budget.unit, branch.charge)
            self._costs[1] += 1

    def seconds_left(self, job: Job) -> float:
        return self.budget.amount - self.seconds_used(job)

    def seconds_used(self, job: Job) -> float:
        started = job.account.started
        return self.clock() - started if started is not None else 0.0

    def stepped(self, seconds: float) -> None:
        """An engine step took so long."""
        self.longest_step = max(self.longest_step * 0.98, seconds)
        if len(self._steps) < 2:
            self._steps.append(seconds)

    def paced(self, seconds: float, tokens: int) -> None:
        """Running branches, whose first tokens were there, wrote ``tokens`` in so many seconds, summed over branches."""
        if tokens:
            self._pace = [0.9 * self._pace[0] + seconds, 0.9 * self._pace[1] + tokens]

    def closing_seconds(self) -> float:
        """How long closing a thought and answering takes at the pace of late, a quarter more, and a step's delay. A first step
        reads prompts and tells nothing of the pace."""
        seconds, tokens = self._pace
        pace = seconds / tokens if tokens else min(self._steps) if len(self._steps) > 1 else 0.0
        return 1.25 * (self.engine.room_tokens + 1) * pace + self.longest_step

    def too_late(self, job: Job) -> str:
        """What is wrong, if time was over before there was an answer ("": it was not)."""
        if self.budget.unit != "seconds" or self.seconds_left(job) > self.longest_step:
            return ""
        return (
            f"budget: {format_amount(self.budget.amount, 'seconds')} were over before an answer was written; give at least"
            f" {rounded_up(self.budget.amount + 2 * self.closing_seconds(), 'seconds')}"
        )

    def check_overrun(self, job: Job) -> None:
        if self.budget.unit != "seconds":
            over = job.account.meter.spent - self.budget.amount
        else:
            over = self.seconds_used(job) - self.budget.amount
        if over > 1e-9 * self.budget.amount:
            self.overrun = max(self.overrun, over)


def efforts(policy: Policy, effort: float | None) -> tuple[float | None, ...]:
    """The efforts that a policy's requests may have: its own, else the run's."""
    return traits_of(policy).efforts or (effort,)


def asks(request: Request, done: int, until: int) -> int:
    """How often the request asks for anytime answers from ``done`` to ``until`` tokens: the multiples of ``every`` there."""
    if not request.probe_every:
        return 0
    start = max(request.probe_from, done, 1)
    return max(0, until // request.probe_every + -start // request.probe_every + 1)


def _begun(request: Request) -> int:
    """The most tokens that the request goes on from; one has a byte or more."""
    return len(request.prefix_ids) or len(request.prefix.encode())


def rounded_up(amount: float, unit: str) -> str:
    """An amount rounded up to three figures, so that what is advised really does."""
    if unit == "tokens":
        return f"{int(-(-amount // 1))} tokens"

    scale = 10 ** (floor(log10(amount)) - 2) if amount > 0 else 1.0
    return format_amount(ceil(amount / scale * (1 - 1e-12)) * scale, unit)
