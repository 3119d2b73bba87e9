"""Reward models: the numbers are transformers' own, a prefix scores as it does inside the whole, and the measures count right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

import ttc.nano  # noqa: E402
from ttc.errors import InputError  # noqa: E402
from ttc.pricing import Pricer  # noqa: E402
from ttc.problems import from_text  # noqa: E402
from ttc.rl import card, tokenizer  # noqa: E402
from ttc.rl.model import Shape, Trunk  # noqa: E402
from ttc.rl.reading import Read, Reader  # noqa: E402
from ttc.rl.reward import NanoReward, RewardNet, _inputs, load, save  # noqa: E402
from ttc.rl.train_reward import Chain, auc, pairs, train_outcome, train_process  # noqa: E402
from ttc.types import Charge  # noqa: E402

PROBLEM = from_text("State the final answer to the following arithmetic problem: 12 + 3 - 4 =")[0]
TEXT = "12 + 3 = 15;15 - 4 = 11;So 11.</think>11"
NAMES = ttc.nano.rewards()


def small_net() -> RewardNet:
    torch.manual_seed(0)
    net = RewardNet(Trunk(Shape(width=32, feed_forward=64, layers=2, heads=2, kv_heads=1, head_width=16)))
    for parameter in net.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_transformers_reads_the_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    net = small_net()
    save(net, tmp_path, torch.float32)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokenizer.encode(tokenizer.prompt(PROBLEM.text) + TEXT)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, 0]
    assert theirs.config.num_labels == 1
    reward = NanoReward("x", "outcome", net)
    assert reward.positions([ids])[0][-1] == pytest.approx(float(expected), abs=1e-4)
    assert reward.score(PROBLEM, [TEXT]) == pytest.approx([float(expected.double().sigmoid())], abs=1e-5)


def test_every_step_is_scored_as_the_text_up_to_it_would_be() -> None:
    reward = NanoReward("x", "process", small_net())
    (steps,) = reward.steps(PROBLEM, [TEXT])
    prefixes = ["12 + 3 = 15;", "12 + 3 = 15;15 - 4 = 11;", "12 + 3 = 15;15 - 4 = 11;So 11."]
    prefixes += ["12 + 3 = 15;15 - 4 = 11;So 11.</think>", TEXT]
    assert steps == pytest.approx(reward.score(PROBLEM, prefixes), abs=1e-5)
    assert all(0 < score < 1 for score in steps)


def test_a_batch_scores_as_its_texts_do_one_by_one() -> None:
    reward = NanoReward("x", "outcome", small_net())
    texts = [TEXT, "", "12", TEXT[:20]]
    assert reward.score(PROBLEM, texts) == pytest.approx(
        [reward.score(PROBLEM, [t])[0] for t in texts], abs=1e-4
    )


def test_nothing_is_read_twice() -> None:
    """A step is read behind what was read of its chain; a prompt once; what is all known costs nothing."""
    reward = NanoReward("x", "outcome", small_net())
    prompt, whole = len(tokenizer.encode(tokenizer.prompt(PROBLEM.text))), len(tokenizer.encode(TEXT))
    assert reward.tokens(PROBLEM, [TEXT, ""]) == prompt + whole
    first = ["12 + 3 = 15;", "12 + 3 = 14;", "12"]
    read = sum(len(tokenizer.encode(text)) for text in first)
    assert reward.tokens(PROBLEM, first) == prompt + read
    reward.score(PROBLEM, first)
    assert reward.tokens(PROBLEM, first) == 0
    steps = ["12 + 3 = 15;15 - 4 = 11;", "12 + 3 = 15;15 - 4 = 1", "12 + 3 = 14;", "12 + 3 = 15;15 - 4 = 11;"]
    fresh = len(tokenizer.encode("15 - 4 = 11;")) + len(tokenizer.encode("15 - 4 = 1"))
    assert reward.tokens(PROBLEM, steps) == fresh
    other = from_text("another")[0]
    assert reward.tokens(other, ["1"]) == len(tokenizer.encode(tokenizer.prompt("another"))) + 1


@pytest.mark.parametrize("seed", range(8))
def test_what_is_read_in_pieces_scores_as_what_is_read_whole(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random searches: chains that grow, fork and wait, with little kept or much. What is announced is what is computed."""
    computed, extend = [0], Reader._extend

    def counted(self: Reader, rows: Sequence[tuple[int, ...]], before: Sequence[Read | None]) -> list[Read]:
        computed[0] += sum(len(r) - len(b.ids if b else ()) for r, b in zip(rows, before, strict=True))
        return extend(self, rows, before)

    monkeypatch.setattr(Reader, "_extend", counted)
    rng = random.Random(seed)
    net = small_net()
    pieces = NanoReward("x", "process", net)
    pieces._reader.most_bytes = rng.choice([1, 20_000, 10**9])
    problems = [PROBLEM, from_text("two")[0]]
    chains: list[list[str]] = [["", "1"], [""]]
    for _ in range(12):
        which = rng.randrange(2)
        texts = [
            rng.choice(chains[which]) + rng.choice(["12 + 3;", "So 1.", "4"])
            for _ in range(rng.randint(1, 5))
        ]
        texts += rng.sample(texts, rng.randint(0, 1))
        before = pieces.tokens(problems[which], texts)
        computed[0] = 0
        scores = pieces.score(problems[which], texts)
        assert computed[0] == before
        whole = NanoReward("x", "process", net)
        assert before <= whole.tokens(problems[which], texts)
        assert scores == pytest.approx(
            [row[-1] for row in whole.positions(_inputs(problems[which], texts))], abs=1e-5
        )
        chains[which] = texts


