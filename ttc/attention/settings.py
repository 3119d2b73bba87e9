"""What a request asks of sparse decoding, and how the engine is set up for it. Imports neither torch nor vLLM."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ttc.costmodel.costs import RENAMED
from ttc.errors import InputError

METHODS = ("block-topk", "quest", "streaming", "power", "oracle-topk")
DEFAULT_METHOD = "block-topk"
EXTRA_ARGS_KEY = "ttc_kv"
CONFIG_KEY = "ttc_sparse"
ENVIRONMENT = "TTC_SPARSE"
WHEN = ("faster", "cheaper", "always")


@dataclass(frozen=True, slots=True)
class KvSetting:
    """How many KV tokens a decoded token may read in each layer and KV head, and which method picks them.

    Raises InputError for an unknown method and a budget that is no positive whole number.
    """

    budget: int
    method: str = DEFAULT_METHOD

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise InputError(f"kv-budget: {self.budget!r}; give a whole number of tokens, one page or more")
        if self.method in RENAMED:
            name = RENAMED[self.method]
            known = name if name in METHODS else f"{name}, in the cost model only"
            raise InputError(f"kv-method: {self.method!r} is called {known}; use one of {', '.join(METHODS)}")
        if self.method not in METHODS:
            raise InputError(f"kv-method: {self.method!r} is not known; use one of {', '.join(METHODS)}")

    @classmethod
    def asked(cls, budget: int | None, method: str | None) -> KvSetting | None:
        """The setting that a budget and a method name, each perhaps None; None is dense."""
        if budget is None:
            if method not in (None, "dense"):
                raise InputError(f"kv-method: {method!r} needs a budget; add --kv-budget TOKENS")
            return None
        return None if method == "dense" else cls(budget, method or DEFAULT_METHOD)

    def check_page(self, page: int) -> None:
        """Raise InputError if the budget is under one page of ``page`` tokens."""
        if self.budget < page:
            raise InputError(
                f"kv-budget: {self.budget} tokens is under one page of {page}; give {page} or more, or a smaller block size"
            )

    @property
    def salt(self) -> str:
        """For the prefix cache: KV computed under sparse decoding must never be found by a request with another setting."""
        return f"ttc-kv:{self.method}:{self.budget}"

    def extra_args(self, key: int | None = None) -> dict[str, Any]:
        """What travels in ``SamplingParams.extra_args``; ``key`` names the counter of the tokens read."""
        told: dict[str, Any] = {"budget": self.budget, "method": self.method}
        return {EXTRA_ARGS_KEY: told if key is None else told | {"key": key}}


def read_setting(extra_args: Mapping[str, Any] | None) -> tuple[KvSetting, int | None] | None:
    """The setting (and counter key) in a request's ``extra_args``; None if it has none. Accepts a JSON string, as a server's
    ``vllm_xargs`` needs. Raises InputError (a ValueError)."""
    given = (extra_args or {}).get(EXTRA_ARGS_KEY)
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise InputError(f"{EXTRA_ARGS_KEY}: not JSON ({error.msg})") from None
    if not isinstance(given, Mapping):
        raise InputError(f"{EXTRA_ARGS_KEY}: {given!r} is no mapping; give budget and method")
    unknown = set(given) - {"budget", "method", "key"}
    if unknown or "budget" not in given:
        raise InputError(f"{EXTRA_ARGS_KEY}: takes budget, method and key, not {sorted(given)}")
    return KvSetting(given["budget"], given.get("method", DEFAULT_METHOD)), given.get("key")


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """The engine's own settings, from ``additional_config["ttc_sparse"]`` or the JSON in TTC_SPARSE.

    ``dense_layers``: the first layers that stay dense. ``share_layers`` n: layers choose in groups of n neighbours, the first
    for all. ``share_steps`` m: a choice lasts at most m steps. ``budgets``: a calibration file (``ttc.attention.budgets``)
    with a factor on the budget for each layer and KV head. ``when`` a row reads a part only: "faster" (where choosing pages takes
    less time than it saves, by a measurement of this machine, and reads fewer bytes), "cheaper" (fewer bytes, whatever the time)
    or "always" (also where nothing is saved: tests). ``overhead`` [vector, fixed] replaces the measurement (``worth.Overhead``).
    ``selector``: "auto" (compiled, else torch), "compiled" or "torch". Raises InputError by field.
    """

    dense_layers: int = 0
    share_layers: int = 1
    share_steps: int = 1
    budgets: str | None = None
    when: str = "faster"
    overhead: tuple[float, float] | None = None
    selector: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("dense_layers", 0), ("share_layers", 1), ("share_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{CONFIG_KEY}: {name} is {value!r}; give a whole number of {least} or more")
        check_when(self.when, f"{CONFIG_KEY}: when is")
        if self.overhead is not None:
            try:
                object.__setattr__(self, "overhead", tuple(float(number) for number in self.overhead))
            except (TypeError, ValueError):
                object.__setattr__(self, "overhead", ())
            if len(self.overhead) != 2 or not all(n >= 0 for n in self.overhead):
                raise InputError(
                    f"{CONFIG_KEY}: overhead takes two numbers of 0 or more: KV tokens a page vector, and a layer"
                )
        if self.selector not in ("auto", "compiled", "torch"):
            raise InputError(f"{CONFIG_KEY}: selector is {self.selector!r}; use auto, compiled or torch")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> SparseOptions:
        told = json.loads(os.environ.get(ENVIRONMENT) or "{}") | dict(given or {})
        known = {field.name for field in fields(cls)}
        if set(told) - known:
            raise InputError(f"{CONFIG_KEY}: {sorted(set(told) - known)} not known; takes {sorted(known)}")
        return cls(**told)

    def factors(self, layers: int, heads: int) -> list[tuple[float, ...] | None]:
        """For each layer the factor on the budget of each KV head; None is a dense layer."""
        rows: list[tuple[float, ...] | None] = [(1.0,) * heads] * layers
        if self.budgets is not None:
            rows = read_factors(Path(self.budgets), layers, heads)
        return [None if i < self.dense_layers else row for i, row in enumerate(rows)]


def check_when(when: str, field: str = "kv-when:") -> str:
    """``when`` if it is one of WHEN. Raises InputError that names ``field``."""
    if when not in WHEN:
        raise InputError(f"{field} {when!r}; use {', '.join(WHEN)}")
    return when


def read_factors(path: Path, layers: int, heads: int) -> list[tuple[float, ...] | None]:
    """``{"factors": [[…per KV head…] | null, …per layer…]}``. Raises InputError for a file of another model."""
    try:
        rows = json.loads(path.read_text())["factors"]
        made = [None if row is None else tuple(float(f) for f in row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"budgets: {path} is no calibration of KV budgets ({error})") from None
    if len(made) != layers or any(row is not None and len(row) != heads for row in made):
        raise InputError(
            f"budgets: {path} is not for {layers} layers of {heads} KV heads; calibrate this model"
        )
    if any(not (f > 0 and math.isfinite(f)) for row in made if row is not None for f in row):
        raise InputError(f"budgets: {path} has a factor that is not positive")
    given = [f for row in made if row is not None for f in row]
    if sum(given) > len(given) * (1 + 1e-6):
        raise InputError(
            f"budgets: the factors of {path} have a mean over 1, which would exceed every budget"
        )
    return made
