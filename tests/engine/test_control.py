"""The control processor alone, driven as vLLM's batch would: rows added, moved, swapped, removed, preempted and brought back."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

VOCAB, END, CLOSE, LEAD = 32, 2, 7, 9


class Batch:
    """A persistent batch of rows under a processor; each step samples greedily from given logits."""

    def __init__(self) -> None:
        from ttc.engine.control import ControlProcessor

        self.processor = ControlProcessor(None, torch.device("cpu"), False)
        self.outputs: list[list[int]] = []
        self.added: list[tuple[int, Any, None, list[int]]] = []
        self.removed: list[int] = []
        self.moved: list[Any] = []

    def add(self, output: list[int] | None = None, **instructions: Any) -> list[int]:
        from vllm import SamplingParams

        params = SamplingParams(
            extra_args={"ttc": instructions} if instructions else None, stop_token_ids=[END]
        )
        row = output if output is not None else []
        self.added.append((len(self.outputs), params, None, row))
        self.outputs.append(row)
        return row

    def swap(self, a: int, b: int) -> None:
        from vllm.v1.sample.logits_processor import MoveDirectionality

        self.moved.append((a, b, MoveDirectionality.SWAP))
        self.outputs[a], self.outputs[b] = self.outputs[b], self.outputs[a]

    def remove_last(self) -> list[int]:
        self.removed.append(len(self.outputs) - 1)
        return self.outputs.pop()

    def step(self, favourite: int = 20, *, cut: bool = False, by: float = 5.0) -> None:
        """``cut``: a part of a prefill, whose sample is thrown away."""
        from vllm.v1.sample.logits_processor import BatchUpdate

        changed = self.added or self.removed or self.moved
        update = (
            BatchUpdate(len(self.outputs), tuple(self.removed), tuple(self.added), tuple(self.moved))
            if changed
            else None
        )
        self.processor.update_state(update)
        self.added, self.removed, self.moved = [], [], []
        logits = torch.zeros(len(self.outputs), VOCAB)
        logits[:, favourite] = by
        for row, token in zip(self.outputs, self.processor.apply(logits).argmax(-1).tolist(), strict=True):
            if not cut:
                row.append(token)


def test_a_thought_is_closed_at_its_due_and_neighbours_are_not() -> None:
    batch = Batch()
    capped = batch.add(due=3, think_close=[CLOSE], close=[CLOSE, 8], lead=[])
    free = batch.add()
    for _ in range(7):
        batch.step()
    assert capped == [20, 20, 20, CLOSE, 8, 20, 20]
    assert free == [20] * 7


def test_a_closed_thought_gets_the_lead_instead() -> None:
    batch = Batch()
    row = batch.add(due=4, think_close=[CLOSE], close=[CLOSE, 8], lead=[LEAD])
    batch.step()
    batch.step(favourite=CLOSE)
    for _ in range(4):
        batch.step()
    assert row == [20, CLOSE, 20, 20, LEAD, 20]


def test_an_end_inside_the_thought_becomes_a_closing_and_no_answer_is_empty() -> None:
    batch = Batch()
    row = batch.add(due=50, think_close=[CLOSE], close=[CLOSE], lead=[])
    batch.step()
    batch.step(favourite=END)
    assert row == [20, CLOSE]
    batch.step(favourite=END)
    assert row[2] != END, "an answer has at least one token"
    batch.step(favourite=END)
    assert row[3] == END


@pytest.mark.parametrize("seed", range(20))
def test_moves_and_swaps_follow_the_rows(seed: int) -> None:
    rng = random.Random(seed)
    batch = Batch()
    rows = {due: batch.add(due=due, think_close=[CLOSE], close=[CLOSE, 8], lead=[]) for due in range(1, 9)}
    for _ in range(12):
        batch.step()
        batch.swap(*rng.sample(range(8), 2))
    for due, row in rows.items():
        assert row[: due + 2] == [20] * due + [CLOSE, 8]
        assert row.count(CLOSE) == 1


@pytest.mark.parametrize("when", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("in_process", [True, False])
def test_a_preempted_row_is_forced_once(when: int, in_process: bool) -> None:
    """With the Control at hand (one process) and without it (worker processes: read back from the output)."""
    from ttc.engine.control import CONTROLS, Control

    batch = Batch()
    told: dict[str, Any] = {"due": 3, "think_close": [CLOSE], "close": [CLOSE, 8, 9], "lead": []}
    if in_process:
        CONTROLS[7] = Control.of(told)
        told["key"] = 7
    batch.add(**told)
    for _ in range(when):
        batch.step()
    row = batch.remove_last()
    batch.step()
    batch.add(output=row, **told)
    for _ in range(6):
        batch.step()
    CONTROLS.clear()
    assert row == [20, 20, 20, CLOSE, 8, 9, *[20] * (len(row) - 6)]


@pytest.mark.parametrize("cuts", [0, 2])
@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("delimiter", [[CLOSE], [CLOSE, 8]])
def test_an_answer_has_a_token_also_where_its_row_is_preempted_right_behind_the_delimiter(
    delimiter: list[int], in_process: bool, cuts: int
) -> None:
    from ttc.engine.control import CONTROLS, Control

    batch = Batch()
    told: dict[str, Any] = {"due": 50, "think_close": delimiter, "close": delimiter}
    if in_process:
        CONTROLS[7] = Control.of(told)
        told["key"] = 7
    batch.add()
    batch.add(**told)
    batch.step()
    for token in delimiter:
        batch.step(favourite=token)
    row = batch.remove_last()
    batch.step()
    batch.add(output=row, **told)
    for _ in range(cuts):
        batch.step(favourite=END, cut=True)
    batch.step(favourite=END)
    batch.step(favourite=END)
    CONTROLS.clear()
    assert row[: 1 + len(delimiter)] == [20, *delimiter]
    assert row[1 + len(delimiter)] != END
    assert row[2 + len(delimiter)] == END


def test_an_answer_has_a_token_also_where_its_thought_was_closed_in_the_prompt() -> None:
    batch = Batch()
    told: dict[str, Any] = {"due": 50, "think_close": [CLOSE], "close": [CLOSE], "opened": False}
    bare, begun = batch.add(**told, bare=True), batch.add(**told)
    batch.step(favourite=END, cut=True)
    batch.step(favourite=END)
    batch.step(favourite=END)
    assert bare[0] != END
    assert bare[1] == begun[0] == END


@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("kind", ["trigger", "least", "delimiter", "confidence"])
def test_what_a_cut_prefill_seems_to_say_is_taken_back(kind: str, cuts: int) -> None:
    """Chunked prefill shows logits of the middle of a prompt, and after a preemption of an output: they decide nothing."""
    told: dict[str, dict[str, Any]] = {
        "trigger": {"triggers": [[5, 6]], "at_end": 1},
        "least": {"triggers": [[5, 6]], "min_thinking": 6},
        "delimiter": {"think_close": [CLOSE, 8], "close": [CLOSE, 8]},
        "confidence": {"stop_below": 3.0, "stop_window": 2, "stop_top_k": 2},
    }
    batch = Batch()
    asked: dict[str, Any] = {"due": 50, "think_close": [CLOSE], "close": [CLOSE]} | told[kind]
    batch.add(**asked)
    misleading: dict[str, Any] = {} if kind == "confidence" else {"favourite": END, "by": 60.0}
    for _ in range(cuts):
        batch.step(cut=True, **misleading)
    batch.step()
    row = batch.remove_last()
    batch.step()
    batch.add(output=row, **asked)
    for _ in range(cuts):
        batch.step(cut=True, **misleading)
    batch.step(by=60.0)
    batch.step(by=60.0)
    assert row == [20] * 3
    if kind == "confidence":
        batch.step()
        batch.step()
        assert row[3:] == [20, CLOSE], "two in a row"
    else:
        batch.step(favourite=END, by=60.0)
        batch.step(by=60.0)
        assert row[3:] == ([CLOSE, 8] if kind == "delimiter" else [5, 6]), "now it is said"


def test_confidence_is_the_mean_over_sampled_tokens() -> None:
    from ttc.engine.control import CONTROLS, Control
    from ttc.engine.reading import confidence

    batch = Batch()
    told: dict[str, Any] = {
        "due": 2, "think_close": [CLOSE], "close": [CLOSE], "lead": [], "signals": True, "key": 1,
    }  # fmt: skip
    CONTROLS[1] = control = Control.of(told)
    batch.add(**told)
    for _ in range(6):
        batch.step()
    CONTROLS.clear()
    log_z = math.log(math.exp(5.0) + VOCAB - 1)
    mean_logprob, certainty = confidence(control)
    assert mean_logprob == pytest.approx(5.0 - log_z, abs=1e-5)
    assert certainty == pytest.approx(log_z - 5.0 / VOCAB - math.log(VOCAB), abs=1e-5)
    assert control.scored == 4, "five sampled so far, one of them not yet seen, and the forced one left out"
    assert control.forced == 1


def test_rows_with_several_things_due_at_one_position() -> None:
    """A checkpoint that does not fit is passed over, twice at one position, in many rows at one step."""
    batch = Batch()
    told: dict[str, Any] = {
        "due": 9,
        "think_close": [CLOSE],
        "close": [CLOSE, 8],
        "triggers": [[5] * 20],
        "at": [2, 2, 2, 3],
    }
    rows = [batch.add(**told) for _ in range(8)]
    for _ in range(13):
        batch.step()
    assert all(row == [20] * 9 + [CLOSE, 8, 20, 20] for row in rows)


def test_the_chance_of_an_end_is_that_of_the_sampler() -> None:
    """Against the definition, row by row: softmax, the k likeliest, the smallest set of mass p. Where the draw decides the same
    either way, a bound will do."""
    from ttc.engine.control import Control
    from ttc.engine.reading import chances_of

    def defined(logits: Any, control: Control, ids: list[int]) -> float:
        if control.temperature == 0:
            return float(int(logits.argmax()) in ids)
        p, order = (logits / control.temperature).softmax(-1).sort(descending=True)
        p[control.top_k or len(p) :] = 0
        p /= p.sum().clone()
        p[p.cumsum(-1) - p >= control.top_p] = 0
        return float(p[torch.isin(order, torch.tensor(ids))].sum() / p.sum())

    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(200):
        count = rng.randint(1, 6)
        logits = 3 * torch.randn(count, VOCAB, generator=generator)
        rows, draws = [Control() for _ in range(count)], [rng.random() for _ in range(count)]
        ids = [rng.sample(range(VOCAB), rng.randint(0, 3)) for _ in rows]
        for row, control in enumerate(rows):
            control.row, control.temperature = row, rng.choice([0.0, 0.5, 1.0, 1.7])
            control.top_p, control.top_k = rng.choice([1.0, 0.9, 0.5]), rng.choice([0, 5, 100])
        found = chances_of(logits.clone(), rows, ids, draws)
        for row, control in enumerate(rows):
            wanted = defined(logits[row], control, ids[row])
            assert found[row] == pytest.approx(wanted, abs=1e-5) or min(draws[row], 1) >= max(
                found[row], wanted
            )


def test_a_forced_token_is_the_only_one_at_any_temperature() -> None:
    batch = Batch()
    row = batch.add(due=1, think_close=[CLOSE], close=[CLOSE, 8], lead=[])
    batch.step()
    batch.processor.update_state(None)
    logits = batch.processor.apply(torch.full((1, VOCAB), 40.0))
    assert row == [20]
    for temperature in (0.01, 1.0, 50.0):
        assert (logits / temperature).softmax(-1)[0, CLOSE] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"due": -1}, {"due": "soon"}, {"colour": 3}, "close it", {"loop_repeats": 1}, {"key": []}],
    ids=["negative", "text", "unknown", "no mapping", "a loop of one", "a key of another kind"],
)
def test_instructions_are_validated_at_the_door(wrong: Any) -> None:
    from vllm import SamplingParams

    from ttc.engine.control import ControlProcessor

    with pytest.raises(ValueError, match="ttc"):
        ControlProcessor.validate_params(SamplingParams(extra_args={"ttc": wrong}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"think_close": [VOCAB], "due": 2},
        {"think_close": [CLOSE], "close": [CLOSE, 10**9], "due": 2},
        {"think_close": [CLOSE], "lead": [VOCAB], "due": 2},
        {"think_close": [CLOSE], "triggers": [[5], [VOCAB]], "at": [1, 2], "due": 20},
    ],
)
def test_a_token_that_the_model_has_not_does_not_end_the_engine(wrong: dict[str, Any]) -> None:
    """A server's processor knows the model's vocabulary only here: such instructions are ignored, and others go on."""
    batch = Batch()
    batch.processor.vocabulary = VOCAB
    lost = batch.add(**wrong)
    capped = batch.add(due=3, think_close=[CLOSE], close=[CLOSE, 8], lead=[])
    for _ in range(6):
        batch.step()
    assert lost == [20] * 6
    assert capped == [20, 20, 20, CLOSE, 8, 20]


def test_an_end_mark_that_the_model_has_not_is_none() -> None:
    batch = Batch()
    batch.processor.vocabulary = VOCAB
    from vllm import SamplingParams

    row: list[int] = []
    instructions = {"due": 2, "think_close": [CLOSE], "close": [CLOSE], "lead": []}
    params = SamplingParams(extra_args={"ttc": instructions}, stop_token_ids=[END, VOCAB + 5, -1])
    batch.added.append((0, params, None, row))
    batch.outputs.append(row)
    for _ in range(4):
        batch.step()
    assert row == [20, 20, CLOSE, 20]
