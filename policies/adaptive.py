"""``adaptive``: buys a branch at a time while it is worth its price, counts late ones early, gives up where votes scatter.

What it knows of a problem is (votes of the leader, of the runner-up, all votes) and how long its branches are; ``posterior`` turns
that into the highest price at which another vote is worth buying. A vote costs what a branch took so far, over the limit on
thinking, and more where many branches brought no vote. Where the engine gives anytime answers,
- a branch that repeats the leader in ``agree`` successive probes counts as a vote for it and is cut (``agree_other`` for another
  answer that has votes). It is probed from ``after`` of the first finished branch's length on: before that even an agreeing answer
  is often a guess that many branches share. Only the first ``early`` branches count so: where more are wanted the case is close,
  and a shared guess would decide it.
- a branch that has used ``patience`` of the room for thinking is asked once: an answer that has votes counts, any other counts once
  a finished branch gives it, and till then says that answers scatter. Branches that long seldom answer rightly.

Where all problems share the budget, a problem's first branch is capped so that first branches, as long as the prior expects them,
fit an even split and a little more; what the short ones leave goes where it is worth most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log

from ttc.errors import InputError
from ttc.jobs import Policy, Traits, traits_of
from ttc.policies.posterior import HORIZON, Prior, cap_for, outlook, value_table
from ttc.types import Branch, Brief, Outcome, Probe, Probing, Problem, Reply, Request, Routine, Steer

RUN_FLOOR = 100
"""A budget for the whole run buys down to this fraction of ``price``: what it is spent on is decided between the problems."""
ROOM = 1.15
"""First branches may be so much longer than an even split allows: most leave some of it to those that start later."""


@dataclass(slots=True)
class Ballot:
    """What is known of one problem. ``streaks``: (answer, how often in a row) of each running branch; ``lengths`` tokens seen;
    ``unheard``: the branches that were dropped late, by their anytime answers, which have no vote yet."""

    votes: dict[str, int] = field(default_factory=dict)
    unheard: dict[str, list[int]] = field(default_factory=dict)
    drawn: int = 0
    streaks: dict[int, tuple[str | None, int]] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    lengths: dict[int, int] = field(default_factory=dict)
    first_length: int = 0
    denied: bool = False
    voters: set[int] = field(default_factory=set)

    def add(self, index: int, vote: str | None, tokens: int) -> None:
        self.drawn += 1
        self.counted.add(index)
        self.lengths[index] = max(tokens, self.lengths.get(index, 0))
        if vote is not None:
            alike = self.unheard.pop(vote, [])
            self.votes[vote] = self.votes.get(vote, 0) + 1 + len(alike)
            self.voters.update(alike, (index,))
            self.first_length = self.first_length or tokens

    @property
    def leader(self) -> str | None:
        """The most votes; among equals the first that was heard (short branches are right more often)."""
        votes = self.votes or {answer: len(dropped) for answer, dropped in self.unheard.items()}
        return max(votes, key=lambda answer: votes[answer]) if votes else None

    def top(self) -> tuple[int, int]:
        ranked = [*sorted(self.votes.values(), reverse=True), 0, 0]
        return ranked[0], ranked[1]

    def share(self, index: int, limit: int) -> float:
        """A counted branch's length over the limit on thinking."""
        return min(max(self.lengths[index], 1) / limit, 1.0)

    def cost(self, limit: int) -> float:
        """What the next vote may take, over the limit on thinking: the mean branch, more where few of them voted."""
        mean = sum(self.share(i, limit) for i in self.counted) / max(self.drawn, 1)
        return mean * (self.drawn + 1) / (len(self.voters) + 1)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Buys one more vote while what it adds to P(right) is worth its tokens (the module tells how). ``price`` is what as many
    tokens as the limit on thinking must add; ``confidence`` stops earlier, once the leader is the most frequent answer with that
    probability; ``width`` branches start side by side (latency for tokens; with a dozen or more set ``early`` to 1: agreement
    between branches that all started together is a guess they share). ``level``, ``slope`` and ``spread`` are the prior's
    (``posterior``), fitted by ``python -m ttc.simulate fit``; the rest was set by hand, on both AIME pools. ``over`` is a policy of
    steered chains whose control every branch gets."""

    max_samples: int = HORIZON
    price: float = 0.05
    confidence: float = 1.0
    width: int = 1
    agree: int = 2
    agree_other: int = 8
    early: int = 4
    after: float = 0.85
    patience: float = 0.67
    probe_every: int = 500
    level: float = -2.0
    slope: float = -4.1
    spread: float = 1.2
    over: Policy | None = None
    name = "adaptive"

    def __post_init__(self) -> None:
        if not 1 <= self.max_samples <= 4096 or not 1 <= self.width <= self.max_samples:
            raise InputError(
                f"policy: max_samples={self.max_samples}, width={self.width}; give 1 <= width <= max_samples <= 4096"
            )
        if not 0 <= self.price <= 1 or not 0 < self.confidence <= 1:
            raise InputError(
                f"policy: price={self.price:g}, confidence={self.confidence:g}; each is 0 to 1, the confidence above 0"
            )
        if not 0 < self.patience <= 1 or not 0 <= self.after < float("inf") or self.early < 0:
            raise InputError(
                f"policy: patience={self.patience:g}, after={self.after:g}, early={self.early}; give a patience in (0, 1], and 0 or"
                " more for the others"
            )
        if not all(abs(value) < 100 for value in (self.level, self.slope)) or not 0 < self.spread < 100:
            raise InputError(
                f"policy: level={self.level:g}, slope={self.slope:g}, spread={self.spread:g} are no prior of a log odds; fit them"
                " (python -m ttc.simulate fit)"
            )
        if self.probe_every < 1 or self.agree < 1 or self.agree_other < 1:
            raise InputError(f"policy: agree={self.agree}, probe_every={self.probe_every}; give 1 or more")

    @property
    def traits(self) -> Traits:
        over = traits_of(self.over)
        return Traits(needs=over.needs, control=over.control, ready=self._ready)

    def run(self, problem: Problem, brief: Brief) -> Routine:
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
            worth, sure = self._worth(ballot, brief.max_thinking_tokens)
            running = reply.running - len(cut)
            if ballot.drawn and (worth < price or (ballot.votes and sure >= self.confidence)):
                why = f"thinking to the limit adds at most {worth:.4f} to P(right), below {price:g}"
                return self._outcome(ballot, "confident" if sure >= 0.8 else "gave-up", why)
            if ballot.denied and running <= 0:
                return self._outcome(ballot, "samples", "the budget")
            more = running <= 0 and issued < self.max_samples and ballot.drawn < HORIZON
            if running <= 0 and not more:
                return self._outcome(ballot, "samples", "as many as allowed")
            start = (self._request(problem, brief, issued, self._probe_from(ballot, late)),) if more else ()
            probe = self._probings(ballot, issued, late) if ballot.votes and not had else ()
            why = f"votes {first}:{second} of {ballot.drawn}; more is worth {worth:.3g}"
            if not start:
                why = "it repeats an answer that has votes, or has run too long"
            work = Steer(start, cancel=cut, probe=probe, why=why, value=worth / brief.max_thinking_tokens)

    def _worth(self, ballot: Ballot, limit: int) -> tuple[float, float]:
        """What the next vote may add to P(right) for each ``limit`` tokens, and P(the leader is the most frequent answer)."""
        if not ballot.drawn:
            return float("inf"), 0.0
        lengths = tuple(sorted(round(log(ballot.share(i, limit)), 1) for i in ballot.voters))
        late = ballot.drawn - len(lengths)
        table = value_table(*outlook(self._prior, lengths, late, round(log(self.patience), 2)))
        (first, second), votes = ballot.top(), len(lengths)
        return table.price(first, second, votes) / ballot.cost(limit), table.sure(first, second, votes)

    def _ready(self) -> None:
        """The first table takes a fifth of a second, which would be the run's."""
        value_table(*outlook(self._prior, (), 0, round(log(self.patience), 2)))

    @property
    def _prior(self) -> Prior:
        return Prior(self.level, self.slope, self.spread)

    def _request(self, problem: Problem, brief: Brief, index: int, start: int) -> Request:
        every = self.probe_every if brief.probe_tokens is not None else 0
        control = self.traits.control
        thinking = brief.max_thinking_tokens
        if brief.budget_scope == "run" and brief.budget_unit == "tokens" and index < self.width:
            thinking = max(
                int(thinking * cap_for(round(ROOM * brief.budget_share / self.width / thinking, 3))), 1
            )
        return brief.request(
            problem, index, probe_from=start if every else 0, probe_every=every, thinking_tokens=thinking,
            control=control(thinking) if control is not None else None,
        )  # fmt: skip

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
            heard = voted and times >= need and ballot.drawn < self.early
            if heard or tokens >= late:
                if vote is not None and not voted:
                    ballot.unheard.setdefault(vote, []).append(index)
                ballot.add(index, vote if voted else None, tokens)
                yield index

    def _outcome(self, ballot: Ballot, stop: str, why: str) -> Outcome:
        votes = {answer: float(count) for answer, count in ballot.votes.items()}
        return Outcome(ballot.leader, stop, votes, why)


__all__ = ["Adaptive", "Ballot"]
