"""``openai:URL``: any OpenAI-compatible server as an engine, with vLLM's own extras where the server is vLLM.

Owns one background thread with one event loop and one pooled client, at most ``concurrency`` calls at a
time, retries, and the hand-over to the driver's thread. What a branch does call by call is in
``http_branch``, what a server can do in ``http_server``, the wire in ``http_stream``.

What to know of engines behind HTTP: a cap is a chain of ``max_tokens`` (see ``http_branch``); ``steerable``
is False, since a steer costs a round trip while the server samples on, so the driver reserves the worst case
up front, and ``steer`` serves deadlines; the batch can't be seen, so ``weight_reads`` is None and
``Counters.steps`` 0; of the confidence signals only "mean-logprob" can be had. Every call is charged its
whole prompt. vLLM gets no seeds unless asked: a seed does not fix a sample there (it depends on the batch),
slows the sampler down, and on CPU kills the engine if the request's prefill is cut.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ttc.engine.course import FAR, check_fits, check_words
from ttc.engine.http_branch import Span, Spans
from ttc.engine.http_runner import PROMPT_PASSES, Runner, Setting, estimate_prompt
from ttc.engine.http_server import ServedModel, Server, base_url, cannot_open, choose_model
from ttc.engine.http_stream import BYTES_PER_TOKEN, CallFailed
from ttc.engine.protocol import Counters, EngineInfo, Probed, Progress, StepReport
from ttc.errors import EngineError, InputError, TTCError
from ttc.types import AnswerFormat, Completion, Control, Problem, Request, Sampling

if TYPE_CHECKING:
    from ttc.costmodel import ModelShape
    from ttc.engine.model import ModelFiles

T = TypeVar("T")
LOG = logging.getLogger("ttc.engine.openai")
GENERIC_FORMAT = AnswerFormat(close_text="\n</think>\n\n\\boxed{", extract="boxed", answer_tokens=64)
UNKNOWN_CONTEXT = 8192
STEP_WAIT_S = 0.05
CLOSE_S = 10.0
"""The longest wait for connections to close, and for the loop to end."""


class OpenAIEngine:
    """An OpenAI-compatible server behind the ``Engine`` protocol; its verbs may be called from any thread.

    ``model`` is a name that the server lists (default: the only one); ``api_key`` falls back to
    OPENAI_API_KEY; ``timeout_s`` is the longest silence of a running stream; ``context``, ``format``,
    ``shape`` and ``sampling`` override what can be learned from the server. ``stream_interval`` is how many
    tokens vLLM puts into one event: a cancelled branch is charged up to that many less one for what the
    server may have sampled unseen. ``seeds``: send each request's seed (None: unless the server is vLLM).
    ``cache_salt`` sets the run's prefix cache apart from others'. Raises InputError if the server can't be
    reached or lacks the model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        format: AnswerFormat | None = None,
        shape: ModelShape | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        backoff_s: float = 0.5,
        stream_interval: int = 8,
        seeds: bool | None = None,
        cache_salt: str | None = None,
        seed: int = 0,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency: {concurrency} branches can't run; give 1 or more")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._server = Server(base_url(url), key, timeout_s, max(stream_interval, 1), seeds, cache_salt)
        self._news = threading.Condition()
        self._finished: list[tuple[int, Completion]] = []
        self._moved: dict[int, Progress] = {}
        self._probed: list[Probed] = []
        self._woken = False
        self._running: dict[int, Runner] = {}
        self._held: dict[int, Request] = {}  # taken while the server takes no calls
        self._scout: int | None = None  # the one ticket that tries it meanwhile
        self._tasks: set[asyncio.Task[None]] = set()
        self._counters = Counters()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ttc-openai", daemon=True)
        self._thread.start()
        try:
            served, files = self._meet(model)
            form = format or (files.format if files is not None else GENERIC_FORMAT)
            length = context or self._server.context or (files.context if files is not None else 0)
            self._setting = self._call(self._set(form, length, concurrency, max_retries, backoff_s, seed))
        except BaseException:
            self.close()
            raise

        self._info = EngineInfo(
            name="openai",
            model=served.id,
            context=self._setting.context,
            concurrency=concurrency,
            format=form,
            sampling=sampling or (files.sampling if files is not None else Sampling()),
            steerable=False,
            shape=shape or (files.shape if files is not None else None),
            prompt_passes=PROMPT_PASSES,
            prompt_error=1 if self._server.exact else BYTES_PER_TOKEN,
            thinking_tokens=files.thinking_tokens if files is not None else 0,
            signals=("mean-logprob",),
            probe_tokens=self.room_tokens if self._server.exact and form.think_close else None,
            probe_prefill=self._setting.context,  # what is in the server's cache can't be known beforehand
            identity={
                **(files.identity if files is not None else {}),
                "model": served.id,
                "server": f"vllm {self._server.version}".strip() if self._server.is_vllm else "openai",
            },
            files=files.files if files is not None else {},
        )

    # -- start-up ----------------------------------------------------------------------------------
    def _meet(self, model: str | None) -> tuple[ServedModel, ModelFiles | None]:
        """Which of the server's models it is, what the server can do, and the model's files if they are here.
        Raises InputError."""
        try:
            served = choose_model(model, self._call(self._server.models()), self._server.url)
            self._call(self._server.learn(served))
        except CallFailed as error:
            raise InputError(cannot_open(self._server.url, error)) from error
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            failed = CallFailed(f"its answers can't be read: {error}", again=False)
            raise InputError(cannot_open(self._server.url, failed)) from error
        return served, _local_files(served.root)

    async def _set(
        self,
        form: AnswerFormat,
        context: int,
        concurrency: int,
        max_retries: int,
        backoff_s: float,
        seed: int,
    ) -> Setting:
        """What all tickets share, with the texts to insert in this model's tokens. Raises InputError."""
        server, opens = self._server, None
        if not context:
            context = UNKNOWN_CONTEXT
            server.say_once(f"the server does not tell its context; {context} tokens are assumed")
        spans = [Span(text, None) for text in Spans.texts(form)]
        if server.exact:
            try:
                spans = [
                    Span(s.text, tuple(await server.tokenize(text=s.text)) if s.text else ()) for s in spans
                ]
                prompt = await server.tokenize(messages=[{"role": "user", "content": "Hi"}])
                end = (await server.detokenize(prompt[-32:])).rstrip()
            except CallFailed as error:
                raise InputError(cannot_open(server.url, error)) from error
            opens = bool(form.think_open.strip()) and end.endswith(form.think_open.strip())
        slots, probe_slots = asyncio.Semaphore(concurrency), asyncio.Semaphore(max(1, concurrency // 8))
        return Setting(
            server, form, Spans(*spans), opens, context, max_retries, backoff_s, seed, slots, probe_slots
        )

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""
        if self._loop.is_closed():
            work.close()
            raise EngineError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- the protocol ------------------------------------------------------------------------------
    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def room_tokens(self) -> int:
        return self._setting.room_tokens

    def learn_kv(self) -> EngineInfo:
        """See ``ServedEngine``. What the server then reads can't be seen from here, and it may stay dense by itself: branches are
        charged as dense, which is the most that they read. Raises InputError if the server can't be reached."""
        if self._info.kv_page is None and not self._info.kv_reason:
            try:
                page, reason = self._call(self._server.learn_kv())
            except CallFailed as error:
                raise InputError(cannot_open(self._server.url, error)) from error
            self._server.kv_page = page
            self._info = replace(self._info, kv_page=page, kv_reason=reason)
            if page is not None:
                self._server.say_once(
                    "what the server reads of the KV cache can't be seen from here: branches with a KV budget are charged as"
                    " dense, the most that they read"
                )
        return self._info

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        """Exact where the server can tokenise, else an estimate (a token for every three bytes, so off by a factor of three at the
        most: no token is shorter than a byte, and what a template writes has room in that, too); also for a
        prompt that the server refuses, since that is the problem's own failure and shows when it runs."""
        if not self._server.exact:
            return estimate_prompt(problem)
        for failures in range(self._setting.max_retries + 1):
            try:
                return len(self._call(self._setting.prompt_ids(problem, effort)))
            except CallFailed as error:
                if not error.again:
                    return estimate_prompt(problem)
                failure = error
                time.sleep(max(failure.wait_s, self._setting.backoff_s * 2.0**failures))
        raise EngineError(f"{self._server.url} can't tokenise the prompt: {failure}", retryable=True)

    def check_control(self, control: Control, thinking: int = FAR) -> None:
        """Raise InputError for a control that this server can't execute in ``thinking`` tokens, with its plugin or without."""
        name, form = self._info.model, self._setting.form
        if not form.think_close:
            raise InputError(
                f"think-close: {name} has no delimiter that ends a thought, so nothing can be forced inside one; name it"
                " with --think-close, or use a policy that does not steer"
            )
        if not self._server.exact:
            raise InputError(
                f"engine: {self._server.url} has no /tokenize or no /v1/completions, so no chain can be steered there; use a"
                " vLLM server, or a policy that does not steer"
            )
        try:
            native = self._call(self._server.learn_plugin())
            delimiter = self._call(self._setting.span_ids(form.think_close))
            lengths = [len(self._call(self._setting.span_ids(text))) for text in control.triggers]
        except CallFailed as error:
            raise InputError(f"trigger: {error}; give some words") from error
        check_words(control, form.think_close)
        check_fits(control, lengths, thinking)
        needs = bool(control.loop_repeats) or control.stop_below is not None
        needs = needs or (control.min_thinking > 0 and not control.triggers)
        if not native and (needs or len(delimiter) > 1):
            raise InputError(
                f"engine: {self._server.url} runs without ttc's plugin, and loops, confidence, and a least thinking without a"
                " trigger are seen only inside the engine; install ttc beside that vLLM"
            )

    def check_steps(self, text: str) -> None:
        """Raise InputError if chains can't be written in steps that end behind ``text`` ("": by token count alone)."""
        if not self._server.exact:
            raise InputError(
                f"engine: {self._server.url} has no /tokenize or no /v1/completions, so no chain can be gone on from token by token"
                " there; use a vLLM server, or a policy that does not search"
            )
        if text:
            try:
                self._call(self._setting.span_ids(text))
            except CallFailed as error:
                raise InputError(f"step: {error}; use another delimiter, or tokens alone") from error
        self._server.say_once(
            "each step of a search is a call of its own and pays its chain's beginning again; what the server has in its prefix"
            " cache it does not compute again"
        )

    def probe(self, ticket: int, start: int, every: int) -> None:
        """From ``start`` tokens on, ask a running branch for its anytime answer at each multiple of ``every`` tokens, as soon as
        the server's events tell that it is there: a call of its own on the branch's tokens (``http_fork``)."""
        self._on_loop(self._probe, ticket, start, every)

    def submit(self, ticket: int, request: Request) -> None:
        self._on_loop(self._start, ticket, request)
        with self._news:
            self._count(requests=1)

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        """Stop the running call, close the thought and answer in the room. No effect on a branch that has
        begun to answer."""
        self._on_loop(self._steer, ticket)

    def abort(self, tickets: Sequence[int]) -> None:
        self._on_loop(self._abort, list(tickets))

    def _on_loop(self, function: Any, *args: Any) -> None:
        if self._loop.is_closed():
            raise EngineError("the engine is closed")
        self._loop.call_soon_threadsafe(function, *args)

    def step(self) -> StepReport:
        """What has ended since the last step, waiting 50 ms for something to end if nothing has, and where
        the others are.

        Raises EngineError once the server can't be reached any more, or refuses every call, and everything
        that had run has been reported.
        """
        if self._loop.is_closed():
            raise EngineError("the engine is closed")
        with self._news:
            if not (self._finished or self._probed or self._woken):
                self._news.wait(STEP_WAIT_S)
            self._woken = False
            report = StepReport(self._finished, self._moved, self._probed)
            self._finished, self._moved, self._probed = [], {}, []
            gone = self._setting.gone
            if gone and not self._running and not report.finished:
                raise EngineError(f"{self._server.url} {gone}", retryable=not self._setting.refusals)
        if self._held and not gone:
            self._on_loop(self._release)
        return report

    def wake(self) -> None:
        with self._news:
            self._woken = True
            self._news.notify_all()

    def counters(self) -> Counters:
        """Totals over branches that have ended, by the server's usage as it was charged."""
        with self._news:
            return self._counters

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=CLOSE_S)
        except TimeoutError:
            LOG.warning("%s: a connection did not close in %g s", self._server.url, CLOSE_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=CLOSE_S)
            self._loop.close()

    async def _shut(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()
        await self._loop.shutdown_asyncgens()

    # -- on the loop -------------------------------------------------------------------------------
    def _start(self, ticket: int, request: Request) -> None:
        if self._setting.gone:
            # Until a call is answered, or a step says that the server is gone. While others' streams live on (a server that is
            # being restarted lets them end), one may find out; a server that refuses by status is taken at its word.
            if self._scout is not None or not self._running or self._setting.refusals:
                self._held[ticket] = request
                return
            self._scout = ticket

        def moved(tokens: int) -> None:
            with self._news:
                self._moved[ticket] = Progress(tokens, None)

        def probed(tokens: int, text: str) -> None:
            with self._news:
                self._probed.append(Probed(ticket, tokens, text))
                self._news.notify_all()

        self._running[ticket] = runner = Runner(self._setting, request, moved, probed)
        if request.probe_every and self._info.probe_tokens is not None:
            self._say_probed()
        task = self._loop.create_task(self._run(ticket, runner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, ticket: int, runner: Runner) -> None:
        completion = await runner.run()
        if ticket == self._scout:
            self._scout = None
            if self._setting.gone and len(self._running) > 1:
                if completion.finish == "error" and not completion.prompt_tokens:
                    self._start(ticket, runner.request)  # it has cost nothing, and goes on trying
                    return
                if self._held:
                    self._start(*_first(self._held))
        with self._news:
            self._running.pop(ticket, None)
            self._moved.pop(ticket, None)
            self._finished.append((ticket, completion))
            self._count(
                output_tokens=completion.output_tokens + completion.probe_tokens,
                prompt_tokens=completion.prompt_tokens + sum(f.prompt_tokens for f in completion.forks),
                cached_tokens=completion.cached_tokens + sum(f.cached_tokens for f in completion.forks),
            )
            self._news.notify_all()

    def _count(self, **more: int) -> None:
        self._counters = replace(
            self._counters, **{name: getattr(self._counters, name) + value for name, value in more.items()}
        )

    def _release(self) -> None:
        held, self._held = self._held, {}
        for ticket, request in held.items():
            self._start(ticket, request)

    def _abort(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if self._held.pop(ticket, None) is not None:
                with self._news:
                    self._finished.append((ticket, Completion("", "abort", 0, 0)))
                    self._news.notify_all()
            if (runner := self._running.get(ticket)) is not None:
                runner.abort()

    def _probe(self, ticket: int, start: int, every: int) -> None:
        if (runner := self._running.get(ticket)) is not None and self._info.probe_tokens is not None:
            self._say_probed()
            runner.probe(start, every)

    def _say_probed(self) -> None:
        self._server.say_once(
            "anytime answers are calls of their own, which pay the prompt and the thought so far again; what the server has in its"
            " prefix cache it does not compute again"
        )

    def _steer(self, ticket: int) -> None:
        if (runner := self._running.get(ticket)) is not None:
            runner.steer()


def _first(held: dict[int, Request]) -> tuple[int, Request]:
    """Take out what was put in first."""
    ticket = next(iter(held))
    return ticket, held.pop(ticket)


def _local_files(root: str) -> ModelFiles | None:
    """Shape, format and sampling, if the served model's files lie on this machine."""
    if not root or not Path(root, "config.json").is_file():
        return None
    try:
        from ttc.engine.model import load_model_files

        return load_model_files(root)
    except (ImportError, TTCError) as error:
        LOG.info("nothing learned from %s: %s", root, error)
        return None
