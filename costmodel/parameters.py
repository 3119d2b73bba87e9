"""Reads a Hugging Face config.json into the fields of a ModelShape: how many parameters, where, and how
stored.

Families counted exactly (tests compare with the published counts): Llama 3, Qwen2.5, Qwen3, Qwen3-MoE,
Mixtral-like MoE, Llama 4, DeepSeek-V2/V3 (MLA), Gemma 1 to 3, Qwen3-Next-like hybrids. Others with the same
field names are counted as a gated-MLP decoder; hybrids with Mamba layers are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttc.errors import InputError

# Published configs of these families leave out the fields that equal their class defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
}
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8_e4m3fn": 1.0, "float8_e5m2": 1.0}
QK_NORM = {"qwen3", "qwen3_moe", "qwen3_next", "gemma3_text"}
FOUR_NORMS = {"gemma2", "gemma3_text"}
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
MAMBA = (
    "hybrid_override_pattern",
    "attn_layer_indices",
    "attn_layer_period",
    "ssm_state_size",
    "mamba_d_state",
)
"""Fields of hybrids that this does not count: their attention stands in a few layers only."""


class AttentionLayers(NamedTuple):
    """``layers`` layers that see the last ``window_tokens`` tokens (None: the whole context)."""

    layers: int
    window_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Config:
    """The raw config with typed, explained access."""

    raw: Mapping[str, Any]
    model: str

    def count(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(
                    f"model {self.model}: {name} is {value!r}; it must be a whole number, 0 or more"
                )
            return value
        if default is None:
            raise InputError(
                f"model {self.model}: config has no {names[0]}; give the model's own Hugging Face config.json"
            )
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        return default if value is None else bool(value)


def read_config(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Every field of a ModelShape but its name and checkpoint count."""
    text = config.get("text_config")
    raw = {**config, **text} if isinstance(text, Mapping) else dict(config)
    kind = str(raw.get("model_type", ""))
    c = _Config({**DEFAULTS.get(kind, {}), **raw}, model)
    hidden, layers = c.count("hidden_size"), c.count("num_hidden_layers")
    if hidden == 0 or layers == 0:
        raise InputError(
            f"model {model}: hidden_size {hidden}, num_hidden_layers {layers}; both must be positive"
        )
    vocab = c.count("vocab_size")
    tied = c.flag("tie_word_embeddings", False)
    types = _layer_types(c, layers)
    fields = _attention(c, kind, hidden)
    dense_mlp_layers, moe_layers = _mlp_split(c, layers)
    linear = types.count("linear_attention")
    attention_params = fields.pop("attention_params") * (layers - linear) + _linear_params(c, hidden) * linear
    router, expert, shared = _moe(c, kind, hidden)
    experts = c.count("num_experts", "n_routed_experts", "num_local_experts", default=0) if moe_layers else 0
    active = c.count("num_experts_per_tok", "experts_per_token", default=0) if experts else 0
    mlp = (
        3
        * hidden
        * c.count("intermediate_size_mlp", "intermediate_size", default=None if dense_mlp_layers else 0)
    )
    if c.flag("mlp_bias", False):
        mlp += 2 * c.count("intermediate_size") + hidden
    norms = (4 if kind in FOUR_NORMS else 2) * hidden * layers + hidden
    embedding = vocab * hidden
    body = attention_params + mlp * dense_mlp_layers + (router + shared) * moe_layers + norms
    all_experts = experts * expert * moe_layers
    params = embedding * (1 if tied else 2) + body + all_experts
    base, quantised, kv_bytes = _precision(c)
    linear_weights = attention_params + mlp * dense_mlp_layers + shared * moe_layers
    weight_bytes = (params - linear_weights - all_experts) * base + (linear_weights + all_experts) * quantised
    return {
        **fields,
        "hidden": hidden,
        "vocab": vocab,
        "attention": _windows(c, types),
        "params": params,
        "active_params": params - all_experts + active * expert * moe_layers,
        "gathered_params": 0 if tied else embedding,
        "head_params": embedding,
        "experts": experts,
        "experts_active": active,
        "expert_params": expert * moe_layers,
        "expert_bytes": expert * moe_layers * quantised,
        "state_elements": _state(c) * linear,
        "weight_bytes": weight_bytes,
        "kv_bytes_per_element": kv_bytes,
        "context_tokens": c.count("max_position_embeddings", default=0) or None,
        "tied": tied,
    }


