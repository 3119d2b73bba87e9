"""The embedded reasoners: found by name, read from the ``card.json`` beside their weights, without importing
torch.

A model is a folder here: Hugging Face files (config, weights, tokenizer), ``card.json`` and a README.md that
tell what it was trained on and what was measured. ``ttc.rl`` makes them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttc.errors import InputError

ROOT = Path(__file__).parent
REWARDS = ROOT / "rewards"

if TYPE_CHECKING:
    from ttc.rl.reward import NanoReward


@dataclass(frozen=True, slots=True)
class NanoModel:
    """One embedded reasoner.

    ``format`` says how it writes (``think_open``, ``think_close``, ``close_text``, ``extract``,
    ``answer_tokens``); ``sampling`` how it was measured; ``context`` is in tokens; ``tasks`` are queries that
    ``--task`` takes, the demo first; ``pass_at_1`` is the held-out share of right samples on each.
    """

    name: str
    path: Path
    params: int
    context: int
    tasks: tuple[str, ...]
    format: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    typical_thinking_tokens: int = 0
    pass_at_1: dict[str, float] = field(default_factory=dict)


def catalog() -> list[NanoModel]:
    """Every embedded reasoner, smallest first."""
    return sorted(map(_read, ROOT.glob("*/card.json")), key=lambda model: model.params)


def resolve(name: str) -> Path | None:
    """The folder of an embedded reasoner, or None when there is none of that name."""
    return next((model.path for model in catalog() if model.name == name), None)


def rewards() -> list[str]:
    """The names of the embedded reward models."""
    return sorted(card.parent.name for card in REWARDS.glob("*/card.json"))


def reward_folder(name: str) -> Path:
    """Where an embedded reward model lies; any other name is a folder."""
    return REWARDS / name if name in rewards() else Path(name)


def reward(name: str) -> NanoReward:
    """An embedded reward model by name, or one in a folder; needs torch. Raises InputError where there is none."""
    folder = reward_folder(name)
    if not (folder / "card.json").is_file():
        raise InputError(
            f"reward: no reward model {name!r}; use one of {', '.join(rewards()) or '(none)'}, a folder, vllm:MODEL or http://HOST:PORT"
        )
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # torch is silent about the machine's memory, as in the engine
    from ttc.rl.reward import load

    return load(folder)


def _read(card: Path) -> NanoModel:
    data = json.loads(card.read_text())
    return NanoModel(
        name=data["name"],
        path=card.parent,
        params=data["params"],
        context=data["context"],
        tasks=tuple(data["tasks"]),
        format=data["format"],
        sampling=data["sampling"],
        typical_thinking_tokens=data["typical_thinking_tokens"],
        pass_at_1={row["task"]: row["pass@1"]["mean"] for row in data["evaluation"]["by_difficulty"]},
    )
