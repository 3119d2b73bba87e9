"""From which context on it pays to read a part of the KV cache: what choosing costs, in KV tokens that could be read instead.

By bytes that is arithmetic: a page vector is half a token (a key without its value). By time it is measured, once for each machine
and model shape, on the real layers (``ttc.attention.backend.measure``), and kept in the user's cache, so that later runs on the
machine decide alike. On CPU a row decides by its own context; on GPU rows share the fixed part (``Planner.pooled``). Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttc.attention.settings import KvSetting

VECTORS = {"block-topk": 1, "quest": 2}
"""Vectors that a method scores for each page; the others score none. Also the selectors' rules."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What choosing pages costs a row in one layer and KV head, in KV tokens: ``vector`` for each page vector scored, ``fixed``
    whatever the context."""

    vector: float
    fixed: float = 0.0

    def dense(self, setting: KvSetting, pages: int, page: int) -> bool:
        """Whether a row of ``pages`` pages (of ``page`` tokens) reads no more by reading all of them."""
        kept = max(1, setting.budget // page) * page
        return pages * page <= kept + self._choosing(setting, pages)

    def dense_below(self, setting: KvSetting, page: int) -> float:
        """The context, in tokens, up to which a row reads everything (infinity: at any)."""
        each = page - self._vectors(setting) * self.vector
        if self.fixed == -math.inf:
            return 0
        if each <= 0 or self.fixed == math.inf:
            return math.inf
        kept = max(1, setting.budget // page) * page
        return max(0, math.floor((kept + self.fixed) / each)) * page

    def _vectors(self, setting: KvSetting) -> int:
        return VECTORS.get(setting.method, 0)

    def _choosing(self, setting: KvSetting, pages: int) -> float:
        return self.fixed + pages * self._vectors(setting) * self.vector


BY_BYTES = Overhead(0.5)
NONE = Overhead(0.0, -math.inf)
"""Choosing is free, even where it drops nothing: every row is read through the chosen tables."""


def by_time(measured: Overhead) -> Overhead:
    """The measured overhead, but never less than the bytes: what is slower or dearer stays dense."""
    return Overhead(max(measured.vector, BY_BYTES.vector), max(measured.fixed, 0.0))


def cache_folder() -> Path:
    """Where things made for this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttc"


def stored_path(facts: Mapping[str, Any]) -> Path:
    """The file of the measurement that these facts (machine, versions, model shape) name."""
    told = json.dumps(dict(facts), sort_keys=True)
    return cache_folder() / f"overhead-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"


def stored(path: Path) -> Overhead | None:
    """An earlier measurement; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text())["overhead"]
        return Overhead(float(found["vector"]), float(found["fixed"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(path: Path, overhead: Overhead, facts: Mapping[str, Any]) -> None:
    """Keep a measurement, with the facts it holds for. A cache that can't be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"overhead": asdict(overhead), "facts": dict(facts)}, indent=1) + "\n")
        fresh.replace(path)
    except OSError:
        return
