"""What is known of a model from its folder alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ttc.engine.model import load_model_files


def test_a_model_that_the_cost_model_does_not_count_has_no_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert load_model_files(str(tmp_path)).shape is None
    assert "no hidden_size" in caplog.text
    assert "no budget of eFLOPs" in caplog.text
