"""What a trace states is true where it is a target; held-out problems stay out."""

from __future__ import annotations

import random
import re

import pytest

from ttc.rl import countdown, heldout, products, sums, tokenizer, traces
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


@pytest.mark.parametrize("task", traces.TASKS)
def test_rechecks_are_stronger_than_what_they_check(task: str) -> None:
    rng = random.Random(4)
    for _ in range(50):
        problem = traces.TASKS[task](rng, DATA, 1.0)
        styles = list(problem.stronger)
        assert set(problem.first) <= set(styles)
        for style, stronger in problem.stronger.items():
            assert all(styles.index(other) > styles.index(style) or other == styles[-1] for other in stronger)


@pytest.mark.parametrize("task", traces.TASKS)
def test_a_chain_ends_at_a_right_answer_unless_a_mistake_was_planted(task: str) -> None:
    rng = random.Random(7)
    wrong = 0
    for _ in range(60):
        problem = traces.TASKS[task](rng, DATA, 1.0)
        for style in problem.stronger:
            assert problem.right(problem.work(rng, style).value)
            chain = problem.work(rng, style, mistake=True)
            if not problem.right(chain.value):
                wrong += 1
                assert chain.said == 0.0 or any(piece.weight == 0.0 for piece in chain.pieces)
    assert wrong > 60


@pytest.mark.parametrize(
    ("task", "query"),
    [("sums", "rg:chain_sum"), ("long", "rg:chain_sum"), ("products", "rg:products"), ("countdown", "rg:countdown")],
)  # fmt: skip
def test_reasoning_gym_gives_the_answers_of_traces_full_marks(task: str, query: str) -> None:
    pytest.importorskip("reasoning_gym")
    scorer, rng = heldout.dataset(query, 0, 1), random.Random(11)
    for _ in range(150):
        problem = traces.TASKS[task](rng, DATA, 1.0)
        answer = traces.trace(rng, problem).answer
        metadata = {"numbers": list(getattr(problem, "numbers", ())), "target": getattr(problem, "target", 0)}
        assert scorer.score_answer(answer, {"answer": str(problem.answer), "metadata": metadata}) == 1.0


def test_countdown_steps_and_expressions_are_true() -> None:
    rng = random.Random(2)
    for _ in range(60):
        problem = countdown.draw(rng, DATA, 1.0)
        every = countdown.folds(problem.numbers)
        for fold in rng.sample(every, min(8, len(every))):
            assert eval(fold.expression) == fold.value
            assert sorted(map(int, re.findall(r"\d+", fold.expression))) == sorted(problem.numbers)
            for step in f"{fold.steps}{fold.value}".split(","):
                left, right = step.split("=")
                assert eval(left) == int(right)


def test_a_recheck_in_countdown_works_out_what_was_concluded() -> None:
    rng = random.Random(8)
    confirmed = found = 0
    for _ in range(80):
        problem = countdown.draw(rng, DATA, 1.0)
        guess = problem.work(rng, "guess", mistake=rng.random() < 0.5)
        recheck = problem.work(rng, "search", previous=guess.value)
        first = recheck.pieces[0].text
        checked = next(f for f in countdown.folds(problem.numbers) if f.expression == guess.value)
        assert first.startswith(f"{checked.steps}{checked.value}")
        confirmed += first.endswith("!") and recheck.value == guess.value
        found += first.endswith(";") and problem.right(recheck.value)
    assert confirmed + found == 80
    assert confirmed > 10
    assert found > 10


@pytest.mark.parametrize("style", ["partials", "columns"])
def test_every_step_of_a_product_is_true(style: str) -> None:
    rng = random.Random(9)
    for _ in range(200):
        problem = products.draw(rng, DATA, 1.0)
        for line in "".join(p.text for p in problem.work(rng, style).pieces).split(";")[:-1]:
            step, _, value = line.rpartition(" = ")
            left, sign, right = step.split(":")[0].split(" ")
            assert int(value) == (int(left) * int(right) if sign == "*" else int(left) + int(right))
            if ":" in step and sign == "*":
                assert step.split(":")[1] == products.product_columns(int(left), int(right))


def test_state_writes_what_is_left_to_add() -> None:
    rng = random.Random(10)
    problem = sums.draw_long(rng, DATA, 1.0)
    lines = "".join(p.text for p in problem.work(rng, "state").pieces).split(";")[:-1]
    assert lines[0] == problem.expression
    assert lines[-1] == str(problem.answer)
    assert all(eval(line) == problem.answer for line in lines)


def test_tasks_share_the_tokens_as_configured() -> None:
    stream = traces.Corpus(random.Random(0), DATA, frozenset())
    for _ in range(300):
        stream.draw(0.0)
    assert "long" not in stream.written
    for _ in range(3000):
        stream.draw(1.0)
    total = sum(stream.written.values())
    for name, share in DATA["tasks"].items():
        assert stream.written[name] / total == pytest.approx(share, abs=0.03)


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
        random.Random(0),
        {"max_terms": 2, "digit_weights": [1.0], "max_columns": 4, "tasks": {"sums": 1.0}},
        held_out,
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


@pytest.mark.parametrize(
    ("task", "grades"),
    [
        (heldout.GRADED["sums"][0], range(6, 13)),
        (heldout.GRADED["products"][1], range(9, 10)),
        (heldout.GRADED["countdown"][1], range(4, 5)),
    ],
)
def test_problems_tell_their_grade(task: str, grades: range) -> None:
    from ttc.problems import from_task

    found = {problem.meta["grade"] for problem in from_task(task, 12, 5)}
    assert found <= set(grades)
    assert len(found) > 1 or len(grades) == 1
