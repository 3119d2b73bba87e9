"""The entry point ``vllm.general_plugins``: puts the sparse backend in the place of vLLM's own, which it extends."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

BACKEND = "ttc.attention.cpu.CpuBackend"
log = logging.getLogger("ttc.attention")


def register() -> None:
    """Called by vLLM in each of its processes. A vLLM that it does not know is left alone, with a warning."""
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        if current_platform.is_cpu():
            register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    except (ImportError, AttributeError) as error:
        log.warning("sparse decoding is off, this vLLM has no place for it: %s", error)


def active() -> bool:
    """True if vLLM, as it is in this process, takes its CPU attention from us."""
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        return False
    load_general_plugins()
    return bool(AttentionBackendEnum.CPU_ATTN.get_path() == BACKEND)


def installed() -> bool:
    """True if both entry points are there: the package was installed, not just on the path."""
    return any(
        e.value == "ttc.attention.plugin:register" for e in entry_points(group="vllm.general_plugins")
    ) and any(
        e.value == "ttc.attention.rows:KvProcessor" for e in entry_points(group="vllm.logits_processors")
    )
