"""A calibrated profile: what an engine's steps take on one machine, with the error that the calibration
itself measured.

Terms are physical and separable, so that another model of the same machine can be priced too, but only the calibrated one
with a known error:

  decode step  = kernel(batch) · L(batch) + k·KV bytes [+ select + batch·select' + q·summary bytes, where it is sparse]
  L(batch)     = fixed + w·weight bytes(batch) + batch·(sequence + f·FLOPs per token)
  prefill step = max(floor, fixed' + w'·weight bytes + f'·linear FLOPs + g·attention FLOPs)

All in seconds; every coefficient >= 0. ``kernel`` is what matrix kernels do as the batch grows (they have tiles and
paths for few rows): a factor at each measured batch, between which the product is linear in the batch; beyond the
last it goes on as between the last two. ``floor`` is the host's own time, behind which an accelerator hides short
prefills. The fit is in ``calibrate``; this file predicts, stores and checks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ttc.costmodel.costs import SparseMethod, full, sparse_rule, sparse_steps
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError

SCHEMA = 2
RANDOM = " (random weights)"  # ends the model's name where only its shape was measured


@dataclass(frozen=True, slots=True)
class Terms:
    """The coefficients, in seconds or seconds per unit."""

    step_fixed_s: float = 0.0
    weight_s_per_byte: float = 0.0
    sequence_s: float = 0.0
    decode_s_per_flop: float = 0.0
    kv_s_per_byte: float = 0.0
    search_s_per_byte: float = 0.0
    select_step_s: float = 0.0
    select_sequence_s: float = 0.0
    prefill_floor_s: float = 0.0
    prefill_fixed_s: float = 0.0
    prefill_s_per_weight_byte: float = 0.0
    prefill_s_per_flop: float = 0.0
    prefill_s_per_pair_flop: float = 0.0
    kernel: tuple[tuple[float, float], ...] = ()  # (batch, factor on the linear part), by batch

    def __post_init__(self) -> None:
        knots = tuple((float(b), float(factor)) for b, factor in self.kernel)
        object.__setattr__(self, "kernel", knots)
        grows = all(a[0] < b[0] for a, b in itertools.pairwise(knots))
        if not grows or not all(b > 0 and f > 0 and math.isfinite(b * f) for b, f in knots):
            raise InputError(
                "profile: kernel needs growing batches with positive, finite factors: calibrate again"
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "kernel":
                continue
            if not isinstance(value, (int, float)) or not (value >= 0 and math.isfinite(value)):
                raise InputError(
                    f"profile: {f.name} is {value}; it must be finite and not negative: calibrate again"
                )

    def selection_s(self, batch: float) -> float:
        """What choosing pages adds to a step of ``batch`` sequences beside the summaries' bytes."""
        return self.select_step_s + batch * self.select_sequence_s

    def shared_s(self, shape: ModelShape, batch: float) -> float:
        """What a decode step of ``batch`` sequences takes beside its KV: kernel(batch) · L(batch)."""

        def line(b: float) -> float:
            own = self.sequence_s + self.decode_s_per_flop * shape.token_flops
            return self.step_fixed_s + self.weight_s_per_byte * float(shape.step_weight_bytes(b)) + b * own

        if not self.kernel:
            return line(batch)
        first, factor = self.kernel[0]
        if batch <= first or len(self.kernel) == 1:
            return factor * line(batch)
        pairs = list(itertools.pairwise(self.kernel))
        (a, at_a), (b, at_b) = next((p for p in pairs if batch <= p[1][0]), pairs[-1])
        low, high = at_a * line(a), at_b * line(b)
        slope = (high - low) / (b - a)
        if batch > b:
            slope = max(0.0, slope)
        return high + slope * (batch - b)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Relative errors |predicted - measured| / measured: on the fitted points, on points held out inside the
    grid and on points beyond it (longer contexts, larger batches). NaN where no such point was measured."""

    fitted_mean: float
    inside_mean: float
    inside_worst: float
    beyond_mean: float
    beyond_worst: float

    def words(self) -> str:
        """What is printed beside every prediction."""
        inside = f"held out inside {self.inside_mean:.1%} mean, {self.inside_worst:.1%} worst"
        if math.isnan(self.beyond_mean):
            return inside
        return f"{inside}; beyond {self.beyond_mean:.1%} mean, {self.beyond_worst:.1%} worst"


@dataclass(frozen=True, slots=True)
class Profile:
    """Terms with where they come from. ``noise`` is the median spread of repeats, (p75 - p25) / median;
    ``statistic`` what stands for a point's repeats (median, or "quiet": the 10th percentile)."""

    model: str
    terms: Terms
    held_out: HeldOut
    noise: float
    kv_block: int | None = None
    kv_method: str | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    statistic: str = "median"
    measurements: tuple[Mapping[str, Any], ...] = ()

    def basis(self, model: str) -> str:
        """What is printed beside seconds that this profile gives ``model``: its error, or that none is known."""
        if model == self.model.removesuffix(RANDOM):
            return f"profile of {self.model}: {self.held_out.words()}"
        return f"profile of {self.model}, another model: how far off is not known (docs/costmodel.md)"

    def decode_s(
        self, shape: ModelShape, *, batch: float, context_tokens: float, kv_budget: float | None = None
    ) -> float:
        """One decode step of ``batch`` sequences, each over ``context_tokens``."""
        kv, search = decode_bytes(shape, context_tokens, kv_budget, self.kv_block, self.kv_method)
        t = self.terms
        moved = batch * (t.kv_s_per_byte * kv + t.search_s_per_byte * search)
        sparse = reads_a_part(context_tokens, kv_budget, self.kv_block, self.kv_method)
        return t.shared_s(shape, batch) + moved + sparse * t.selection_s(batch)

    def prefill_s(self, shape: ModelShape, *, tokens: Any, cached_tokens: Any = 0) -> Any:
        """One prefill step of ``tokens`` new tokens after ``cached_tokens``. Numbers or arrays."""
        t = self.terms
        linear, attention = prefill_flops(shape, tokens, cached_tokens)
        weights = t.prefill_s_per_weight_byte * shape.step_weight_bytes(tokens)
        flops = t.prefill_s_per_flop * linear + t.prefill_s_per_pair_flop * attention
        return t.prefill_floor_s + _positive(t.prefill_fixed_s + weights + flops - t.prefill_floor_s)

    def chain_s(
        self,
        shape: ModelShape,
        *,
        prompt_tokens: Any,
        generated_tokens: Any,
        samples: Any = 1,
        batch: float = 1.0,
        kv_budget: float | None = None,
        kv_block: int | None = None,
        method: str | SparseMethod | None = None,
        cached_prompt_tokens: Any = 0,
    ) -> Any:
        """This problem's share of the machine's seconds for N chains in steps of ``batch`` sequences; numbers
        or arrays.

        One prefill, then the chain's share of every decode step, 1/batch, and its own KV in full. ``kv_block`` and
        ``method`` default to those that were calibrated.
        """
        t = self.terms
        common: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "generated_tokens": generated_tokens,
            "samples": samples,
            "weight_reads": 0.0,
            "kv_budget": kv_budget,
            "kv_block": kv_block or self.kv_block,
            "method": method or self.kv_method,
        }
        prompt = full(shape, prompt_tokens=prompt_tokens, generated_tokens=0, weight_reads=0.0)
        whole = full(shape, **common).bytes
        read = whole
        if kv_budget is not None:
            read = full(replace(shape, key_elements_per_layer=0), **common).bytes
        forwards = samples * _positive(generated_tokens - 1)
        moved = t.kv_s_per_byte * (read - prompt.bytes) + t.search_s_per_byte * (whole - read)
        told = {
            name: common[name]
            for name in ("prompt_tokens", "generated_tokens", "kv_budget", "kv_block", "method")
        }
        chosen = samples * sparse_steps(**told) * t.selection_s(batch) / batch
        shared = forwards * t.shared_s(shape, batch) / batch
        start = self.prefill_s(
            shape, tokens=prompt_tokens - cached_prompt_tokens, cached_tokens=cached_prompt_tokens
        )
        return start + shared + moved + chosen

    def save(self, path: str | Path) -> None:
        """As JSON, NaN errors as null."""
        data = {"schema": SCHEMA, **asdict(self)}
        data["held_out"] = {k: None if math.isnan(v) else v for k, v in data["held_out"].items()}
        Path(path).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read and check; raises InputError for NaN, negative, missing or unknown fields."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(), parse_constant=_no_constant)
        except OSError as error:
            raise InputError(
                f"profile {path}: cannot be read ({error.strerror}); make one with ttc calibrate"
            ) from None
        except ValueError as error:
            raise InputError(f"profile {path}: {error}; calibrate again") from None
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise InputError(f"profile {path}: not a profile of schema {SCHEMA}; calibrate again")
        for name in ("held_out", "terms"):
            if not isinstance(data.get(name), dict):
                raise InputError(f"profile {path}: {name} is {data.get(name)!r}, no object; calibrate again")
        try:
            errors = {k: math.nan if v is None else float(v) for k, v in data.pop("held_out").items()}
            terms, noise = Terms(**data.pop("terms")), float(data.pop("noise"))
            rows = tuple(data.pop("measurements", ()))
            profile = cls(terms=terms, held_out=HeldOut(**errors), noise=noise, measurements=rows, **data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"profile {path}: {error}; calibrate again") from None
        if not (profile.noise >= 0 and math.isfinite(profile.noise)):
            raise InputError(f"profile {path}: noise is {profile.noise}; calibrate again")
        return profile


