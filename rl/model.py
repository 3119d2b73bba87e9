"""The nano reasoner as a network: Qwen3, written in one page so that it trains fast on a CPU.

Same parameter names and the same numbers as transformers' Qwen3ForCausalLM (tests/rl/test_model.py compares
logits), so export and import are a copy. Embedding and output head are separate: with tied rows, tokens that
occur only in prompts are all pushed one way by the softmax and stop carrying information (measured;
docs/nano.md), and 130 rows cost little.

Shapes: B batch, T tokens, D width, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttc.errors import InputError
from ttc.rl import tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3Config

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Width, feed-forward width, depth and heads of one size."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int = len(tokenizer.VOCABULARY)


def size_config(size: str) -> dict[str, Any]:
    """The TOML file of a size (rl/sizes/): tables ``shape``, ``training`` and ``data``."""
    path = Path(__file__).parent / "sizes" / f"{size}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.toml")))
        raise InputError(f"--size {size!r}: no such size; use one of {known}")
    return tomllib.loads(path.read_text())


class HalfMatmul(torch.autograd.Function):
    """``x @ w.T`` with bf16 factors and float32 results, forward and backward.

    On CPUs with avx512_bf16 the product is twice as fast as in float32 and a training step 1.2 times, where
    autocast gains nothing (it also turns norms and activations to bf16, which are slower so).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        half_x, half_w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(half_x, half_w)
        return (half_x @ half_w.t()).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        half_x, half_w = ctx.saved_tensors
        half = gradients[0].bfloat16().flatten(0, -2)
        return (half @ half_w).float().view(half_x.shape), (half.t() @ half_x.flatten(0, -2)).float()


class Linear(nn.Linear):
    """A bias-free linear map; in training it may multiply in bf16 (``half``), otherwise exact."""

    half_matmul = False

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.half_matmul and self.training:
            out: Tensor = HalfMatmul.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return out
        return F.linear(x, self.weight)


def use_half(model: nn.Module, half: bool) -> None:
    """Switch bf16 products on or off for all linear maps of a network in training."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.half_matmul = half


class Norm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, NORM_EPS)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.q_proj = Linear(shape.width, inner)
        self.k_proj = Linear(shape.width, kv)
        self.v_proj = Linear(shape.width, kv)
        self.o_proj = Linear(inner, shape.width)
        self.q_norm, self.k_norm = Norm(shape.head_width), Norm(shape.head_width)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) → queries (B, H, T, E), keys and values (B, G, T, E), rotated."""
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, -1, self.shape.head_width)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, -1, self.shape.head_width)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, -1, self.shape.head_width).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        group = self.shape.heads // self.shape.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.feed_forward)
        self.up_proj = Linear(shape.width, shape.feed_forward)
        self.down_proj = Linear(shape.feed_forward, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.width), Norm(shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers, last norm (``model.`` in Hugging Face's names)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids → (B, T, D) last hidden states."""
        x = self.embed_tokens(ids)
        cos, sin = rope(torch.arange(ids.shape[1], device=ids.device), self.shape.head_width)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Nano(nn.Module):
    """The whole network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.lm_head = Linear(shape.width, shape.vocabulary)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_init_std(name, parameter, shape))

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.model.layers if isinstance(layer, Block)]

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) token ids → (B, T, D) last hidden states."""
        out: Tensor = self.model(ids)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids → (B, T, V) logits."""
        out: Tensor = self.lm_head(self.hidden(ids))
        return out


def _init_std(name: str, parameter: Tensor, shape: Shape) -> float:
    if "embed" in name:
        return 0.1
    if "lm_head" in name:
        return 0.02
    last = "o_proj" in name or "down_proj" in name
    return 1 / math.sqrt(parameter.shape[1]) / (math.sqrt(2 * shape.layers) if last else 1)


def rope(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines, shape of ``positions`` + (E,)."""
    steps = torch.arange(0, head_width, 2, device=positions.device).float() / head_width
    angle = positions.float()[..., None] / ROPE_THETA**steps
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout that Qwen3 uses."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def hf_config(shape: Shape, dtype: torch.dtype) -> Qwen3Config:
    """transformers' configuration of the same network."""
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.EOS,
        pad_token_id=tokenizer.PAD,
        dtype=dtype,
    )


def config_shape(folder: Path) -> Shape:
    """The shape that a folder's config.json tells."""
    config = json.loads((folder / "config.json").read_text())
    return Shape(
        width=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        vocabulary=config["vocab_size"],
    )


def save(model: Nano, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder: config, generation config, weights, tokenizer with its chat template."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    hf_config(model.shape, dtype).save_pretrained(folder)
    weights = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.hf_tokenizer().save_pretrained(folder)
    GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.EOS,
        pad_token_id=tokenizer.PAD,
    ).save_pretrained(folder)


def load(folder: Path) -> Nano:
    """Read a folder written by ``save`` into the training network, in float32."""
    from safetensors.torch import load_file

    model = Nano(config_shape(folder))
    model.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
    return model.eval()
