"""The published policies do what their papers and their authors' code say, and land on the published figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.conftest import make_problems
from tests.driving import make_driver
from tests.test_replay import make_pool, replay_driver
from ttc.budget import Budget
from ttc.costmodel.records import Pool, PooledProblem
from ttc.engine.fake import FakeEngine, Script
from ttc.engine.protocol import StepReport
from ttc.engine.replay import ReplayEngine
from ttc.errors import InputError
from ttc.ledger import Ledger
from ttc.policies import ParallelProbe, parse
from ttc.policies.baselines import DeepConf, beta_confidence, dirichlet_confidence
from ttc.simulate import load, replay, simulate
from ttc.types import Branch, Brief, Completion, Generate, Problem, Reply, Sampling

POOLS = Path(__file__).parents[3] / "shared" / "pools"
needs_pools = pytest.mark.skipif(not POOLS.is_dir(), reason="the recorded pools are not on this machine")


def test_beta_confidence_is_the_beta_distribution() -> None:
    for first, second in [(1, 0), (2, 0), (4, 0), (5, 1), (9, 4), (40, 23)]:
        assert beta_confidence(first, second) == pytest.approx(
            stats.beta.sf(0.5, first + 1, second + 1), abs=1e-12
        )


def test_dirichlet_confidence_is_the_share_of_draws() -> None:
    rng = np.random.default_rng(0)
    for counts in [(3, 1), (4, 2, 2), (5, 1, 1, 1), (2, 2)]:
        draws = rng.dirichlet([c + 1 for c in counts], 200_000)
        assert dirichlet_confidence(counts) == pytest.approx((draws.argmax(axis=1) == 0).mean(), abs=0.005)


@needs_pools
@pytest.mark.parametrize(
    ("policy", "aime24", "aime25"),
    [
        ("self-consistency?n=64", (0.804, 910.8e3), (0.767, 1124.4e3)),
        ("adaptive-consistency", (0.804, 226.0e3), (0.767, 406.2e3)),
        ("early-stopping", (0.804, 459.4e3), (0.767, 793.1e3)),
    ],
)
def test_published_policies_land_on_their_published_figures(
    policy: str, aime24: tuple[float, float], aime25: tuple[float, float]
) -> None:
    for name, (accuracy, tokens) in (("aime24", aime24), ("aime25", aime25)):
        found = simulate(POOLS / f"qwen3-8b_{name}.json", policy, shuffles=30)
        assert found["accuracy"] == pytest.approx(accuracy, abs=0.012)
        assert found["tokens_per_problem"] == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize(
    ("n", "window", "drawn"), [(20, 8, 20), (10, 8, 10), (16, 8, 16), (3, 3, 3), (9, 1, 1)]
)
def test_early_stopping_draws_all_n_where_no_window_agrees(n: int, window: int, drawn: int) -> None:
    """No window agrees where every answer differs; a window of one always does."""
    final = np.arange(24, dtype=np.int64)
    problem = PooledProblem("q", np.full(24, 5.0), final, np.empty((24, 0), dtype=np.int64))
    found = replay(Pool("p", (problem,)), parse(f"early-stopping?n={n}&window={window}"), shuffles=1)
    assert found.samples[0, 0] == drawn


def probed_pool(seed: int, branches: int = 9, every: int = 10) -> Pool:
    """One problem as the published pools record it: anytime answers up to where thinking ended, which may be well before or a
    little after the branch's last token."""
    rng = np.random.default_rng(seed)
    heard = rng.integers(0, 30, branches)
    tokens = np.maximum(heard * every + rng.integers(-every, 5 * every, branches), 1).astype(float)
    final = np.where(rng.random(branches) < 0.5, 0, rng.integers(-1, 3, branches))
    probes = np.full((branches, 30), -1)
    for row, count in enumerate(heard):
        settled = rng.integers(0, count + 1)
        probes[row, :count] = [final[row] if k >= settled else rng.integers(-1, 3) for k in range(count)]
        probes[row, count:] = probes[row, count - 1] if count else -1
    return Pool("probed", (PooledProblem("q", tokens, final, probes, heard),), probe_every=every)


def by_the_paper(pool: Pool, stable: int, patience: int, warmup: int) -> tuple[bool, int, int]:
    """Algorithm 1 of arXiv 2602.03845 with the majority over branches that were not cut, a step at a time over all branches:
    right or wrong, tokens, the longest branch."""
    (problem,), every = pool.problems, pool.probe_every
    heard = problem.heard
    assert heard is not None
    count, at = problem.samples, 0
    spent, says = [0] * count, [0] * count
    ended, cut, strayed = [False] * count, [False] * count, [0] * count

    def advance() -> None:
        for i in range(count):
            if ended[i] or cut[i]:
                continue
            if at < heard[i]:
                spent[i], says[i] = spent[i] + every, int(problem.probes[i, at])
            else:
                spent[i], says[i] = max(spent[i], int(problem.tokens[i])), int(problem.final[i])
                ended[i] = True

    def majority() -> int:
        return Counter(says[i] for i in range(count) if not cut[i]).most_common(1)[0][0]

    advance()
    last, same = None, 0
    while True:
        at += 1
        advance()
        winner = majority()
        if at > warmup and count - sum(cut) > 1:
            for i in range(count):
                if not ended[i] and not cut[i]:
                    strayed[i] = strayed[i] + 1 if says[i] != winner else 0
                    cut[i] = strayed[i] >= patience
            if all(cut):
                break
            winner = majority()
        same = same + 1 if winner == last else 0
        last = winner
        if same >= stable or all(e or c for e, c in zip(ended, cut, strict=True)):
            break
    return last == 0, sum(spent), max(spent)


