"""The controller's word on its way to branches that run in vLLM's worker processes.

Words are gathered and sent together before the engine's next step, one ``collective_rpc`` for all: a round trip that ends between
two steps of the workers. In process a word is a function call (``ttc.engine.control.say``) and needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ttc.engine.vllm_forks import Running

if TYPE_CHECKING:
    from ttc.engine.control import Word


@dataclass(slots=True)
class Words:
    """Words for the branches of ``running``, sent by ``rpc`` (vLLM's ``collective_rpc``); ``room`` is what an answer may take."""

    running: Mapping[int, Running]
    rpc: Callable[..., Sequence[Any]]
    room: int
    _waiting: list[tuple[int, Word]] = field(default_factory=list)
    _ended: list[int] = field(default_factory=list)

    def say(self, ticket: int, word: Word) -> None:
        self._waiting.append((ticket, word))

    def forget(self, branch: Running) -> None:
        """The branch is over."""
        if branch.told and branch.control.key is not None:
            self._ended.append(branch.control.key)

    def send(self) -> None:
        """Deliver what was said since the last time, and note where each word takes effect."""
        told = [(self.running[ticket], word) for ticket, word in self._waiting if ticket in self.running]
        self._waiting.clear()
        if not told:
            return
        ended, self._ended = self._ended, []
        [positions, *_] = self.rpc(
            "ttc_hear", args=([(branch.control.key, word) for branch, word in told], ended)
        )
        for (branch, word), position in zip(told, positions, strict=True):
            branch.told = True
            at = len(branch.ids) if position is None else position
            if at < 0:
                continue
            control = branch.control
            if word is None:
                control.due = min(control.due, at)
                branch.limit = control.due + self.room
            elif (
                position is not None
            ):  # else it may not have fitted: what it wrote is taken for the branch's own
                control.spans.append((at, len(word)))
                control.inserted += 1
