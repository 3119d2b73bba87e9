"""Control of running branches inside vLLM's step loop: a V1 logits processor, loaded through vLLM's plugin entry point.

A branch carries its instructions in ``SamplingParams.extra_args["ttc"]`` (see ``Instructions``). The processor closes the thought
at a given output position by forcing token ids, so nothing is stopped, edited and prefilled again, and computes confidence where
the logits are, so no log-probabilities leave the worker. In process (no worker processes) the engine also reaches a branch's
``Control`` through ``CONTROLS``: to close its thought now, and to read what was forced and measured.

A model that would end inside its thought closes it instead (the end mark's probability goes to the closing delimiter), and an
answer has at least one token, so no branch ends empty.

Each running row has the output position at which something is due; a heap ordered by step makes a step's cost proportional to the
rows with something due, not to the batch. Rows that stand still (preempted) are found early when popped, and put back.

This module imports torch and vLLM; nothing outside ``ttc.engine`` may import it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

EXTRA_ARGS_KEY = "ttc"


class Instructions(TypedDict, total=False):
    """What a request may ask for, as plain JSON values.

    ``due``: output position (tokens) at which the thought must end, or, if it has, at which the answer's own room begins.
    ``think_close``: token ids that end a thought ([]: the model has none, the thought counts as closed from the start).
    ``close``: ids forced at ``due`` while the thought is open; ``lead``: ids forced at ``due`` once it is closed ([]: none).
    ``signals``: accumulate mean log-probability and self-certainty. ``key``: registry key, in process only.
    """

    due: int
    think_close: list[int]
    close: list[int]
    lead: list[int]
    signals: bool
    key: int


@dataclass(slots=True)
class Control:
    """One running branch as its processor sees it; ``forced`` counts inserted tokens, ``scored`` the tokens in the sums."""

    due: int
    think_close: list[int]
    close: list[int]
    lead: list[int]
    signals: bool
    key: int | None
    output: list[int] = field(default_factory=list)
    row: int = -1
    open: bool = False
    ends: tuple[int, ...] = ()
    pending: list[int] = field(default_factory=list)
    forced: int = 0
    closed_by_force: bool = False
    done: bool = False
    log_prob: float = 0.0
    self_certainty: float = 0.0
    scored: int = 0

    @staticmethod
    def of(instructions: Instructions) -> Control:
        return Control(
            due=instructions.get("due", 1 << 60),
            think_close=list(instructions.get("think_close", [])),
            close=list(instructions.get("close", [])),
            lead=list(instructions.get("lead", [])),
            signals=bool(instructions.get("signals", False)),
            key=instructions.get("key"),
        )

    def thought_closed(self) -> bool:
        """True if the sequence that ends a thought is in the output (or the model has none)."""
        end, out = self.think_close, self.output
        if not end:
            return True
        first, width = end[0], len(end)
        start = 0
        while True:
            try:
                start = out.index(first, start)
            except ValueError:
                return False
            if out[start : start + width] == end:
                return True
            start += 1

    def read_back(self) -> None:
        """Read from the output what was forced, for a Control that was not there (preempted, or in another process)."""
        written = self.output[self.due :]
        for span in (self.close, self.lead):
            if span and written and written[: len(span)] == span[: len(written)]:
                self.done, self.pending, self.forced = (
                    True,
                    span[len(written) :],
                    min(len(span), len(written)),
                )
                self.closed_by_force = span is self.close
                return


CONTROLS: dict[int, Control] = {}
"""Branches of in-process engines by their key. The engine adds before ``add_request`` and removes when the branch has ended."""

_STEERED: set[int] = set()
"""Keys whose ``due`` was moved since the processor last looked."""


def steer_close(key: int) -> None:
    """Close the branch's thought at the next step (no effect where that has been done)."""
    control = CONTROLS.get(key)
    if control is not None and not control.done:
        control.due = min(control.due, len(control.output))
        _STEERED.add(key)


class ControlProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not type-checked here
    """Executes the instructions of every row that has any; rows without are never touched."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        instructions = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if instructions is None:
            return
        if not isinstance(instructions, dict):
            raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}'] must be a mapping, got {instructions!r}")
        unknown = sorted(set(instructions) - set(Instructions.__annotations__))
        if unknown:
            raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}']: unknown key {unknown[0]!r}")
        due = instructions.get("due", 0)
        if not isinstance(due, int) or due < 0:
            raise ValueError(
                f"extra_args['{EXTRA_ARGS_KEY}']['due'] must be a whole number >= 0, got {due!r}"
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.clock = 0
        self.rows: dict[int, Control] = {}
        self.agenda: list[tuple[int, int, Control]] = []  # (clock when due, tie, control)
        self.forcing: list[Control] = []
        self.measured: list[Control] = []
        self.thinking: list[Control] = []
        self.last: tuple[list[tuple[Control, int]], torch.Tensor] | None = None
        self.ties = 0

    def is_argmax_invariant(self) -> bool:
        return False

    # -- batch make-up ---------------------------------------------------------------------------------------------------
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.clock += 1
        if batch_update is not None:
            for index in batch_update.removed:
                self._drop(self.rows.pop(index, None))
            for index, params, _, output in batch_update.added:
                self._drop(self.rows.pop(index, None))
                self._add(index, params, output)
            for source, target, direction in batch_update.moved:
                self._move(source, target, swap=direction is MoveDirectionality.SWAP)
        if _STEERED:
            for key in list(_STEERED):
                control = CONTROLS.get(key)
                if control is None or control.row >= 0:
                    _STEERED.discard(key)
                if control is not None and control.row >= 0:
                    self._schedule(control)

    def _add(self, index: int, params: SamplingParams, output: list[int]) -> None:
        instructions = (params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if instructions is None:
            return
        key = instructions.get("key")
        control = CONTROLS.get(key) if key is not None else None
        control = control or Control.of(instructions)
        control.output, control.row = output, index
        if not control.done and len(output) > control.due:
            control.read_back()
        self.rows[index] = control
        control.ends = tuple(sorted(params.all_stop_token_ids))
        control.open = not control.thought_closed()
        if control.open and control.ends:
            self.thinking.append(control)
        if control.pending:  # preempted in the middle of a forced span
            self.forcing.append(control)
        elif not control.done:
            self._schedule(control)
        if control.signals:
            self.measured.append(control)

    def _drop(self, control: Control | None) -> None:
        if control is None:
            return
        control.row = -1
        if control in self.forcing:
            self.forcing.remove(control)
        if control in self.measured:
            self.measured.remove(control)
        if control in self.thinking:
            self.thinking.remove(control)

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        a, b = self.rows.pop(source, None), self.rows.pop(target, None)
        if a is not None:
            self.rows[target], a.row = a, target
        if b is not None:
            if swap:
                self.rows[source], b.row = b, source
            else:
                self._drop(b)

    def _schedule(self, control: Control) -> None:
        self.ties += 1
        wait = max(0, control.due - len(control.output))
        heapq.heappush(self.agenda, (self.clock + wait, self.ties, control))

    # -- every step ------------------------------------------------------------------------------------------------------
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        while self.agenda and self.agenda[0][0] <= self.clock:
            control = heapq.heappop(self.agenda)[2]
            if control.row < 0 or control.done:
                continue
            if len(control.output) < control.due:
                self._schedule(control)
            else:
                self._begin_span(control)
        if self.measured or self.last is not None:
            self._measure(logits)
        if self.thinking:
            self._keep_from_ending(logits)
        if self.forcing:
            self._force(logits)
        return logits

    def _keep_from_ending(self, logits: torch.Tensor) -> None:
        """In an open thought, p(end) is added to p(closing delimiter); right after closing, p(end) is 0."""
        just_closed = [
            c for c in self.thinking if c.output and c.output[-1] == c.think_close[-1] and c.thought_closed()
        ]
        if just_closed:
            for control in just_closed:
                control.open = False
                logits[control.row, list(control.ends)] = -math.inf
            self.thinking = [c for c in self.thinking if c.open]
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for control in self.thinking:
            groups.setdefault((control.think_close[0], control.ends), []).append(control.row)
        for (close, ends), rows in groups.items():
            at = torch.tensor(rows, device=logits.device)
            for end in ends:
                logits[at, close] = torch.logaddexp(logits[at, close], logits[at, end])
                logits[at, end] = -math.inf

    def _begin_span(self, control: Control) -> None:
        control.done = True
        if control.thought_closed():
            control.pending = list(control.lead)
        else:
            control.pending = list(control.close)
            control.closed_by_force = True
        if control.pending:
            self.forcing.append(control)

    def _force(self, logits: torch.Tensor) -> None:
        rows = [control.row for control in self.forcing]
        ids = [control.pending.pop(0) for control in self.forcing]
        logits[rows] = -math.inf
        logits[rows, ids] = 0.0
        for control in self.forcing:
            control.forced += 1
        self.forcing = [control for control in self.forcing if control.pending]

    def _measure(self, logits: torch.Tensor) -> None:
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
            self.last = None
        live = [c for c in self.measured if not c.pending]
        if live:
            rows: Sequence[int] = [c.row for c in live]
            self.last = ([(c, len(c.output)) for c in live], logits[rows].float().log_softmax(-1))


def confidence(control: Control) -> tuple[float | None, float | None]:
    """(mean log-probability, self-certainty) of a branch, in nats a token; None where nothing was measured."""
    if not control.signals or not control.scored:
        return None, None
    return control.log_prob / control.scored, control.self_certainty / control.scored


def instructions(control: Control) -> dict[str, Any]:
    """The JSON form that travels in ``extra_args``."""
    return {
        EXTRA_ARGS_KEY: Instructions(
            due=control.due, think_close=control.think_close, close=control.close, lead=control.lead,
            signals=control.signals, **({"key": control.key} if control.key is not None else {}),
        )
    }  # fmt: skip
