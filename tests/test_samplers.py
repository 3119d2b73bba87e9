"""Votes, weighted votes, best by score, and policies over them on the fake engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttc.errors import InputError
from ttc.policies import parse
from ttc.samplers import best, confidences, leader, tally
from ttc.types import Branch, Completion


def branch(
    vote: str | None,
    *,
    finish: str = "stop",
    logprob: float | None = None,
    certainty: float | None = None,
    index: int = 0,
) -> Branch:
    completion = Completion("", finish, 1, 1, mean_logprob=logprob, self_certainty=certainty)  # type: ignore[arg-type]
    return Branch("p", index, 0, completion, vote, vote)


def test_votes_count_usable_branches_only() -> None:
    branches = [
        branch("1"),
        branch("2"),
        branch("1"),
        branch(None),
        branch("2", finish="abort"),
        branch("2", finish="error"),
    ]
    assert tally(branches) == {"1": 2.0, "2": 1.0}
    assert leader(tally(branches), seed=0) == "1"
    assert leader({}, seed=0) is None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(0, 1000), st.randoms())
def test_the_leader_does_not_depend_on_order(votes: list[str], seed: int, rng) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(votes)
    rng.shuffle(shuffled)
    assert leader(tally([branch(v) for v in votes]), seed) == leader(
        tally([branch(v) for v in shuffled]), seed
    )


def test_ties_are_broken_by_seed_without_favour() -> None:
    winners = [leader({"a": 1.0, "b": 1.0}, seed) for seed in range(400)]
    assert 140 < winners.count("a") < 260


def test_weighted_votes_and_best() -> None:
    branches = [branch("1", logprob=-2.0), branch("2", logprob=-0.1), branch("1", logprob=-2.5)]
    assert confidences(branches, "mean-logprob") == [-2.0, -0.1, -2.5]
    assert best(branches, confidences(branches, "mean-logprob"), seed=0) is branches[1]
    assert leader(tally(branches, [0.1, 0.5, 0.1]), 0) == "2"


def test_a_branch_without_the_measure_wins_only_alone() -> None:
    assert best([branch("1"), branch("2", logprob=-9.0)], [float("-inf"), -9.0], 0).vote == "2"  # type: ignore[union-attr]
    assert best([branch(None)], [1.0], 0) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self-consistancy", "did you mean 'self-consistency'"),
        ("greedy?n=3", "takes none"),
        ("best-of-n?k=3", "no option 'k'; it takes n, score"),
        ("best-of-n?n=many", "wants int for n, not 'many'"),
        ("best-of-n?n=0", "give 1 to 4096"),
        ("best-of-n?score=luck", "use one of mean-logprob, self-certainty, reward"),
        ("nowhere.module:Policy", "can't import"),
    ],
)
def test_bad_policies_are_named_with_a_mend(text: str, message: str) -> None:
    with pytest.raises(InputError, match="policy:") as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_policy_of_ones_own_is_found_by_its_path() -> None:
    assert parse("tests.test_driver:EarlyStop?n=3").name == "early-stop"
