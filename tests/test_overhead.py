"""The interval of ``ttc bench overhead``: paired by rounds, at the confidence that so many rounds allow."""

import pytest

from ttc.bench.overhead import paired


def test_rounds_are_paired_before_anything_is_averaged() -> None:
    ratio = paired([90.0, 45.0, 180.0], [100.0, 50.0, 200.0])  # the machine's own speed drops out
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.9, 0.9, 0.9))
    assert ratio.best == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("rounds", "low", "high", "confidence"),
    [(1, 1, 1, 0.0), (2, 1, 2, 0.5), (6, 1, 6, 0.96875), (9, 2, 8, 0.9609375)],
)
def test_the_sign_interval(rounds: int, low: float, high: float, confidence: float) -> None:
    """Binomial: the median of all lies outside the k-th smallest and largest of n with 2 P(Bin(n, 1/2) < k)."""
    ratio = paired([float(i + 1) for i in range(rounds)], [1.0] * rounds)
    assert (ratio.low, ratio.high) == (low, high)
    assert ratio.confidence == pytest.approx(confidence)
