"""The replay engine: recorded branches behind the same five verbs, so that any policy runs unchanged without a model.

A problem's branches are drawn in seeded random order without replacement (``in_order``: as recorded). A branch can be cut anywhere
(it is then made to answer with its last recorded anytime answer, or with none where it was never probed), cancelled, and probed
where the recording was. Each branch has a clock of its own, one token a tick, from when it was submitted; ``step`` goes to the next
moment at which anything happens, so that policies see branches side by side as on an engine with room for all of them.

The price of an anytime answer is ``PROBE_TOKENS`` each; ``free_probes`` is the published accounting of Parallel-Probe
(arXiv 2602.03845), which leaves them out, and in which a branch ends one probe after its last recorded one, whatever it wrote
between (its tokens are then its own, or those up to its last probe if they are more).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from ttc.costmodel.records import Pool, PooledProblem
from ttc.engine.protocol import Counters, EngineInfo, Probed, Progress, StepReport
from ttc.types import AnswerFormat, Completion, Finish, Problem, Request, Sampling, Verdict, seed_for

PROBE_TOKENS = 15
"""Tokens of a forced answer: what closing the thought and writing a short answer takes."""
GOLD, NOTHING = "gold", "nothing"


@lru_cache(maxsize=65536)
def _text(code: int, unanswered: str | None) -> str:
    """What a branch wrote: its recorded answer, by code (0 is the gold one)."""
    if code < 0:
        return "" if unanswered is None else f"</think>{unanswered}"
    return "</think>" + (GOLD if code == 0 else f"other-{code}")


class RecordedJudge:
    """Answers of a pool are equal if their codes are."""

    slow = False

    def answer(self, problem: Problem, text: str) -> str | None:
        return text[8:] or None

    def vote(self, problem: Problem, answer: str) -> str:
        return answer

    def verdict(self, problem: Problem, answer: str | None) -> Verdict | None:
        return RIGHT if answer == GOLD else WRONG

    def forget(self, problem: Problem) -> None: ...


RIGHT, WRONG = Verdict(True, 1.0), Verdict(False, 0.0)


@dataclass(slots=True)
class _Tape:
    """A running branch: which recording, when it started, when it ends and whether by itself, its tokens if it does, and its
    probing schedule (0: none)."""

    request: Request
    problem: PooledProblem
    row: int
    started: int
    ends: int
    whole: int
    by_itself: bool
    probe_every: int = 0
    next_probe: int = 0
    probes: int = 0


@dataclass(slots=True)
class ReplayEngine:
    """See the module. ``unanswered`` is what a branch without an answer says: a string votes like any answer (as in the published
    replays), None abstains. ``limit`` is the recorded run's on thinking, where no branch reached it. ``chains`` holds each
    problem's longest dependent chain so far, in tokens."""

    pool: Pool
    seed: int = 0
    max_branches: int = 0
    concurrency: int = 4096
    probe_tokens: int = PROBE_TOKENS
    free_probes: bool = False
    unanswered: str | None = NOTHING
    in_order: bool = False
    limit: int = 0
    now: int = 0
    chains: dict[str, int] = field(default_factory=dict)
    _by_id: dict[str, PooledProblem] = field(default_factory=dict)
    _orders: dict[str, list[int]] = field(default_factory=dict)
    _begun: dict[str, int] = field(default_factory=dict)
    _tapes: dict[int, _Tape] = field(default_factory=dict)
    _events: list[tuple[int, int, int]] = field(default_factory=list)  # (time, 0 probe or 1 end, ticket)
    _ended: list[tuple[int, Completion]] = field(default_factory=list)
    _counts: list[int] = field(default_factory=lambda: [0, 0, 0])
    _info: EngineInfo | None = None

    def __post_init__(self) -> None:
        self._by_id = {p.id: p for p in self.pool.problems}

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            longest = max(
                self.limit, *(self._whole(p, row)[0] for p in self.pool.problems for row in range(p.samples))
            )
            probes = self.pool.probe_every > 0
            self._info = EngineInfo(
                name="replay", model=self.pool.model or self.pool.name, concurrency=self.concurrency,
                context=longest + self.room_tokens + self._prompt, format=AnswerFormat(), sampling=Sampling(),
                steerable=True, probe_tokens=(0 if self.free_probes else self.probe_tokens) if probes else None,
                signals=self._signals(), identity={"pool": self.pool.name},
            )  # fmt: skip
        return self._info

    def _signals(self) -> tuple[str, ...]:
        """The measures of confidence that were recorded of every branch."""
        first, *rest = (set(p.confidence) for p in self.pool.problems)
        return tuple(sorted(first.intersection(*rest)))

    @property
    def _prompt(self) -> int:
        return int(self.pool.prompt_tokens or 0)

    @property
    def room_tokens(self) -> int:
        return self.probe_tokens

    def problems(self) -> list[Problem]:
        """The pool's problems, to be run."""
        return [Problem(p.id, ({"role": "user", "content": p.id},), gold=GOLD) for p in self.pool.problems]

    def clock(self) -> float:
        """Seconds at 1000 tokens a second a branch."""
        return self.now / 1000

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        return self._prompt

    def _whole(self, problem: PooledProblem, row: int) -> tuple[int, int]:
        """A branch's tokens and how long it lasts, in ticks."""
        tokens, every = int(problem.tokens[row]), self.pool.probe_every
        if not self.free_probes or problem.heard is None or every <= 0:
            return tokens, tokens
        heard = int(problem.heard[row])
        return max(tokens, every * heard), every * (heard + 1)

    def _row(self, problem: PooledProblem, index: int) -> int | None:
        order = self._orders.get(problem.id)
        if order is None:
            order = list(range(problem.samples))
            if not self.in_order:
                random.Random(seed_for(self.seed, problem.id, 0)).shuffle(order)
            self._orders[problem.id] = order = order[: self.max_branches or None]
        return order[index] if index < len(order) else None

    def submit(self, ticket: int, request: Request) -> None:
        problem = self._by_id[request.problem.id]
        self._counts[0] += 1
        row = self._row(problem, request.index)
        if row is None:
            why = f"the pool has no branch {request.index} of {problem.id}"
            self._ended.append((ticket, Completion("", "error", 0, 0, error=why)))
            return
        self._counts[2] += self._prompt
        self._begun.setdefault(problem.id, self.now)
        whole, lasts = self._whole(problem, row)
        by_itself = whole <= request.thinking_tokens
        ends = self.now + (lasts if by_itself else request.thinking_tokens)
        self._tapes[ticket] = _Tape(request, problem, row, self.now, ends, whole, by_itself)
        heapq.heappush(self._events, (ends, 1, ticket))
        if request.probe_every:
            self.probe(ticket, request.probe_from, request.probe_every)

    def probe(self, ticket: int, start: int, every: int) -> None:
        tape = self._tapes.get(ticket)
        if tape is None or self.pool.probe_every <= 0:
            return
        at = max(start, self.now - tape.started, 1)
        tape.probe_every, tape.next_probe = every, -(-at // every) * every
        heapq.heappush(self._events, (tape.started + tape.next_probe, 0, ticket))

    def step(self) -> StepReport:
        moved: dict[int, Progress] = {}
        report = StepReport(self._ended, moved)
        self._ended = []
        if report.finished:
            return report
        events, tapes = self._events, self._tapes
        while events and not report.finished and not report.probes:
            self.now = events[0][0]
            while events and events[0][0] == self.now:
                _, end, ticket = heapq.heappop(events)
                tape = tapes.get(ticket)
                if tape is None:
                    continue
                if end:
                    report.finished.append((ticket, self._end(ticket, tape)))
                elif self.now < tape.ends:
                    self._answer(ticket, tape, report, moved)
        return report

    def _answer(self, ticket: int, tape: _Tape, report: StepReport, moved: dict[int, Progress]) -> None:
        """The branch's anytime answer: the last one recorded at or before where it is."""
        tokens = self.now - tape.started
        if tokens == tape.next_probe:
            tape.probes += 1
            tape.next_probe += tape.probe_every
            report.probes.append(Probed(ticket, tokens, _text(self._anytime(tape, tokens), self.unanswered)))
            moved[ticket] = Progress(tokens, None)
            heapq.heappush(self._events, (self.now + tape.probe_every, 0, ticket))

    def _anytime(self, tape: _Tape, tokens: int) -> int:
        every, probes = self.pool.probe_every, tape.problem.probes
        column = min(tokens // every, probes.shape[1]) - 1 if every else -1
        return int(probes[tape.row, column]) if column >= 0 else -1

    def _end(self, ticket: int, tape: _Tape, finish: Finish | None = None) -> Completion:
        """``finish`` None: the branch ends by itself, or where its cap makes it answer."""
        del self._tapes[ticket]
        tokens, forced, text = min(self.now - tape.started, tape.whole), 0, ""
        if finish != "abort" and tape.by_itself and self.now >= tape.ends:
            tokens = tape.whole
            finish, text = "stop", _text(int(tape.problem.final[tape.row]), self.unanswered)
        elif finish != "abort":
            finish, forced = "stop", self.probe_tokens
            text = _text(self._anytime(tape, tokens), self.unanswered)
        paid = tape.probes * (self.info.probe_tokens or 0)
        self._counts[1] += tokens + forced + paid
        name = tape.problem.id
        self.chains[name] = max(self.chains.get(name, 0), tape.started + tokens + forced - self._begun[name])
        told = tape.problem.confidence if tape.request.signals and tokens >= tape.whole else {}
        logprob, certainty = (
            float(told[k][tape.row]) if k in told else None for k in ("mean-logprob", "self-certainty")
        )
        return Completion(
            text, finish, self._prompt, tokens, forced, closed=forced > 0, probe_tokens=paid, mean_logprob=logprob,
            self_certainty=certainty,
        )  # fmt: skip

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        tape = self._tapes.get(ticket)
        if tape is not None:
            self._ended.append((ticket, self._end(ticket, tape)))

    def abort(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            tape = self._tapes.get(ticket)
            if tape is not None:
                self._ended.append((ticket, self._end(ticket, tape, "abort")))

    def counters(self) -> Counters:
        requests, output, prompt = self._counts
        return Counters(requests=requests, output_tokens=output, prompt_tokens=prompt)

    def close(self) -> None:
        self._tapes.clear()
