"""Policies over steered chains: every branch is told inside the engine where to think again, how long at least, and when to stop.

``n`` branches are drawn and vote, or with ``select=reward`` the reward model's favourite is kept (ID-Sampling uses both).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.policies.fixed import MAX_SAMPLES
from ttc.samplers import best, leader, tally
from ttc.samplers.deepening import checkpoints
from ttc.types import Branch, Brief, Control, Generate, Outcome, Problem, Reply, Routine, Score, Work

MARCO = "Wait! Maybe I made some mistakes! I need to rethink from scratch."
"""Marco-o1's sentence (arXiv 2411.14405), the one that ID-Sampling quotes."""
SEPARATOR = "|"
"""Between several triggers, which take turns."""
Select = Literal["vote", "reward"]


def _whole(field: str, value: int, least: int, most: int = MAX_SAMPLES) -> None:
    if not least <= value <= most:
        raise InputError(f"policy: {field}={value}; give {least} to {most}")


def _triggers(text: str) -> tuple[str, ...]:
    found = tuple(text.split(SEPARATOR))
    if not all(part.strip() for part in found):
        raise InputError(
            f"policy: trigger={text!r} has an empty one; give the words to force, {SEPARATOR!r} between several"
        )
    return found


def _steered(
    problem: Problem,
    brief: Brief,
    control: Control | None,
    n: int,
    cap: int,
    effort: float,
    select: Select,
    why: str,
) -> Generator[Work, Reply, Outcome]:
    thinking = min(cap or brief.max_thinking_tokens, brief.max_thinking_tokens)
    requests = tuple(
        brief.request(
            problem, index, thinking_tokens=thinking, control=control, effort=effort or brief.effort
        )
        for index in range(n)
    )
    reply = yield Generate(requests, why=why)
    return (yield from _chosen(problem, brief, reply.branches, select))


def _chosen(
    problem: Problem, brief: Brief, branches: tuple[Branch, ...], select: Select
) -> Generator[Work, Reply, Outcome]:
    votes = tally(branches)
    if select == "reward":
        usable = tuple(branch for branch in branches if branch.usable)
        reply = yield Score(usable, why="reward model")
        if len(reply.scores) == len(usable):
            favourite = best(usable, reply.scores, brief.seed)
            return Outcome(favourite.vote if favourite is not None else None, "samples", votes)
    return Outcome(leader(votes, brief.seed, problem.id), "samples", votes)


def _check(n: int, cap: int, select: str) -> None:
    _whole("n", n, 1)
    _whole("cap", cap, 0, 1 << 30)
    if select not in get_args(Select):
        raise InputError(f"policy: unknown select {select!r}; use one of {', '.join(get_args(Select))}")


def _scored(select: Select) -> tuple[str, ...]:
    return ("reward",) if select == "reward" else ()


@dataclass(frozen=True, slots=True)
class IterativeDeepening:
    """Chains that get a self-correction trigger at geometrically growing lengths (ID-Sampling, arXiv 2502.05449).

    ``first`` is B0 in tokens, ``growth`` gamma (1: uniform triggers, the baseline); checkpoints count tokens in all, or with
    ``incremental`` new ones. A chain that has ended its thought is left alone; with ``reopen`` a trigger takes the place of
    that end, as long as checkpoints are left. ``cap`` bounds the thought (0: the run's bound).
    """

    first: int = 64
    growth: float = 2.0
    trigger: str = MARCO
    incremental: bool = False
    reopen: bool = False
    n: int = 1
    cap: int = 0
    select: Select = "vote"
    name = "iterative-deepening"

    def __post_init__(self) -> None:
        _check(self.n, self.cap, self.select)
        _whole("first", self.first, 1, 1 << 30)
        if not 1 <= self.growth < float("inf"):
            raise InputError(
                f"policy: growth={self.growth:g} would bring checkpoints ever closer; give 1 (uniform) or more, 2 doubles"
            )
        _triggers(self.trigger)

    @property
    def traits(self) -> Traits:
        return Traits(
            ("control", *_scored(self.select)), cap=self.cap, control=self.control, check_room=self.check_room
        )

    def check_room(self, room: int, thinking: int) -> None:
        """Raise InputError if no checkpoint lies within a thought of ``thinking`` tokens."""
        if self.first >= thinking:
            less = f"give less than {thinking}, or a higher cap" if thinking > 1 else "raise the cap"
            raise InputError(
                f"policy: first={self.first} lies behind the cap of {thinking} tokens of thinking, so nothing would be forced;"
                f" {less} (cap, --max-thinking or the budget)"
            )

    def control(self, limit: int) -> Control:
        at = checkpoints(self.first, self.growth, limit, incremental=self.incremental)
        return Control(_triggers(self.trigger), at, self.incremental, at_end=len(at) if self.reopen else 0)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        limit = min(self.cap or brief.max_thinking_tokens, brief.max_thinking_tokens)
        control = self.control(limit)
        why = f"{self.n} chains, checkpoints at {', '.join(map(str, control.at[:6])) or 'none'}"
        return (yield from _steered(problem, brief, control, self.n, self.cap, 0.0, self.select, why))


