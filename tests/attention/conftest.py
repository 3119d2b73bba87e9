"""One tiny model, and vLLM with and without the plugin on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attention.models import open_engine, save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stock(tiny: Path) -> Callable[..., Any]:
    """Opens an engine without the plugin's backend: what ours must equal."""

    def opened(**changes: Any) -> Any:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from ttc.attention import plugin

        load_general_plugins()
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()
        try:
            return open_engine(tiny, **changes)
        finally:
            plugin.register()
            selector._cached_get_attn_backend.cache_clear()

    return opened


@pytest.fixture(scope="module")
def sparse(tiny: Path) -> Any:
    """The plugin in force, through the per-head path even where it saves nothing."""
    return open_engine(tiny, sparse={"when": "always"})
