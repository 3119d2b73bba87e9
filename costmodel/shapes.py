"""The shape of a model: what its weights, its KV cache and its attention cost to hold, to read and to
multiply.

Owns parameter counts and sizes, in elements, bytes and FLOPs. Knows no price, no hardware, no sampler. A
shape comes from a Hugging Face ``config.json`` (``from_config``, ``load``) or from the small registry of
published configs (``named``).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ttc.costmodel.parameters import AttentionLayers, read_config
from ttc.errors import InputError

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the cost model sees it. Counts are exact for the families in ``costmodel/parameters.py``.

    ``kv_elements`` D of the paper: KV elements stored for one token in all layers (K and V; under MLA the
    latent and the rotary key). ``pair_flops`` FLOPs of one query token against one context token in all
    layers (r·D·2 of the paper for GQA; the absorbed form under MLA); ``prefill_pair_flops`` the same in
    prefill (MLA: not absorbed).
    """

    name: str
    hidden: int
    vocab: int
    attention: tuple[AttentionLayers, ...]
    q_heads: int
    kv_heads: int
    kv_elements_per_layer: int
    key_elements_per_layer: int
    pair_flops_per_layer: int
    key_pair_flops_per_layer: int
    prefill_pair_flops_per_layer: int
    params: int
    active_params: int
    gathered_params: int = (
        0  # the input embedding when it is not also the output head: looked up, never multiplied
    )
    head_params: int = 0  # the output head, multiplied once per sampled token
    experts: int = 0
    experts_active: int = 0
    expert_params: int = 0  # one expert in every MoE layer
    state_elements: int = 0  # recurrent state of linear-attention layers, per sequence
    weight_bytes: float = 0.0  # all weights as stored
    expert_bytes: float = 0.0  # one expert in every MoE layer, as stored
    kv_bytes_per_element: float = 2.0
    context_tokens: int | None = None
    checkpoint_params: int | None = None
    tied: bool = False
    mla: bool = False
    # derived once, because the driver prices every branch
    attention_layers: int = field(init=False, compare=False, repr=False)
    kv_elements: int = field(init=False, compare=False, repr=False)
    kv_bytes: float = field(init=False, compare=False, repr=False)
    pair_flops: int = field(init=False, compare=False, repr=False)
    token_flops: float = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("hidden", "vocab", "params", "active_params"):
            if getattr(self, name) <= 0:
                raise InputError(f"model {self.name}: {name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.experts_active <= self.experts:
            raise InputError(
                f"model {self.name}: experts_active is {self.experts_active}; use 0 to {self.experts}"
            )
        layers = sum(group.layers for group in self.attention)
        put = object.__setattr__
        put(self, "attention_layers", layers)
        put(self, "kv_elements", layers * self.kv_elements_per_layer)
        put(self, "kv_bytes", layers * self.kv_elements_per_layer * self.kv_bytes_per_element)
        put(self, "pair_flops", layers * self.pair_flops_per_layer)
        put(self, "token_flops", 2.0 * (self.active_params - self.gathered_params))

    @property
    def kinetics_params(self) -> int:
        """P of the Kinetics equations: active parameters, counted as the published checkpoint stores them."""
        return self.active_params + (self.checkpoint_params - self.params if self.checkpoint_params else 0)

    @property
    def gqa_ratio(self) -> float:
        """r of the paper, query heads per KV head; under MLA the ratio that makes r·D the attention's
        FLOPs."""
        return self.pair_flops / (2.0 * self.kv_elements) if self.kv_elements else 0.0

    def kv_store_bytes(self, context_tokens: float) -> float:
        """Bytes that hold the KV cache of one sequence of ``context_tokens``; windowed layers hold their
        window."""
        per_layer = self.kv_elements_per_layer * self.kv_bytes_per_element
        held = sum(n * (context_tokens if w is None else min(context_tokens, w)) for n, w in self.attention)
        return held * per_layer + self.state_elements * self.kv_bytes_per_element

    def step_weight_bytes(self, batch: Any) -> Any:
        """Bytes of weights that one step over ``batch`` sequences reads: every dense weight once, the
        expected number of distinct experts E(1 - (1 - k/E)^batch), the input embedding (gathered) not at
        all."""
        if not self.experts:
            return self._dense_bytes
        missed = (1.0 - self.experts_active / self.experts) ** batch
        return self._dense_bytes + self.expert_bytes * self.experts * (1.0 - missed)

    @property
    def _dense_bytes(self) -> float:
        per_param = (self.weight_bytes - self.expert_bytes * self.experts) / max(
            1, self.params - self.expert_params * self.experts
        )
        return self.weight_bytes - self.expert_bytes * self.experts - self.gathered_params * per_param

    def with_kv_bytes(self, kv_bytes_per_element: float) -> ModelShape:
        """The same model with a KV cache of another precision (1 for FP8)."""
        return replace(self, kv_bytes_per_element=kv_bytes_per_element)

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints of a model."""
        return {
            "name": self.name,
            "params": self.params,
            "active_params": self.active_params,
            "kinetics_params": self.kinetics_params,
            "attention_layers": self.attention_layers,
            "kv_elements_per_token": self.kv_elements,
            "kv_bytes_per_token": self.kv_bytes,
            "gqa_ratio": self.gqa_ratio,
            "weight_bytes": self.weight_bytes,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, name: str = "model", checkpoint_params: int | None = None
    ) -> ModelShape:
        """The shape of a Hugging Face ``config.json``; raises InputError naming the field that is missing
        or wrong."""
        return cls(name=name, checkpoint_params=checkpoint_params, **read_config(config, name))

    @classmethod
    def load(cls, path: str | Path) -> ModelShape:
        """The shape of a model folder or of a ``config.json`` file."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except OSError as error:
            raise InputError(
                f"model {path}: no readable config.json ({error.strerror}); give a model folder"
            ) from None
        except ValueError as error:
            raise InputError(f"model {file}: not JSON ({error}); give a Hugging Face config.json") from None
        if not isinstance(config, dict):
            raise InputError(
                f"model {file}: holds a {type(config).__name__}; a config.json is one JSON object"
            )
        folder = file.resolve().parent.name
        return cls.from_config(config, name=folder if file.name == "config.json" else file.stem)

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """A model of the registry, by name with or without its organisation, in any case."""
        key = _key(name)
        try:
            return _registry_shape(_keys()[key])
        except KeyError:
            close = [_keys()[k] for k in difflib.get_close_matches(key, _keys(), n=3, cutoff=0.5)]
            mend = (
                f"nearest known: {', '.join(close)}" if close else f"known: {', '.join(model_names()[:4])} …"
            )
            raise InputError(
                f"model {name!r} is not known; {mend}; or give a folder with config.json"
            ) from None

    @classmethod
    def of(cls, model: str | Path | ModelShape) -> ModelShape:
        """A shape from whatever a user wrote: a shape, a path that exists, or a registry name."""
        if isinstance(model, ModelShape):
            return model
        if Path(model).exists():
            return cls.load(model)
        return cls.named(str(model))


def published_config(name: str) -> dict[str, Any]:
    """The published config.json values of a registry model; raises InputError for an unknown name."""
    shape = ModelShape.named(name)
    return dict(_registry()[shape.name]["config"])


def model_names() -> list[str]:
    """The registry's names, in the registry's order."""
    return list(_registry())


@cache
def _registry() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads((DATA / "models.json").read_text())["models"]
    return models


@cache
def _keys() -> dict[str, str]:
    return {_key(name): name for name in _registry()}


@cache
def _registry_shape(name: str) -> ModelShape:
    entry = _registry()[name]
    return ModelShape.from_config(
        entry["config"], name=name, checkpoint_params=entry.get("checkpoint_params")
    )


def _key(name: str) -> str:
    key = name.rsplit("/", 1)[-1].lower().replace("_", "-").replace("meta-llama-", "llama-")
    for suffix in ("-instruct", "-it", "-base", "-pt"):
        key = key.removesuffix(suffix)
    return key
