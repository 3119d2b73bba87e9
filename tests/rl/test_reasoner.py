"""The recipe learns, resumes exactly, and its measurements count right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from ttc.rl import (  # noqa: E402
    card,
    heldout,
    tokenizer,
)
from ttc.rl.evaluate import Answers, Bench, coverage, gain, interval, joined, majority, triggers  # noqa: E402
from ttc.rl.reasoner import Run, batches  # noqa: E402

CONFIG: dict[str, Any] = {
    "shape": {"width": 32, "feed_forward": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16},
    "data": {
        "max_terms": 4,
        "digit_weights": [1.0],
        "max_columns": 8,
        "product_digits": [1.0],
        "countdown_numbers": [1.0, 0.5, 0.0],
        "countdown_value": 9,
        "countdown_target": [2, 60],
        "tasks": {"sums": 0.6, "products": 0.2, "countdown": 0.2},
        "from": {"products": 0.2, "countdown": 0.3},
    },
    "training": {
        "tokens": 20_000,
        "step_tokens": 512,
        "micro_tokens": 256,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "decay_from": 0.5,
        "final_rate": 0.1,
        "weight_decay": 0.05,
        "half_matmul": False,
    },
}


def steps(run: Run, until: int) -> list[float]:
    return [run.advance(run.step / 20) for _ in range(until - run.step)]


def test_twenty_steps_lower_the_loss() -> None:
    losses = steps(Run(CONFIG, 0, "cpu", frozenset()), 20)
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, first = Run(CONFIG, 7, "cpu", frozenset()), Run(CONFIG, 7, "cpu", frozenset())
    expected = steps(whole, 16)
    started = steps(first, 8)
    first.save(tmp_path)
    second = Run(CONFIG, 99, "cpu", frozenset())
    second.resume(tmp_path)
    assert second.step == 8
    assert started + steps(second, 16) == expected
    assert second.tokens == whole.tokens
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_is_continued_from_a_shipped_model(tmp_path: Path) -> None:
    """Weights, counts and curve are taken over; the rate warms up again; the data are fresh."""
    first = Run(CONFIG, 0, "cpu", frozenset())
    losses = steps(first, 10)
    first.log()
    first.save(tmp_path)
    model = tmp_path / "model"
    counts = {"steps": first.step, "tokens": first.tokens, "tokens_read": first.read_tokens, "minutes": 2.0}
    (model / "card.json").write_text(json.dumps({"training": counts}))
    (model / "loss.json").write_text(json.dumps(first.curve))
    second = Run(CONFIG, 0, "cpu", frozenset())
    second.start_from(model)
    assert (second.step, second.tokens, second.seconds) == (10, first.tokens, 120.0)
    assert second.curve == first.curve
    assert second.corpus.draw(0.5).ids != Run(CONFIG, 0, "cpu", frozenset()).corpus.draw(0.5).ids
    assert np.mean(steps(second, 14)) < losses[0]  # learnt, not begun again
    rates = {group["lr"] for optimizer in second.optimizers for group in optimizer.param_groups}
    assert max(rates) <= CONFIG["training"]["learning_rate"]
    other = {**CONFIG, "shape": {**CONFIG["shape"], "layers": CONFIG["shape"]["layers"] + 1}}
    with pytest.raises(ValueError, match="another shape"):
        Run(other, 0, "cpu", frozenset()).start_from(model)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run = Run(CONFIG, 0, "cpu", frozenset())
    run.save(tmp_path)
    other = {**CONFIG, "data": {**CONFIG["data"], "max_terms": 3}}
    with pytest.raises(ValueError, match="another configuration"):
        Run(other, 0, "cpu", frozenset()).resume(tmp_path)


def test_batches_hold_every_trace_once_and_little_padding() -> None:
    run = Run(CONFIG, 0, "cpu", frozenset())
    traces = [run.corpus.draw(1.0) for _ in range(40)]
    parts = batches(traces, 256)
    assert sum(len(part.ids) for part in parts) == 40
    assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(
        sum(sum(t.weights) for t in traces)
    )
    padding = 1 - sum(len(t.ids) for t in traces) / sum(part.ids.numel() for part in parts)
    assert padding < 0.2


def answers(rows: list[list[str]], gold: str = "1") -> Answers:
    right = np.array([[answer == gold for answer in row] for row in rows])
    return Answers(right, rows, np.zeros(right.shape), np.ones(right.shape, dtype=bool))


def test_majority_counts_ties_by_chance_and_empty_answers_not_at_all() -> None:
    votes = answers([["1", "1", "2"], ["1", "2", "3"], ["2", "2", "1"], ["", "", "1"], ["", "", ""]])
    assert majority(votes, 3).tolist() == pytest.approx([1, 1 / 3, 0, 1, 0])
    assert majority(votes, 1).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 1 / 3, 1 / 3, 0]
    )  # of one vote: pass@1
    assert coverage(votes, 1).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 0])
    assert coverage(votes, 2).tolist() == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 0])


def test_intervals_hold_the_mean() -> None:
    found = interval(np.array([0.0, 1.0] * 50))
    assert found["mean"] == 0.5
    assert found["ci95"] == pytest.approx([0.4038, 0.5962], abs=1e-4)  # Wilson's of 50 in 100
    assert found["problems"] == 100
    assert gain(np.zeros(30))["ci95"] == pytest.approx([-0.1206, 0.1206], abs=1e-4)


def test_draws_of_the_same_problems_are_joined_side_by_side() -> None:
    whole = joined([answers([["1", "2"], ["1", "1"]]), answers([["3", "1"], ["2", "2"]])])
    assert whole.answers == [["1", "2", "3", "1"], ["1", "1", "2", "2"]]
    assert whole.right.tolist() == [[True, False, False, True], [True, True, False, False]]


class Scripted:
    """A sampler that concludes wrongly at first and, after a trigger, rightly; the answer is its last conclusion."""

    def __init__(self, items: list[heldout.Item]) -> None:
        self.answers = {item.prompt: item.answer for item in items}
        self.seeds: list[int] = []

    def __call__(self, texts: Any, max_tokens: int, stop: Any, seed: int) -> list[list[int]]:
        self.seeds.append(seed)
        return [tokenizer.encode(self.reply(tokenizer.decode(text))) for text in texts]

    def reply(self, text: str) -> str:
        answer = next(answer for prompt, answer in self.answers.items() if prompt in text)
        checked = tokenizer.TRIGGERS[0] in text
        if text.endswith("</think>"):
            return (answer if checked else "7000") + "<eos>"
        return f"So {answer if checked else 7000}."


def test_triggers_are_put_behind_conclusions_and_their_gain_is_of_the_same_problems() -> None:
    task = heldout.GRADED["sums"][0]
    sampler = Scripted(heldout.items(task, 6))
    rows = triggers(sampler, task, 6, 2, tokenizer.TRIGGERS[:1], 1)
    assert [(row["k"], row["pass@1"]["mean"]) for row in rows] == [(0, 0.0), (1, 1.0)]
    assert "gain" not in rows[0]  # it is what the others are held against
    assert rows[1]["gain"]["mean"] == 1.0
    assert rows[1]["hard half"]["mean"] == 1.0
    assert len(set(sampler.seeds)) == len(sampler.seeds)


def test_a_bench_judges_by_reasoning_gyms_scorer() -> None:
    task = heldout.GRADED["countdown"][0]
    bench = Bench(Scripted([]), task, 3, 1)
    for index, item in enumerate(bench.items):
        assert bench.verdict(index, item.answer)
        assert not bench.verdict(index, item.answer + " + 1")


@pytest.mark.parametrize(
    ("thought", "total"),
    [
        ("", ""),
        ("47", ""),
        ("47,85,", "85"),
        ("47,85,2", "85"),
        ("47 + 38 = 85;85 - 5", "85"),
        ("47 + 38:15,8 = 85;85 - 58:7", "85"),
        ("47,85;So 84.Wait85", "84"),
        ("47,-15,", "-15"),
    ],
)
def test_the_last_total_is_read_off_a_cut_thought(thought: str, total: str) -> None:
    assert card.last_total(thought) == total
