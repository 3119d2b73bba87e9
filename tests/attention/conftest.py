"""One tiny model, and vLLM with and without the plugin on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.attention.models import open_engine, open_stock, save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stock(tiny: Path) -> Callable[..., Any]:
    """Opens an engine without the plugin's backend: what ours must equal."""

    return partial(open_stock, tiny, "CPU_ATTN")


@pytest.fixture(scope="module")
def sparse(tiny: Path) -> Any:
    """The plugin in force, through the per-head path even where it saves nothing."""
    return open_engine(tiny, sparse={"when": "always"})
