"""vLLM in this process: one request per branch, stepped by us, steered by ``ttc.engine.control``.

Owns the mapping between tickets and vLLM's requests, and what a branch comes to. Start-up is in ``vllm_start``, tokens in
``vllm_spelling``, anytime answers in ``vllm_forks``. The traps (docs/engine.md): children of an n > 1 request can't be cancelled
apart, so every branch is its own request; asking for log-probabilities compiles for half a minute, so confidence is measured by the
processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

from ttc.attention.settings import CONFIG_KEY, KvSetting, check_when
from ttc.engine.course import FAR
from ttc.engine.model import ModelFiles, load_model_files
from ttc.engine.protocol import Counters, EngineInfo, Progress, StepReport
from ttc.engine.vllm_args import check_engine_args, in_words, shaping
from ttc.engine.vllm_forks import Forks, Passes, Running
from ttc.engine.vllm_spelling import Spelling, with_delimiter
from ttc.engine.vllm_start import (
    Stats,
    checked_page,
    import_vllm,
    one_line,
    shortest_page,
    start,
    token_prompt,
    vllm_version,
)
from ttc.engine.vllm_words import Words
from ttc.errors import EngineError, InputError
from ttc.types import Completion, Finish, Problem, Request, Sampling
from ttc.types import Control as Steering

if TYPE_CHECKING:
    from ttc.engine.control import Control

_KEYS = itertools.count(1)


class VLLMEngine:
    """An in-process vLLM engine behind the ``Engine`` protocol.

    ``model`` is a nano name, a local path or a hub id. ``concurrency`` is the most branches in flight (vLLM's max_num_seqs);
    ``engine_args`` are passed to vLLM's ``EngineArgs`` and win over ours (a text is read as on vLLM's command line);
    ``think_close`` names the delimiter that ends a thought, where the model's own files don't tell; ``kv_page`` is the tokens of a
    KV page (vLLM's block size; None: vLLM's own, or with ``short_pages``, for work that goes on from its own tokens, the shortest:
    a step computes its last page again); ``kv_when`` a branch with a KV budget reads a part only (None: the engine's own, "faster";
    see ``SparseOptions``). Raises InputError for a model that can't be found, an argument that vLLM does not have or a page that
    can't be, and EngineError if vLLM is missing or does not start.
    """

    def __init__(
        self,
        model: str,
        *,
        concurrency: int = 64,
        context: int | None = None,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        think_close: str | None = None,
        kv_page: int | None = None,
        kv_when: str | None = None,
        short_pages: bool = False,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency: {concurrency} branches can't run; give 1 or more")
        if context is not None and context < 1:
            raise InputError(
                f"context: {context} tokens hold nothing; give 1 or more, or leave it out for the model's own"
            )
        self.files: ModelFiles = load_model_files(model)
        if think_close is not None:
            self.files = with_delimiter(self.files, think_close)
        self._vllm = import_vllm()
        own = check_engine_args(engine_args or {})
        self._stats = Stats()
        page_of = shortest_page(self._vllm) if short_pages and kv_page is None else kv_page
        told: dict[str, Any] = {} if page_of is None else {"block_size": checked_page(self._vllm, page_of)}
        if kv_page is not None or kv_when is not None:  # asked for, so also in full CUDA graphs
            told["additional_config"] = {CONFIG_KEY: {} if kv_when is None else {"when": check_when(kv_when)}}
        self._llm = start(
            self._vllm, self.files, self._stats, concurrency=concurrency, context=context, dtype=dtype,
            extra=told | own | _merged("additional_config", told, own),
        )  # fmt: skip
        config = self._llm.model_config
        marks = config.try_get_generation_config().get("eos_token_id") or ()  # where vLLM ends a text, too
        ends = (marks,) if isinstance(marks, int) else marks
        self.spelling = Spelling(self._llm.get_tokenizer(), self.files, ends)
        # With worker processes (tensor parallel) the processor lives elsewhere: words reach it a step or two late (vllm_words).
        self._in_process = isinstance(
            self._llm.engine_core, self._vllm.v1.engine.core_client.InprocClient
        ) and (self._llm.vllm_config.parallel_config.world_size == 1)
        # Then what the processor sees of an ended branch is all of it, and nothing more.
        self._in_turn = self._in_process and not self._llm.vllm_config.scheduler_config.async_scheduling
        self._draws = self._in_process and self._can_draw()
        kinds = self._vllm.sampling_params.RequestOutputKind
        self._kind = kinds.FINAL_ONLY if self._in_process else kinds.DELTA
        page = int(self._llm.vllm_config.cache_config.block_size)
        dense = self._why_dense()
        self._info = EngineInfo(
            name="vllm",
            model=self.files.name,
            context=int(config.max_model_len),
            concurrency=concurrency,
            format=self.files.format,
            sampling=self.files.sampling,
            steerable=self._in_process,
            inserts=True,
            shape=self.files.shape,
            thinking_tokens=self.files.thinking_tokens,
            signals=("mean-logprob", "self-certainty") if self._in_process else (),
            probe_tokens=self.room_tokens if self.spelling.end else None,
            probe_prefill=page,
            kv_page=page if not dense else None,
            kv_reason=dense,
            identity={
                **({} if kv_page is None else {"kv_page": str(kv_page)}),
                **({} if kv_when is None else {"kv_when": kv_when}),
                **({"engine_args": in_words(shaped)} if (shaped := shaping(own)) else {}),
                **self.files.identity,
                "vllm": vllm_version(),
                "dtype": str(config.dtype).removeprefix("torch."),
            },
            engine_args=in_words(own),
            files=self.files.files,
        )
        self._checked: dict[tuple[Sampling, tuple[int, ...]], Any] = {}
        self._running: dict[int, Running] = {}
        self._ended: list[tuple[int, Completion]] = []
        self._passes = Passes()
        self._looked_at: set[int] = (
            set()
        )  # tickets that must be looked at after each step: steered, or asked for probes
        self._forks = Forks(
            self._running, self._fork, self._drop, self.spelling.text, self._passes, page, self._in_process
        )
        self._words = Words(self._running, self._llm.collective_rpc, self.room_tokens)

    @staticmethod
    def _can_draw() -> bool:
        from ttc.engine import draws

        return draws.available()

    def _why_dense(self) -> str:
        """Why this engine can't decode sparsely ("" : it can). Worker processes can't be asked: there it is taken to."""
        from ttc.attention import plugin, rows

        if not plugin.installed():
            return (
                "ttc's attention plugin is not installed for vLLM (pip install the package; see ttc doctor)"
            )
        served = rows.batch_of(self._llm.vllm_config).served
        if not self._in_process:
            return ""
        if not served:
            return "vLLM's attention backend here is not one that ttc's plugin extends"
        return "" if "" in served.values() else f"{self.files.name}: {next(iter(served.values()))}"

    # -- the protocol -----------------------------------------------------------------------------------------------------
    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def room_tokens(self) -> int:
        return self.spelling.room

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        return len(self.spelling.prompt(problem, effort))

    def check_control(self, control: Steering, thinking: int = FAR) -> None:
        self.spelling.check_control(control, thinking)

    def check_steps(self, text: str) -> None:
        self.spelling.check_steps(text)

    def submit(self, ticket: int, request: Request) -> None:
        from ttc.engine.control import CONTROLS, Control

        prefix = list(request.prefix_ids) or self.spelling.ids(request.prefix)
        ids = self.spelling.prompt(request.problem, request.effort) + prefix
        control = Control(
            due=request.thinking_tokens,
            think_close=self.spelling.end,
            close=self.spelling.close,
            lead=self.spelling.lead,
            signals=bool(request.signals),
            key=next(_KEYS),
            seed=request.seed,
            drawn=self._draws and request.sampling.temperature > 0,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=max(request.sampling.top_k, 0),
            opened=self.spelling.opened(prefix),
            bare=bool(prefix) and prefix[-len(self.spelling.end) :] == self.spelling.end,
            **self.spelling.steering(request.control),
        )
        try:
            if request.step_text and request.step_tokens < request.thinking_tokens:
                control.step = self.spelling.step(request.step_text)
            kv = self._kv(request)
            self._add(ticket, ids, self._params(request, self._told(control) | _kv_args(kv, control)), kv)
        except ValueError as error:  # vLLM's own validation of this one request, or ours
            CONTROLS.pop(control.key or 0, None)
            self._ended.append((ticket, Completion("", "error", 0, 0, error=one_line(error))))
            return
        self._stats.requests += 1
        running = self._running[ticket] = Running.begin(control, ids, self._passes)
        running.step_tokens, running.kv = request.step_tokens, kv
        if request.probe_every:
            self.probe(ticket, request.probe_from, request.probe_every)

    def probe(self, ticket: int, start: int, every: int) -> None:
        """From ``start`` tokens on, ask a running branch at each multiple of ``every`` tokens. Unknown tickets are ignored."""
        running = self._running.get(ticket)
        if running is not None and self._info.probe_tokens is not None:
            if self._in_process:
                running.tokens = running.control.length
            self._looked_at.add(ticket)
            self._forks.ask(running, start, every)

    def _fork(self, ticket: int, ids: list[int], parent: Running) -> Control:
        """A greedy request that closes the thought behind ``ids`` and answers, reading the KV cache as ``parent`` does."""
        from ttc.engine.control import Control

        control = Control(due=0, think_close=self.spelling.end, close=self.spelling.close, key=next(_KEYS))
        extra = self._told(control) | _kv_args(parent.kv, parent.control)
        params = self._sampling_params(Sampling(0.0), 0, self.room_tokens, extra)
        self._add(ticket, ids, params, parent.kv)
        return control

    def _drop(self, ticket: int) -> None:
        self._llm.abort_request([str(ticket)])

    def _told(self, control: Control) -> dict[str, Any]:
        """What a request carries of its control: all of it, or in process its key (vLLM copies deeply what a request carries)."""
        from ttc.engine.control import CONTROLS, EXTRA_ARGS_KEY, instructions

        if not self._in_process:
            return instructions(control)
        CONTROLS[control.key or 0] = control
        return {EXTRA_ARGS_KEY: {"key": control.key} | ({"step": control.step} if control.step else {})}

    def _kv(self, request: Request) -> KvSetting | None:
        """How a request reads the KV cache (None: all of it). Raises InputError for a budget under a page."""
        kv = KvSetting.asked(request.kv_budget, request.kv_method)
        if kv is None or self._info.kv_page is None:
            return None
        kv.check_page(self._info.kv_page)
        return kv

    def sparse(self, kv: KvSetting) -> tuple[float, float] | None:
        """See ``SparseEngine``; None in another process. The first call may measure the machine, in about a second."""
        if not self._in_process or self._info.kv_page is None:
            return None
        from ttc.attention import rows

        batch = rows.batch_of(self._llm.vllm_config)
        return batch.dense_below(kv), batch.part

    def _add(self, ticket: int, ids: list[int], params: Any, kv: KvSetting | None) -> None:
        salt = (
            kv.salt if kv is not None else None
        )  # what was written under one setting is never read under another
        self._llm.add_request(str(ticket), token_prompt(ids, salt), params)

    def _params(self, request: Request, extra: dict[str, Any]) -> Any:
        most = request.step_tokens if request.pauses else request.thinking_tokens + self.room_tokens
        sampling = Sampling(0.0) if self._draws else request.sampling  # greedy takes what was drawn
        return self._sampling_params(sampling, request.seed, most, extra)

    def _sampling_params(self, sampling: Sampling, seed: int, most: int, extra: dict[str, Any]) -> Any:
        """vLLM's parameters: a copy of those it has checked already, where only what is each request's own differs."""
        steps, seeded = tuple(extra["ttc"].get("step", ())), sampling.temperature > 0
        known = self._checked.get((sampling, steps))
        if known is None:
            known = self._checked[sampling, steps] = self._vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed if seeded else None,
                stop_token_ids=list(steps),
                skip_special_tokens=False,
                detokenize=False,
                output_kind=self._kind,
                skip_clone=True,  # a copy that is nobody else's
            )
        params = copy(known)
        params.seed, params.max_tokens, params.extra_args = seed if seeded else None, most, extra
        return params

    def step(self) -> StepReport:
        report = StepReport(finished=self._ended)
        self._ended = []
        if not self._running:
            return report
        try:
            if not self._in_process:
                self._words.send()
            self._stats.step_tokens, before = 0, self._stats.steps
            self._stats.ends_only = self._in_turn
            outputs = self._llm.step()
        except Exception as error:
            raise EngineError(f"vLLM stopped: {one_line(error)}") from error
        finally:
            self._stats.ends_only = False
        if self._in_process:
            if (
                self._stats.steps > before
            ):  # else vLLM has begun a first step, and ends it while the next runs
                self._follow_controls(outputs, report)
            report.progress, report.standing = _Places(self._running), True
        else:
            self._follow_outputs(outputs, report)
        return report

    def _follow_controls(self, outputs: Sequence[Any], report: StepReport) -> None:
        """In process a branch's tokens are read where the processor sees them, and vLLM makes outputs of ended branches only: an
        output for every branch and step would cost a twentieth of the throughput of a small model, and so would a look at every
        branch. vLLM's count of the step's tokens tells whether all that run were in it."""
        ended = {int(output.request_id): output for output in outputs}
        moved, passes = self._stats.step_tokens, self._passes
        share = 1.0 / moved if moved else 0.0
        if moved != len(self._running):
            for ticket, running in self._running.items():
                if ticket not in ended and running.control.length <= passes.steps - running.missed:
                    running.missed, running.unread = running.missed + 1, running.unread + share
        passes.steps, passes.reads = passes.steps + 1, passes.reads + share
        for ticket, output in ended.items():
            if ticket not in self._running:
                continue  # a fork whose branch has just ended
            running = self._running[ticket]
            written = running.control.output if self._in_turn else output.outputs[0].token_ids
            if not written and output.outputs[0].token_ids:
                raise EngineError(
                    "vLLM does not call ttc's logits processor, so no budget can be kept; see 'ttc doctor', and use no model that"
                    " brings speculative decoding"
                )
            running.ids, running.cached = list(written), output.num_cached_tokens or 0
            if running.parent:
                report.probes.append(self._forks.answered(ticket))
                continue
            running.partial = _paused(output, running)
            report.finished.append((ticket, self._completion(ticket, _finish(output))))
        for ticket in sorted(self._looked_at):
            running = self._running[ticket]
            running.tokens = running.control.length
            if running.limit is not None and running.tokens >= running.limit:
                self._llm.abort_request([str(ticket)])  # its answer outgrew the room that steering left
                running.ids = running.control.written()
                report.finished.append((ticket, self._completion(ticket, "length")))
            elif running.probe_every:
                self._forks.look(ticket, running)

    def _follow_outputs(self, outputs: Sequence[Any], report: StepReport) -> None:
        """With worker processes: an output for every branch and step."""
        share = 1.0 / len(outputs) if outputs else 0.0
        self._passes.reads += share
        moved = {int(output.request_id) for output in outputs}
        for ticket, running in self._running.items():
            if ticket not in moved:
                running.unread += share
        progress: dict[int, Progress] = {}
        report.progress = progress
        for output in outputs:
            ticket = int(output.request_id)
            if ticket not in self._running:
                continue
            running = self._running[ticket]
            if not running.ids:
                running.cached = output.num_cached_tokens or 0
            running.ids.extend(output.outputs[0].token_ids)
            if running.parent:
                if output.finished:
                    report.probes.append(self._forks.answered(ticket))
            elif output.finished:
                running.partial = _paused(output, running)
                report.finished.append((ticket, self._completion(ticket, _finish(output))))
            elif running.limit is not None and len(running.ids) >= running.limit:
                self._llm.abort_request([str(ticket)])
                report.finished.append((ticket, self._completion(ticket, "length")))
            else:
                progress[ticket] = Progress(len(running.ids), running.reads)
                if running.probe_every:
                    running.control.output, running.tokens = running.ids, len(running.ids)
                    self._forks.look(ticket, running)

    def _completion(self, ticket: int, finish: Finish) -> Completion:
        from ttc.engine.control import CONTROLS
        from ttc.engine.reading import confidence

        running = self._running.pop(ticket)
        self._looked_at.discard(ticket)
        if running.fork:
            self._forks.end(running)
        control = running.control
        ahead = len(control.output) > len(running.ids)  # its next step is under way, for a token thrown away
        control.output = running.ids
        CONTROLS.pop(control.key or 0, None)
        skipped, scored = self._kv_counts(running, ahead)
        mean_logprob, self_certainty = confidence(control)
        if not self._in_process:
            self._words.forget(running)
            control.read_back()
        forced = min(control.forced, len(running.ids))
        return Completion(
            text=self.spelling.text(running.ids),
            finish=finish,
            prompt_tokens=len(running.context) if running.ids else 0,
            generated_tokens=len(running.ids) - forced,
            forced_tokens=forced,
            cached_tokens=running.cached,
            token_ids=tuple(running.ids),
            closed=control.closed_by_force,
            triggers=control.begun + control.inserted,
            partial=running.partial,
            probe_tokens=sum(fork.output_tokens for fork in running.forks),
            forks=tuple(running.forks),
            kv_skipped=skipped,
            kv_scored=scored,
            weight_reads=running.reads,
            mean_logprob=mean_logprob,
            self_certainty=self_certainty,
        )

    def _kv_counts(self, running: Running, ahead: bool) -> tuple[float | None, float]:
        """KV tokens skipped and page vectors scored, without the step that is ``ahead``; None where they were not counted (dense,
        or in another process)."""
        if running.kv is None:
            return None, 0.0
        from ttc.attention.rows import COUNTS

        skipped, scored, *last = COUNTS.pop(running.control.key or 0, (0.0, 0.0, 0.0, 0.0))
        if ahead:
            skipped, scored = skipped - last[0], scored - last[1]
        return (skipped if self._in_process else None), scored

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        running = self._running.get(ticket)
        if running is not None:
            self._say(ticket, None)
            if self._in_process:
                running.limit = running.control.due + self.room_tokens
                self._looked_at.add(ticket)

    def insert(self, ticket: int, text: str) -> None:
        """Force ``text`` into a running branch's thought. Raises InputError for a text without a token."""
        if ticket in self._running:
            self._say(ticket, self.spelling.trigger(text))

    def _say(self, ticket: int, word: Sequence[int] | None) -> None:
        from ttc.engine.control import say

        if self._in_process:
            say(self._running[ticket].control.key or 0, word)
        else:
            self._words.say(ticket, word)

    def abort(self, tickets: Sequence[int]) -> None:
        live = [ticket for ticket in tickets if ticket in self._running]
        if not live:
            return
        self._llm.abort_request([str(ticket) for ticket in live])
        if self._in_process:
            for ticket in live:
                self._running[ticket].ids = self._running[ticket].control.written()
        self._ended.extend((ticket, self._completion(ticket, "abort")) for ticket in live)

    def counters(self) -> Counters:
        stats = self._stats
        return Counters(
            stats.requests, stats.output_tokens, stats.prompt_tokens, stats.cached_tokens, stats.steps
        )

    def close(self) -> None:
        llm, self._llm = getattr(self, "_llm", None), None
        if llm is not None:
            llm.engine_core.shutdown()


