"""``Score`` work: what the reward model says of chains, priced before it reads, written down when it has.

A reward model behind a server, or of an engine behind one, is asked in threads of its
own, so that other branches go on and are heard while it reads; one that shares this process with the engine would take the engine's
cores there, and is asked between two of its steps. Where the budget pays for no scores, time is up, or the reward model breaks, the
policy gets none, and answers with what it has.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ttc.books import Books
from ttc.cashier import Cashier
from ttc.engine.protocol import ServedEngine
from ttc.errors import named
from ttc.flights import new_ticket
from ttc.jobs import Desk, Job, RewardModel
from ttc.pricing import Pricer, spent_in
from ttc.rewards import scores_of
from ttc.types import Charge, Reply, Score

LAST_WORD_S = 1.0
"""How long an interrupted run waits for scores that are under way: what they cost is known then, and they are kept."""


@dataclass(slots=True, eq=False)
class Asked:
    """Texts on their way through the reward model: first their price, then, if the budget pays for it (``held``: the ticket of its
    hold), their scores. ``given_up``: nobody waits for them any more."""

    job: Job
    texts: list[str]
    why: str
    charge: Charge | None = None
    held: int = 0
    scores: tuple[float, ...] | None = None
    error: Exception | None = None
    seconds: float = 0.0
    given_up: bool = False

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()[:16]

    def work(self, reward: RewardModel, pricer: Pricer, clock: Callable[[], float]) -> None:
        """The next piece of work, in whatever thread; what breaks is kept."""
        begun = clock()
        try:
            if self.charge is None:
                self.charge = pricer.reading(reward, self.job.posed, self.texts)
            else:
                self.scores = scores_of(reward, self.job.posed, self.texts)
        except Exception as error:  # a reward model is anybody's
            self.error = error
        self.seconds = clock() - begun


class Scoring:
    """Asks the run's reward model. Not to be called from more than one thread."""

    def __init__(self, desk: Desk, reward: RewardModel | None, cashier: Cashier, books: Books) -> None:
        self.desk, self.reward, self.cashier, self.books = desk, reward, cashier, books
        self._aside = bool(getattr(reward, "slow", False)) or isinstance(cashier.engine, ServedEngine)
        self._at_once = int(getattr(reward, "at_once", 1))
        self._waiting: deque[Asked] = deque()
        self._under_way: list[Asked] = []
        self._longest = 0.0
        self._work: SimpleQueue[Asked | None] = SimpleQueue()
        self._done: SimpleQueue[Asked] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def open(self) -> bool:
        """True if policies wait for scores."""
        return bool(self._waiting or self._wanted())

    def _wanted(self) -> list[Asked]:
        return [asked for asked in self._under_way if not asked.given_up]

    def ask(self, job: Job, work: Score) -> Reply | None:
        """The reply, or None: it comes later."""
        reward, pricer, clock = self.reward, self.cashier.pricer, self.cashier.clock
        if reward is None or not work.branches:
            return Reply(remaining=job.account.meter.remaining)
        texts = list(work.texts) or [b.completion.text for b in work.branches]
        asked = Asked(job, texts, work.why)
        known = self.books.ledger.scores(job.problem.id, asked.digest)
        if known is not None:
            scores, charge = known
            self.books.replay(job, charge)
            return Reply(scores=scores, remaining=job.account.meter.remaining)
        if self._aside:
            self._waiting.append(asked)
            self._begin()
            return None
        asked.work(reward, pricer, clock)
        if self._afford(asked):
            asked.work(reward, pricer, clock)
        return self._reply(asked)

    def look(self, wait_s: float = 0.0) -> None:
        """Tell the policies whose scores have come, and those for which it is too late (or will be by the next look); wait for the
        first if there is nothing else to do."""
        until_next = wait_s
        while self._under_way:
            try:
                asked = self._done.get(timeout=wait_s) if wait_s else self._done.get_nowait()
            except Empty:
                break
            wait_s = 0.0
            if asked.scores is None and not asked.given_up and self._afford(asked):
                self._work.put(asked)
                continue
            self._under_way.remove(asked)
            if not asked.given_up:
                self._tell(asked)
            self._begin()
        for asked in (*self._waiting, *self._wanted()):
            if self._late(asked.job, until_next):
                self._give_up(asked)
                self._tell(asked)

    def close(self) -> None:
        """The run is over. What is still being read is waited for shortly; what comes too late counts as spent."""
        until = time.monotonic() + LAST_WORD_S
        while self._wanted() and (left := until - time.monotonic()) > 0:
            try:
                asked = self._done.get(timeout=left)
            except Empty:
                break
            self._under_way.remove(asked)
            if asked.held and not asked.given_up:
                self._reply(asked)
        for asked in self._wanted():
            if asked.held:
                self._give_up(asked)
                self._reply(asked)
        self._under_way.clear()
        self._waiting.clear()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(timeout=0.1)  # one that hangs is a daemon
        self._threads.clear()

    # -- one at a time -----------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        """Hand over what waits, as much as the reward model takes at once."""
        while self._waiting and len(self._under_way) < self._at_once:
            asked = self._waiting.popleft()
            self._under_way.append(asked)
            if len(self._threads) < len(self._under_way):
                thread = threading.Thread(target=self._run, name="ttc-scores", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._work.put(asked)

    def _run(self) -> None:
        reward, cashier = self.reward, self.cashier
        while (asked := self._work.get()) is not None:
            assert reward is not None
            asked.work(reward, cashier.pricer, cashier.clock)
            self._done.put(asked)
            if isinstance(cashier.engine, ServedEngine):
                cashier.engine.wake()

    def _late(self, job: Job, more: float) -> bool:
        """True under a budget of seconds of which closing and answering take the rest, with ``more`` before (and a step that reads
        the answer's beginning, and one that may be under way)."""
        cashier = self.cashier
        if cashier.budget.unit != "seconds":
            return False
        return cashier.seconds_left(job) <= cashier.closing_seconds() + 2 * cashier.longest_step + more

    def _afford(self, asked: Asked) -> bool:
        """Hold the price of what has just been priced, if the budget can pay for it."""
        job, unit = asked.job, self.books.unit
        if asked.charge is None or asked.error is not None or asked.held:
            return False
        price = spent_in(unit, asked.charge) if unit != "seconds" else 0.0
        self.books.decide(job, f"score {len(asked.texts)}", asked.why, price)
        if self._late(job, self._longest):
            return False
        ticket = new_ticket()
        if not job.account.meter.hold(ticket, price):
            return False
        asked.held = ticket
        return True

    def _reply(self, asked: Asked) -> Reply:
        """Settle what it cost; the scores, if there are any."""
        job, unit, meter = asked.job, self.books.unit, asked.job.account.meter
        if asked.held and asked.charge is not None:
            meter.settle(asked.held, spent_in(unit, asked.charge) if unit != "seconds" else 0.0)
            self.books.charge(job, asked.charge)
            self.books.ledger.write_scores(job.problem.id, asked.digest, asked.scores, asked.charge)
            self._longest = max(self._longest, asked.seconds)
        if asked.error is not None:
            job.trouble = f"reward: {named(asked.error)}"
            self.books.decide(job, "no scores", job.trouble, 0.0)
        return Reply(scores=asked.scores or (), remaining=meter.remaining)

    def _give_up(self, asked: Asked) -> None:
        asked.given_up = True
        if asked in self._waiting:
            self._waiting.remove(asked)
        self.books.decide(asked.job, "no scores", "they would come too late", 0.0)

    def _tell(self, asked: Asked) -> None:
        job, reply = asked.job, self._reply(asked)
        if job.failed or job.outcome is not None:
            return
        try:
            self.desk.advance(job, reply)
        except Exception as error:
            self.desk.blame(job, error)
