"""Batched sampling from a nano reasoner: in vLLM (``VllmSampler``: what users run, and the fastest), or from the training
network (``TorchSampler``: needs nothing but torch and starts at once).

The latter keeps one static left-padded key/value cache that grows in blocks, and drops rows as they finish.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ttc.rl.model import CONTEXT_TOKENS, Nano, rope
from ttc.rl.tokenizer import EOS, PAD

BATCH_ROWS = 256
BATCH_TOKENS = 12_000
"""Of the texts that TorchSampler reads at once: reading takes memory by rows × length²."""


class Sampler(Protocol):
    """Continues texts (token ids), each until a stop token (kept) or ``max_tokens``, at temperature 1."""

    def __call__(
        self, texts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int], seed: int
    ) -> list[list[int]]: ...


class VllmSampler:
    """A nano folder in vLLM, in this process; bf16 as shipped. One sampler at a time."""

    def __init__(self, folder: Path, concurrency: int = BATCH_ROWS) -> None:
        from ttc.engine.vllm_start import import_vllm

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        self._vllm: Any = import_vllm()
        self._llm = self._vllm.LLM(
            str(folder), max_num_seqs=concurrency, enable_prefix_caching=True, enforce_eager=True,
            max_model_len=CONTEXT_TOKENS, generation_config="vllm", enable_chunked_prefill=False,
            max_num_batched_tokens=2 * CONTEXT_TOKENS, skip_tokenizer_init=True, use_tqdm_on_load=False,
        )  # fmt: skip

    def __call__(
        self, texts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int], seed: int
    ) -> list[list[int]]:
        torch.manual_seed(seed)
        asked = [
            self._vllm.SamplingParams(
                temperature=1.0, max_tokens=max(1, min(max_tokens, CONTEXT_TOKENS - len(text) - 1)),
                stop_token_ids=list(stop), ignore_eos=True, detokenize=False,
            )
            for text in texts
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        found = self._llm.generate(prompts, asked, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    def close(self) -> None:
        """Free the engine, so that another can start in this process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


class TorchSampler:
    """A training network, in batches of like length."""

    def __init__(self, model: Nano) -> None:
        self.model = model

    def __call__(
        self, texts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int], seed: int
    ) -> list[list[int]]:
        generator = torch.Generator(next(self.model.parameters()).device).manual_seed(seed)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        out: list[list[int]] = [[] for _ in texts]
        while order:
            rows = order[:BATCH_ROWS]
            while len(rows) > 1 and len(rows) * len(texts[rows[-1]]) > BATCH_TOKENS:
                rows = rows[: max(1, BATCH_TOKENS // len(texts[rows[-1]]))]
            order = order[len(rows) :]
            news = generate(
                self.model, [texts[row] for row in rows], max_tokens, stop=stop, generator=generator
            )
            for row, new in zip(rows, news, strict=True):
                out[row] = new
        return out


BLOCK_TOKENS = 128
MASKED = -1e30


class Cache:
    """Keys and values of all layers for B rows: (L, B, G, capacity, E), and the additive mask of the left
    padding (B, capacity)."""

    def __init__(self, model: Nano, padding: Tensor, capacity: int) -> None:
        shape, device = model.shape, padding.device
        size = (shape.layers, len(padding), shape.kv_heads, capacity, shape.head_width)
        self.keys, self.values = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.mask = torch.zeros(len(padding), capacity, device=device)
        self.mask.masked_fill_(torch.arange(capacity, device=device)[None] < padding[:, None], MASKED)
        self.padding, self.length = padding, 0

    def grow(self, tokens: int) -> None:
        """Room for ``tokens`` more."""
        short = self.length + tokens - self.mask.shape[1]
        if short > 0:
            block = -(-short // BLOCK_TOKENS) * BLOCK_TOKENS
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, block))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, block))
            self.mask = torch.nn.functional.pad(self.mask, (0, block))

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.mask, self.padding = self.mask[rows], self.padding[rows]


def _forward(model: Nano, cache: Cache, ids: Tensor) -> Tensor:
    """(B, T) new ids → (B, V) logits of the last; their keys and values join the cache."""
    shape, tokens = model.shape, ids.shape[1]
    cache.grow(tokens)
    start, end = cache.length, cache.length + tokens
    positions = (torch.arange(start, end, device=ids.device)[None] - cache.padding[:, None]).clamp(min=0)
    cos, sin = (part[:, None] for part in rope(positions, shape.head_width))
    mask = cache.mask[:, None, None, :end]
    if tokens > 1:
        future = torch.full((tokens, end), MASKED, device=ids.device).triu(1 + start)
        mask = mask + future
    x = model.model.embed_tokens(ids)
    for index, layer in enumerate(model.blocks):
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(x), cos, sin)
        cache.keys[index, :, :, start:end], cache.values[index, :, :, start:end] = k, v
        keys, values = cache.keys[index, :, :, :end], cache.values[index, :, :, :end]
        group = shape.heads // shape.kv_heads
        rows = q.reshape(
            len(ids), shape.kv_heads, group * tokens, shape.head_width
        )  # queries of a group share their keys
        scores = torch.matmul(rows, keys.transpose(-1, -2)) * shape.head_width**-0.5
        scores = scores.view(len(ids), shape.heads, tokens, end) + mask
        mixed = torch.matmul(scores.softmax(-1).view(len(ids), shape.kv_heads, group * tokens, end), values)
        mixed = mixed.view(len(ids), shape.heads, tokens, shape.head_width).transpose(1, 2).flatten(2)
        x = x + attention.o_proj(mixed)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    cache.length = end
    logits: Tensor = model.lm_head(model.model.norm(x[:, -1]))
    return logits


@torch.no_grad()
def generate(
    model: Nano,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    stop: Sequence[int] = (EOS,),
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token (kept) or ``max_tokens``. Temperature 0 is greedy."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = Cache(model, padding, longest + BLOCK_TOKENS)
    stops = torch.tensor(list(stop), device=device)
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        chosen = _choose(_forward(model, cache, ids), temperature, generator)
        for row, token, finished in zip(rows, chosen.tolist(), done.tolist(), strict=True):
            if not finished:
                out[row].append(token)
        done |= torch.isin(chosen, stops)
        if bool(done.all()):
            break
        if int(done.sum()) >= 0.25 * len(rows):
            alive = (~done).nonzero()[:, 0]
            cache.keep(alive)
            chosen, done, rows = chosen[alive], done[alive], [rows[index] for index in alive.tolist()]
        ids = chosen[:, None]
    return out


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
