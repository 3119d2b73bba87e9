"""A tiny Qwen3 with random weights, sharp enough that what it reads decides what it says, and bare vLLM engines on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttc.attention.settings import KvSetting
from ttc.engine.vllm_start import import_vllm

VOCABULARY = 512
PAGE = 32
MOST_STEPS = 5000
_OPEN: list[
    Any
] = []  # an engine that is collected ends vLLM's distributed state, and with it every other engine here


def save_model(folder: Path, **changes: Any) -> Path:
    """Three layers, two KV heads of 32 channels with two query heads each, context 2048. ``changes`` go to the config."""
    import torch
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "initializer_range": 0.1, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    made = auto.from_config(transformers.Qwen3Config(**(settings | changes)))
    for name, weight in made.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data *= 1.7
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


def open_engine(folder: Path, *, sparse: dict[str, Any] | None = None, **changes: Any) -> Any:
    """vLLM's own LLMEngine in this process: chunked prefill, mixed batches, prefix caching, pages of 32."""
    vllm = import_vllm()
    args: dict[str, Any] = {
        "model": str(folder), "skip_tokenizer_init": True, "dtype": "auto", "max_model_len": 1024, "max_num_seqs": 6,
        "block_size": PAGE, "enforce_eager": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 160,
        "enable_prefix_caching": True, "async_scheduling": False, "kv_cache_memory_bytes": 2**26,
        "additional_config": {"ttc_sparse": {"when": "cheaper"} | (sparse or {})},
    }  # fmt: skip
    _OPEN.append(vllm.v1.engine.llm_engine.LLMEngine.from_engine_args(vllm.EngineArgs(**(args | changes))))
    return _OPEN[-1]


def open_stock(folder: Path, backend: str, **changes: Any) -> Any:
    """Likewise, with vLLM's own class for its attention ``backend``, not the plugin's."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from ttc.attention import plugin

    load_general_plugins()
    AttentionBackendEnum[backend].clear_override()
    selector._cached_get_attn_backend.cache_clear()
    try:
        return open_engine(folder, **changes)
    finally:
        plugin.register()
        selector._cached_get_attn_backend.cache_clear()


def cached_tokens(engine: Any, ids: list[int], setting: KvSetting | None) -> int:
    """Tokens of a prompt that the prefix cache has under a setting."""
    vllm = import_vllm()
    prompt: dict[str, Any] = {"prompt_token_ids": ids}
    if setting is not None:
        prompt["cache_salt"] = setting.salt
    engine.add_request("asked", prompt, vllm.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False))
    [output] = [o for _ in range(20) for o in engine.step() if o.finished]
    return int(output.num_cached_tokens)


def prompts(count: int = 10, shared: int = 150, seed: int = 0) -> list[list[int]]:
    """Prompts of 20 to 600 tokens; every other one begins with the same ``shared`` tokens."""
    source = random.Random(seed)
    stem = [source.randrange(3, VOCABULARY) for _ in range(shared)]
    made = []
    for i in range(count):
        own = [source.randrange(3, VOCABULARY) for _ in range(source.randint(20, 450))]
        made.append(stem + own if i % 2 else own)
    return made


def add_requests(
    engine: Any,
    asked: Sequence[list[int]],
    settings: Sequence[KvSetting | None] | KvSetting | None = None,
    tokens: int = 40,
    salted: bool = True,
) -> None:
    """Submit prompts for greedy continuations."""
    vllm = import_vllm()
    each = settings if isinstance(settings, Sequence) else [settings] * len(asked)
    for i, (ids, setting) in enumerate(zip(asked, each, strict=True)):
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=setting.extra_args() if setting is not None else None,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if setting is not None and salted:
            prompt["cache_salt"] = setting.salt
        engine.add_request(str(i), prompt, params)


def decode(
    engine: Any,
    asked: Sequence[list[int]],
    settings: Sequence[KvSetting | None] | KvSetting | None = None,
    tokens: int = 40,
    salted: bool = True,
) -> list[list[int]]:
    """Greedy continuations, all submitted at once."""
    add_requests(engine, asked, settings, tokens, salted)
    done: dict[int, list[int]] = {}
    for _ in range(MOST_STEPS):
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    else:
        raise AssertionError(f"{len(asked) - len(done)} requests did not end in {MOST_STEPS} steps")
    return [done[i] for i in range(len(asked))]
