"""What the driver keeps of a run: problems on their way, requests in flight, accounts; and the seams it is given.

Plain state. ``ttc.driver`` moves it, ``ttc.cashier`` prices it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ttc.budget import Budget, Meter
from ttc.types import (
    Branch,
    Brief,
    Charge,
    Control,
    Decision,
    Generate,
    Outcome,
    Probe,
    Problem,
    Reply,
    Request,
    Routine,
    Steer,
    Verdict,
)

if TYPE_CHECKING:
    from ttc.costmodel.shapes import ModelShape


class Policy(Protocol):
    """A frozen, picklable value: what to buy for a budget. One of which a run must know more before it starts says so in
    ``traits``, a ``Traits``; whatever else it has is its own."""

    @property
    def name(self) -> str: ...

    def run(self, problem: Problem, brief: Brief) -> Routine: ...


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy that plans is told before the run: the model, the budget of each problem (a run's budget split evenly), how
    many branches share a step, the mean prompt, and the most that a branch may think (tokens)."""

    model: str
    shape: ModelShape | None
    budget: Budget
    batch: int
    prompt_tokens: float
    thinking_tokens: int


@dataclass(frozen=True, slots=True)
class Traits:
    """What a policy tells of itself beforehand, as its attribute ``traits``: a run that can't give it that is refused at once.

    ``needs``: "reward" (a reward model; with "steps" one that scores steps), "control" (steering inside the engine), "steps"
    (chains grown step by step), "insert" (text put into running chains), "effort" (a model trained for levels of effort), or a
    confidence of the engine's ("mean-logprob", "self-certainty"). ``efforts`` are those of its requests (none: the run's), each
    with a prompt of its own to price. ``cap`` bounds its thoughts and ``total`` thought and answer together, in tokens (0: the
    run's bounds). ``text`` is put behind each problem's last message; ``step`` is the text that ends a step. ``control`` gives
    what is done to a chain that may think for so many tokens. ``check_room`` raises InputError for what finds no place in (tokens
    of the answer's room, tokens of thinking). ``planned`` gives the policy with what it plans of a ``Situation``;
    ``ready`` computes what it needs once, before a run's clock begins."""

    needs: tuple[str, ...] = ()
    efforts: tuple[float, ...] = ()
    cap: int = 0
    total: int = 0
    text: str = ""
    step: str = ""
    control: Callable[[int], Control | None] | None = None
    check_room: Callable[[int, int], None] | None = None
    planned: Callable[[Situation], Policy] | None = None
    ready: Callable[[], None] | None = None


def traits_of(policy: object) -> Traits:
    """What a policy tells of itself; nothing, where it has no ``Traits`` of that name."""
    found = getattr(policy, "traits", None)
    return found if isinstance(found, Traits) else NO_TRAITS


NO_TRAITS = Traits()


class Judge(Protocol):
    """What the driver needs to know of answers: extraction, equality, verdict (``ttc.judge.Jury``). Where verdicts are ``slow``
    they are asked for in another thread, one at a time; the rest is not."""

    @property
    def slow(self) -> bool: ...

    def answer(self, problem: Problem, text: str) -> str | None: ...
    def vote(self, problem: Problem, answer: str) -> str: ...
    def verdict(self, problem: Problem, answer: str | None) -> Verdict | None: ...
    def forget(self, problem: Problem) -> None: ...


class RewardModel(Protocol):
    """Scores answers for best-of-n and its kin: finite numbers, in [0, 1] where they lead a search, 0 or more where they weigh
    votes. ``tokens`` says beforehand how many tokens that will read. One that can be charged in eFLOPs has ``shape`` (a
    ``ModelShape``) and ``reads(problem, texts)``: for each sequence that scoring computes its length in tokens and how many of them
    it knows already. One that is ``slow``, as behind a server, is asked in other threads, ``at_once`` (1) at a time; so is any
    where the engine is behind a server."""

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int: ...
    def score(self, problem: Problem, texts: Sequence[str]) -> Sequence[float]: ...


