"""The catalogue of embedded reasoners: read without torch, true to the files beside it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ttc.nano

MODELS = ttc.nano.catalog()


def test_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys, ttc.nano; ttc.nano.catalog(); ttc.nano.resolve('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_resolve_to_folders() -> None:
    assert ttc.nano.resolve("no-such-model") is None
    assert MODELS
    for model in MODELS:
        assert ttc.nano.resolve(model.name) == model.path


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_card_tells_the_truth_about_its_files(model: ttc.nano.NanoModel) -> None:
    config = json.loads((model.path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == model.context == 4096
    weights = model.path / "model.safetensors"
    assert 2 * model.params <= weights.stat().st_size <= 2 * model.params + 10_000  # bf16 and a header
    assert model.format["think_open"] == "<think>"
    assert model.format["think_close"] == model.format["close_text"] == "</think>"
    assert model.format["extract"] == "tail"
    assert model.typical_thinking_tokens > 0
    assert all(task.startswith("rg:") for task in model.tasks)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_readme_is_the_card_in_words(model: ttc.nano.NanoModel) -> None:
    pytest.importorskip("torch")
    from ttc.rl import card

    assert (model.path / "README.md").read_text() == card.readme(card.read(model.path))
