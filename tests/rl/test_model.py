"""The training network is Qwen3, and the shipped weights are what transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest

import ttc.nano

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ttc.rl import heldout, tokenizer  # noqa: E402
from ttc.rl.generate import generate  # noqa: E402
from ttc.rl.model import Nano, Shape, load, save  # noqa: E402

SMALL = Shape(width=32, feed_forward=48, layers=2, heads=4, kv_heads=2, head_width=16)
MODELS = [model.name for model in ttc.nano.catalog()]


def prompts() -> list[list[int]]:
    pytest.importorskip("reasoning_gym")
    return [tokenizer.encode(tokenizer.prompt(item.prompt)) for item in heldout.items("rg:chain_sum", 4)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_shipped_weights_equal_those_of_transformers(name: str) -> None:
    folder = ttc.nano.resolve(name)
    assert folder is not None
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder)
    with torch.no_grad():
        for ids in prompts():
            row = torch.tensor([ids])
            torch.testing.assert_close(ours(row), reference(row).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_network_loads_alike_here_and_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nano(SMALL)
    save(model, tmp_path, torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(6, SMALL.vocabulary, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(ids), model(ids))
        torch.testing.assert_close(reference(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("So 1.") == tokenizer.encode("So 1.")


def test_batched_greedy_generation_equals_one_forward_a_token() -> None:
    torch.manual_seed(1)
    model = Nano(SMALL).eval()
    starts = [[1, 7, 20], [1, 9, 30, 31, 40, 12], [1]]
    batched = generate(model, starts, 30, stop=(), temperature=0)
    for start, new in zip(starts, batched, strict=True):
        ids = list(start)
        with torch.no_grad():
            for _ in range(30):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(start) :] == new


def test_generation_stops_at_stop_tokens_and_keeps_rows_apart() -> None:
    torch.manual_seed(2)
    model = Nano(SMALL).eval()
    starts = [[1, token] for token in range(10, 40)]
    free = generate(model, starts, 20, stop=(), temperature=0)
    stop = free[0][5]
    for whole, cut in zip(free, generate(model, starts, 20, stop=(stop,), temperature=0), strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)
