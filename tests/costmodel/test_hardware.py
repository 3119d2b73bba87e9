"""Hardware profiles: the paper's 562.5 explained, every figure with a source."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ttc.costmodel import KINETICS_INTENSITY, Cost, Figures, Hardware, hardware_names
from ttc.errors import InputError


def test_the_papers_intensity_and_the_consistent_one() -> None:
    paper, card = Hardware.named("kinetics-b200"), Hardware.named("B200")
    assert paper.intensity() == KINETICS_INTENSITY == card.intensity("fp8") == 562.5
    assert card.intensity() == card.intensity("bf16") == 281.25


@pytest.mark.parametrize("name", hardware_names())
def test_every_profile_is_sourced_and_sane(name: str) -> None:
    hardware = Hardware.named(name)
    for figures in (hardware.datasheet, hardware.measured):
        assert figures is None or len(figures.source) > 10
    assert 0.5 < hardware.intensity() < 1000
    assert pickle.loads(pickle.dumps(hardware)) == hardware


def test_known_intensities() -> None:
    assert Hardware.named("h100").intensity() == pytest.approx(295, rel=0.01)
    assert Hardware.named("h200").intensity() == pytest.approx(206, rel=0.01)
    assert Hardware.named("a100").intensity() == pytest.approx(153, rel=0.01)


def test_roofline_is_the_larger_of_two_times() -> None:
    h = Hardware.named("h200")
    assert h.roofline_s(Cost(989.5e12, 0.0)) == 1.0
    assert h.roofline_s(Cost(0.0, 4.8e12)) == 1.0
    both = h.roofline_s(Cost(np.array([989.5e12, 0.0]), np.array([0.0, 9.6e12])))
    assert both.tolist() == [1.0, 2.0]


def test_bad_hardware_gets_one_line() -> None:
    with pytest.raises(InputError, match="h100"):
        Hardware.named("H10")
    with pytest.raises(InputError, match="known: bf16"):
        Hardware.named("a100").intensity("fp8")
    with pytest.raises(InputError, match="positive, finite"):
        Figures({"bf16": float("nan")}, 1.0, "nowhere")
    with pytest.raises(InputError, match="no figures"):
        Hardware("x", "bf16").intensity()
    with pytest.raises(InputError, match="usd-per-hour"):
        Hardware.named("h100").usd(1.0)
