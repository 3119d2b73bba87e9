"""Reward models of nano size: what is a chain, or the beginning of one, worth?

One network for both kinds, Qwen3ForSequenceClassification with one label (Hugging Face's and vLLM's name for it): the trunk of a
reasoner and a linear score of every position. A score of position t has read nothing behind t, so one pass scores every step.

* ``outcome``: the score of a whole chain, the sigmoid of a logit. Trained on pairs, right and wrong, of one problem (Bradley-Terry;
  TRL's RewardTrainer), so it ranks chains of one problem and weighs their votes; it is no chance to be right.
* ``process``: the chance that a chain which has got so far ends right, at every token of it. Trained on whether it did: a
  one-sample form of Math-Shepherd's soft estimate (Wang et al., arXiv:2312.08935, Eq. 2), at every token as in Cobbe et al.
  (arXiv:2110.14168, section 4.2).

``ttc.nano.reward(name)`` loads one; ``ttc.rl.train_reward`` trains, measures and ships them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ttc.costmodel import ModelShape
from ttc.rl import tokenizer
from ttc.rl.model import Linear, Trunk, config_shape, hf_config
from ttc.rl.reading import BATCH_TOKENS, Reader
from ttc.types import Problem

Kind = Literal["outcome", "process"]
STEP_ENDS = tuple(tokenizer.ID[mark] for mark in (";", ".", "!", tokenizer.THINK_CLOSE))
"""What ends a step: an equation, a conclusion, a hit of countdown, the thought."""


class RewardNet(nn.Module):
    """A trunk and one linear score for each position."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.model = trunk
        self.score = Linear(trunk.shape.width, 1)
        nn.init.zeros_(self.score.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids → (B, T) logits."""
        out: Tensor = self.score(self.model(ids))[..., 0]
        return out


class NanoReward:
    """A reward model as the driver wants it (``ttc.jobs.RewardModel``).

    Texts are completions: thinking, ``</think>``, answer, or any beginning of that. Scores lie in [0, 1], as a pooling model's
    do (``ttc.rewards``); ``positions`` gives the logits of ``outcome``, as it is trained.
    """

    def __init__(self, name: str, kind: Kind, net: RewardNet, shape: ModelShape | None = None) -> None:
        self.name, self.kind, self.net, self.shape = name, kind, net.eval(), shape
        self._reader = Reader(net.model)

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        """Tokens that ``score`` reads now: of prompt and texts, what it has not read before (``ttc.rl.reading``)."""
        return sum(length - known for length, known in self.reads(problem, texts))

    def reads(self, problem: Problem, texts: Sequence[str]) -> list[tuple[int, int]]:
        """Of each sequence that ``score`` computes its length, and how much of it was read before."""
        return self._reader.planned(_inputs(problem, texts), len(_prompt(problem)))

    @torch.no_grad()
    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        """One score a text: of all that it says so far."""
        if not texts:
            return []
        last = self._reader.last(_inputs(problem, texts), len(_prompt(problem)))
        logits = self.net.score(last)[
            ..., 0
        ].double()  # a float's sigmoid is 1 from 17 on, and good chains would tie
        return [float(s) for s in logits.sigmoid().tolist()]

    def steps(self, problem: Problem, texts: Sequence[str]) -> list[list[float]]:
        """For each text the score at the end of each of its steps (equation, conclusion, thought) and of the text."""
        inputs = _inputs(problem, texts)
        start = len(_prompt(problem))
        found = []
        for ids, row in zip(inputs, self.positions(inputs), strict=True):
            ends = [t for t in range(start, len(ids) - 1) if ids[t] in STEP_ENDS]
            found.append([row[t] for t in (*ends, len(ids) - 1)])
        return found

    @torch.no_grad()
    def positions(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The score (``outcome``: its logit) of every position of each row of token ids."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        out: list[list[float]] = [[] for _ in rows]
        device = self.net.score.weight.device
        while order:
            longest = len(rows[order[0]])
            count = 1
            while count < len(order) and (count + 1) * len(rows[order[count]]) <= BATCH_TOKENS:
                longest = len(rows[order[count]])
                count += 1
            part, order = order[:count], order[count:]
            ids = torch.full((count, longest), tokenizer.PAD)
            for place, row in enumerate(part):
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
            scores = self.net(ids.to(device)).float()
            scores = scores.sigmoid() if self.kind == "process" else scores
            for place, row in enumerate(part):
                out[row] = scores[place, : len(rows[row])].tolist()
        return out


def _prompt(problem: Problem) -> list[int]:
    return tokenizer.encode(tokenizer.prompt(problem.text))


def _inputs(problem: Problem, texts: Sequence[str]) -> list[list[int]]:
    prompt = _prompt(problem)
    return [prompt + tokenizer.encode(text) for text in texts]


def load(folder: Path) -> NanoReward:
    """Read a folder written by ``save``, or by TRL's RewardTrainer with a ``card.json`` beside it, in float32."""
    from safetensors.torch import load_file

    net = RewardNet(Trunk(config_shape(folder)))
    net.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
    info = json.loads((folder / "card.json").read_text())
    return NanoReward(info["name"], info["kind"], net, ModelShape.load(folder))


def save(net: RewardNet, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder (Qwen3ForSequenceClassification, one label) with the reasoners' tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(net.model.shape, dtype)
    config.architectures, config.num_labels = ["Qwen3ForSequenceClassification"], 1
    config.save_pretrained(folder)
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in net.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.hf_tokenizer().save_pretrained(folder)
