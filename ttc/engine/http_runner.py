"""One ticket over HTTP from start to end: call after call, with retries, until its branch is done.

Owns waiting, retrying and interrupting; ``http_branch`` says which call comes next, ``http_server`` makes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from ttc.engine.course import STEERING, Course
from ttc.engine.http_branch import HTTPBranch, Spans
from ttc.engine.http_fork import Probing
from ttc.engine.http_server import Server
from ttc.engine.http_stream import BYTES_PER_TOKEN, CallFailed, Delta, one_line
from ttc.types import AnswerFormat, Completion, Finish, Problem, Request

LOG = logging.getLogger("ttc.engine.openai")
LONGEST_BACKOFF_S = 30.0
TEMPLATE_TOKENS = 8  # a chat template's own tokens around a message, where prompts can only be estimated
REMEMBERED_PROMPTS = 4096
REFUSED = {
    401: "set OPENAI_API_KEY to a valid key",
    402: "see what is left of the account's credit",
    403: "see what the key in OPENAI_API_KEY may do",
    404: "see whether the server still has the model",
}
"""Statuses that no request of a run will escape, and the mend."""
REFUSALS = 8
"""Branches refused in a row after which the rest is not tried."""
PROMPT_PASSES = 3
"""Calls of one branch that a server may accept: the thought, the answer, and one resumed after a break."""


def estimate_prompt(problem: Problem) -> int:
    """Prompt tokens where nothing can tokenise: a token for every three bytes, and the template's own."""
    return sum(len(m["content"].encode()) // BYTES_PER_TOKEN + TEMPLATE_TOKENS for m in problem.messages)


@dataclass(slots=True)
class Setting:
    """What all tickets of an engine share. ``gone`` says why no call can succeed any more, as the server can't be reached or has
    refused ``REFUSALS`` branches in a row; "" if a call has been accepted since."""

    server: Server
    form: AnswerFormat
    spans: Spans
    prompt_opens: bool | None
    context: int
    max_retries: int
    backoff_s: float
    seed: int
    slots: asyncio.Semaphore
    probe_slots: asyncio.Semaphore
    gone: str = ""
    refusals: int = 0
    prompts: dict[tuple[str, float | None], list[int]] = field(default_factory=dict)
    spelt: dict[str, list[int]] = field(default_factory=dict)
    tails: dict[tuple[int, str], str] = field(default_factory=dict)

    @property
    def room_tokens(self) -> int:
        return self.spans.most_tokens + self.form.answer_tokens

    def failed(self, failure: CallFailed, words: str) -> None:
        """A branch has ended in this failure."""
        if failure.unreachable:
            self.gone = f"can't be reached any more: {words}"
        elif failure.status in REFUSED:
            self.refusals += 1
            if self.refusals == REFUSALS:
                self.gone = (
                    f"has refused {self.refusals} branches in a row ({words}); {REFUSED[failure.status]}"
                )

    def accepted(self) -> None:
        """The server has answered a branch's call."""
        self.gone, self.refusals = "", 0

    async def prompt_ids(self, problem: Problem, effort: float | None) -> list[int]:
        """The prompt's token ids, remembered for its other branches. Raises CallFailed."""
        key = (repr(problem.messages), effort)
        ids = self.prompts.get(key)
        if ids is None:
            ids = await self.server.tokenize(messages=problem.messages, effort=effort)
            if len(self.prompts) >= REMEMBERED_PROMPTS:
                self.prompts.clear()
            self.prompts[key] = ids
        return ids

    async def span_ids(self, text: str) -> list[int]:
        """The ids of a text to insert. Raises CallFailed where it has none."""
        if text not in self.spelt:
            self.spelt[text] = await self.server.tokenize(text=text) if text else []
            if not self.spelt[text]:
                raise CallFailed(f"{text!r} is no token of this model's, so it can't be forced", again=False)
        return self.spelt[text]

    async def tail(self, token: int, step: str) -> str:
        """What a token says behind the end of a step's text: a server that stops at a text shows the token up to there only."""
        key = (token, step)
        if key not in self.tails:
            try:
                word = await self.server.detokenize([token])
            except CallFailed as error:
                LOG.info("the end of a step can't be read: %s", error)
                return ""
            cut = next((n for n in range(len(step), 0, -1) if word.startswith(step[-n:])), 0)
            at = word.find(step)
            self.tails[key] = word[at + len(step) :] if at >= 0 else word[cut:] if cut else ""
        return self.tails[key]

    def backoff(self, failures: int, failure: CallFailed, lot: random.Random) -> float:
        """Seconds until the next try: doubling, between half and whole of it by lot, never before the
        server's Retry-After."""
        longest = min(self.backoff_s * 2.0 ** (failures - 1), LONGEST_BACKOFF_S)
        return max(failure.wait_s, longest * lot.uniform(0.5, 1.0))


class Runner:
    """One ticket, or (``fork``) an anytime answer of one. ``run`` returns its Completion whatever happens; ``moved`` is told the
    tokens so far, ``probed`` each anytime answer: tokens so far, and the text."""

    def __init__(
        self,
        setting: Setting,
        request: Request,
        moved: Callable[[int], None],
        probed: Callable[[int, str], None] = lambda tokens, text: None,
        *,
        fork: bool = False,
    ) -> None:
        self.setting, self.request, self.moved, self.fork = setting, request, moved, fork
        self.probing = Probing(
            request, lambda forked: Runner(setting, forked, lambda tokens: None, fork=True), probed
        )
        self.branch: HTTPBranch | None = None
        self.lot = random.Random(f"{setting.seed}/{request.seed}")
        self.prompt_ids: list[int] = []
        self.aborted = self.steered = False
        self.failures = 0
        self._call: asyncio.Task[None] | None = None

    def abort(self) -> None:
        self.aborted = True
        if self._call is not None:
            self._call.cancel()

    def steer(self) -> None:
        """Close the thought at once; no effect on a branch that has begun to answer."""
        branch = self.branch
        if self.steered or (
            branch is not None and (branch.answering or (branch.whole and not branch.thinking_open))
        ):
            return
        self.steered = True
        if self._call is not None:
            self._call.cancel()

    def probe(self, start: int, every: int) -> None:
        """From ``start`` tokens on, answer at each multiple of ``every`` (see ``http_fork``)."""
        self.probing.ask(start, every, len(self.branch.ids) if self.branch is not None else 0)

    async def run(self) -> Completion:
        completion = await self._completion()
        forks = tuple(self.probing.forks)
        if not forks:
            return completion
        return replace(completion, forks=forks, probe_tokens=sum(fork.output_tokens for fork in forks))

    async def _completion(self) -> Completion:
        finish: Finish = "error"
        error = ""
        try:
            async with self.setting.probe_slots if self.fork else self.setting.slots:
                finish = await self._drive()
        except CallFailed as failure:
            error = one_line(str(failure))
            if failure.unreachable or not self.fork:
                self.setting.failed(failure, error)
        except Exception as failure:  # a mistake of ours must not leave the driver waiting for ever
            LOG.exception("seed %d failed", self.request.seed)
            error = f"{type(failure).__name__}: {one_line(str(failure))}"
        finally:
            await self.probing.end()
        if self.aborted and finish == "error":
            finish, error = "abort", ""
        if self.branch is None:
            return Completion("", finish, 0, 0, error=error)
        completion = self.branch.completion(finish, error)
        if self.request.signals and finish == "stop" and completion.mean_logprob is None:
            self.setting.server.say_once(
                "the server sends no log-probabilities, so no branch's confidence is known"
            )
        return completion

    async def _drive(self) -> Finish:
        """Call after call until the branch is done. Raises the CallFailed that ended it."""
        wait_s = 0.0
        resumes = self.setting.server.exact or self.setting.server.continues
        while not self.aborted:
            branch = self.branch
            if branch is None:
                work = self._prepare(wait_s)
            else:
                branch.steered = self.steered
                if not (max_tokens := branch.next_tokens()):
                    return branch.finish
                work = self._attempt(branch, max_tokens, wait_s)
            wait_s = 0.0
            try:
                await self._interruptible(work)
            except CallFailed as failure:
                if failure.changed:
                    continue
                self.failures += 1
                control = self.request.control
                passes = PROMPT_PASSES
                passes += control.most_insertions(self.request.thinking_tokens) if control is not None else 0
                spent = branch is not None and branch.least_passes > passes
                if not failure.again or spent or self.fork or self.failures > self.setting.max_retries:
                    raise
                LOG.info("seed %d, failure %d: %s", self.request.seed, self.failures, failure)
                self.setting.server.say_once(f"{one_line(str(failure))}; trying again")
                wait_s = self.setting.backoff(self.failures, failure, self.lot)
            if branch is not None and not (resumes or self.steered):
                branch.restart_if_cut()
        return "abort"

    async def _interruptible(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` as a task that ``abort`` and ``steer`` can cancel without ending the branch."""
        call = self._call = asyncio.get_running_loop().create_task(work)
        try:
            await asyncio.wait({call})
            if not call.cancelled():
                call.result()
        finally:
            self._call = None
            if not call.done():  # the ticket itself was cancelled: the engine is closing
                call.cancel()
                await asyncio.wait({call})

    async def _prepare(self, wait_s: float) -> None:
        """The prompt, and with it the branch's state. Raises CallFailed also where nothing fits."""
        await asyncio.sleep(wait_s)
        request, setting, server = self.request, self.setting, self.setting.server
        room, thinking = setting.room_tokens, request.thinking_tokens
        if server.exact:
            self.prompt_ids = list(await setting.prompt_ids(request.problem, request.effort))
            prefix = list(request.prefix_ids)
            if request.prefix and not prefix:
                prefix = await server.tokenize(text=request.prefix)
            self.prompt_ids += prefix
            prompt = len(self.prompt_ids)
            thinking = min(thinking, setting.context - prompt - room)
            if thinking < 0:
                raise CallFailed(
                    f"the prompt ({prompt} tokens) and the room to answer ({room}) do not fit into the "
                    f"model's context ({setting.context})",
                    again=False,
                )
        else:
            prompt = estimate_prompt(request.problem) + len(request.prefix.encode()) // BYTES_PER_TOKEN
        self.branch = HTTPBranch(
            request=request,
            form=setting.form,
            spans=setting.spans,
            thinking=thinking,
            room=room,
            prompt=prompt,
            prompt_opens=setting.prompt_opens,
            # A fork that is cut is charged whole: it is short, and a busy server's events may lag behind what it samples.
            unseen=room if self.fork else server.stream_interval - 1 if server.is_vllm else 0,
            course=await (self._course(thinking) if request.control is not None else self._cap(thinking)),
            native=bool(server.steers),
            continues=server.exact or server.continues,
            prefix_ids=request.prefix_ids,
            step_ids=await self._step_ids(),
        )

    async def _step_ids(self) -> tuple[int, ...]:
        """The one token that the step's text is: an end that the server sees before it reads the text (none: the text alone)."""
        if not self.request.step_text:
            return ()
        ids = await self.setting.span_ids(self.request.step_text)
        return tuple(ids) if len(ids) == 1 else ()

    async def _cap(self, thinking: int) -> Course | None:
        """What makes a server close the thought at its cap by itself, and answer in the same call; None where it can't. Only for a
        thought that the template opens: an end of text inside one becomes its end, and a model that is not told to think would
        never come to another."""
        request, setting, server = self.request, self.setting, self.setting.server
        if (
            self.fork
            or request.pauses_within(thinking)
            or not (server.exact and setting.prompt_opens and thinking > 0)
        ):
            return None
        if (request.prefix and not request.prefix_ids) or not await server.learn_plugin():
            return None
        course = Course(
            due=thinking, think_close=await setting.span_ids(setting.form.think_close), seed=request.seed
        )
        course.output[:] = request.prefix_ids
        closed = course.thought_closed()
        course.output.clear()
        return None if closed else course

    async def _course(self, thinking: int) -> Course:
        """The request's control in this model's tokens. Raises CallFailed also for what no server can do."""
        request, server = self.request, self.setting.server
        control = request.control
        if control is None or not server.exact:
            raise CallFailed("the server has no /tokenize, so no chain can be steered there", again=False)
        if not await server.learn_plugin():
            server.say_once(
                "ttc's plugin is not loaded there, so chains are steered by continuation requests: each trigger is a call of its"
                " own and pays its prompt again"
            )
        delimiter = await self.setting.span_ids(self.setting.form.think_close)
        return Course(
            due=thinking,
            think_close=delimiter,
            triggers=[await self.setting.span_ids(text) for text in control.triggers],
            seed=request.seed,
            **{name: getattr(control, name) for name in STEERING if name != "at"},
            at=list(control.at),
        )

    async def _attempt(self, branch: HTTPBranch, max_tokens: int, wait_s: float) -> None:
        """One call of the branch, after a pause."""
        if wait_s:
            await asyncio.sleep(wait_s)
        server, heard = self.setting.server, False
        path, body = await self._body(branch, max_tokens)

        def receive(delta: Delta) -> bool:
            nonlocal heard
            if not heard:  # later events tell nothing of whether the server still takes calls
                self.setting.accepted()
            going, heard = branch.receive(delta), True
            self.moved(branch.output_tokens)
            self.probing.look(branch)
            if not going:
                server.say_once(f"the server samples past {server.max_field}; calls are cut there")
            return going

        branch.begin(max_tokens)
        cut = True
        try:
            await server.generate(path, body, receive)
            cut = False
        except asyncio.CancelledError:
            if not self.setting.gone:
                branch.hang_up()
            raise
        finally:
            branch.end(cut=cut)
        if branch.at_step and branch.ids:
            branch.text += await self.setting.tail(branch.ids[-1], self.request.step_text)

    async def _body(self, branch: HTTPBranch, max_tokens: int) -> tuple[str, dict[str, Any]]:
        request, server, answering = self.request, self.setting.server, branch.answering
        seed = (request.seed + branch.calls) & (2**63 - 1)  # no two calls of a branch draw the same
        if server.exact:
            written = branch.ids if branch.ids_known else await server.tokenize(text=branch.text)
            ids = self.prompt_ids + written
            return "/v1/completions", server.completion_body(
                request, ids, max_tokens, seed, answering=answering, steering=branch.steering()
            )
        body = server.chat_body(request, branch.turn, max_tokens, seed, answering=answering)
        return "/v1/chat/completions", body
