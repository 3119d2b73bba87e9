"""A driver on the fake engine, and policies and engines for it that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.conftest import PlainJudge
from ttc.budget import Budget
from ttc.driver import Driver
from ttc.engine.fake import FakeEngine
from ttc.errors import EngineError
from ttc.jobs import Job
from ttc.ledger import Ledger
from ttc.opening import open_jobs
from ttc.pricing import Pricer
from ttc.samplers import leader, tally
from ttc.types import Branch, Brief, Charge, Generate, Outcome, Problem, Result, Routine, Sampling


def pricer_for(engine: FakeEngine) -> Pricer:
    return Pricer(
        engine.info.shape, engine.concurrency, engine.steerable, usd_per_m_input=1.0, usd_per_m_output=4.0
    )


def make_driver(
    engine: FakeEngine,
    policy: object,
    budget: Budget,
    *,
    ledger: Ledger | None = None,
    cap: int = 100,
    effort: float | None = None,
    **more: object,
) -> Driver:
    brief = Brief(
        seed=0, max_thinking_tokens=cap, sampling=Sampling(), effort=effort, room_tokens=engine.room_tokens
    )
    return Driver(
        engine, policy, budget, PlainJudge(), ledger or Ledger(), pricer_for(engine),  # type: ignore[arg-type]
        brief=brief, clock=engine.clock, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def jobs_of(driver: Driver, problems: Sequence[Problem]) -> Sequence[Job]:
    """The jobs that the driver would make of problems. Raises BudgetTooSmall."""
    return open_jobs(problems, driver.policy, driver.brief, driver.cashier).jobs


def total(results: Sequence[Result]) -> Charge:
    charge = Charge()
    for result in results:
        charge = charge + result.charge
    return charge


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Self-consistency that cancels the rest at two equal answers, in two rounds: exercises ``until`` and several works."""

    n: int = 6
    name = "early-stop"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        def settled(done: Sequence[Branch]) -> bool:
            return max(tally(done).values(), default=0.0) >= 2

        seen: tuple[Branch, ...] = ()
        for start in (0, self.n):
            requests = tuple(brief.request(problem, start + i) for i in range(self.n))
            reply = yield Generate(requests, settled, "until two agree")
            seen += reply.branches
        votes = tally(seen)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


class Dies(FakeEngine):
    """Stops like a crashed engine after some steps."""

    def __init__(self, steps: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.steps_left = steps

    def step(self):  # type: ignore[no-untyped-def]
        self.steps_left -= 1
        if self.steps_left < 0:
            raise EngineError("the engine died")
        return super().step()
