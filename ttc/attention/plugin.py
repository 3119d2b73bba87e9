"""The entry point ``vllm.general_plugins``: puts the sparse backend in the place of vLLM's own, which it extends."""

from __future__ import annotations

import logging
import os
from importlib.metadata import entry_points

ON_CPU = {"CPU_ATTN": "ttc.attention.cpu.CpuBackend"}
ON_GPU = {
    "FLASH_ATTN": "ttc.attention.flash_attn.FlashBackend",
    "TRITON_ATTN": "ttc.attention.triton_attn.TritonBackend",
}
log = logging.getLogger("ttc.attention")


def register() -> None:
    """Called by vLLM in each of its processes, before its config is made. A vLLM that it does not know is left alone, with a
    warning.

    On GPU vLLM is kept on its first model runner, unless the user chose: the second one refuses to start where a processor of
    the first's interface is installed, as ours are.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        ours = _ours()
        for name, path in ours.items():
            register_backend(AttentionBackendEnum[name], path)
        if ours is ON_GPU:
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    except (ImportError, AttributeError, KeyError) as error:
        log.warning("sparse decoding is off, this vLLM has no place for it: %s", error)


def _ours() -> dict[str, str]:
    from vllm.platforms import current_platform

    return ON_CPU if current_platform.is_cpu() else ON_GPU if current_platform.is_cuda() else {}


def active() -> list[str]:
    """vLLM's attention backends that, as vLLM is in this process, are ours."""
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        return []
    load_general_plugins()
    return [name for name, path in _ours().items() if AttentionBackendEnum[name].get_path() == path]


def installed() -> bool:
    """True if both entry points are there: the package was installed, not just on the path."""
    return any(
        e.value == "ttc.attention.plugin:register" for e in entry_points(group="vllm.general_plugins")
    ) and any(
        e.value == "ttc.attention.rows:KvProcessor" for e in entry_points(group="vllm.logits_processors")
    )
