"""Anytime answers over HTTP: while a branch runs, what would it answer now?

A fork is a call of its own on the branch's tokens so far, with its thought closed behind them; it does not touch the branch. The
server finds the prompt and the thought in its prefix cache, where it has one, and is charged for whatever it does: the fork's whole
prompt, its answer, and the closing span that stands in its prompt. A fork is never tried again: a later one tells more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ttc.engine.http_branch import HTTPBranch
from ttc.types import Completion, Fork, Request, Sampling

if TYPE_CHECKING:
    from ttc.engine.http_runner import Runner


class Probing:
    """The forks of one branch, one at a time. ``runner`` makes what runs a fork; ``told`` gets, for each that comes to its end,
    where the branch was (tokens of output) and the branch's text as if it had been made to answer there."""

    def __init__(
        self, request: Request, runner: Callable[[Request], Runner], told: Callable[[int, str], None]
    ) -> None:
        self.request, self.runner, self.told = request, runner, told
        self.forks: list[Fork] = []
        self._every = self._next = 0
        self._fork: Runner | None = None
        self._task: asyncio.Task[None] | None = None
        if request.probe_every:
            self.ask(request.probe_from, request.probe_every, 0)

    def ask(self, start: int, every: int, tokens: int) -> None:
        """From ``start`` tokens on, fork at each multiple of ``every``; the branch has ``tokens`` by now."""
        self._every, self._next = every, -(-max(start, tokens, 1) // every) * every

    def look(self, branch: HTTPBranch) -> None:
        """The branch has moved: fork it if that is due and its last fork has ended."""
        written = len(branch.ids)
        if not self._every or written < self._next or self._task is not None or not branch.ids_known:
            return
        if branch.answering or not branch.thinking_open:
            self._every = 0  # its own answer is on the way
            return
        self._next = (written // self._every + 1) * self._every
        self._fork = self.runner(
            replace(
                self.request, prefix=self.request.prefix + branch.text, thinking_tokens=0, sampling=Sampling(0.0),
                prefix_ids=(*branch.prefix_ids, *branch.ids), signals=(), control=None, probe_every=0, step_text="", step_tokens=0,
            )
        )  # fmt: skip
        self._task = asyncio.get_running_loop().create_task(self._run(self._fork, written, branch.text))

    async def _run(self, fork: Runner, at: int, text: str) -> None:
        completion = await fork.run()
        self._note(completion)
        self._task = self._fork = None
        if completion.finish in ("stop", "length"):
            self.told(at, text + completion.text)

    def _note(self, completion: Completion) -> None:
        if completion.prompt_tokens:
            self.forks.append(
                Fork(completion.prompt_tokens, completion.cached_tokens, completion.output_tokens, None)
            )

    async def end(self) -> None:
        """The branch is over: a fork under way is cancelled, and charged for what it used."""
        self._every = 0
        if self._fork is not None and self._task is not None:
            self._fork.abort()
            await asyncio.wait({self._task})
