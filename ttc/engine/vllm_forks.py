"""Branches inside vLLM, and anytime answers of running ones: a greedy request of its own goes on from the branch's tokens, closes
the thought and answers. It shares the branch's KV prefix, so at most a block is computed again; the branch runs on as it was.

Owns when a fork is due, which are dropped, and what each cost its branch; how a request is made is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttc.attention.settings import KvSetting
from ttc.engine.protocol import Probed
from ttc.types import Fork

if TYPE_CHECKING:
    from ttc.engine.control import Control


@dataclass(slots=True)
class Passes:
    """Steps of the engine so far, and the weight reads of a branch that has been in all of them (1 / rows for each)."""

    steps: int = 0
    reads: float = 0.0


@dataclass(slots=True)
class Running:
    """A branch, or (tickets below 0) the fork of one that writes its anytime answer. ``missed``: steps that it was not in, and
    ``unread`` their weight reads."""

    control: Control
    context: list[int]
    passes: Passes
    missed: int
    unread: float
    ids: list[int] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    limit: int | None = None
    step_tokens: int = 0
    partial: bool = False
    probe_every: int = 0
    next_probe: int = 0
    fork: int = 0  # ticket of the anytime answer under way (0: none)
    forks: list[Fork] = field(default_factory=list)
    parent: int = 0  # of a fork: the branch it was made from, and where
    at: int = 0
    kv: KvSetting | None = None
    told: bool = False  # it was given a word, in another process

    @property
    def reads(self) -> float:
        return self.passes.reads - self.unread

    @staticmethod
    def begin(control: Control, context: list[int], passes: Passes) -> Running:
        """A request that is in the next step at the earliest."""
        return Running(control, context, passes, passes.steps, passes.reads)


@dataclass(slots=True)
class Forks:
    """The anytime answers of an engine whose branches are ``running``. ``start(ticket, ids, parent)`` makes a greedy request that
    answers behind ``ids``; ``cancel(ticket)`` ends one early; ``block`` is the tokens of a KV block; ``sees_rows``: a branch's
    ``Control`` says whether it was preempted."""

    running: dict[int, Running]
    start: Callable[[int, list[int], Running], Control]
    cancel: Callable[[int], None]
    text: Callable[[Sequence[int]], str]
    passes: Passes
    block: int
    sees_rows: bool
    made: int = 0

    def ask(self, branch: Running, start: int, every: int) -> None:
        """From ``start`` tokens on, fork the branch at each multiple of ``every`` tokens."""
        branch.probe_every = every
        branch.next_probe = -(-max(start, branch.tokens, 1) // every) * every

    def look(self, ticket: int, branch: Running) -> None:
        """The branch has moved: begin its next fork if it is due; drop one that is stranded."""
        control = branch.control
        if branch.fork:
            fork = self.running[branch.fork]
            if self.sees_rows and control.row < 0 and not fork.control.length:
                self.end(
                    branch
                )  # preempted, so it has no KV to share: a fork that has not begun is not begun
            return
        if branch.tokens < branch.next_probe or control.forcing() or control.done:
            return
        if control.thought_closed():  # its own answer is on the way
            branch.probe_every = 0
            return
        branch.next_probe = (branch.tokens // branch.probe_every + 1) * branch.probe_every
        self.made += 1
        branch.fork = -self.made
        written = control.written()
        ids = branch.context + written
        started = self.start(branch.fork, ids, branch)
        fork = self.running[branch.fork] = Running.begin(started, ids, self.passes)
        fork.parent, fork.at = ticket, len(written)

    def answered(self, ticket: int) -> Probed:
        """A fork has ended by itself: what it answered; its branch is charged."""
        fork = self.running[ticket]
        parent = self.running[fork.parent]
        written = fork.context[len(parent.context) :]
        self.end(parent, whole=True)
        return Probed(fork.parent, fork.at, self.text(written + fork.ids))

    def end(self, parent: Running, *, whole: bool = False) -> None:
        """Take the branch's fork out, cancelled if it still runs, and note what it cost. What it found in the cache is known
        only of a whole one; of another it is taken to be all whole blocks, since the branch itself holds them."""
        from ttc.engine.control import CONTROLS

        ticket, parent.fork = parent.fork, 0
        fork = self.running.pop(ticket)
        CONTROLS.pop(fork.control.key or 0, None)
        if not whole:
            self.cancel(ticket)
            fork.ids = fork.ids or fork.control.written()
            fork.cached = (len(fork.context) - 1) // self.block * self.block
        if fork.ids:
            parent.forks.append(Fork(len(fork.context), fork.cached, len(fork.ids), fork.reads))
