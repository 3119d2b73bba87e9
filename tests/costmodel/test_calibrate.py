"""The calibration fit: synthetic engines give back their own terms; noise is measured, held-out points are
honest."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttc.costmodel import ModelShape
from ttc.costmodel.calibrate import Cell, Measurement, Phase, design, fit, measure, predict
from ttc.costmodel.profile import Profile, Terms, decode_bytes, prefill_flops
from ttc.errors import InputError

SHAPE = ModelShape.named("Qwen3-0.6B")
PROFILES = Path(__file__).resolve().parents[2] / "costmodel" / "profiles"


class Synthetic:
    """A machine that obeys the model, with multiplicative noise and, now and then, a hiccup."""

    def __init__(self, noise: float = 0.0, hiccup: float = 0.0) -> None:
        self.noise, self.hiccup, self.random = noise, hiccup, random.Random(0)

    def true(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> float:
        if phase == "prefill":
            linear, attention = prefill_flops(SHAPE, context)
            return float(0.1 + linear / 2e11 + attention / 1e11)
        kv, search = decode_bytes(SHAPE, context, kv_budget, 32, "block-topk")
        chosen = 0.0 if kv_budget is None else 0.02 + batch * 0.001
        return 0.1 + batch * (0.004 + kv / 6e9 + search / 3e9) + chosen

    def measure(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> list[float]:
        out = []
        for _ in range(7):
            slow = 3.0 if self.random.random() < self.hiccup else 1.0
            out.append(
                self.true(batch, context, kv_budget, phase) * slow * (1 + self.noise * self.random.random())
            )
        return out


def _calibrated(machine: Synthetic) -> Profile:
    cells = design(kv_budgets=(64, 256))
    return fit(SHAPE, measure(machine, cells, rounds=3), kv_block=32, kv_method="block-topk")


def test_a_quiet_machine_is_recovered_exactly() -> None:
    profile = _calibrated(Synthetic())
    assert profile.held_out.inside_worst < 1e-6
    assert profile.held_out.beyond_worst < 1e-6
    assert profile.terms.kv_s_per_byte == pytest.approx(1 / 6e9)
    assert profile.terms.search_s_per_byte == pytest.approx(1 / 3e9)
    assert profile.terms.select_step_s == pytest.approx(0.02)
    assert profile.terms.select_sequence_s == pytest.approx(0.001)
    assert profile.terms.prefill_s_per_flop == pytest.approx(1 / 2e11)
    assert profile.noise == 0


def test_a_noisy_machine_is_fitted_within_the_goal_and_says_so() -> None:
    profile = _calibrated(Synthetic(noise=0.05, hiccup=0.1))
    assert profile.held_out.inside_mean < 0.05
    assert profile.held_out.inside_worst < 0.15
    assert 0.01 < profile.noise < 0.2


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.1, 1e-3, 7e-5])
def test_a_machine_without_overheads_is_no_error(scale: float) -> None:
    """A fixed cost that the weights explain to the last bit must not round to below zero."""

    class Pure(Synthetic):
        def true(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> float:
            weights = float(SHAPE.step_weight_bytes(1)) / 6e9
            if phase == "prefill":
                return scale * (weights + float(sum(prefill_flops(SHAPE, context))) / 2e11)
            kv, _ = decode_bytes(SHAPE, context, kv_budget, 32, "block-topk")
            return scale * (weights + batch * (SHAPE.token_flops / 2e11 + kv / 6e9))

    terms = fit(SHAPE, measure(Pure(), design(), rounds=1)).terms
    assert terms.step_fixed_s == pytest.approx(0.0, abs=1e-6 * scale)
    assert terms.sequence_s == pytest.approx(0.0, abs=1e-6 * scale)


def test_the_design_holds_out_inside_and_beyond() -> None:
    cells = design(batches=(1, 2, 4, 8), contexts=(64, 128, 256), kv_budgets=(100,))
    roles = {role: [c for c in cells if c.role == role] for role in ("fit", "inside", "beyond")}
    assert all(roles.values())
    decode = [c for c in roles["inside"] if c.phase == "decode"]
    assert all(c.batch < 8 and c.context < 256 for c in decode)
    assert all(c.kv_budget is None or c.kv_budget < c.context for c in cells)
    with pytest.raises(InputError, match="too small a grid"):
        design(batches=(1, 2))


def test_a_time_limit_ends_repeats_but_not_first_visits() -> None:
    class Clocked(Synthetic):
        now = 0.0

        def measure(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> list[float]:
            self.now += 1.0
            return super().measure(batch, context, kv_budget, phase)

    cells, machine = design(), Clocked()
    rows = measure(machine, cells, rounds=9, limit_s=len(cells) + 5.0, clock=lambda: machine.now)
    assert machine.now == len(cells) + 5
    assert sorted({len(m.seconds) for m in rows}) == [7, 14]
    machine = Clocked()
    measure(machine, cells, rounds=9, limit_s=1.0, clock=lambda: machine.now)
    assert machine.now == len(cells)


def test_a_kernel_that_is_no_line_in_the_batch_is_followed() -> None:
    """Batch 2 slower than batch 4, as a matrix kernel of few rows may be."""

    class Jagged(Synthetic):
        def true(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> float:
            return super().true(batch, context, kv_budget, phase) + (0.03 if batch == 2 else 0.0)

    profile = _calibrated(Jagged())
    assert profile.held_out.inside_worst < 1e-6
    step = [profile.decode_s(SHAPE, batch=b, context_tokens=200) for b in (1, 2, 4)]
    assert step[1] > step[2] > step[0]
    half = profile.decode_s(SHAPE, batch=3, context_tokens=200)
    assert half == pytest.approx((step[1] + step[2]) / 2)
    for bad in (((2.0, 1.0), (1.0, 1.0)), ((1.0, math.nan),), ((1.0, 0.0),)):
        with pytest.raises(InputError, match="kernel needs"):
            Terms(kernel=bad)


def test_a_host_that_an_accelerator_waits_for_is_a_floor_of_prefill() -> None:
    class Hosted(Synthetic):
        def true(self, batch: int, context: int, kv_budget: int | None, phase: Phase) -> float:
            if phase == "prefill":
                return max(0.3, super().true(batch, context, kv_budget, phase))
            return super().true(batch, context, kv_budget, phase)

    cells = design(prefills=(4, 8, 16, 32, 64, 128, 256, 512, 768, 1024))
    profile = fit(SHAPE, measure(Hosted(), cells, rounds=1))
    assert profile.terms.prefill_floor_s == pytest.approx(0.3)
    assert profile.held_out.inside_worst < 1e-6
    assert profile.held_out.beyond_worst < 1e-6
    assert profile.prefill_s(SHAPE, tokens=1) == pytest.approx(0.3)
    assert fit(SHAPE, measure(Synthetic(), cells, rounds=1)).terms.prefill_floor_s == 0


def test_profiles_survive_storage(tmp_path: Path) -> None:
    profile = _calibrated(Synthetic())
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert again.terms == profile.terms
    assert again.held_out == profile.held_out
    assert "held out inside" in again.basis(SHAPE.name)
    assert "another model: how far off is not known" in again.basis("Qwen3-8B")
    for cell in (Cell("decode", 3, 300, 100), Cell("prefill", 1, 77)):
        assert predict(SHAPE, again, cell) == predict(SHAPE, profile, cell)


def test_a_chain_is_the_sum_of_its_steps() -> None:
    profile = _calibrated(Synthetic())
    prompt, length, batch = 50, 30, 4
    steps = sum(
        profile.decode_s(SHAPE, batch=batch, context_tokens=prompt + t) / batch for t in range(1, length)
    )
    whole = profile.chain_s(SHAPE, prompt_tokens=prompt, generated_tokens=length, batch=batch)
    prefill = profile.chain_s(SHAPE, prompt_tokens=prompt, generated_tokens=0, batch=batch)
    assert whole - prefill == pytest.approx(steps, rel=1e-9)
    two = profile.chain_s(SHAPE, prompt_tokens=np.array([0, prompt]), generated_tokens=length, batch=batch)
    assert two[1] == pytest.approx(whole)
    assert two[0] < whole
    sparse: dict[str, Any] = {"kv_budget": 64, "batch": batch}
    steps = sum(
        profile.decode_s(SHAPE, context_tokens=prompt + t, **sparse) / batch for t in range(1, length)
    )
    whole_sparse = profile.chain_s(SHAPE, prompt_tokens=prompt, generated_tokens=length, **sparse)
    assert whole_sparse - prefill == pytest.approx(steps, rel=1e-9)
    many = profile.chain_s(SHAPE, prompt_tokens=prompt, generated_tokens=np.array([1, length]), batch=batch)
    assert many[1] == pytest.approx(whole)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"terms": {"step_fixed_s": math.nan}}, "holds NaN"),
        ({"terms": {"step_fixed_s": -1.0}}, "not negative"),
        ({"terms": {"unheard_of": 1.0}}, "unheard_of"),
        ({"terms": {"kernel": [["one", 1.0]]}}, "could not convert"),
        ({"terms": {"kernel": [[2.0, 1.0], [1.0, 1.0]]}}, "kernel needs growing batches"),
        ({"held_out": None}, "held_out is None"),
        ({"schema": 9}, "schema 2"),
        ({"noise": None}, "calibrate again"),
    ],
)
def test_bad_profiles_get_one_line(tmp_path: Path, change: dict[str, object], told: str) -> None:
    _calibrated(Synthetic()).save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text()) | change
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=told) as caught:
        Profile.load(tmp_path / "p.json")
    assert "\n" not in str(caught.value)


def test_bad_measurements_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step time"):
        Measurement(Cell("decode", 1, 1), (math.nan,))
    with pytest.raises(InputError, match="too few"):
        fit(SHAPE, [Measurement(Cell("decode", 1, 1), (1.0,))])
    with pytest.raises(InputError, match="not negative"):
        Terms(step_fixed_s=math.inf)
    with pytest.raises(InputError, match="ttc calibrate"):
        Profile.load(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda p: p.stem)
def test_the_profiles_we_keep_load(path: Path) -> None:
    profile = Profile.load(path)
    assert profile.machine
    assert profile.versions
    assert profile.measurements
