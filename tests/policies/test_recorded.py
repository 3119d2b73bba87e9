"""Policies replayed from a recorded file whose problems have known outcomes: what each must answer and pay for, on any machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.policies.recorded import BRANCHES, CLOSE, EVERY, HOPELESS, LONG, SPLIT, SURE, write_pool
from ttc.budget import Budget
from ttc.policies import parse
from ttc.simulate import Replay, load, replay, simulate

PROBLEMS = SURE + CLOSE + HOPELESS + SPLIT
ALL = sum(range(101, 101 + BRANCHES))
"""Tokens of all branches of a problem that is not sure."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"))


def by_kind(path: Path, policy: str, **options: object) -> dict[str, tuple[list[float], list[float]]]:
    """For each kind of problem: (right, tokens) of its problems in all shuffles."""
    pool = load(path)
    found: Replay = replay(pool, parse(policy), shuffles=5, **options)  # type: ignore[arg-type]
    assert found.overrun == 0
    kinds = np.array([problem.id.partition("-")[0] for problem in pool.problems])
    return {
        kind: (
            found.right[:, kinds == kind].ravel().tolist(),
            found.tokens[:, kinds == kind].ravel().tolist(),
        )
        for kind in ("sure", "close", "hopeless", "split")
    }


def test_self_consistency_over_all_branches_is_the_majority_and_the_sum(path: Path) -> None:
    told = simulate(path, f"self-consistency?n={BRANCHES}", shuffles=3)
    assert told["accuracy"] == pytest.approx((SURE + CLOSE) / PROBLEMS)
    whole = SURE * BRANCHES * LONG + (PROBLEMS - SURE) * ALL
    assert told["tokens_per_problem"] == pytest.approx(whole / PROBLEMS)
    assert told["problems"] == PROBLEMS


@pytest.mark.parametrize(
    ("policy", "drawn"), [("adaptive-consistency", 4), ("early-stopping", 8), ("early-stopping?window=5", 5)]
)
def test_what_agrees_is_stopped_at_the_first_look_and_what_never_agrees_is_drawn_to_the_end(
    path: Path, policy: str, drawn: int
) -> None:
    """Of n equal answers and none else the Beta posterior is 1 - 2^-(n+1) sure: over 0.95 from four on."""
    found = by_kind(path, policy)
    assert found["sure"] == ([1.0] * 5 * SURE, [float(drawn * LONG)] * 5 * SURE)
    assert found["split"] == ([0.0] * 5 * SPLIT, [float(ALL)] * 5 * SPLIT)
    for kind in ("close", "hopeless"):
        assert max(found[kind][1]) <= ALL


def test_parallel_probe_stops_as_soon_as_its_lanes_have_agreed_for_long_enough(path: Path) -> None:
    policy = f"parallel-probe?n=8&every={EVERY}&stable=3&warmup=4&patience=99"
    found = by_kind(path, policy, free_probes=True)
    right, tokens = found["sure"]
    assert right == [1.0] * 5 * SURE
    assert len(set(tokens)) == 1 and 8 * 3 * EVERY <= tokens[0] <= 8 * 5 * EVERY < 8 * LONG
    assert found["split"][0] == [0.0] * 5 * SPLIT


def test_adaptive_pays_for_doubt_only(path: Path) -> None:
    found = by_kind(path, "adaptive")
    assert found["sure"][0] == [1.0] * 5 * SURE
    assert found["split"][0] == [0.0] * 5 * SPLIT
    assert max(found["sure"][1]) < 8 * LONG, "an eighth of the branches at the most"
    mean = {kind: sum(tokens) / len(tokens) for kind, (_, tokens) in found.items()}
    assert mean["sure"] < mean["close"]
    dear = by_kind(path, "adaptive?price=0.5")
    assert sum(map(sum, (t for _, t in dear.values()))) < sum(map(sum, (t for _, t in found.values())))


def test_a_budget_holds_whatever_is_recorded(path: Path) -> None:
    for policy in ("self-consistency?n=64", "adaptive-consistency", "early-stopping", "adaptive"):
        found = by_kind(path, policy, budget=Budget(900, "tokens"))
        assert all(tokens <= 900 for _, spent in found.values() for tokens in spent)
        assert all(right == 1.0 for right in found["sure"][0])
