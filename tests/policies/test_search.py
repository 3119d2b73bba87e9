"""Search on the fake engine: who goes on and who does not, under budgets of any size; resampling against its definition."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import jobs_of, make_driver, total
from ttc.budget import Budget, Unit
from ttc.checks import check_control, check_reward
from ttc.costmodel import ModelShape
from ttc.engine.fake import FakeEngine, random_writer
from ttc.errors import BudgetTooSmall, InputError
from ttc.policies import parse
from ttc.samplers.search import annealed, effective, logit, shares, systematic
from ttc.types import Problem, Result


# -- resampling ------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 2**32))
def test_systematic_resampling_copies_in_proportion(raw: list[float], count: int, seed: int) -> None:
    weights = [w / sum(raw) for w in raw]
    picked = Counter(systematic(weights, count, random.Random(seed)))
    assert sum(picked.values()) == count
    for i, weight in enumerate(weights):
        assert math.floor(count * weight - 1e-9) <= picked[i] <= math.ceil(count * weight + 1e-9)


def test_systematic_resampling_is_unbiased() -> None:
    weights, rng = [0.05, 0.15, 0.3, 0.5], random.Random(0)
    picked = Counter(i for _ in range(4000) for i in systematic(weights, 3, rng))
    for i, weight in enumerate(weights):
        assert picked[i] / 12000 == pytest.approx(weight, abs=0.01)


def test_shares_are_the_odds() -> None:
    assert shares([0.5, 0.8, 0.2]) == pytest.approx([1 / 5.25, 4 / 5.25, 0.25 / 5.25])
    assert shares([0.9, 0.1], temperature=1e9) == pytest.approx([0.5, 0.5])
    assert math.isfinite(logit(0.0))
    assert math.isfinite(logit(1.0))


def test_annealing_flattens_only_what_collapses_early() -> None:
    collapsed, spread = [0.999, 0.1, 0.1, 0.1], [0.5, 0.5, 0.6, 0.4]
    assert annealed(collapsed, 0.1) == pytest.approx(0.9 * 4 / effective(shares(collapsed)))
    assert annealed(collapsed, 0.5) == 1.0
    assert annealed(spread, 0.1) == 1.0
    assert effective(shares(collapsed, annealed(collapsed, 0.1))) > effective(shares(collapsed))


def test_the_entropic_variant_differs_where_weights_collapse_and_only_there() -> None:
    """Hashes as scores collapse often; with a collapse of 0 nothing counts as one, and it is particle filtering to the letter."""
    plain, never, often = (
        [r.answer for r in solve(text, count=20)[0]]
        for text in (
            "particles?n=4&tokens=20",
            "particles?n=4&tokens=20&entropic=1&collapse=0",
            "particles?n=4&tokens=20&entropic=1",
        )
    )
    assert plain == never
    assert plain != often


# -- on the fake engine ----------------------------------------------------------------------------------------------------------
def chance(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@dataclass
class Hashed:
    """A process reward model without any sense: a beginning's score is its hash. ``read`` keeps what it was given."""

    read: list[list[str]] = field(default_factory=list)

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return sum(len(text) // 3 + 1 for text in texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        self.read.append(list(texts))
        return [chance(text) for text in texts]


def solve(
    text: str, *, count: int = 3, mean: float = 60.0, **more: Any
) -> tuple[list[Result], Hashed, FakeEngine]:
    engine, reward = FakeEngine(random_writer(mean_thinking=mean)), Hashed()
    driver = make_driver(engine, parse(text), Budget(100_000.0, "tokens"), cap=200, reward=reward, **more)
    results = list(driver.run(make_problems(count)))
    charge = total(results)
    assert charge.tokens - charge.tokens_judge == engine.counters().output_tokens
    assert charge.tokens_judge > 0
    assert all(r.answer is not None for r in results)
    return results, reward, engine


@dataclass
class Shaped(Hashed):
    """The same with a shape: what it reads has a price in eFLOPs, too."""

    shape: ModelShape | None = field(default_factory=lambda: FakeEngine().info.shape)

    def reads(self, problem: Problem, texts: Sequence[str]) -> list[tuple[int, int]]:
        return [(len(text) // 3 + 1, 0) for text in texts]


def trail(text: str) -> list[str]:
    """The steps of a text of the fake's: <index of the request that wrote it>."""
    return re.findall(r"<(\d+)>", text)


def test_beam_goes_on_from_the_best_of_each_round() -> None:
    _, reward, _ = solve("beam?n=6&width=3&tokens=20", count=1)
    rounds = reward.read
    assert len(rounds[0]) == 6
    ended = 0
    for before, after in itertools.pairwise(rounds):
        begun = [text for text in before if "</think>" not in text]
        ended += len(before) - len(begun)
        places = 6 - ended
        best = sorted(begun, key=chance, reverse=True)[: max(places // 3, 1)]
        parents = {"".join(f"<{i}>" for i in trail(text)) for text in after if "</think>" not in text}
        for text in parents:
            assert any(text.startswith(each) for each in best)
        assert len(after) == len(best) * min(3, places)


def test_dvts_keeps_its_trees_apart() -> None:
    _, reward, _ = solve("dvts?n=9&width=3&tokens=20", count=1, mean=1e9)
    roots = [trail(text)[0] for text in reward.read[-1]]
    assert len(set(roots)) == 3, "each of the three trees is still its own"
    first, second = reward.read[:2]
    for tree in range(3):
        best = max(first[3 * tree : 3 * tree + 3], key=chance)
        assert all(text.startswith(best) for text in second[3 * tree : 3 * tree + 3])


def test_particles_that_score_high_have_the_most_children() -> None:
    _, reward, _ = solve("particles?n=16&tokens=15", count=1, mean=1e9)
    for before, after in itertools.pairwise(reward.read):
        if any("</think>" in text for text in before + after):
            break
        copies = Counter("".join(f"<{i}>" for i in trail(text)[:-1]) for text in after)
        for text, share in zip(before, shares([chance(t) for t in before]), strict=True):
            assert abs(copies[text] - 16 * share) < 1
        assert sum(copies.values()) == 16


@pytest.mark.parametrize(
    "text", ["beam?n=4&width=2", "dvts?n=4&width=2", "particles?n=4", "particles?n=4&entropic=1"]
)
def test_steps_are_of_the_length_asked_for_and_the_cap_is_the_whole_chains(text: str) -> None:
    results, _, engine = solve(text + "&tokens=15&most=4", mean=1e9)
    for result in results:
        for branch in result.branches:
            partial = branch.completion.partial
            assert branch.completion.output_tokens == 15 if partial else branch.completion.closed
        whole = [b for b in result.branches if not b.completion.partial]
        assert whole
        assert all(b.completion.output_tokens <= 200 - 4 * 15 + engine.room_tokens for b in whole)


@pytest.mark.parametrize("select", ["weighted", "best", "vote"])
def test_the_answer_is_chosen_as_asked(select: str) -> None:
    results, reward, _ = solve(f"particles?n=8&tokens=30&select={select}", count=6)
    del reward
    for result in results:
        if select == "vote":
            assert all(v == int(v) for v in result.votes.values())
        if select != "best":
            assert result.votes[result.answer or ""] == max(result.votes.values())


@dataclass
class Kept(Hashed):
    """Keeps, by problem, what it gave to each chain that had ended."""

    ended: dict[str, dict[str, float]] = field(default_factory=dict)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        scores = super().score(problem, texts)
        self.ended.setdefault(problem.id, {}).update(
            (text, s) for text, s in zip(texts, scores, strict=True) if "</think>" in text
        )
        return scores


def test_select_best_takes_the_chain_with_the_highest_score() -> None:
    """Beam keeps all chains that ended, so the answer is that of the highest score that was given to any."""
    reward = Kept()
    policy = parse("beam?n=6&width=3&tokens=30&select=best")
    engine = FakeEngine(random_writer(mean_thinking=60))
    driver = make_driver(engine, policy, Budget(1e6, "tokens"), cap=200, reward=reward)
    places = []
    for result in driver.run(make_problems(30)):
        texts = reward.ended[result.problem_id]
        favourite = max(texts, key=lambda text: texts[text])
        assert result.answer == favourite.rpartition("</think>")[2]
        places.append([*texts].index(favourite) / max(len(texts) - 1, 1))
    assert 0 in places and 1 in places, "it is neither always the first nor always the last"


@pytest.mark.parametrize("seed", range(150))
def test_any_budget_is_kept_and_the_answer_still_comes(seed: int) -> None:
    rng = random.Random(seed)
    engine = FakeEngine(
        random_writer(mean_thinking=80.0, p_fail=rng.choice([0, 0.1])), concurrency=rng.randint(1, 8)
    )
    unit: Unit = rng.choice(["tokens", "eflops", "dollars"])
    name = rng.choice(["beam?n=4&width=2", "dvts?n=6&width=3", "particles?n=5"])
    policy = parse(f"{name}&tokens={rng.randint(3, 30)}&most={rng.randint(1, 9)}")
    try:
        jobs_of(make_driver(engine, policy, Budget(1e-30, unit), cap=150), make_problems(3))
    except BudgetTooSmall as error:
        least = error.least
    driver = make_driver(
        engine, policy, Budget(least * rng.choice([1.0, 1.5, 4, 20, 200]), unit), cap=150, reward=Shaped()
    )
    results = list(driver.run(make_problems(3)))
    assert driver.overrun == 0
    charge = total(results)
    for result in results:
        drawn = sum(getattr(branch.charge, unit) for branch in result.branches)
        if result.charge.tokens_judge:
            assert getattr(result.charge, unit) > drawn * (1 + 1e-9), (
                "what the reward model reads is paid for"
            )
        else:
            assert getattr(result.charge, unit) == pytest.approx(drawn)
    assert charge.tokens - charge.tokens_judge == engine.counters().output_tokens
    if not any(b.finish == "error" for r in results for b in r.branches):
        assert all(r.answer is not None for r in results), [r.error for r in results]


def test_a_run_is_repeated_by_its_seed() -> None:
    first, second = (solve("particles?n=6&tokens=20")[0] for _ in range(2))
    assert [(r.answer, r.votes) for r in first] == [(r.answer, r.votes) for r in second]


# -- at the door -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beam?n=8&width=3", "divides"),
        ("beam?width=1", "width=1"),
        ("dvts?n=6&width=4", "width=4"),
        ("beam?tokens=0", "tokens=0"),
        ("particles?tokens=-1", "tokens=-1"),
        ("particles?most=0", "most=0"),
        ("particles?select=first", "select"),
        ("particles?collapse=1.5", "collapse=1.5"),
        ("particles?early=nan", "early=nan"),
    ],
)
def test_options_without_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=r"^policy: ") as caught:
        parse(text)
    assert words in str(caught.value)


def test_what_is_missing_is_named() -> None:
    class Plainest:
        info, room_tokens = FakeEngine().info, 8

    with pytest.raises(InputError, match="reward"):
        check_reward(parse("beam"), None)
    check_reward(parse("beam"), Hashed())
    with pytest.raises(InputError, match="step by step, which the fake engine can't"):
        check_control(parse("particles"), Plainest())  # type: ignore[arg-type]


def test_a_score_that_is_no_chance_is_this_problems_failure() -> None:
    class Logits(Hashed):
        def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
            return [3.2] * len(texts)

    driver = make_driver(FakeEngine(), parse("beam"), Budget(9000.0, "tokens"), reward=Logits())
    [result] = driver.run(make_problems(1))
    assert "not 3.2" in result.error
