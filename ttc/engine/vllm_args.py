"""vLLM's own engine arguments, as users give them: checked against ``EngineArgs`` and read by vLLM's own parser.

Owns which of them are ours to set, and which of them can shape a sample.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ttc.engine.vllm_start import import_vllm, one_line
from ttc.errors import InputError

OURS = {
    "model": "--model",
    "max_model_len": "--context",
    "max_num_seqs": "--concurrency",
    "block_size": "--kv-page",
    "scheduler_cls": None,
    "disable_log_stats": None,
    "worker_extension_cls": None,
    "skip_tokenizer_init": None,
}
"""What ``--engine-arg`` does not set: the option that does, or None where ttc works with one value only."""

SPECULATES = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""Arguments of speculative decoding, with which vLLM loads no logits processor, so that nothing is capped, forced or counted."""

UNSHAPING = frozenset(
    {
        "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "load_format", "download_dir",
        "use_tqdm_on_load", "disable_log_stats", "cpu_offload_gb", "swap_space", "num_gpu_blocks_override", "scheduling_policy",
        "max_parallel_loading_workers", "model_loader_extra_config", "distributed_executor_backend", "enable_prefix_caching",
    }
)  # fmt: skip
"""Arguments of memory, loading and order of work: a run may be resumed with others. All else may shape a sample."""


def read_engine_args(given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` each, in the words of ``vllm serve`` (``gpu_memory_utilization=0.5``, ``enforce_eager=true``, a mapping as
    JSON). Raises InputError for a name that vLLM or ttc does not let be set, and a value that vLLM's parser refuses."""
    told: dict[str, Any] = {}
    for each in given:
        name, sign, value = each.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not sign or not name.isidentifier():
            raise InputError(f"engine-arg: {each!r} is no NAME=VALUE; write it as enforce_eager=true")
        if name in OURS:
            option = OURS[name]
            mend = f"use {option}" if option else "ttc needs its own value; leave it out"
            raise InputError(f"engine-arg: {name} can't be set here; {mend}")
        told[name] = value
    return check_engine_args(told) if told else {}


def check_engine_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, of which texts are read as vLLM reads them on its command line. Raises InputError for an unknown name and
    for a text that can't be read."""
    vllm = import_vllm()
    known = vllm.EngineArgs.__dataclass_fields__
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"engine-arg: vLLM's EngineArgs has no {name!r}{hint} ('vllm serve --help' lists them)"
            )
        if name in SPECULATES and given[name] is not None:
            raise InputError(
                f"engine-arg: {name} can't be set here; with speculative decoding vLLM loads no logits processor, and no budget"
                " could be kept; leave it out"
            )
    if not any(isinstance(value, str) for value in given.values()):
        return dict(given)
    parser = _parser(vllm)
    actions = {action.dest: action for action in parser._actions}
    found = {
        name: _read(parser, actions.get(name), name, value) if isinstance(value, str) else value
        for name, value in given.items()
    }
    for name, value in found.items():  # vLLM's parser lets some of these pass
        if str(known[name].type).startswith("dict") and not (value is None or isinstance(value, Mapping)):
            raise InputError(f"engine-arg: {name} can't be {value!r} (give a mapping as JSON)")
    return found


def shaping(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that may shape a sample."""
    return {name: args[name] for name in sorted(args) if name not in UNSHAPING}


def in_words(args: Mapping[str, Any]) -> str:
    """Arguments in one line, for run.json."""
    return " ".join(f"{name}={json.dumps(args[name], default=str)}" for name in sorted(args))


def _parser(vllm: Any) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not type-checked here
        def error(self, message: str) -> NoReturn:
            raise InputError(message)

    return vllm.EngineArgs.add_cli_args(Parser(add_help=False))


def _read(parser: Any, action: Any, name: str, value: str) -> Any:
    if action is None:  # not on vLLM's command line: a JSON value, else a text
        try:
            return json.loads(value)
        except ValueError:
            return value
    option = action.option_strings[0]
    if action.nargs == 0:
        flag = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        if flag is None:
            raise InputError(f"engine-arg: {name} is true or false, not {value!r}")
        return flag
    try:
        return getattr(parser.parse_args([f"{option}={value}"]), name)
    except (InputError, ValueError, TypeError) as error:
        raise InputError(
            f"engine-arg: {name} can't be {value!r} ({re.sub(r'^argument [^ :]+: ', '', one_line(error))})"
        ) from None
