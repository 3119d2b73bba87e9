"""Arguments of vLLM's own, as users give them."""

from __future__ import annotations

from typing import Any

import pytest

from ttc.engine.vllm_args import check_engine_args, in_words, read_engine_args, shaping
from ttc.errors import InputError

pytest.importorskip("vllm")


def test_values_are_read_as_on_vllms_command_line() -> None:
    read = read_engine_args(
        ["gpu-memory-utilization=0.5", "enforce_eager=true", "--max_num_batched_tokens=4k", "dtype=float32",
         'additional_config={"a": 1}', "seed=-1"]
    )  # fmt: skip
    assert read == {
        "gpu_memory_utilization": 0.5, "enforce_eager": True, "max_num_batched_tokens": 4000, "dtype": "float32",
        "additional_config": {"a": 1}, "seed": -1,
    }  # fmt: skip
    assert in_words(shaping(read)) == 'additional_config={"a": 1} dtype="float32" enforce_eager=true seed=-1'
    assert read_engine_args([]) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("enforce_eager", "no NAME=VALUE; write it as enforce_eager=true"),
        (
            "gpu_memory_utilisation=0.5",
            "has no 'gpu_memory_utilisation'; did you mean gpu_memory_utilization",
        ),
        ("gpu_memory_utilization=lots", "gpu_memory_utilization can't be 'lots' .invalid float value"),
        ("dtype=float33", "dtype can't be 'float33' .invalid choice"),
        ("enforce_eager=perhaps", "enforce_eager is true or false, not 'perhaps'"),
        ("additional_config={", "additional_config can't be '{'"),
        ("max_model_len=100", "max_model_len can't be set here; use --context"),
        ("disable_log_stats=true", "disable_log_stats can't be set here; ttc needs its own value"),
        (
            'speculative_config={"method": "ngram"}',
            "speculative_config can't be set here; with speculative decoding",
        ),
    ],
)
def test_what_vllm_would_refuse_is_said_in_one_line(given: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_engine_args([given])
    assert "\n" not in str(caught.value)


def test_the_api_takes_values_and_texts() -> None:
    given: dict[str, Any] = {"gpu_memory_utilization": 0.25, "enforce_eager": "false", "max_num_seqs": 128}
    assert check_engine_args(given) == {**given, "enforce_eager": False}
    with pytest.raises(InputError, match="has no 'colour'"):
        check_engine_args({"colour": 1})