class _Places(Mapping[int, Progress]):
    """Where the running branches are, made when it is read."""

    def __init__(self, running: Mapping[int, Running]) -> None:
        self._running = running

    def __getitem__(self, ticket: int) -> Progress:
        running = self._running[ticket]
        if running.parent:
            raise KeyError(ticket)
        return Progress(running.control.length, running.reads)

    def __iter__(self) -> Iterator[int]:
        return iter([ticket for ticket, running in self._running.items() if not running.parent])

    def __len__(self) -> int:
        return sum(not running.parent for running in self._running.values())


def _kv_args(kv: KvSetting | None, control: Control) -> dict[str, Any]:
    """What tells the attention plugin of a request; opens its counter."""
    if kv is None:
        return {}
    from ttc.attention.rows import COUNTS

    COUNTS.setdefault(control.key or 0, [0.0, 0.0, 0.0, 0.0])
    return kv.extra_args(control.key)


def _paused(output: Any, running: Running) -> bool:
    """True if a branch of a search came to the end of a step, not of its text."""
    end = output.outputs[0]
    if end.finish_reason == "stop":
        return end.stop_reason in running.control.step
    return 0 < running.step_tokens <= len(running.ids) and not running.control.done


def _finish(output: Any) -> Finish:
    return "stop" if output.outputs[0].finish_reason == "stop" else "length"


def _merged(key: str, *given: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping under ``key`` with the entries that each has there, the last first."""
    found = [each[key] for each in given if key in each]
    return {key: {name: value for each in found for name, value in each.items()}} if found else {}
