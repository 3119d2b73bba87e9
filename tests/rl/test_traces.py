"""What a trace states is true where it is a target; held-out problems stay out."""

from __future__ import annotations

import random
import re

import pytest

from ttc.rl import heldout, sums, tokenizer, traces
from ttc.rl.model import size_config

DATA = size_config("s")["data"]


def drawn(count: int, progress: float = 1.0) -> list[tuple[sums.Sum, traces.Trace]]:
    rng = random.Random(5)
    problems = [sums.draw(rng, DATA, progress) for _ in range(count)]
    return [(problem, traces.trace(rng, problem, progress)) for problem in problems]


def targets(trace: traces.Trace) -> str:
    """The text with every token that is not a target replaced by a bar."""
    pairs = zip(trace.ids, trace.weights, strict=True)
    return "".join(tokenizer.VOCABULARY[token] if weight else "|" for token, weight in pairs)


def test_every_equation_that_is_a_target_is_right() -> None:
    checked = 0
    for _, trace in drawn(600):
        for left, sign, right, columns, total in re.findall(
            r"(?:^|[;|.>])(-?\d+) ([+-]) (\d+)(?::([\d,-]+))? = (-?\d+);", targets(trace)
        ):
            step = int(right) if sign == "+" else -int(right)
            assert int(left) + step == int(total)
            assert not columns or columns == sums.column_work(int(left), step)
            checked += 1
    assert checked > 2000


@pytest.mark.parametrize(
    ("left", "right"), [(47, 38), (85, -58), (0, -7), (-15, -86), (-5, 100), (9, -9), (999, 1)]
)
def test_columns_give_the_sum(left: int, right: int) -> None:
    columns = sums.column_work(left, right).split(",")
    digits = "".join(column.rstrip("-")[-1] for column in reversed(columns))
    overflow = columns[-1].rstrip("-")[:-1]
    assert int(overflow + digits) == abs(left + right)


def test_the_answer_is_gold_or_no_target() -> None:
    for problem, trace in drawn(600):
        text = tokenizer.decode(trace.ids)
        tail = len(tokenizer.encode(text.split("</think>")[1]))
        answer = tokenizer.decode(trace.ids[-tail:-1])
        assert trace.ids[-1] == tokenizer.EOS
        assert answer
        if any(trace.weights[-tail:-1]):
            assert answer == str(problem.answer) == trace.answer


def test_a_chain_without_mistake_ends_at_the_answer_and_one_with_a_mistake_masks_it() -> None:
    rng = random.Random(3)
    for _ in range(300):
        problem = sums.draw(rng, DATA, 1.0)
        for style in sums.STYLES:
            right, wrong = sums.work(rng, problem, style), sums.work(rng, problem, style, mistake=True)
            assert right.value == problem.answer
            assert all(piece.weight == 1.0 for piece in right.pieces)
            assert any(piece.weight == 0.0 for piece in wrong.pieces)


def test_rechecks_are_stronger_than_what_they_check() -> None:
    order = {style: rank for rank, style in enumerate(sums.STYLES)}
    for style, stronger in traces.STRONGER.items():
        assert all(order[other] > order[style] or other == "columns" for other in stronger)


def test_votes_tie_to_the_latest() -> None:
    assert [traces.vote(v) for v in ([1], [1, 2], [1, 1, 2], [1, 2, 1, 2], [2, 1, 1, 2])] == [1, 2, 1, 2, 2]


def test_effort_labels_follow_length() -> None:
    lengths: dict[str, list[int]] = {}
    for _, trace in drawn(1500):
        label = next(
            (tokenizer.VOCABULARY[t] for t in trace.ids if tokenizer.VOCABULARY[t] in tokenizer.EFFORTS), None
        )
        if label:
            lengths.setdefault(label, []).append(len(trace.ids))
    means = [sum(lengths[label]) / len(lengths[label]) for label in tokenizer.EFFORTS]
    assert means == sorted(means)


def test_the_effort_mark_is_a_target() -> None:
    marks = {tokenizer.ID[effort] for effort in tokenizer.EFFORTS}
    for _, trace in drawn(200):
        assert all(
            weight == 1.0 for token, weight in zip(trace.ids, trace.weights, strict=True) if token in marks
        )


def test_a_forced_close_is_never_a_target_in_the_middle_of_a_chain() -> None:
    for _, trace in drawn(600):
        text = targets(trace)
        if "</think>" in text:
            assert re.search(r"So -?\d+\.</think>", text), text


def test_held_out_expressions_never_enter_training() -> None:
    pytest.importorskip("reasoning_gym")
    task = "rg:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    held_out = heldout.expressions([task], seeds=40)
    assert 30 < len(held_out) <= 40
    stream = traces.Corpus(
        random.Random(0), {"max_terms": 2, "digit_weights": [1.0], "max_columns": 4}, held_out
    )
    seen = {tokenizer.decode(stream.draw(0.0).ids) for _ in range(1000)}
    assert not any(f": {expression} =" in text for expression in held_out for text in seen)


def test_problems_are_written_as_reasoning_gym_writes_them() -> None:
    pytest.importorskip("reasoning_gym")
    for item in heldout.items("rg:chain_sum?min_terms=2&max_terms=9&min_digits=1&max_digits=4", 50, seed=9):
        first, *rest = item.entry["metadata"]["expression"].split(" ")
        terms = (int(first), *map(int, rest[1::2]))
        signs = (1, *(1 if sign == "+" else -1 for sign in rest[::2]))
        problem = sums.Sum(terms, signs, item.entry["metadata"]["num_digits"])
        assert problem.prompt == item.prompt
        assert str(problem.answer) == item.answer