def test_parallel_probe_is_the_published_algorithm_to_the_token() -> None:
    cuts = 0
    for seed in range(150):
        pool = probed_pool(seed)
        stable, patience, warmup = 3 + seed % 9, 2 + seed % 3, 1 + seed % 4
        policy = ParallelProbe(n=9, every=10, stable=stable, patience=patience, warmup=warmup)
        found = replay(pool, policy, shuffles=1, in_order=True, free_probes=True)
        assert (bool(found.right[0, 0]), int(found.tokens[0, 0]), int(found.chain[0, 0])) == by_the_paper(
            pool, stable, patience, warmup
        ), seed
        cuts += found.stops.get("confident", 0)
    assert 20 < cuts < 130, "both ends are reached: a stable majority, and all branches"


@pytest.mark.parametrize(
    "policy",
    [
        "deepconf?n=9&keep=0.5",
        "deepconf?n=30&keep=0.5&mode=online&warmup=4&consensus=0.8",
        "best-of-n?n=5&score=mean-logprob",
        "weighted-vote?n=9&weight=self-certainty",
    ],
)
def test_recorded_confidences_replay_as_they_ran(policy: str, tmp_path: Path) -> None:
    rng, bare = np.random.default_rng(3), make_pool(8, 40, every=0, seed=3)
    pool = replace(
        bare,
        problems=tuple(
            replace(p, confidence={"self-certainty": rng.random(40), "mean-logprob": -rng.random(40)})
            for p in bare.problems
        ),
    )
    with pytest.raises(InputError, match="has not recorded"):
        replay(bare, parse(policy), shuffles=1)
    engine, ledger = ReplayEngine(pool), Ledger.open(tmp_path, {"model": "pool"})
    results = list(replay_driver(engine, parse(policy), Budget(1e6, "tokens"), ledger).run(engine.problems()))
    ledger.close()
    again = replay(load(tmp_path), parse(policy), shuffles=1, max_branches=0, in_order=True)
    by_id = {r.problem_id: r for r in results}
    told = [by_id[p.id] for p in load(tmp_path).problems]
    assert again.tokens[0].tolist() == [r.charge.tokens for r in told]
    assert again.right[0].tolist() == [float(r.verdict is not None and r.verdict.correct) for r in told]
    assert {r.answer for r in told} != {None}


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_share_of_the_most_confident_is_of_those_that_the_budget_paid_for(mode: str) -> None:
    policy = DeepConf(n=40, keep=0.1, mode=mode, warmup=40)  # type: ignore[arg-type]
    problem = Problem("p", ({"role": "user", "content": "?"},))
    routine = policy.run(problem, Brief(0, 100, Sampling()))
    work = next(routine)
    assert isinstance(work, Generate)
    branches = []
    for request in work.requests:
        paid = request.index < 10
        done = Completion(
            "", "stop" if paid else "denied", 5, 5, self_certainty=10.0 - request.index if paid else None
        )
        vote = ("right" if request.index == 0 else "wrong") if paid else None
        branches.append(Branch("p", request.index, request.seed, done, vote, vote))
    with pytest.raises(StopIteration) as end:
        routine.send(Reply(tuple(branches)))
    assert end.value.value.answer == "right"
    assert {k: v for k, v in end.value.value.votes.items() if v} == {"right": 10.0}


class Silent(FakeEngine):
    """Tells no confidence, as a server that keeps its log-probabilities to itself."""

    def step(self) -> StepReport:
        report = super().step()
        report.finished = [
            (ticket, replace(done, mean_logprob=None, self_certainty=None))
            for ticket, done in report.finished
        ]
        return report


@pytest.mark.parametrize(
    "policy",
    [
        "best-of-n?score=mean-logprob", "best-of-n?score=self-certainty", "weighted-vote?weight=mean-logprob",
        "weighted-vote?weight=self-certainty", "deepconf?n=8", "deepconf?n=8&signal=mean-logprob",
        "deepconf?n=8&mode=online&warmup=4",
    ],
)  # fmt: skip
def test_where_no_branch_has_a_confidence_the_most_votes_win(policy: str, tmp_path: Path) -> None:
    engine = Silent(lambda request, _: Script(5, "right" if request.index % 4 else "wrong", 1))
    ledger = Ledger.open(tmp_path, {"model": "fake"})
    driver = make_driver(engine, parse(policy), Budget.parse("10k tokens"), ledger=ledger)
    results = list(driver.run(make_problems(16)))
    ledger.close()
    assert [result.answer for result in results] == ["right"] * 16


@needs_pools
def test_parallel_probe_lands_on_its_published_figures() -> None:
    """Within three standard errors of 12 shuffles (a shuffle's own is 1.7 and 2.8 points)."""
    for name, accuracy, noise, tokens, chain in (
        ("aime24", 0.815, 0.017, 730.8e3, 20.3e3),
        ("aime25", 0.769, 0.028, 846.7e3, 21.9e3),
    ):
        found = simulate(POOLS / f"qwen3-8b_{name}.json", "parallel-probe", shuffles=12, free_probes=True)
        assert found["accuracy"] == pytest.approx(accuracy, abs=3 * noise / 12**0.5)
        assert found["tokens_per_problem"] == pytest.approx(tokens, rel=0.01)
        assert found["sequential_tokens_per_problem"] == pytest.approx(chain, rel=0.01)