@dataclass(frozen=True, slots=True)
class BudgetForcing:
    """s1 (arXiv 2501.19393): the first ``extend`` ends of the thought are replaced by ``trigger``, and ``cap`` closes it."""

    extend: int = 1
    trigger: str = "Wait"
    cap: int = 0
    n: int = 1
    select: Select = "vote"
    name = "budget-forcing"

    def __post_init__(self) -> None:
        _check(self.n, self.cap, self.select)
        _whole("extend", self.extend, 0)
        _triggers(self.trigger)

    @property
    def traits(self) -> Traits:
        return Traits(("control", *_scored(self.select)), cap=self.cap, control=self.control)

    def control(self, limit: int) -> Control:
        return Control(_triggers(self.trigger), at_end=self.extend)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        why = f"{self.n} chains, {self.extend} times {self.trigger!r} at the end of thought"
        return (yield from _steered(problem, brief, self.control(0), self.n, self.cap, 0.0, self.select, why))


@dataclass(frozen=True, slots=True)
class Plain:
    """Chains as they come, with a least and a most thinking.

    A thought that would end before ``least`` tokens gets ``trigger`` instead ("" : its end is made impossible); ``cap`` closes it
    (0: the run's bound); ``total`` bounds thought and answer together (0: no such bound); ``loops`` N > 0 breaks a thought that
    says the same thing N times over; ``stop_below`` > 0 closes one whose confidence falls below (DeepConf, nats, mean over
    ``window`` tokens). ``effort`` in (0, 1] overrides the run's, for models that were trained for it; ``text`` is put behind the
    problem, for any model ("Think briefly.")."""

    least: int = 0
    trigger: str = ""
    cap: int = 0
    total: int = 0
    loops: int = 0
    stop_below: float = 0.0
    window: int = 128
    effort: float = 0.0
    text: str = ""
    n: int = 1
    select: Select = "vote"
    name = "plain"

    def __post_init__(self) -> None:
        _check(self.n, self.cap, self.select)
        _whole("least", self.least, 0, 1 << 30)
        _whole("total", self.total, 0, 1 << 30)
        _whole("loops", self.loops, 0, 1000)
        if self.loops == 1:
            raise InputError(
                "policy: loops=1 would break any thought; give 2 or more repetitions, or 0 for no such rule"
            )
        if not 0 <= self.stop_below < float("inf"):
            raise InputError(
                f"policy: stop_below={self.stop_below:g}; give nats above 0, or 0 for no such rule"
            )
        _whole("window", self.window, 1, 1 << 20)
        if self.cap and self.least > self.cap:
            raise InputError(
                f"policy: least={self.least} is more than cap={self.cap}; lower the one or raise the other"
            )
        if not 0 <= self.effort <= 1:
            raise InputError(
                f"policy: effort={self.effort:g} is not in (0, 1]; give a fraction of full effort"
            )
        if self.trigger:
            _triggers(self.trigger)

    @property
    def traits(self) -> Traits:
        return Traits(
            (*(("control",) if self._steers else ()), *_scored(self.select)), efforts=(self.effort,) if self.effort else (),
            cap=self.cap, total=self.total, text=self.text, control=self.control, check_room=self.check_room,
        )  # fmt: skip

    @property
    def _steers(self) -> bool:
        return bool(self.least or self.loops or self.stop_below)

    def check_room(self, room: int, thinking: int) -> None:
        """Raise InputError if ``total`` leaves nothing to think, the answer's room being ``room`` tokens, or if ``least`` is
        more than the ``thinking`` tokens that a thought may have."""
        if self.total and self.total <= room:
            raise InputError(
                f"policy: total={self.total} is no more than the answer's room of {room} tokens; give at least {room + 1}"
            )
        most = min(thinking, self.total - room) if self.total else thinking
        if self.least > most:
            raise InputError(
                f"policy: least={self.least} is more than the {most} tokens that a thought may have here; lower it, or raise"
                " --max-thinking, the budget or total"
            )

    def control(self, limit: int) -> Control | None:
        if not self._steers:
            return None
        return Control(
            _triggers(self.trigger) if self.trigger else (), min_thinking=self.least, loop_repeats=self.loops,
            stop_below=self.stop_below or None, stop_window=self.window,
        )  # fmt: skip

    def run(self, problem: Problem, brief: Brief) -> Routine:
        if self.total:
            most = min(brief.max_thinking_tokens, self.total - brief.room_tokens)
            brief = replace(brief, max_thinking_tokens=max(most, 1))
        why = f"{self.n} chains"
        return (
            yield from _steered(
                problem, brief, self.control(0), self.n, self.cap, self.effort, self.select, why
            )
        )
