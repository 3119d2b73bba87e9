"""Coverage and votes against enumeration; pools in every format, and what bad ones are told."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttc.costmodel.accuracy import coverage, pool_accuracy, vote
from ttc.costmodel.pools import read, read_all
from ttc.costmodel.records import Curve, Pool
from ttc.errors import InputError
from ttc.policies import parse
from ttc.simulate import replay

POOLS = Path(__file__).resolve().parents[2] / ".." / "shared" / "pools"
needs_pools = pytest.mark.skipif(not POOLS.is_dir(), reason="recorded pools (../shared/pools) are not here")


@settings(max_examples=60)
@given(s=st.integers(1, 9), data=st.data())
def test_coverage_is_the_share_of_subsets_with_a_right_answer(s: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, s)), data.draw(st.integers(1, s))
    right = [True] * c + [False] * (s - c)
    subsets = list(itertools.combinations(right, k))
    assert coverage(c, s, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert coverage(c, s, k)[0] == pytest.approx(1 - math.comb(s - c, k) / math.comb(s, k))


def _vote_by_enumeration(codes: list[int], draws: int) -> float:
    total = 0.0
    subsets = list(itertools.combinations(codes, draws))
    for subset in subsets:
        counts = Counter(code for code in subset if code >= 0)
        top = max(counts.values(), default=0)
        leaders = [code for code, n in counts.items() if n == top]
        total += 1 / len(leaders) if 0 in leaders else 0.0
    return total / len(subsets)


@settings(max_examples=40)
@given(codes=st.lists(st.integers(-1, 3), min_size=1, max_size=7), data=st.data())
def test_votes_are_the_mean_over_subsets(codes: list[int], data: st.DataObject) -> None:
    draws = data.draw(st.integers(1, len(codes)))
    exact = _vote_by_enumeration(codes, draws)
    drawn = vote(np.array(codes), draws, rounds=4000)
    exactly = draws in (1, len(codes))
    assert drawn == pytest.approx(exact, abs=1e-12 if exactly else 0.05)


def test_several_answers_may_be_right() -> None:
    codes = np.array([0, 1, 1, 2, 2, -1])  # 0 and 1 are right
    assert vote(codes, 6, right=2) == 0.5
    assert vote(codes, 6) == 0.0
    assert vote(codes, 1, right=2) == 0.5


@needs_pools
def test_recorded_pools_give_the_published_figures() -> None:
    """research/papers.md section 6: pass@1, forced answers at T tokens, majority and coverage of all 128."""
    published = {
        "aime24": [0.757, 0.035, 0.142, 0.291, 0.517, 0.684, 0.800, 0.933],
        "aime25": [0.671, 0.028, 0.095, 0.262, 0.411, 0.597, 0.767, 0.900],
    }
    for task, expected in published.items():
        (pool,) = read(POOLS / f"qwen3-8b_{task}.json")
        assert isinstance(pool, Pool)
        assert (pool.model, pool.task, pool.samples) == ("qwen3-8b", task, 128)
        found = [pool_accuracy(pool, samples=1).mean()]
        found += [
            pool_accuracy(pool, samples=1, thinking_tokens=t).mean() for t in (1000, 2000, 4000, 8000, 16000)
        ]
        found += [
            pool_accuracy(pool, samples=128).mean(),
            pool_accuracy(pool, samples=128, rule="coverage").mean(),
        ]
        assert [round(float(f), 3) for f in found] == expected
    pools, curves = read_all([POOLS / "accuracy_vs_tokens.json", POOLS / "accuracy_vs_kv_budget.json"])
    assert not pools
    assert {c.axis for c in curves if isinstance(c, Curve)} == {"tokens", "kv_budget"}
    assert all(isinstance(c, Curve) and c.accuracy.max() <= 1 for c in curves)


def _trace(rows: list[dict[str, Any]], **head: Any) -> str:
    return "\n".join(json.dumps(row) for row in [head, *rows]) + "\n"


def _row(query: str, score: float, text: str = "x" * 320) -> dict[str, Any]:
    return {"query": query, "choices": ["7"], "prediction": [text], "score": score}


def test_kinetics_traces(tmp_path: Path) -> None:
    file = tmp_path / "aime24_qwen3-8b_blocktopk.jsonl"
    rows = [_row("a", 100.0), _row("a", 0.0), _row("b", 0.0), _row("b", 0.0)]
    file.write_text(_trace(rows, attn_local=0, attn_block_size=32, attn_block_topk=16))
    (pool,) = read(file)
    assert isinstance(pool, Pool)
    assert (pool.model, pool.task, pool.kv_budget, pool.kv_block) == ("qwen3-8b", "aime24", 512, 32)
    assert pool.lengths_estimated
    assert pool.tokens.tolist() == [100.0] * 4
    assert pool_accuracy(pool, samples=2, rule="coverage").tolist() == [1.0, 0.0]


def test_our_run_folders(tmp_path: Path) -> None:
    def branch(problem: str, index: int, vote: str | None, **more: Any) -> str:
        completion = {
            "text": "",
            "finish": "stop",
            "prompt_tokens": 9,
            "generated_tokens": 40,
            "forced_tokens": 2,
        }
        return json.dumps({"problem": problem, "index": index, "vote": vote, "completion": completion} | more)

    (tmp_path / "run.json").write_text(json.dumps({"model": "nano-s", "kv_budget": 64}))
    lines = [branch("p", 0, "7"), branch("p", 1, "8"), branch("q", 0, "1"), branch("q", 1, None)]
    lines.append(branch("q", 2, "3"))
    lines += [branch("p", 2, "9", interrupted=True), branch("r", 0, "5")]
    (tmp_path / "branches.jsonl").write_text("\n".join(lines) + "\n")
    right, wrong = {"correct": True, "score": 1.0}, {"correct": False, "score": 0.0}
    results = [
        {"problem": "p", "answer": "7", "verdict": right, "right": ["7"]},
        {"problem": "q", "answer": "1", "verdict": wrong, "right": ["3"]},
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(r) for r in results) + "\n")
    (pool,) = read(tmp_path)
    assert isinstance(pool, Pool)
    assert (pool.model, pool.kv_budget, len(pool.problems)) == ("nano-s", 64, 2)
    assert [p.final.tolist() for p in pool.problems] == [[0, 1], [1, -1, 0]]
    assert pool.tokens.tolist() == [42.0] * 5


def test_a_run_of_the_driver_reads_back(tmp_path: Path) -> None:
    from ttc.api import run
    from ttc.engine.fake import FakeEngine
    from ttc.types import Problem

    problems = [Problem(str(k), ({"role": "user", "content": f"{k}?"},), gold=str(k)) for k in range(12)]
    out = tmp_path / "run"
    settings: dict[str, Any] = {"policy": "self-consistency?n=5", "budget": "10k tokens"}
    results = list(run(problems, engine=FakeEngine(), out=out, **settings))
    (pool,) = read(out, model="Qwen3-0.6B", task="t")
    assert isinstance(pool, Pool)
    right = sum(bool(r.verdict and r.verdict.correct) for r in results) / len(results)
    assert pool.samples == 5
    assert pool_accuracy(pool, samples=5).mean() == pytest.approx(
        right, abs=0.2
    )  # ties are shared here, broken there
    assert pool.tokens.sum() == sum(r.charge.tokens for r in results)


def test_what_votes_buy_is_paired_by_problem() -> None:
    from ttc.api import run
    from ttc.costmodel import intervals
    from ttc.curves import vote_curve
    from ttc.engine.fake import FakeEngine
    from ttc.types import Problem

    problems = [Problem(str(k), ({"role": "user", "content": f"{k}?"},), gold=str(k)) for k in range(20)]
    results = list(run(problems, engine=FakeEngine(), policy="self-consistency?n=5", budget="10k tokens"))
    one, five = vote_curve(results, (1, 5, 8))
    assert one.gain == (0.0, 0.0, 0.0)  # over itself
    assert five.gain.low < five.gain.mean < five.gain.high
    assert five.gain.mean == pytest.approx(five.accuracy - one.accuracy)
    share = [sum(b.vote in r.right for b in r.branches) / 5 for r in results]
    assert (one.accuracy, one.low, one.high) == pytest.approx(intervals.mean(share)[:3])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.json", "{", "not JSON"),
        ("p.json", "[]", "neither problems nor curves"),
        ("p.json", '[{"each_branch": [[["1"], 9, "1"]], "probe_freq": 5}]', "no gold_answer"),
        ("p.json", '[{"gold_answer": "1"}]', "no each_branch"),
        ("p.json", '[{"gold_answer": "1", "each_branch": []}]', "no branches"),
        ("p.json", '[{"gold_answer": "1", "each_branch": [[["1"], -9, "1"]]}]', "finite count"),
        ("p.json", '{"models": {"m": {"t": {"tokens": [1], "accuracy": [1.5]}}}}', r"outside 0\.\.1"),
        ("p.json", '{"models": {"m": {"t": {"tokens": [1], "accuracy": [NaN]}}}}', r"outside 0\.\.1"),
        ("t.jsonl", '{"a": 1}\n{"query": "q", "prediction": "x"}\n', "no score"),
        ("t.jsonl", '{"a": 1}\n', "no branches"),
        ("t.jsonl", "nonsense\n", "line 1 is not JSON"),
    ],
)
def test_bad_pools_get_one_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="give a"):
            read(path)
    with pytest.raises(InputError, match="between 1 and 4"):
        coverage(1, 4, 5)
    with pytest.raises(InputError, match="vote or coverage"):
        pool_accuracy(Pool("p", ()), samples=1, rule="magic")


def test_long_questions_that_begin_alike_are_two_problems(tmp_path: Path) -> None:
    begins = "Let x be a number that is larger than any of those which follow: " + "1, " * 20
    file = tmp_path / "t.jsonl"
    rows = [_row(begins + end, score) for end, score in (("2?", 1.0), ("2?", 1.0), ("3?", 0.0))] + [
        _row("3?", 1.0)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [pool] = read(file)
    assert isinstance(pool, Pool)
    names = [problem.id for problem in pool.problems]
    assert len(set(names)) == 3 and names[2] == "3?"
    assert all(name.startswith(begins[:60]) for name in names[:2])
    assert [len(problem.tokens) for problem in pool.problems] == [2, 1, 1]
    assert replay(pool, parse("greedy"), shuffles=1).right.mean() == pytest.approx(2 / 3)
