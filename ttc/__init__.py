"""ttc: test-time compute under a hard budget.

``solve`` one problem, ``run`` many, ``open_engine`` for an engine of your own. ``import ttc`` loads no torch, vLLM, ray or
transformers; engines load what they need when they are opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttc import costmodel, errors, nano, policies, problems, samplers, types
    from ttc.api import Run, Settings, arun, asolve, open_engine, run, solve
    from ttc.budget import Budget
    from ttc.errors import BudgetTooSmall, EngineError, InputError, TTCError, VerifierError
    from ttc.types import Problem, Result

__version__ = "0.1.0"

_HOMES = {
    "Budget": "ttc.budget", "BudgetTooSmall": "ttc.errors", "EngineError": "ttc.errors", "InputError": "ttc.errors",
    "Problem": "ttc.types", "Result": "ttc.types", "Run": "ttc.api", "Settings": "ttc.api", "TTCError": "ttc.errors",
    "VerifierError": "ttc.errors", "arun": "ttc.api", "asolve": "ttc.api", "open_engine": "ttc.api", "run": "ttc.api",
    "solve": "ttc.api",
}  # fmt: skip
_ROOMS = ("costmodel", "errors", "nano", "policies", "problems", "samplers", "types")


def __getattr__(name: str) -> Any:
    """Names are imported at their first use, so that ``ttc --help`` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"ttc.{name}")
    raise AttributeError(f"module 'ttc' has no attribute {name!r}")


__all__ = [
    "Budget", "BudgetTooSmall", "EngineError", "InputError", "Problem", "Result", "Run", "Settings", "TTCError",
    "VerifierError", "__version__", "arun", "asolve", "costmodel", "errors", "nano", "open_engine", "policies", "problems",
    "run", "samplers", "solve", "types",
]  # fmt: skip
