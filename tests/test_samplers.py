"""Votes, weighted votes, best by score, and policies over them on the fake engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttc.errors import InputError
from ttc.policies import parse
from ttc.samplers import best, confidences, leader, tally
from ttc.types import Branch, Brief, Completion, Problem, Reply, Sampling


def branch(
    vote: str | None,
    *,
    finish: str = "stop",
    logprob: float | None = None,
    certainty: float | None = None,
    index: int = 0,
    problem: str = "p",
) -> Branch:
    completion = Completion("", finish, 1, 1, mean_logprob=logprob, self_certainty=certainty)  # type: ignore[arg-type]
    return Branch(problem, index, 0, completion, vote, vote)


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
    assert leader(tally(branches), 0, "p") == "1"
    assert leader({}, 0, "p") is None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(0, 1000), st.randoms())
def test_the_leader_does_not_depend_on_order(votes: list[str], seed: int, rng) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(votes)
    rng.shuffle(shuffled)
    told, again = (tally([branch(v) for v in order]) for order in (votes, shuffled))
    assert leader(told, seed, "p") == leader(again, seed, "p")


def test_ties_are_broken_by_seed_without_favour() -> None:
    """Over seeds, and over the problems of one seed: a run in which "True" and "False" often tie must not favour one."""
    over_seeds = [leader({"True": 1.0, "False": 1.0}, seed, "p") for seed in range(400)]
    over_problems = [leader({"True": 1.0, "False": 1.0}, 1, f"p{i}") for i in range(400)]
    for winners in (over_seeds, over_problems):
        assert 140 < winners.count("True") < 260
    tied = [[branch(vote, problem=f"p{i}") for vote in ("True", "False")] for i in range(400)]
    chosen = [best(pair, [0.5, 0.5], 1) for pair in tied]
    assert 140 < sum(b is not None and b.vote == "True" for b in chosen) < 260


@pytest.mark.parametrize("offset", [0.0, -5.0, 1e9, -1e9])
def test_weights_of_any_sign_have_a_leader(offset: float) -> None:
    assert leader({"a": offset, "b": offset + 1.0}, 0, "p") == "b"
    assert leader({"a": -1.0}, 0, "p") == "a"
    assert {leader({"a": offset - 2, "b": offset - 2}, seed, "p") for seed in range(50)} == {"a", "b"}


def test_weighted_votes_and_best() -> None:
    branches = [branch("1", logprob=-2.0), branch("2", logprob=-0.1), branch("1", logprob=-2.5)]
    assert confidences(branches, "mean-logprob") == [-2.0, -0.1, -2.5]
    assert best(branches, confidences(branches, "mean-logprob"), seed=0) is branches[1]
    assert leader(tally(branches, [0.1, 0.5, 0.1]), 0, "p") == "2"


def test_a_branch_without_the_measure_wins_only_alone() -> None:
    assert confidences([branch("1"), branch("2", logprob=-9.0)], "mean-logprob") == [float("-inf"), -9.0]
    assert confidences([branch("1"), branch("2")], "self-certainty") == []
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
        ("nowhere.module:Policy", "no module 'nowhere' for"),
    ],
)
def test_bad_policies_are_named_with_a_mend(text: str, message: str) -> None:
    with pytest.raises(InputError, match="policy:") as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_policy_of_ones_own_is_found_by_its_path() -> None:
    assert parse("tests.driving:EarlyStop?n=3").name == "early-stop"


@pytest.mark.parametrize("certain", ["mean-logprob", "self-certainty"])
def test_where_no_confidence_is_known_votes_count_alike(certain: str) -> None:
    """As on a server that sends no log-probabilities."""
    problem = Problem("p", ({"role": "user", "content": "?"},))
    for name in (
        "best-of-n?n=5&score=",
        "weighted-vote?n=5&weight=",
        "deepconf?n=5&signal=",
        "deepconf?n=5&mode=online&warmup=5&signal=",
    ):
        for seed in range(8):  # no tie
            routine = parse(name + certain).run(problem, Brief(seed, 100, Sampling()))
            next(routine)
            with pytest.raises(StopIteration) as end:
                routine.send(Reply(tuple(branch(vote) for vote in "abbcb")))
            assert end.value.value.answer == "b"
            assert dict(end.value.value.votes) == {"a": 1.0, "b": 3.0, "c": 1.0}


def test_a_branch_whose_confidence_is_not_known_leaves_no_infinite_votes() -> None:
    routine = parse("best-of-n?n=3&score=mean-logprob").run(
        Problem("p", ({"role": "user", "content": "?"},)), Brief(0, 100, Sampling())
    )
    next(routine)
    with pytest.raises(StopIteration) as end:
        routine.send(Reply((branch("a"), branch("b", logprob=-9.0), branch("b"))))
    assert end.value.value.answer == "b"
    assert dict(end.value.value.votes) == {"b": -9.0}