def test_reading_is_priced_by_what_is_computed() -> None:
    """eFLOPs of the shape that the folder tells: a step behind a known beginning costs less than the whole, nothing new nothing."""
    reward = ttc.nano.reward("nano-s-process")
    pricer = Pricer(None, 1, False, usd_per_m_input=2.0)
    first = pricer.reading(reward, PROBLEM, [TEXT, "12"])
    assert reward.shape is not None
    assert first.tokens_judge == reward.tokens(PROBLEM, [TEXT, "12"]) > 0
    least = 2 * 0.7e6 * first.tokens_judge  # two a parameter and token, embeddings apart
    assert least < first.flops < 2 * least
    assert first.eflops == pytest.approx(first.flops + 562.5 * first.bytes)
    assert first.dollars == pytest.approx(2e-6 * first.tokens_judge)
    reward.score(PROBLEM, [TEXT.partition("</think>")[0]])
    step = pricer.reading(reward, PROBLEM, [TEXT])
    assert 0 < step.flops < first.flops / 4
    reward.score(PROBLEM, [TEXT])
    assert pricer.reading(reward, PROBLEM, [TEXT]) == Charge()


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, right = rng.integers(0, 6, 12).astype(float), rng.random(12) < 0.5
        if right.all() or not right.any():
            continue
        both = itertools.product(scores[right], scores[~right])
        assert auc(scores, right) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in both]))


def chains(n: int) -> list[Chain]:
    """Right chains hold an "a", wrong ones a "b"; two of each a problem."""
    rng = random.Random(0)
    found = []
    for index in range(n):
        right = index % 2 == 0
        text = "".join(rng.choice("cdef") for _ in range(rng.randrange(4, 12)))
        prompt = tokenizer.encode(tokenizer.prompt("x"))
        found.append(
            Chain(prompt + tokenizer.encode(("a" if right else "b") + text), len(prompt), right, index // 4)
        )
    return found


def test_pairs_are_of_one_problem_right_one_first() -> None:
    found = {tuple(chain.ids): chain for chain in chains(80)}
    drawn = pairs(list(found.values()), 4, 0)
    assert len(drawn) == 40
    for right, wrong in drawn:
        a, b = found[tuple(right)], found[tuple(wrong)]
        assert a.right and not b.right and a.problem == b.problem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_training_tells_right_from_wrong(kind: str, tmp_path: Path) -> None:
    if kind == "outcome":
        pytest.importorskip("trl")
    from ttc.rl.model import Nano
    from ttc.rl.model import save as save_nano

    torch.manual_seed(0)
    base = tmp_path / "base"
    save_nano(Nano(Shape(width=32, feed_forward=64, layers=1, heads=2, kv_heads=1, head_width=16)), base)
    out = tmp_path / "out"
    if kind == "outcome":
        train_outcome(base, chains(400), out, rate=5e-3)
    else:
        train_process(base, chains(400), out, rate=5e-3, step_tokens=256)
    card.write_reward(out, {"name": "x", "kind": kind, "params": 1, "training": {}, "evaluation": []})
    fresh = chains(440)[400:]
    scores = [row[-1] for row in load(out).positions([chain.ids for chain in fresh])]
    assert auc(np.array(scores), np.array([chain.right for chain in fresh])) > 0.9


def test_an_unknown_reward_model_is_named() -> None:
    with pytest.raises(InputError, match="reward model 'no-such'"):
        ttc.nano.reward("no-such")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_reward_models_score_and_tell_the_truth(name: str) -> None:
    reward = ttc.nano.reward(name)
    info = card.read(ttc.nano.REWARDS / name)
    assert reward.kind == info["kind"] == name.rpartition("-")[2]
    assert sum(p.numel() for p in reward.net.parameters()) == info["params"]
    assert (ttc.nano.REWARDS / name / "README.md").read_text() == card.reward_readme(info)
    right, wrong = reward.score(
        PROBLEM, [TEXT, TEXT.replace("= 15", "= 25").replace("11", "21").replace("15 -", "25 -")]
    )
    assert right > wrong
