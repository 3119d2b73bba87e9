"""The interval of ``ttc bench overhead``: paired by rounds, at the confidence that so many rounds allow."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from ttc.bench import overhead
from ttc.bench.arms import Job
from ttc.bench.overhead import Arm, paired, processor_seconds


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


def test_a_goal_is_reached_or_missed_only_by_a_sure_interval() -> None:
    assert paired([1.0] * 6, [1.0] * 6).reaches(0.95) == "reached"
    assert paired([0.9] * 6, [1.0] * 6).reaches(0.95) == "missed"
    assert paired([0.9] + [1.0] * 5, [1.0] * 6).reaches(0.95) == "not decided"
    assert paired([1.0] * 3, [1.0] * 3).reaches(0.95) == "not decided"  # 75 % is all that three rounds allow


def test_an_arm_of_few_rounds_is_paired_with_the_same_rounds_of_the_other() -> None:
    assert paired([80.0, 160.0, 9.0, 9.0], [20.0, 40.0]).median == pytest.approx(4.0)


def test_processor_time_counts_children_that_run_and_that_ended() -> None:
    pytest.importorskip("psutil")
    burn = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\n"
    before = processor_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True, stdout=subprocess.DEVNULL)
    assert (
        processor_seconds(os.getpid()) - before >= 0.19
    )  # whatever the clock's grain, ended children are in it
    wait = subprocess.Popen(
        [sys.executable, "-c", burn + "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert wait.stdout is not None
    wait.stdout.readline()
    assert processor_seconds(os.getpid()) - before >= 0.38
    wait.communicate(b"\n")
    assert processor_seconds(wait.pid) == 0.0  # gone


WORKER = """
import json, sys, time
print("{}", flush=True)
for line in sys.stdin:
    start = time.process_time()
    while time.process_time() < start + 0.1: pass
    print(json.dumps({"tokens": 7, "lengths": json.loads(line), "peak_bytes": 1}), flush=True)
"""


def test_arms_in_slices_do_the_whole_job_and_are_charged_for_their_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("psutil")
    start = partial(subprocess.Popen)

    def worker(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", WORKER], **options)

    monkeypatch.setattr(subprocess, "Popen", worker)
    monkeypatch.setattr(overhead, "SLICE_S", 0.01)
    job = Job("m", "t", 2, 1, 1, 1)
    arms = [Arm(kind, job, None) for kind in ("ttc", "bare")]
    try:
        for counted in (False, True):
            found = overhead._in_slices(arms, [[3], [4], [5]], counted=counted)
            assert {arm.kind: written for arm, written in found} == {"ttc": [[3], [4]], "bare": [[3], [4]]}
        for arm in arms:
            (turn,) = arm.turns
            assert turn["seconds"] >= 0.05  # it burned twice that (a stop may reach it a little late)
            assert turn["processor_s"] >= 0.08  # the kernel counts in hundredths
            assert arm.result().problems == 2
    finally:
        for arm in arms:
            arm.close()
