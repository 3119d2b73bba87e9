"""95 % intervals over problems: of a proportion, of a mean of values in [0, 1], of a paired difference, of any other statistic.

Problems are the independent draws; samples, shuffles and seeds of one problem are not, so they are averaged first. The first three
are in closed form (nothing is drawn), never of zero width, and hold the point estimate. How often they hold the truth:
``python -m ttc.costmodel.intervals_study``, whose table is in docs/costmodel.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ttc.errors import InputError

Z95 = 1.959963984540054
"""The standard normal's 97.5 % quantile."""

PSEUDO = Z95 * Z95
"""Pseudo-problems that a variance is taken with: half at either end of the scale (Agresti & Coull 1998)."""

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean over ``problems`` with its 95 % interval; ``problems`` is 0 where the source does not say."""

    mean: float
    low: float
    high: float
    problems: int = 0

    @property
    def interval(self) -> list[float] | None:
        """As it stands in JSON: [low, high], or None where there is none."""
        return None if math.isnan(self.low) else [self.low, self.high]


def proportion(right: int, count: int) -> Estimate:
    """Wilson's score interval of ``right`` in ``count`` (Wilson 1927); (0, 1) without observations, whose mean is NaN."""
    if not 0 <= right <= count:
        raise InputError(f"proportion: {right} right of {count}; give 0 to {count}")
    if count == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    mean = np.array(right / count)
    return _estimate(mean, *_score(mean, np.array(float(count))), count)


def mean(values: ArrayLike) -> Estimate:
    """The mean over problems of ``values`` (P,) in [0, 1]: Wilson's interval with the effective number of problems.

    That number is P · m(1 − m) / v (Korn & Graubard 1998). m and v are mean and variance of the values and z² pseudo-problems, half
    of them right and half wrong, so that v is never zero and a few agreeing problems don't pass for certainty. For values that are
    0 or 1 it is P, and the interval Wilson's own. Where problems hardly differ the interval is wider than it need be.
    """
    own = _checked(values, 0.0, "a mean over problems")
    return _estimate(own.mean(), *mean_bounds(own), own.size)


def paired(differences: ArrayLike) -> Estimate:
    """The mean over problems of ``differences`` (P,) in [-1, 1] of two arms on the same problems.

    The mean ± z times its standard error. The variance is taken with z² pseudo-problems that differ from the mean by r, as Bonett &
    Price (2012) add pairs that either arm wins; the centre stays where it is, so that a large gain is not drawn towards 0. r²
    is the mean square of the differences that are not 0 and of one more, of 1: a problem like those not seen yet may differ as
    much as those that did, and fully where none did. Differences that are all 0 thus give about ± 3.8 / P.
    """
    own = _checked(differences, -1.0, "a paired difference")
    return _estimate(own.mean(), *paired_bounds(own), own.size)


def resampled(
    statistic: Callable[[NDArray[np.int64]], float], problems: int, *, rounds: int, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap of ``statistic``, which gets the indices (P,) of resampled problems, for what is no mean (a slope, an
    AUC). Rounds that give NaN are left out; None if they are more than half."""
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, problems, problems)) for _ in range(rounds)])
    draws = draws[np.isfinite(draws)]
    if len(draws) <= rounds // 2:
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_bounds(values: Array) -> tuple[Array, Array]:
    """Both ends of ``mean``'s interval for values (…, P)."""
    count = values.shape[-1]
    centre = (values.sum(axis=-1) + PSEUDO / 2) / (count + PSEUDO)
    variance = (np.square(values).sum(axis=-1) + PSEUDO / 2) / (count + PSEUDO) - centre**2
    return _score(values.mean(axis=-1), count * centre * (1 - centre) / variance)


def paired_bounds(differences: Array) -> tuple[Array, Array]:
    """Both ends of ``paired``'s interval for differences (…, P)."""
    count, squares = differences.shape[-1], np.square(differences).sum(axis=-1)
    size = (squares + 1) / (np.count_nonzero(differences, axis=-1) + 1)
    centre = differences.mean(axis=-1)
    variance = (squares - count * centre**2 + PSEUDO * size) / (count + PSEUDO)
    half = Z95 * np.sqrt(variance / count)
    return np.maximum(centre - half, -1.0), np.minimum(centre + half, 1.0)


def _score(mean: Array, count: Array) -> tuple[Array, Array]:
    """Wilson's interval of a mean of ``count`` problems, a real number."""
    z2 = Z95 * Z95
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * np.sqrt(mean * (1 - mean) / count + z2 / (4 * count * count))
    low = np.where(mean <= 0, 0.0, np.maximum(centre - half, 0.0))
    return low, np.where(mean >= 1, 1.0, np.minimum(centre + half, 1.0))


def _estimate(mean: Any, low: Array, high: Array, problems: int) -> Estimate:
    return Estimate(float(mean), float(low), float(high), problems)


def _checked(values: ArrayLike, least: float, what: str) -> Array:
    own = np.asarray(values, dtype=np.float64)
    if own.ndim != 1 or own.size == 0:
        raise InputError(f"{what}: shape {own.shape}; give one value a problem, at least one")
    if not (own >= least - 1e-9).all() or not (own <= 1 + 1e-9).all():
        raise InputError(f"{what}: {own.min():g} to {own.max():g}; give values from {least:g} to 1")
    return np.clip(own, least, 1.0)