@dataclass(slots=True)
class Account:
    """A budget scope at run time: its meter, its clock, the flights that may still give something back, and what those are
    expected (not bounded) to cost in all."""

    meter: Meter
    started: float | None = None
    flights: int = 0
    planned: float = 0.0


class Failure(NamedTuple):
    """A request that waits to be made again: the attempts that failed, which are on record and paid for, and what was wrong."""

    attempts: int
    error: str


@dataclass(slots=True)
class Job:
    """One problem on its way; ``posed``: as its policy and the reward model see it. ``prompts``: its prompt in tokens at each
    effort. ``failures``: of the pending requests that have failed before, by slot. For ``Generate`` work: its ``open`` slots. For
    ``Steer`` work: ``tickets`` of running branches by request index, what is ``news`` to the policy (``quiet``: indices that it
    cancelled itself), whether it ``waits``, and its last word while branches still end. ``trouble``: what broke on the way to its
    answer; ``traceback``: of the policy's exception."""

    order: int
    problem: Problem
    brief: Brief
    prompts: dict[float | None, int]
    account: Account
    routine: Routine | None = None
    work: Generate | Steer | None = None
    pending: deque[tuple[int, Request]] = field(default_factory=deque)
    failures: dict[int, Failure] = field(default_factory=dict)
    slots: list[Branch | None] = field(default_factory=list)
    open: int = 0
    arrived: list[Branch] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    charge: Charge = Charge()
    shared_eflops: list[float] = field(default_factory=list)
    started: int = 0
    flights: set[int] = field(default_factory=set)
    cancelled: bool = False
    denied: bool = False
    failed: str = ""
    trouble: str = ""
    traceback: str = ""
    tickets: dict[int, int] = field(default_factory=dict)
    news: list[Branch] = field(default_factory=list)
    probed: list[Probe] = field(default_factory=list)
    quiet: set[int] = field(default_factory=set)
    waits: bool = False
    outcome: Outcome | None = None
    value: float = 0.0
    posed: Problem = field(init=False)

    def __post_init__(self) -> None:
        self.posed = self.problem.posed()


@dataclass(slots=True)
class Flight:
    """One request inside the engine. ``asked``: the most anytime answers that were begun before it was last told when to give some
    (on a server some may have failed, at a price)."""

    job: Job
    slot: int
    request: Request
    submitted: float
    tokens: int = 0
    reads: float = 0.0
    lease_end: int | None = None
    moved: float = 0.0
    attempts: int = 0
    expected: float = 0.0
    closing: bool = False
    probes: list[Probe] = field(default_factory=list)
    asked: int = 0


class Desk(Protocol):
    """The driver, as its parts see it: where they hand over what is new of a job."""

    def arrive(self, job: Job, slot: int, branch: Branch, *, replayed: Request | None = None) -> None:
        """A branch of the job's work is there (``replayed``: what it was asked for in an earlier session)."""

    def advance(self, job: Job, reply: Reply | None) -> None:
        """The job's policy may go on."""

    def finish(self, job: Job, outcome: Outcome) -> None:
        """The job's policy has had its last word."""

    def blame(self, job: Job, error: Exception) -> None:
        """The job's policy, or what that called, raised."""


@dataclass(slots=True)
class Status:
    """Where a run is; read by the progress display after each step. ``charge``, ``samples`` (chains, ``failed_samples`` of them
    lost) and ``steps`` (pieces of a search's chains) are the whole run's, ``replayed_tokens`` of them spent before this session;
    ``retried_samples`` (attempts that failed and were made again) and ``seconds`` are this session's."""

    problems: int = 0
    done: int = 0
    failed: int = 0
    scored: int = 0
    correct: int = 0
    running: int = 0
    samples: int = 0
    failed_samples: int = 0
    retried_samples: int = 0
    steps: int = 0
    charge: Charge = Charge()
    seconds: float = 0.0
    running_tokens: int = 0
    replayed_tokens: int = 0

    def note(self, branch: Branch) -> None:
        """Count a branch that has ended (one that was denied never began)."""
        if branch.completion.partial:
            self.steps += 1
        elif branch.finish != "denied":
            self.samples += 1
            self.failed_samples += branch.finish == "error"
