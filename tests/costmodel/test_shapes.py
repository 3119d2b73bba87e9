"""Parameter counts and sizes against the published architectures, and what bad configs are told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ttc.costmodel import AttentionLayers, ModelShape, model_names
from ttc.errors import InputError

PUBLISHED = {  # parameters of the published checkpoints, tied heads counted once
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "DeepSeek-V3": 671_026_419_200,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_263_168,
    "Gemma-3-12B": 11_766_034_176,
    "Gemma-3-27B": 27_009_346_304,
}


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name: str, params: int) -> None:
    assert ModelShape.named(name).params == params


def test_active_parameters_of_mixtures() -> None:
    assert ModelShape.named("Qwen3-30B-A3B").active_params == pytest.approx(3.3e9, rel=0.02)
    assert ModelShape.named("Qwen3-235B-A22B").active_params == pytest.approx(22e9, rel=0.01)
    assert ModelShape.named("DeepSeek-V3").active_params == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize(
    ("experts", "every", "billions"), [(16, 1, 107.77), (128, 2, 400.71)], ids=["Scout", "Maverick"]
)
def test_llama_4_has_a_shared_expert_and_layers_in_chunks(experts: int, every: int, billions: float) -> None:
    text = {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_local_experts": experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": every, "vocab_size": 202048,
        "attention_chunk_size": 8192,
    }  # fmt: skip
    shape = ModelShape.from_config({"model_type": "llama4", "text_config": text})
    assert shape.params == pytest.approx(billions * 1e9, rel=1e-4)
    assert shape.active_params == pytest.approx(17.17e9, rel=1e-3), "17B, in its name"
    assert shape.attention == ((12, None), (36, 8192))


def test_the_first_gemma_ties_its_embeddings() -> None:
    config = {
        "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "intermediate_size": 16384, "vocab_size": 256000,
    }  # fmt: skip
    assert ModelShape.from_config(config).params == 2_506_172_416, "as published"


@pytest.mark.parametrize(
    ("name", "gib_per_32k"),
    [
        ("Qwen3-0.6B", 3.5),
        ("Qwen3-1.7B", 3.5),
        ("Qwen3-8B", 4.5),
        ("Qwen3-14B", 5.0),
        ("Qwen3-32B", 8.0),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 0.875),
        ("DeepSeek-R1-Distill-Qwen-7B", 1.75),
        ("DeepSeek-R1-Distill-Qwen-14B", 6.0),
        ("DeepSeek-R1-Distill-Qwen-32B", 8.0),
    ],
)
def test_kv_cache_sizes_of_the_papers_table_2(name: str, gib_per_32k: float) -> None:
    """All but Qwen3-14B, which the paper prints as 6: the value of the 48-layer Qwen2.5-14B."""
    assert ModelShape.named(name).kv_store_bytes(32768) == gib_per_32k * 2**30


def test_the_papers_scripts_count_stored_parameters() -> None:
    counts = [
        ModelShape.named(f"Qwen3-{size}").kinetics_params
        for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
    ]
    assert [round(c / 1e9, 2) for c in counts] == [0.75, 2.03, 4.02, 8.19, 14.77, 32.76]


def test_mla_windows_and_quantised_weights() -> None:
    deepseek = ModelShape.named("deepseek-ai/DeepSeek-V3")
    assert deepseek.kv_elements == 61 * 576
    assert deepseek.mla
    assert deepseek.weight_bytes == pytest.approx(671e9, rel=0.01)
    gemma = ModelShape.named("google/gemma-3-27b-it")
    assert gemma.attention == (AttentionLayers(10, None), AttentionLayers(52, 1024))
    held = gemma.kv_store_bytes(100_000)
    assert held == (10 * 100_000 + 52 * 1024) * gemma.kv_elements_per_layer * 2


def test_experts_read_grow_with_the_batch() -> None:
    shape = ModelShape.named("Qwen3-30B-A3B")
    one, many = shape.step_weight_bytes(1), shape.step_weight_bytes(10_000)
    assert one == pytest.approx(2 * (shape.active_params - shape.gathered_params))
    assert many == pytest.approx(2 * (shape.params - shape.gathered_params))


def _config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000,
    }  # fmt: skip
    return {k: v for k, v in (base | changes).items() if v is not None}


def test_quantised_configs() -> None:
    plain = ModelShape.from_config(_config())
    awq = ModelShape.from_config(
        _config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    )
    scheme = {
        "config_groups": {"g": {"weights": {"num_bits": 8, "group_size": None}}},
        "kv_cache_scheme": {"num_bits": 8},
    }
    mixed = ModelShape.from_config(
        _config(quantization_config={"quant_method": "compressed-tensors", **scheme})
    )
    assert plain.weight_bytes == 2 * plain.params
    assert plain.weight_bytes / 4 < awq.weight_bytes < plain.weight_bytes
    assert mixed.kv_bytes_per_element == 1.0
    assert plain.with_kv_bytes(1.0).kv_bytes == plain.kv_bytes / 2


def test_hybrid_layers_keep_a_state_and_little_cache() -> None:
    linear = {
        "model_type": "qwen3_next", "full_attention_interval": 4, "num_hidden_layers": 8, "head_dim": 16,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_num_value_heads": 4,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    shape = ModelShape.from_config(_config(**linear))
    assert shape.attention == (AttentionLayers(2, None),)
    assert shape.state_elements == 6 * (4 * 16 * 16 + (2 * 2 * 16 + 4 * 16) * 3)


def test_loads_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    shape = ModelShape.of(tmp_path)
    assert shape == ModelShape.load(tmp_path / "config.json")
    assert pickle.loads(pickle.dumps(shape)) == shape
    assert pickle.loads(pickle.dumps(shape)).token_flops == shape.token_flops


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (_config(num_attention_heads=None), "num_attention_heads"),
        (_config(num_attention_heads=0), "num_attention_heads is 0"),
        (_config(hidden_size="64"), "whole number"),
        (_config(num_key_value_heads=3), "must divide"),
        (_config(num_hidden_layers=0), "must be positive"),
        (_config(torch_dtype="int3"), "dtype"),
        (_config(layer_types=["full_attention"]), "layer_types"),
        (_config(layer_types=["mamba", "full_attention"]), "layer_types has 'mamba'"),
        (_config(hybrid_override_pattern="M*"), "Mamba layers"),
        (_config(quantization_config={"quant_method": "gptq"}), "bits"),
        (_config(num_experts=4, num_experts_per_tok=8, moe_intermediate_size=8), "experts_active"),
    ],
)
def test_bad_configs_get_one_line(config: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        ModelShape.from_config(config, name="m")
    assert "\n" not in str(caught.value)


def test_unknown_models_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Qwen3-8B"):
        ModelShape.of("Qwen3-8")
    with pytest.raises(InputError, match=r"config\.json"):
        ModelShape.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="one JSON object"):
        ModelShape.of(tmp_path)
    assert len(model_names()) >= 30
