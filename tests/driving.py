"""A driver on the fake engine, and policies and engines for it that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.conftest import PlainJudge
from ttc.budget import Budget
from ttc.costmodel import ModelShape
from ttc.driver import Driver
from ttc.engine.fake import FakeEngine
from ttc.errors import EngineError
from ttc.jobs import Job
from ttc.ledger import Ledger
from ttc.opening import open_jobs
from ttc.policies import Policy, parse
from ttc.pricing import Pricer
from ttc.samplers import leader, tally
from ttc.types import (
    Branch,
    Brief,
    Charge,
    Generate,
    Outcome,
    Probing,
    Problem,
    Result,
    Routine,
    Sampling,
    Steer,
)


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


@dataclass(frozen=True, slots=True)
class Odd:
    """Requests that differ from the run's own: each its effort, its problem's words, a text (of any alphabet) to go on from; and
    anytime answers that are asked for anew while it runs."""

    n: int = 3
    name = "odd"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        longer = replace(problem, meta={"prompt_tokens": int(problem.meta["prompt_tokens"]) + 7})
        texts = ("", "was it 7?", "\U0001f914\U0001f914 数")
        requests = tuple(
            brief.request(
                (problem, longer)[i % 2],
                i,
                effort=(None, 0.25, 1.0)[i % 3],
                prefix=texts[i % 3],
                probe_every=4,
            )
            for i in range(self.n)
        )
        reply, told = (yield Steer(requests)), 0
        seen: list[Branch] = []
        while reply.running:
            seen += reply.branches
            told += bool(reply.probes)
            probe = tuple(Probing(p.branch, 0, 3 + told) for p in reply.probes)
            reply = yield Steer(probe=probe if told < 4 else ())
        votes = tally([*seen, *reply.branches])
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


class Reads:
    """A process reward model that reads what it is given, a token for three letters."""

    def __init__(self, shape: ModelShape | None) -> None:
        self.shape = shape

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return sum(length for length, _ in self.reads(problem, texts))

    def reads(self, problem: Problem, texts: Sequence[str]) -> list[tuple[int, int]]:
        return [(len(text) // 3 + 1, 0) for text in texts]

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [len(text) % 10 / 10 for text in texts]


ANY_POLICY = (
    "plain?effort=0.25&n=3", "plain?effort=1&n=2&cap=30", "plain?least=9&total=40&n=3", "effort?n=4", "effort?levels=0.125|0.5",
    "greedy", "weighted-vote?n=3&weight=reward", "best-of-n?n=3&score=reward", "budget-forcing?extend=3&n=2&trigger=Wait a bit",
    "iterative-deepening?first=5&n=2&reopen=1&select=reward", "iterative-deepening?first=3&growth=1&incremental=1",
    "beam?n=4&width=2&tokens=7", "dvts?n=4&width=2&tokens=9", "particles?n=3&tokens=5", "particles?n=1&tokens=1&most=30",
    "parallel-probe?n=3&every=1", "parallel-probe?n=2&every=7&stable=2", "adaptive?probe_every=5&width=2",
    "adaptive?probe_every=3&over=iterative-deepening%3Ffirst=6", "odd",
)  # fmt: skip
"""One of each kind; ``policy_of`` makes them."""


def policy_of(text: str) -> Policy:
    own: dict[str, Policy] = {"odd": Odd(), "early-stop": EarlyStop()}
    return own.get(text) or parse(text)


def ledger_tokens(ledger: Ledger) -> int:
    """All that the branches of a run directory were charged, those that were cut too."""
    cut = sum(charge.tokens for charges in ledger.interrupted.values() for charge in charges)
    return cut + sum(r.branch.charge.tokens for rows in ledger._recorded.values() for r in rows)


def read_ledger(directory: Path) -> Ledger:
    ledger = Ledger(directory)
    ledger._load()
    return ledger
