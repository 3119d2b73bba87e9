"""What the logits of a step tell of its rows: how sure a branch is, and how likely its thought would end here.

This module imports torch; nothing outside ``ttc.engine`` may import it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ttc.engine.control import Control

CACHED = 1 << 19
"""Numbers that a pass over the vocabulary takes at a time on a CPU, so that they stay in its cache."""
COLDEST = 1e-5
"""Below this temperature vLLM is greedy."""


class Measured:
    """The rows whose mean log-probability and self-certainty are summed as they are sampled."""

    def __init__(self) -> None:
        self.rows: list[Control] = []
        self.last: tuple[list[tuple[Control, int]], torch.Tensor] | None = None

    def __bool__(self) -> bool:
        return bool(self.rows) or self.last is not None

    def take(self, logits: torch.Tensor) -> None:
        """Add the last step's sampled tokens to the sums, and keep this step's log-probabilities for the next.

        Mean log-probability: (1/n) sum log p(y_t). Self-certainty (arXiv 2502.18581, Eq. 6 as KL from uniform):
        (1/n) sum_t KL(U || p_t) = (1/n) sum_t [-log V - (1/V) sum_v log p_t(v)]. Both before temperature, in nats; forced tokens
        and the last token of a branch (the end-of-sequence mark, as a rule) are left out.
        """
        if self.last is not None:
            before, log_probs = self.last
            moved = [i for i, (c, n) in enumerate(before) if len(c.output) > n]
            if moved:
                ids = [before[i][0].output[before[i][1]] for i in moved]
                picked = log_probs[moved, ids].tolist()
                certainty = (-log_probs[moved].mean(-1) - math.log(log_probs.shape[-1])).tolist()
                for i, value, sure in zip(moved, picked, certainty, strict=True):
                    control = before[i][0]
                    control.log_prob += value
                    control.self_certainty += sure
                    control.scored += 1
                    control.latest = before[i][1] + 1, value, sure
            self.last = None
        live = [c for c in self.rows if not c.forcing()]
        if live:
            self.last = (
                [(c, len(c.output)) for c in live],
                logits[[c.row for c in live]].float().log_softmax(-1),
            )


def confidence(control: Control) -> tuple[float | None, float | None]:
    """(mean log-probability, self-certainty) of a branch that has ended, in nats a token; None where nothing was measured. Where
    vLLM runs a step ahead, its last token has been seen as well, and is taken out again."""
    at, value, sure = control.latest
    last = bool(at) and at >= len(control.output)
    scored = control.scored - last
    if not control.signals or scored < 1:
        return None, None
    return (control.log_prob - last * value) / scored, (control.self_certainty - last * sure) / scored


def token_confidence(logits: torch.Tensor, live: Sequence[Control]) -> list[float]:
    """Token confidence of rows that stop on it, in nats: minus the mean log-probability of their ``stop_top_k`` likeliest tokens
    (DeepConf, arXiv 2508.15260, Eq. 2)."""
    if not live:
        return []
    most = min(max(c.stop_top_k for c in live), logits.shape[-1])
    own = logits[[c.row for c in live]].float()
    top = (own.topk(most, dim=-1).values - own.logsumexp(-1, keepdim=True)).cumsum(-1)
    at = torch.tensor([[min(c.stop_top_k, most) - 1] for c in live], device=top.device)
    sums = top.gather(-1, at).squeeze(-1).tolist()
    return [-total / min(c.stop_top_k, most) for c, total in zip(live, sums, strict=True)]


def chances_of(
    logits: torch.Tensor, rows: Sequence[Control], ids: Sequence[list[int]], draws: Sequence[float]
) -> list[float]:
    """P(one of ``ids``) for each row as its sampler would draw: after temperature, then top-k, then top-p. Top-p raises it to 1/p
    times at most; where the row's draw lies above that, it is left as it is: the vocabulary is sorted where it matters only."""
    device, vocab = logits.device, logits.shape[-1]
    part = max(CACHED // vocab, 1) if device.type == "cpu" else len(rows)
    p: list[float] = []
    for first in range(0, len(rows), part):
        some = rows[first : first + part]
        own = logits[[c.row for c in some]].float()
        if any(c.temperature != 1.0 for c in some):
            own /= torch.tensor([max(c.temperature, COLDEST) for c in some], device=device)[:, None]
        marks = ids[first : first + part]
        width = max(map(len, marks))
        padded = torch.tensor([[*i, *[0] * (width - len(i))] for i in marks], dtype=torch.long, device=device)
        real = torch.arange(width, device=device) < torch.tensor([[len(i)] for i in marks], device=device)
        wanted = own.gather(-1, padded).masked_fill(~real, -math.inf)
        p += (wanted.logsumexp(-1) - own.logsumexp(-1)).exp().tolist()
        for i, control in enumerate(some, first):
            if control.temperature < COLDEST:
                p[i] = float(int(own[i - first].argmax()) in ids[i])
            elif control.top_k or (control.top_p < 1 and draws[i] * control.top_p < p[i]):
                p[i] = _truncated(own[i - first], ids[i], control)
    return p


def _truncated(own: torch.Tensor, ids: Sequence[int], control: Control) -> float:
    """P(one of ``ids``) of one row after top-k and top-p, as vLLM cuts them: the smallest set of likeliest tokens with that mass is
    kept."""
    k = min(control.top_k or len(own), len(own))
    top, order = own.topk(k) if k < len(own) else own.sort(descending=True)
    kept = top.softmax(-1)
    kept = torch.where(kept.cumsum(-1) - kept < control.top_p, kept, 0.0)
    among = torch.isin(order, torch.tensor(list(ids), device=own.device))
    return float((kept * among).sum() / kept.sum())
