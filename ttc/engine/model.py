"""What can be known of a model from its folder alone: shape, answer format, sampling, context, identity.

Reads JSON only: no torch, no transformers. A nano name, a local folder, or a hub id (its small files are fetched, or found in the
local cache, through huggingface_hub).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ttc import nano
from ttc.costmodel import ModelShape
from ttc.errors import InputError
from ttc.types import AnswerFormat, Sampling

LOG = logging.getLogger("ttc.engine.model")
_HASHED_WEIGHTS_BYTES = 64 * 2**20
_THINKING_MARGIN = 8
"""Default thinking cap over a model's typical length: what only runaway chains exceed."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``path`` is what an engine loads (a folder, or the hub id itself); ``context`` 0 if the config does not say;
    ``thinking_tokens`` a default cap (0: unknown)."""

    name: str
    path: str
    shape: ModelShape | None
    format: AnswerFormat
    sampling: Sampling
    context: int
    thinking_tokens: int
    identity: Mapping[str, str]
    files: Mapping[str, str]


def load_model_files(model: str) -> ModelFiles:
    """Resolve ``model``. Raises InputError (one line, with the models that exist) if there is none."""
    folder = nano.resolve(model)
    target = str(folder) if folder is not None else model
    if folder is None:
        folder = Path(model).expanduser()
        if folder.is_dir():
            target = str(folder)
        elif model.startswith((".", "/", "~")) or "/" not in model:
            raise InputError(
                f"model: there is no {model!r}; use one of {_known()}, a folder, or a hub id such as Qwen/Qwen3-8B"
            )
        else:
            folder = _from_hub(model)
    config = _read_json(folder / "config.json", required=True)
    card = _read_json(folder / "card.json")
    return ModelFiles(
        name=str(card.get("name", model if target == model else folder.name)),
        path=target,
        shape=_shape(config, model),
        format=_format(folder, card),
        sampling=_sampling(folder, card),
        context=int(config.get("max_position_embeddings") or 0),
        thinking_tokens=_THINKING_MARGIN * int(card.get("typical_thinking_tokens", 0)),
        identity={"model": str(card.get("name", model)), "weights": fingerprint(folder)},
        files={file.name: _digest(file).hexdigest()[:8] for file in _told(folder)},
    )


def _shape(config: Mapping[str, Any], model: str) -> ModelShape | None:
    """None for a model that the cost model does not count: it runs all the same, but not on a budget of eFLOPs."""
    try:
        return ModelShape.from_config(config)
    except InputError as error:
        words = str(error).removeprefix("model model: ")
        LOG.warning("%s: %s; FLOPs are not counted, so no budget of eFLOPs can be kept", model, words)
        return None


def _known() -> str:
    return ", ".join(m.name for m in nano.catalog()) or "the nano models (none is installed)"


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"model: {model!r} is not a folder here, and hub ids need transformers; pip install 'ttc[vllm]'"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja"]))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise InputError(
            f"model: {model!r} is neither a nano model ({_known()}) nor a folder, and the hub gave none of it"
            f" ({type(error).__name__}); check the name and the network"
        ) from error


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise InputError(
                f"model: {path.parent} has no {path.name}; point --model at a Hugging Face model folder"
            )
        return {}
    try:
        loaded = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(
            f"model: {path} is not JSON (line {error.lineno}: {error.msg}); fetch it again"
        ) from error
    return dict(loaded)


def _format(folder: Path, card: Mapping[str, Any]) -> AnswerFormat:
    if "format" in card:
        known = {
            f.name for f in fields(AnswerFormat)
        }  # a card may tell more (triggers, efforts) than this version reads
        return AnswerFormat(**{key: value for key, value in card["format"].items() if key in known})
    from ttc.answers import detect_format

    template = folder / "chat_template.jinja"
    text = (
        template.read_text()
        if template.is_file()
        else _read_json(folder / "tokenizer_config.json").get("chat_template")
    )
    vocabulary = folder / "tokenizer.json"
    words = vocabulary.read_text() if vocabulary.is_file() else ""
    return detect_format(text if isinstance(text, str) else None, lambda token: json.dumps(token) in words)


def _sampling(folder: Path, card: Mapping[str, Any]) -> Sampling:
    found = card.get("sampling") or _read_json(folder / "generation_config.json")
    return Sampling(
        temperature=float(found.get("temperature", 1.0)),
        top_p=float(found.get("top_p", 1.0)),
        top_k=int(found.get("top_k", 0) or 0),
    )


def fingerprint(folder: Path) -> str:
    """Of config and weights: contents of small weights, sizes of large ones; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in _told(folder):
        digest = _digest(file, digest)
    return digest.hexdigest()[:16]


def _told(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def _digest(file: Path, digest: hashlib._Hash | None = None) -> hashlib._Hash:
    """``digest`` (a new one if not given) with what tells the file from others."""
    digest = digest or hashlib.sha256()
    if file.suffix != ".json":
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        if size > _HASHED_WEIGHTS_BYTES:
            return digest
    digest.update(file.read_bytes())
    return digest


def hollow_model(model: str, folder: Path, context: int) -> Path:
    """A folder that vLLM loads with drawn weights: the model's config (a published shape, or a folder's) and a nano model's
    tokenizer. Raises InputError for a shape that can't be drawn."""
    import shutil

    from ttc import nano
    from ttc.costmodel.shapes import published_config

    file = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    config = json.loads(file.read_text()) if file.is_file() else published_config(model)
    architectures = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    kind = str(config.get("model_type"))
    if "architectures" not in config and kind not in architectures:
        raise InputError(
            f"--random-weights: {model} is {kind}; dense qwen2, qwen3 and llama shapes can be drawn"
        )
    config = {
        "architectures": [architectures.get(kind, "")],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **config,
    }
    config |= {"hidden_act": "silu", "max_position_embeddings": max(context, 4096)}
    (folder / "config.json").write_text(json.dumps(config))
    donor = next(iter(nano.catalog()), None)
    if donor is None:
        raise InputError("--random-weights borrows a tokenizer from a nano model, and none is installed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(donor.path) / name, folder / name)
    return folder
