"""Calibration: which steps to measure, and how measurements become a profile. Pure: the engine is behind
``Stepper``.

Step times of a shared machine are noisy upwards, so each point is a median of repeats; the fit minimises
relative errors with Huber weights and keeps every coefficient at 0 or above. Points are held out inside the
grid and beyond it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ttc.costmodel.profile import HeldOut, Profile, Terms, decode_bytes, prefill_flops, reads_a_part
from ttc.costmodel.records import Floats
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError

Phase = Literal["decode", "prefill"]
Role = Literal["fit", "inside", "beyond"]
Statistic = Literal["median", "quiet"]


class Stepper(Protocol):
    """What a running engine must offer: the seconds of single steps."""

    def measure(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> list[float]:
        """Seconds of repeated steps: decode with ``batch`` sequences of ``context`` tokens, or prefill of
        ``context`` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the design: what to measure, and whether it is fitted or held out."""

    phase: Phase
    batch: int
    context: int
    kv_budget: int | None = None
    role: Role = "fit"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A cell with its repeats in seconds."""

    cell: Cell
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or not all(s > 0 and math.isfinite(s) for s in self.seconds):
            raise InputError(f"calibration: {self.cell} has no valid step time; all must be positive")

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def typical(self, statistic: Statistic) -> float:
        """The median of the repeats, or ("quiet") their 10th percentile: what a step takes when nothing
        disturbs it."""
        return self.median if statistic == "median" else float(np.percentile(self.seconds, 10))

    @property
    def spread(self) -> float:
        """(p75 - p25) / median of the repeats."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / self.median


def design(
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    contexts: Sequence[int] = (128, 256, 512, 1024),
    kv_budgets: Sequence[int] = (),
    prefills: Sequence[int] = (32, 64, 128, 256, 512),
) -> list[Cell]:
    """The grid: the largest batch and the longest context are held out as beyond, every third of the rest as
    inside.

    Corners of the fitted box are never held out, so that inside means interpolation. Raises InputError for a
    grid too small.
    """
    batches, contexts, prefills = sorted(set(batches)), sorted(set(contexts)), sorted(set(prefills))
    for name, values, least in (
        ("batches", batches, 3),
        ("contexts", contexts, 3),
        ("prefills", prefills, 4),
    ):
        if len(values) < least:
            told = ",".join(map(str, values))
            raise InputError(
                f"{name}: {told} is too small a grid to fit and to hold out from; give at least {least} numbers"
            )
    cells = []
    for number, (batch, context) in enumerate(itertools.product(batches, contexts)):
        edge = batch == batches[-1] or context == contexts[-1]
        corner = batch in (batches[0], batches[-2]) and context in (contexts[0], contexts[-2])
        role: Role = "beyond" if edge else "inside" if number % 3 == 1 and not corner else "fit"
        cells.append(Cell("decode", batch, context, None, role))
        for budget in kv_budgets:
            if budget < context:
                cells.append(Cell("decode", batch, context, budget, role))
    for number, tokens in enumerate(prefills):
        role = "beyond" if tokens == prefills[-1] else "inside" if number % 3 == 1 else "fit"
        cells.append(Cell("prefill", 1, tokens, None, role))
    return cells


def measure(
    stepper: Stepper,
    cells: Sequence[Cell],
    progress: Callable[[str], None] = lambda _: None,
    *,
    rounds: int = 5,
    limit_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[Measurement]:
    """Every cell once in each of ``rounds`` rounds, in a new order each time: a machine that is slower for
    a while then touches all cells alike. Repeats of all rounds are pooled. After ``limit_s`` seconds no cell is
    visited again; the first visits are all made."""
    if rounds < 1 or not cells:
        raise InputError(f"calibration of {len(cells)} cells in {rounds} rounds measures nothing; give both")
    rng = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in cells]
    end = clock() + limit_s
    for turn in range(rounds):
        for done, k in enumerate(rng.permutation(len(cells)), 1):
            if turn and clock() >= end:
                break
            cell = cells[k]
            seconds[k] += stepper.measure(cell.batch, cell.context, cell.kv_budget, cell.phase)
            where = f"{cell.phase} batch {cell.batch} context {cell.context}"
            progress(f"round {turn + 1}/{rounds}, {done}/{len(cells)}: {where}: {seconds[k][-1]:.4g} s")
    return [Measurement(cell, tuple(times)) for cell, times in zip(cells, seconds, strict=True)]


def fit(
    shape: ModelShape,
    measurements: Sequence[Measurement],
    *,
    kv_block: int | None = None,
    kv_method: str | None = None,
    machine: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    statistic: Statistic = "median",
) -> Profile:
    """Measurements to a profile; raises InputError when there are too few to fit.

    ``statistic`` says what stands for a point: the median of its repeats, or "quiet", their 10th
    percentile, where other work shares the machine. Errors are against the same statistic of the points
    held out.

    What a step takes beside KV is fitted batch by batch, then drawn as a line over the batch (fixed part and
    weights, sequence overhead and FLOPs) with a factor at each batch, ``Terms.kernel``. With one dense model a
    step's fixed part and its weights are constants of the same column, and so are a sequence's overhead and its
    FLOPs: only the sums are identified. They are split by what the other phase shows (weights at the KV's bytes
    per second, a sequence's FLOPs at prefill's rate, each capped by the sum), and ``Profile.split`` says so.
    """
    decode = [m for m in measurements if m.cell.phase == "decode"]
    prefill = [m for m in measurements if m.cell.phase == "prefill"]
    if sum(m.cell.role == "fit" for m in decode) < 4 or sum(m.cell.role == "fit" for m in prefill) < 2:
        raise InputError("calibration: too few points to fit; measure at least 4 decode and 2 prefill points")
    batches = sorted({m.cell.batch for m in decode if m.cell.role == "fit"})
    rows = _decode_rows(shape, decode, batches, kv_block, kv_method)
    *bases, kv_rate, search_rate, select, select_each = _fitted(rows, decode, statistic, free=len(batches))
    step, sequence = _solve(np.array([[1.0, b] for b in batches]), np.array(bases))
    kernel = tuple((float(b), base / (step + b * sequence)) for b, base in zip(batches, bases, strict=True))
    floor, start, linear_rate, pair_rate = _fitted_prefill(shape, prefill, statistic)
    weights = float(shape.step_weight_bytes(1.0))
    weight_rate = min(step, weights * kv_rate) / weights
    streamed = min(start, weights * weight_rate)  # an accelerator hides weights behind a prefill's FLOPs
    flop_rate = min(sequence, shape.token_flops * linear_rate) / shape.token_flops
    terms = Terms(
        step_fixed_s=max(
            0.0, step - weights * weight_rate
        ),  # rounding may take a difference of equals below 0
        weight_s_per_byte=weight_rate,
        sequence_s=max(0.0, sequence - shape.token_flops * flop_rate),
        decode_s_per_flop=flop_rate,
        kv_s_per_byte=kv_rate,
        search_s_per_byte=search_rate or kv_rate,  # not measured: bytes like others
        select_step_s=select,
        select_sequence_s=select_each,
        prefill_floor_s=floor,
        prefill_fixed_s=start - streamed,
        prefill_s_per_weight_byte=streamed / weights,
        prefill_s_per_flop=linear_rate,
        prefill_s_per_pair_flop=pair_rate,
        kernel=kernel,
    )
    blank = HeldOut(math.nan, math.nan, math.nan, math.nan, math.nan)
    draft = Profile(shape.name, terms, blank, 0.0, kv_block, kv_method)
    table = tuple(_row(shape, draft, m, statistic) for m in measurements)
    return Profile(
        model=shape.name,
        terms=terms,
        held_out=_errors(table),
        noise=float(np.median([m.spread for m in measurements])),
        kv_block=kv_block,
        kv_method=kv_method,
        machine=dict(machine or {}),
        versions=dict(versions or {}),
        statistic=statistic,
        split="fixed/weights and sequence/FLOPs are identified as sums; split at the KV and prefill rates",
        measurements=table,
    )


def predict(shape: ModelShape, profile: Profile, cell: Cell) -> float:
    """Seconds that the profile gives a cell."""
    if cell.phase == "prefill":
        return float(profile.prefill_s(shape, tokens=cell.context))
    return profile.decode_s(shape, batch=cell.batch, context_tokens=cell.context, kv_budget=cell.kv_budget)


def _decode_rows(
    shape: ModelShape,
    points: Sequence[Measurement],
    batches: Sequence[int],
    kv_block: int | None,
    method: str | None,
) -> Floats:
    """A column for each fitted batch (what its steps take beside KV), KV bytes, summary bytes, and for sparse steps
    1 and the batch."""
    rows = []
    for m in points:
        kv, search = decode_bytes(shape, m.cell.context, m.cell.kv_budget, kv_block, method)
        own = [float(m.cell.batch == b) for b in batches]
        sparse = float(reads_a_part(m.cell.context, m.cell.kv_budget, kv_block, method))
        moved = (m.cell.batch * kv, m.cell.batch * search)
        rows.append([*own, *moved, sparse, sparse * m.cell.batch])
    return np.array(rows)


def _fitted_prefill(
    shape: ModelShape, points: Sequence[Measurement], statistic: Statistic
) -> tuple[float, float, float, float]:
    """Floor, start, seconds a linear FLOP and a FLOP of attention: max(floor, start + FLOPs · rates).

    Where the host is what an accelerator waits for, prefills up to some length take the same time. A floor is taken
    where the shortest points, two or more, differ by less than a tenth, three or more are left to tell the rates, and
    taking it at least halves the mean error.
    """
    use = sorted((m for m in points if m.cell.role == "fit"), key=lambda m: m.cell.context)
    columns = np.array([[1.0, *prefill_flops(shape, m.cell.context)] for m in use])
    times = np.array([m.typical(statistic) for m in use])
    flat = next((i for i in range(len(use)) if times[: i + 1].max() > 1.1 * times[: i + 1].min()), len(use))
    tried = []
    for skip in (0, flat) if flat >= 2 and len(use) - flat >= 3 else (0,):
        line = _solve(columns[skip:], times[skip:])
        floor = float(np.median(times[:skip])) if skip else 0.0
        error = float(np.abs(np.maximum(floor, columns @ np.array(line)) / times - 1.0).mean())
        tried.append((error, (floor, *line)))
    plain, last = tried[0], tried[-1]
    floor, start, linear, pair = last[1] if last[0] < plain[0] / 2 else plain[1]
    return floor, start, linear, pair


def _fitted(
    columns: Floats, points: Sequence[Measurement], statistic: Statistic, free: int = 0
) -> list[float]:
    use = np.array([m.cell.role == "fit" for m in points])
    return _solve(columns[use], np.array([m.typical(statistic) for m in points])[use], free)


def _solve(columns: Floats, target: Floats, free: int = 0) -> list[float]:
    """Non-negative coefficients that minimise relative errors, Huber-weighted."""
    scaled = columns / target[:, None]
    weight = np.ones(target.size)
    best = np.zeros(columns.shape[1])
    for _ in range(12):
        best = _nonnegative(scaled * weight[:, None], weight, free)
        residual = np.abs(scaled @ best - 1.0)
        cut = 1.5 * max(float(np.median(residual)), 1e-9)
        weight = np.sqrt(np.minimum(1.0, cut / np.maximum(residual, 1e-12)))
    return [float(b) for b in best]


def _nonnegative(matrix: Floats, target: Floats, free: int) -> Floats:
    """Non-negative least squares, exactly, by trying every set of active columns; the first ``free`` ones are always
    active (there are at most four others)."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), math.inf
    live = [c for c in range(free, columns) if np.any(matrix[:, c])]
    norms = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    for size in range(0 if free else 1, len(live) + 1):
        for others in itertools.combinations(live, size):
            active = [*range(free), *others]
            solution, *_ = np.linalg.lstsq(matrix[:, active] / norms[active], target, rcond=None)
            if np.any(solution < 0):
                continue
            loss = float(((matrix[:, active] / norms[active] @ solution - target) ** 2).sum())
            if loss < least - 1e-15:
                least, best = loss, np.zeros(columns)
                best[active] = solution / norms[active]
    return best


def _row(shape: ModelShape, profile: Profile, m: Measurement, statistic: Statistic) -> dict[str, Any]:
    predicted = predict(shape, profile, m.cell)
    row: dict[str, Any] = asdict(m.cell)
    seconds = m.typical(statistic)
    row |= {
        "seconds": seconds,
        "spread": m.spread,
        "predicted": predicted,
        "error": predicted / seconds - 1.0,
    }
    return row | {"repeats": [round(s, 7) for s in m.seconds]}


def _errors(rows: Sequence[Mapping[str, Any]]) -> HeldOut:
    def of(role: Role) -> list[float]:
        return [abs(r["error"]) for r in rows if r["role"] == role]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    inside, beyond = of("inside"), of("beyond")
    worst_inside, worst_beyond = max(inside, default=math.nan), max(beyond, default=math.nan)
    return HeldOut(mean(of("fit")), mean(inside), worst_inside, mean(beyond), worst_beyond)