def reads_a_part(
    context_tokens: float, kv_budget: float | None, kv_block: int | None, method: str | SparseMethod | None
) -> bool:
    """Whether a decode step over this context is sparse."""
    step: dict[str, Any] = {"prompt_tokens": context_tokens - 1, "generated_tokens": 2}
    return bool(sparse_steps(**step, kv_budget=kv_budget, kv_block=kv_block, method=method))


def decode_bytes(
    shape: ModelShape,
    context_tokens: float,
    kv_budget: float | None,
    kv_block: int | None,
    method: str | SparseMethod | None,
) -> tuple[float, float]:
    """KV bytes that one sequence reads and writes in one decode step, and bytes of page summaries that it
    scores."""
    common: dict[str, Any] = {"prompt_tokens": context_tokens - 1, "start_tokens": 1, "generated_tokens": 1}
    common["weight_reads"] = 0.0
    if kv_budget is None:
        return float(full(shape, **common).bytes), 0.0
    rule = sparse_rule(kv_budget, kv_block, method)
    common |= {"kv_budget": kv_budget, "kv_block": kv_block}
    total = float(full(shape, **common, method=rule).bytes)
    if rule is None or not rule.summaries:
        return total, 0.0
    unsearched = replace(shape, key_elements_per_layer=0)
    read = float(full(unsearched, **common, method=rule).bytes)
    return read, total - read


def prefill_flops(shape: ModelShape, tokens: Any, cached_tokens: Any = 0) -> tuple[Any, Any]:
    """Linear and attention FLOPs of prefilling ``tokens`` after ``cached_tokens``. Numbers or arrays."""
    whole = full(
        shape, prompt_tokens=cached_tokens + tokens, cached_prompt_tokens=cached_tokens, generated_tokens=0
    )
    linear = tokens * (shape.token_flops - 2.0 * shape.head_params) + (tokens > 0) * 2.0 * shape.head_params
    return linear, whole.flops - linear


def _positive(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return max(value, 0)
    import numpy as np

    return np.maximum(value, 0)


def _no_constant(text: str) -> float:
    raise ValueError(f"holds {text}")
