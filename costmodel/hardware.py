"""Hardware: what a second buys. Datasheet figures and measured figures apart, each with its source.

Intensity (FLOP/byte) = peak FLOP/s of a precision over bytes/s of memory. The paper's 562.5 is a B200's
dense FP8 peak over its bandwidth, 4.5e15 / 8e12, while its KV elements take 2 bytes; at one consistent
precision, BF16, the same card has 2.25e15 / 8e12 = 281.25, and FP8 with a 1-byte cache keeps 562.5 but
halves the bytes.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel.costs import Cost

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Figures:
    """Peak FLOP/s by precision and memory bytes/s, from one source."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        for name, value in (*self.flops_per_s.items(), ("bytes_per_s", self.bytes_per_s)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"hardware figure {name} is {value}; it must be a positive, finite number")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self.flops_per_s), self.bytes_per_s, self.source)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. ``datasheet`` is what its maker states (dense, no sparsity), ``measured`` what someone
    saw."""

    name: str
    dtype: str  # the precision that ``intensity()`` means unless told otherwise
    memory_bytes: float | None = None
    datasheet: Figures | None = None
    measured: Figures | None = None
    usd_per_hour: float | None = None
    note: str = field(default="", compare=False)

    def figures(self, measured: bool = False) -> Figures:
        """The datasheet's figures, or the measured ones; whichever exists where the wanted ones do not."""
        found = (self.measured or self.datasheet) if measured else (self.datasheet or self.measured)
        if found is None:
            raise InputError(f"hardware {self.name} has no figures; give flops_per_s and bytes_per_s")
        return found

    def intensity(self, dtype: str | None = None, *, measured: bool = False) -> float:
        """Peak FLOP/s of ``dtype`` over memory bytes/s (FLOP/byte)."""
        figures = self.figures(measured)
        return self.flops_per_s(dtype, measured=measured) / figures.bytes_per_s

    def flops_per_s(self, dtype: str | None = None, *, measured: bool = False) -> float:
        """Peak FLOP/s of a precision; raises InputError with the precisions that exist."""
        figures = self.figures(measured)
        try:
            return figures.flops_per_s[dtype or self.dtype]
        except KeyError:
            known = ", ".join(figures.flops_per_s)
            raise InputError(f"hardware {self.name} has no {dtype} figure; known: {known}") from None

    def roofline_s(self, cost: Cost, dtype: str | None = None, *, measured: bool = False) -> Any:
        """Seconds that the cost takes at least: max(FLOPs/peak, bytes/bandwidth). A bound, not a
        prediction."""
        compute = cost.flops / self.flops_per_s(dtype, measured=measured)
        memory = cost.bytes / self.figures(measured).bytes_per_s
        if isinstance(compute, (int, float)) and isinstance(memory, (int, float)):
            return max(compute, memory)
        import numpy as np

        return np.maximum(compute, memory)

    def usd(self, seconds: Any) -> Any:
        """Dollars for device seconds; raises InputError where the profile has no price."""
        if self.usd_per_hour is None:
            raise InputError(f"hardware {self.name} has no price; give --usd-per-hour")
        return seconds * (self.usd_per_hour / 3600.0)

    @classmethod
    def named(cls, name: str) -> Hardware:
        """A profile of the registry, in any case (H100, H200, B200, A100, …)."""
        table = _registry()
        key = name.lower().replace("_", "-").replace(" ", "-")
        if key in table:
            return table[key]
        close = difflib.get_close_matches(key, table, n=3, cutoff=0.4)
        raise InputError(
            f"hardware {name!r} is not known; {'nearest' if close else 'known'}: {', '.join(close or table)}"
        )


def hardware_names() -> list[str]:
    """The registry's names."""
    return list(_registry())


@cache
def _registry() -> dict[str, Hardware]:
    entries = json.loads((DATA / "hardware.json").read_text())["hardware"]
    return {e["name"]: _read(e) for e in entries}


def _read(entry: Mapping[str, Any]) -> Hardware:
    def figures(key: str) -> Figures | None:
        return Figures(**entry[key]) if key in entry else None

    return Hardware(
        name=entry["name"],
        dtype=entry["dtype"],
        memory_bytes=entry.get("memory_bytes"),
        datasheet=figures("datasheet"),
        measured=figures("measured"),
        note=entry.get("note", ""),
    )