def _attention(c: _Config, kind: str, hidden: int) -> dict[str, Any]:
    heads = c.count("num_attention_heads")
    if heads == 0:
        raise InputError(f"model {c.model}: num_attention_heads is 0; a model that attends has at least one")
    if c.raw.get("kv_lora_rank"):
        return _latent_attention(c, hidden, heads)
    kv = c.count("num_key_value_heads", default=heads)
    if kv == 0 or heads % kv:
        raise InputError(
            f"model {c.model}: {heads} query heads over {kv} KV heads; num_key_value_heads must divide them"
        )
    dim = c.count("head_dim", default=hidden // heads)
    bias = c.flag("attention_bias", False)
    params = 2 * hidden * heads * dim + 2 * hidden * kv * dim
    if kind.startswith("qwen2") or bias:
        params += (heads + 2 * kv) * dim
    if bias and not kind.startswith("qwen2"):
        params += hidden
    if kind in QK_NORM:
        params += 2 * dim
    if kind == "qwen3_next":
        params += hidden * heads * dim  # the output gate
    return {
        "q_heads": heads,
        "kv_heads": kv,
        "kv_elements_per_layer": 2 * kv * dim,
        "key_elements_per_layer": kv * dim,
        "pair_flops_per_layer": 4 * heads * dim,
        "key_pair_flops_per_layer": 2 * heads * dim,
        "prefill_pair_flops_per_layer": 4 * heads * dim,
        "attention_params": params,
    }


def _latent_attention(c: _Config, hidden: int, heads: int) -> dict[str, Any]:
    """MLA: the cache holds one latent and one rotary key per layer; decode runs absorbed, over the latent."""
    latent, rope = c.count("kv_lora_rank"), c.count("qk_rope_head_dim")
    nope, value = c.count("qk_nope_head_dim"), c.count("v_head_dim")
    rank = c.count("q_lora_rank", default=0)
    query = hidden * rank + rank + rank * heads * (nope + rope) if rank else hidden * heads * (nope + rope)
    params = (
        query + hidden * (latent + rope) + latent + latent * heads * (nope + value) + heads * value * hidden
    )
    return {
        "q_heads": heads,
        "kv_heads": 1,
        "kv_elements_per_layer": latent + rope,
        "key_elements_per_layer": latent + rope,
        "pair_flops_per_layer": 2 * heads * (2 * latent + rope),
        "key_pair_flops_per_layer": 2 * heads * (latent + rope),
        "prefill_pair_flops_per_layer": 2 * heads * (nope + rope + value),
        "attention_params": params,
        "mla": True,
    }


def _mlp_split(c: _Config, layers: int) -> tuple[int, int]:
    """How many layers have a dense MLP and how many a mixture of experts."""
    if not c.count("num_experts", "n_routed_experts", "num_local_experts", default=0):
        return layers, 0
    first = c.count("first_k_dense_replace", default=0)
    every = c.count("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1) or 1
    only = set(c.raw.get("mlp_only_layers") or ())
    start = 1 if {"decoder_sparse_step", "interleave_moe_layer_step"} & c.raw.keys() else 0
    moe = sum(i >= first and (i + start) % every == 0 and i not in only for i in range(layers))
    return layers - moe, moe


def _moe(c: _Config, kind: str, hidden: int) -> tuple[int, int, int]:
    """Parameters per MoE layer: the router, one expert, the shared experts."""
    experts = c.count("num_experts", "n_routed_experts", "num_local_experts", default=0)
    if not experts:
        return 0, 0, 0
    width = c.count("moe_intermediate_size", "intermediate_size")
    router = hidden * experts + (experts if kind == "deepseek_v3" else 0)  # V3 keeps a bias for load balance
    shared = 3 * hidden * width * c.count("n_shared_experts", default=1 if kind == "llama4_text" else 0)
    shared_width = c.count("shared_expert_intermediate_size", default=0)
    if shared_width:
        shared = 3 * hidden * shared_width + hidden
    return router, 3 * hidden * width, shared


def _layer_types(c: _Config, layers: int) -> list[str]:
    if found := next((name for name in MAMBA if c.raw.get(name) is not None), ""):
        raise InputError(f"model {c.model}: its {found} tells of Mamba layers, which are not counted here")
    types = c.raw.get("layer_types")
    if isinstance(types, list) and types:
        if len(types) != layers:
            raise InputError(
                f"model {c.model}: layer_types names {len(types)} layers; num_hidden_layers is {layers}"
            )
        if strange := sorted({str(t) for t in types} - set(LAYER_TYPES)):
            raise InputError(
                f"model {c.model}: layer_types has {strange[0]!r}; counted here: {', '.join(LAYER_TYPES)}"
            )
        return [str(t) for t in types]
    every = c.count("full_attention_interval", default=0)
    if every:
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    if c.raw.get("attention_chunk_size"):  # Llama 4: every fourth layer, which has no positions, sees all
        every = c.count("no_rope_layer_interval", default=4) or 4
        return ["full_attention" if (i + 1) % every == 0 else "chunked_attention" for i in range(layers)]
    window = c.raw.get("sliding_window")
    pattern = c.count("sliding_window_pattern", default=0)
    if window and pattern:
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    if window and c.flag("use_sliding_window", "use_sliding_window" not in c.raw):
        first_full = c.count("max_window_layers", default=0)
        return ["full_attention" if i < first_full else "sliding_attention" for i in range(layers)]
    return ["full_attention"] * layers


def _windows(c: _Config, types: list[str]) -> tuple[AttentionLayers, ...]:
    groups: Counter[int | None] = Counter()
    for kind in types:
        if kind == "linear_attention":
            continue
        sized = kind in ("sliding_attention", "chunked_attention")
        groups[c.count("sliding_window", "attention_chunk_size") if sized else None] += 1
    return tuple(
        AttentionLayers(n, w) for w, n in sorted(groups.items(), key=lambda g: (g[0] is not None, g[0] or 0))
    )


def _linear_sizes(c: _Config) -> tuple[int, int, int, int]:
    return (
        c.count("linear_num_key_heads"),
        c.count("linear_key_head_dim"),
        c.count("linear_num_value_heads"),
        c.count("linear_value_head_dim"),
    )


def _linear_params(c: _Config, hidden: int) -> int:
    """One gated delta-net layer: qkvz and ba projections, convolution, decay, gated norm, output."""
    if "linear_num_key_heads" not in c.raw:
        return 0
    kh, kd, vh, vd = _linear_sizes(c)
    mixed = 2 * kh * kd + vh * vd
    conv = c.count("linear_conv_kernel_dim", default=4)
    return hidden * (mixed + vh * vd) + hidden * 2 * vh + mixed * conv + 2 * vh + vd + vh * vd * hidden


def _state(c: _Config) -> int:
    """Elements of recurrent state that one linear layer keeps per sequence: the outer-product memory and
    the window of its convolution."""
    if "linear_num_key_heads" not in c.raw:
        return 0
    kh, kd, vh, vd = _linear_sizes(c)
    return vh * kd * vd + (2 * kh * kd + vh * vd) * (c.count("linear_conv_kernel_dim", default=4) - 1)


def _precision(c: _Config) -> tuple[float, float, float]:
    """Bytes per unquantised weight, per quantised weight, per KV element."""
    dtype = str(c.raw.get("dtype") or c.raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise InputError(f"model {c.model}: dtype is {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    base = DTYPE_BYTES[dtype]
    kv_bytes = min(base, 2.0) if dtype != "float32" else 4.0
    quant = c.raw.get("quantization_config")
    if not isinstance(quant, Mapping):
        return base, base, kv_bytes
    method = str(quant.get("quant_method", ""))
    scheme = quant.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and scheme.get("num_bits"):
        kv_bytes = float(scheme["num_bits"]) / 8
    bits, group = _quant_bits(c, method, quant)
    scale_bits = 20.0 / group if group else 0.0  # a 16-bit scale and a 4-bit zero point per group
    return base, (bits + scale_bits) / 8, kv_bytes


def _quant_bits(c: _Config, method: str, quant: Mapping[str, Any]) -> tuple[float, int]:
    """Bits per quantised weight, and the size of the group that shares a scale (0: per tensor or channel)."""
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0, 0
    if method == "mxfp4":
        return 4.25, 0
    if method == "bitsandbytes":
        return (4.5 if quant.get("load_in_4bit") else 8.0), 0
    weights: Mapping[str, Any] = quant
    groups = quant.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        weights = next(iter(groups.values())).get("weights") or {}
    bits = weights.get("bits", weights.get("num_bits", weights.get("w_bit")))
    if not isinstance(bits, int) or bits <= 0:
        raise InputError(f'model {c.model}: quantization_config {method!r} names no bits; add "bits"')
    group = weights.get("group_size", weights.get("q_group_size", 128)) or 0
    return float(bits), max(0, int(group))
