"""``adaptive``: buys a branch at a time while it is worth its price, counts late ones early, gives up where votes scatter.

What it knows of a problem is (votes of the leader, of the runner-up, branches drawn); ``posterior`` turns that into the highest
price at which another branch is worth buying. Where the engine gives anytime answers,
- a branch that repeats the leader in ``agree`` successive probes counts as a vote for it and is cut (``agree_other`` for another
  answer that has votes). It is probed from ``after`` of the first finished branch's length on: before that even an agreeing answer
  is often a guess that many branches share.
- a branch that has used ``patience`` of the room for thinking is asked once: an answer that has votes counts, any other is dropped.
  Branches that long seldom answer rightly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ttc.errors import InputError
from ttc.policies.posterior import HORIZON, value_table
from ttc.types import Branch, Brief, Outcome, Probe, Probing, Problem, Reply, Request, Routine, Steer

RUN_FLOOR = 16
"""A budget for the whole run buys down to this fraction of ``price``: what it is spent on is decided between the problems."""


@dataclass(slots=True)
class Ballot:
    """What is known of one problem. ``streaks``: (answer, how often in a row) of each running branch; ``lengths`` tokens seen."""

    votes: dict[str, int] = field(default_factory=dict)
    drawn: int = 0
    streaks: dict[int, tuple[str | None, int]] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    lengths: dict[int, int] = field(default_factory=dict)
    first_length: int = 0
    denied: bool = False

    def add(self, index: int, vote: str | None, tokens: int) -> None:
        self.drawn += 1
        self.counted.add(index)
        self.lengths[index] = max(tokens, self.lengths.get(index, 0))
        if vote is not None:
            self.votes[vote] = self.votes.get(vote, 0) + 1
            self.first_length = self.first_length or tokens

    @property
    def leader(self) -> str | None:
        """The most votes; among equals the first that was heard (short branches are right more often)."""
        return max(self.votes, key=lambda answer: self.votes[answer]) if self.votes else None

    def top(self) -> tuple[int, int]:
        ranked = [*sorted(self.votes.values(), reverse=True), 0, 0]
        return ranked[0], ranked[1]

    @property
    def mean_length(self) -> float:
        return max(sum(self.lengths.values()) / len(self.lengths), 1.0) if self.lengths else 1.0


@dataclass(frozen=True, slots=True)
class Adaptive:
    """See the module. ``price`` is what a branch must add to P(right); ``confidence`` stops earlier, once the leader is the most
    frequent answer with that probability; ``width`` branches start side by side (latency for tokens). ``mean`` and ``spread``
    are the prior's (``posterior``), fitted by ``python -m ttc.simulate fit``; the rest was set by hand, on both AIME pools."""

    max_samples: int = 16
    price: float = 0.014
    confidence: float = 1.0
    width: int = 1
    agree: int = 2
    agree_other: int = 8
    after: float = 0.85
    patience: float = 0.67
    probe_every: int = 500
    mean: float = 0.08
    spread: float = 2.2
    name = "adaptive"

    def __post_init__(self) -> None:
        if not 1 <= self.max_samples <= 4096 or not 1 <= self.width <= self.max_samples:
            raise InputError(
                f"policy: max_samples={self.max_samples}, width={self.width}; give 1 <= width <= max_samples <= 4096"
            )
        if not 0 <= self.price <= 1 or not 0 < self.confidence <= 1:
            raise InputError(
                f"policy: price={self.price:g} and confidence={self.confidence:g} are probabilities"
            )
        if self.probe_every < 1 or self.agree < 1 or self.agree_other < 1:
            raise InputError(f"policy: agree={self.agree}, probe_every={self.probe_every}; give 1 or more")

    def run(self, problem: Problem, brief: Brief) -> Routine:
        table = value_table(self.mean, self.spread, min(max(self.max_samples, 2), HORIZON))
        price = self.price if brief.budget_scope == "problem" else self.price / RUN_FLOOR
        late = int(self.patience * brief.max_thinking_tokens)
        ballot, issued = Ballot(), 0
        work = Steer(
            tuple(self._request(problem, brief, i, late) for i in range(self.width)),
            why="first branches",
            value=1.0,
        )
        while True:
            reply = yield work
            issued = max(issued, len(work.start) and work.start[-1].index + 1)
            had = bool(ballot.votes)
            cut = self._absorb(ballot, reply, late)
            first, second = ballot.top()
            worth = table.price(first, second, ballot.drawn) if ballot.drawn else float("inf")
            sure = table.sure(first, second, ballot.drawn)
            running = reply.running - len(cut)
            if ballot.votes and (worth < price or sure >= self.confidence):
                why = f"another branch adds at most {worth:.4f} to P(right), below {price:g}"
                return self._outcome(ballot, "confident" if sure >= 0.8 else "gave-up", why)
            if ballot.denied and running <= 0:
                return self._outcome(ballot, "samples", "the budget")
            more = running <= 0 and issued < self.max_samples and ballot.drawn < HORIZON
            if running <= 0 and not more:
                return self._outcome(ballot, "samples", "as many as allowed")
            start = (self._request(problem, brief, issued, self._probe_from(ballot, late)),) if more else ()
            probe = self._probings(ballot, issued, late) if ballot.votes and not had else ()
            why = f"votes {first}:{second} of {ballot.drawn}; a branch is worth {worth:.3g}"
            if not start:
                why = "it repeats an answer that has votes, or has run too long"
            work = Steer(start, cancel=cut, probe=probe, why=why, value=min(worth, 1.0) / ballot.mean_length)

    def _request(self, problem: Problem, brief: Brief, index: int, start: int) -> Request:
        every = self.probe_every if brief.probe_tokens is not None else 0
        return brief.request(problem, index, probe_from=start if every else 0, probe_every=every)

    def _probe_from(self, ballot: Ballot, late: int) -> int:
        return min(int(self.after * ballot.first_length), late) if ballot.first_length else late

    def _probings(self, ballot: Ballot, issued: int, late: int) -> tuple[Probing, ...]:
        """The first vote is there: branches that started with it are to be watched from now on."""
        start = self._probe_from(ballot, late)
        return tuple(Probing(i, start, self.probe_every) for i in range(issued) if i not in ballot.counted)

    def _absorb(self, ballot: Ballot, reply: Reply, late: int) -> tuple[int, ...]:
        """Count what is new; returns the running branches that are decided and can be cut."""
        for branch in reply.branches:
            self._count(ballot, branch, late)
        return tuple(self._heard(ballot, reply.probes, late))

    def _count(self, ballot: Ballot, branch: Branch, late: int) -> None:
        tokens = branch.completion.output_tokens
        if branch.index in ballot.counted:
            ballot.lengths[branch.index] = tokens
        elif branch.finish == "denied":
            ballot.denied = True
        elif (
            branch.finish == "abort"
        ):  # cut in an earlier session of this run: for the same reason as then, if any
            if not list(self._heard(ballot, branch.probes, late)):
                ballot.add(branch.index, None, tokens)
        else:
            ballot.add(branch.index, branch.vote if branch.usable else None, tokens)

    def _heard(self, ballot: Ballot, probes: Iterable[Probe], late: int) -> Iterable[int]:
        for index, tokens, vote in probes:
            if index in ballot.counted:
                continue
            last, times = ballot.streaks.get(index, (None, 0))
            times = times + 1 if vote is not None and vote == last else 1
            ballot.streaks[index] = (vote, times)
            ballot.lengths[index] = tokens
            voted = vote is not None and vote in ballot.votes
            need = self.agree if vote == ballot.leader else self.agree_other
            if (voted and times >= need) or tokens >= late:
                ballot.add(index, vote if voted else None, tokens)
                yield index

    def _outcome(self, ballot: Ballot, stop: str, why: str) -> Outcome:
        votes = {answer: float(count) for answer, count in ballot.votes.items()}
        return Outcome(ballot.leader, stop, votes, why)


__all__ = ["Adaptive", "Ballot"]
