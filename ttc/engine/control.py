"""Control of running branches inside vLLM's step loop: a V1 logits processor, loaded through vLLM's plugin entry point.

A branch carries its instructions in ``SamplingParams.extra_args["ttc"]``: a mapping (``ttc.engine.course``), or the same as
one JSON string, since a server's ``vllm_xargs`` takes flat values only. The processor forces token ids at given output
positions, so nothing is stopped, edited and prefilled again, and computes confidence where the logits are, so no
log-probabilities leave the worker.

The controller's word reaches a branch as it runs. In process (no worker processes) the engine holds the branch's ``Control`` in
``CONTROLS``: a word is a function call and takes effect at the next step, and what was forced and measured can be read. Worker
processes hear it through ``WordsForWorkers``, which vLLM adds to its workers (``worker_extension_cls``) for ``collective_rpc``.

A model that would end inside its thought closes it instead (the end mark's probability goes to the closing delimiter), and an
answer has at least one token, so no branch ends empty. Where an end of the thought is to be replaced by a trigger, whether it would
have been sampled is drawn here, from its probability under the branch's own temperature, top-p and top-k.

A heap ordered by step holds the output positions at which something is due, so a step costs what is due, not what runs. Rows that
stand still (preempted) are found early when popped, and put back. A prefill that is cut shows logits of another position, and its
sample is thrown away: what was decided by them is taken back at the next step, where no token has followed.

This module imports torch and vLLM; nothing outside ``ttc.engine`` may import it.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ttc.engine.course import FAR, Course
from ttc.engine.draws import Draws
from ttc.engine.reading import Measured, chances_of, token_confidence

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

LOG = logging.getLogger("ttc.engine.control")
EXTRA_ARGS_KEY = "ttc"
NEVER_WRITTEN = "\N{SYMBOL FOR NULL}" * 32
"""A word that a server is told to keep from: where it schedules ahead, it fetches each token in time for requests with such words
(it must, to know when one would be complete), and for those with nothing but instructions for us it would not."""
CERTAIN = 1e30
"""The logit of a forced token; finite also after a division by the least temperature."""


@dataclass(slots=True, eq=False)
class Control(Course):
    """One running branch as its processor sees it; ``scored`` counts the tokens in the sums. ``signals``: accumulate mean
    log-probability and self-certainty;
    ``key``: registry key, in process only; ``step``: ids that end a step, and so are no end of the text; ``drawn``: its tokens are
    sampled here (``ttc.engine.draws``, in process only), and vLLM takes the request for a greedy one."""

    MORE: ClassVar[tuple[str, ...]] = ("signals", "key", "step")

    signals: bool = False
    key: int | None = None
    step: list[int] = field(default_factory=list)
    row: int = -1
    open: bool = False
    ends: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    drawn: bool = False
    group: _Group | None = None  # while its thought is open in a batch
    log_prob: float = 0.0
    self_certainty: float = 0.0
    scored: int = 0
    latest: tuple[int, float, float] = (
        0,
        0.0,
        0.0,
    )  # output length at the last token in the sums, and what it added


CONTROLS: dict[int, Control] = {}
"""Branches of in-process engines by their key. The engine adds before ``add_request`` and removes when the branch has ended."""

Word = Sequence[int] | None
"""What the controller says to a running branch: ids to be forced here, or (None) that its thought ends here."""

_STEERED: dict[int, Control] = {}
"""Branches that were given a word since the processor last looked."""

_ROWS: dict[int, Control] = {}
"""Branches of an engine in another process, by their key, while they are in a batch here."""

_HEARD: dict[int, Control] = {}
"""Those that were given a word: their instructions no longer say all of them, so they are kept while they are preempted."""

_WAITING: dict[int, list[Word]] = {}
"""Words for branches that are in no batch here (not begun yet, or preempted): executed when they come."""


def say(key: int, word: Word) -> int:
    """Execute a word at the next step. Returns the output position at which it does, -1 where it has no effect (the thought is
    closed or closing, or the ids do not fit before its cap, or another span is being written)."""
    control = CONTROLS.get(key) or _ROWS.get(key)
    if control is not None:
        control.take_back()
    if control is None or control.done:
        return -1
    if word is None:
        control.close_now()
    elif not control.insert_now(list(word)):
        return -1
    _STEERED[key] = control
    return len(control.output)


class WordsForWorkers:
    """What vLLM's worker processes can be asked besides their own (``ParallelConfig.worker_extension_cls``)."""

    def ttc_hear(self, words: Sequence[tuple[int, Word]], ended: Sequence[int]) -> list[int | None]:
        """``say`` each (key, word); None for a branch that is in no batch now and will hear it when it is. ``ended``: keys of
        branches that are over."""
        for key in ended:
            _HEARD.pop(key, None)
            _WAITING.pop(key, None)
        positions: list[int | None] = []
        for key, word in words:
            if key in _ROWS:
                _HEARD[key] = _ROWS[key]
                positions.append(say(key, word))
            else:
                _WAITING.setdefault(key, []).append(word)
                positions.append(None)
        return positions


def read_instructions(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The instructions of a request, None if it has none. Raises ValueError."""
    given = (extra_args or {}).get(EXTRA_ARGS_KEY)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}'] is not JSON ({error.msg})") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}'] must be a mapping, got {given!r}")
    return given


class SeesTokens(LogitsProcessor):  # type: ignore[misc]  # vLLM is not type-checked here
    """Does nothing. Where vLLM schedules ahead (GPUs), it fetches each token in time for the processors that its configuration
    names, and not for those that it finds by their entry point, as ours: the engine names this one."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None: ...

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class _Group:
    """Thinking rows with the same closing delimiter and the same end marks."""

    def __init__(self, close: Sequence[int], ends: tuple[int, ...], device: torch.device) -> None:
        self.close, self.last = close[0] if len(close) == 1 else None, close[-1]
        self.ends, self.device = ends, device
        self.members: list[Control] = []
        self.guards: list[Control] = []
        self.plain: list[Control] = []  # not drawn here: their logits say that an end is a closing
        self._here, self._elsewhere = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self._masks: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, control: Control) -> None:
        self.members.append(control)
        if control.at_end or control.min_thinking:
            self.guards.append(control)
        if control.drawn:
            return
        self.plain.append(control)
        if control.row >= len(self._here):
            more = max(64, control.row + 1)
            self._here = np.concatenate([self._here, np.zeros(more, np.float32)])
            self._elsewhere = np.concatenate([self._elsewhere, np.full(more, -np.inf, np.float32)])
            self._masks = None
        self._mark(control.row, -math.inf, 0.0)

    def remove(self, control: Control) -> None:
        self.members.remove(control)
        if control in self.guards:
            self.guards.remove(control)
        if control in self.plain:
            self.plain.remove(control)
            self._mark(control.row, 0.0, -math.inf)

    def _mark(self, row: int, here: float, elsewhere: float) -> None:
        self._here[row], self._elsewhere[row] = here, elsewhere
        self._masks = None

    def keep(self, logits: torch.Tensor) -> None:
        """In the plain members' rows, p(end) goes to the closing delimiter. -inf in those rows and 0 in the others, and the
        reverse, are added to whole columns, which is several times as fast as picking rows; on a CPU in place, without torch's
        overhead."""
        rows = len(logits)
        xp: Any = torch
        here: Any = self._here[:rows]
        elsewhere: Any = self._elsewhere[:rows]
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            table: Any = logits.numpy()
            xp = np
        else:
            table = logits
            if self._masks is None or len(self._masks[0]) != rows:
                self._masks = (
                    torch.from_numpy(here).to(self.device, logits.dtype),
                    torch.from_numpy(elsewhere).to(self.device, logits.dtype),
                )
            here, elsewhere = self._masks
        close = table[:, self.close]
        for end in self.ends:
            stop = table[:, end]
            xp.logaddexp(close, stop + elsewhere, out=close)
            stop += here


class ControlProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not type-checked here
    """Executes the instructions of every row that has any; rows without are never touched."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        instructions = read_instructions(sampling_params.extra_args)
        if instructions is None:
            return
        key = instructions.get("key")
        if isinstance(key, int) and key in CONTROLS:
            return  # of this process, and made by us
        try:
            Control.of(instructions)
        except ValueError as error:
            raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}']: {error}") from None
        if not sampling_params.bad_words and current_platform.is_cuda_alike():
            sampling_params.bad_words = [NEVER_WRITTEN]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.vocabulary = FAR if vllm_config is None else int(vllm_config.model_config.get_vocab_size())
        self.clock = 0
        self.rows: dict[int, Control] = {}
        self.agenda: list[tuple[int, int, Control]] = []  # (clock when due, tie, control)
        self.forcing: list[Control] = []
        self.measured = Measured()
        self.watched: list[Control] = []  # stopped on confidence
        self.thinking: dict[tuple[tuple[int, ...], tuple[int, ...]], _Group] = {}
        self.closing: list[
            Control
        ] = []  # drawn here: the last token that was drawn may have closed the thought
        self.closed: list[Control] = []  # just closed: no end may follow
        self.decided: list[Control] = []  # by the last step's logits
        self.inserted: list[Control] = []  # on the controller's word, when a token was still under way
        self.draws = Draws()
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
            for key, control in list(_STEERED.items()):
                if control.row >= 0 and self.rows.get(control.row) is control:
                    del _STEERED[key]
                    if control.output and control.output[-1] < 0:
                        self.inserted.append(control)
                    self._follow(control)
                elif key not in CONTROLS and key not in _ROWS:
                    del _STEERED[key]

    def _add(self, index: int, params: SamplingParams, output: list[int]) -> None:
        instructions = read_instructions(params.extra_args)
        if instructions is None:
            return
        key = instructions.get("key", -1)
        control = CONTROLS.get(key) or _HEARD.get(key)
        known = control is not None
        control = control or Control.of(instructions)
        if (
            not known and control.largest >= self.vocabulary
        ):  # a client's mistake must not be the engine's end
            LOG.error(
                "a request's instructions name token %d, which the model has not: ignored", control.largest
            )
            return
        control.output, control.row = output, index
        if not known and output:
            control.read_back()
        self.rows[index] = control
        if key >= 0 and key not in CONTROLS:
            _ROWS[key] = control
            for word in _WAITING.pop(key, ()):
                _HEARD[key] = control
                say(key, word)
        ends = params.all_stop_token_ids.difference(control.step)
        control.ends = tuple(sorted(end for end in ends if 0 <= end < self.vocabulary))
        if not control.drawn:
            control.temperature, control.top_p = params.temperature, params.top_p
            control.top_k = max(params.top_k, 0)
        control.open = not control.thought_closed()
        self._enter(control)
        if not control.open and control.must_answer():
            self.closed.append(control)
        if control.signals:
            self.measured.rows.append(control)
        if control.stop_below is not None and control.open:
            self.watched.append(control)
        self._follow(control)

    def _follow(self, control: Control) -> None:
        """Put the branch where what it needs next is seen to."""
        if control.forcing():
            if control not in self.forcing:
                self.forcing.append(control)
        else:
            self._schedule(control)

    def _drop(self, control: Control | None) -> None:
        if control is None:
            return
        self._leave(control)
        control.row = -1
        if control.key is not None and _ROWS.get(control.key) is control:
            del _ROWS[control.key]
        for members in (self.forcing, self.measured.rows, self.watched, self.closed):
            if control in members:
                members.remove(control)

    def _enter(self, control: Control) -> None:
        """Note what must be seen to in the branch's row."""
        if control.drawn:
            self.draws.put(control)
        if control.open:
            close, ends = tuple(control.think_close), control.ends
            group = self.thinking.get((close, ends))
            if group is None:
                group = self.thinking[close, ends] = _Group(close, ends, self.device)
            group.add(control)
            control.group = group

    def _leave(self, control: Control) -> None:
        if control.row < 0:
            return
        if control.drawn:
            self.draws.take(control.row)
        if control.group is not None:
            control.group.remove(control)
            control.group = None

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        a, b = self.rows.pop(source, None), self.rows.pop(target, None)
        for control in (a, b):
            if control is not None:
                self._leave(control)
        if a is not None:
            self.rows[target], a.row = a, target
            self._enter(a)
        if b is not None:
            if swap:
                self.rows[source], b.row = b, source
                self._enter(b)
            else:
                b.row = -1
                self._drop(b)

    def _schedule(self, control: Control) -> None:
        position = control.next_position()
        if position < FAR:
            self.ties += 1
            wait = max(0, position - len(control.output))
            heapq.heappush(self.agenda, (self.clock + wait, self.ties, control))

    # -- every step ------------------------------------------------------------------------------------------------------
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for control in self.decided:
            control.take_back()
        self.decided.clear()
        for control in self.inserted:
            control.unless_closed()
        self.inserted.clear()
        if self.forcing:
            self._release()
        while self.agenda and self.agenda[0][0] <= self.clock:
            control = heapq.heappop(self.agenda)[2]
            if control.row < 0 or control.forcing():
                continue  # gone, or looked after when its span is written
            if len(control.output) >= control.next_position() and control.arrive():
                self.forcing.append(control)
            elif control.next_position() > len(control.output):
                self._schedule(control)
            else:  # several things at one position: look again here
                self._schedule(control)
        if self.measured:
            self.measured.take(logits)
        if self.watched:
            self._watch(logits)
        if self.thinking or self.closed or self.closing:
            self._keep_from_ending(logits)
        if self.forcing:
            self._force(logits)
        if self.draws:
            self.closing = self.draws.apply(logits)
        return logits

    def _keep_from_ending(self, logits: torch.Tensor) -> None:
        """In an open thought, p(end) is added to p(closing delimiter); right after closing, p(end) is 0. Where the course
        says so, an end of the thought is replaced or forbidden."""
        for control in self.closing:
            if control.group is not None and control.output and control.output[-1] == control.group.last:
                self._close(control)
        self.closing = []
        for key, group in list(self.thinking.items()):
            for control in [c for c in group.plain if c.output and c.output[-1] == group.last]:
                self._close(control)
            if not group.members:
                del self.thinking[key]
                continue
            if group.guards:
                guarded = [c for c in group.guards if not c.forcing() and c.guards_end()]
                if guarded:
                    self._guard(logits, guarded)
            if group.close is None:
                several = [c for c in group.members if not c.forcing() and not c.guards_end()]
                if several:
                    self._guard(logits, several)
            elif group.plain:
                group.keep(logits)
        if (
            self.closed
        ):  # also behind a preemption, and behind a prefill that is cut, whose logits decide nothing
            self.closed = [c for c in self.closed if c.must_answer()]
            table = (
                logits.numpy() if logits.device.type == "cpu" and logits.dtype == torch.float32 else logits
            )
            for control in self.closed:
                table[control.row, list(control.ends)] = -math.inf

    def _close(self, control: Control) -> None:
        """The branch's last token is the delimiter's last: if its thought is closed by that, what it needs from now on is less."""
        if not control.thought_closed():
            return
        if control.group is not None:
            control.group.remove(control)
        control.open, control.group = False, None
        if control.drawn:
            self.draws.closed(control)
        self.closed.append(control)
        if control in self.watched:
            self.watched.remove(control)

    def _guard(self, logits: torch.Tensor, rows: list[Control]) -> None:
        """Draw whether each of these thoughts would end here; where it would, force what stands in for that; where not, sample
        among all else. (Together that is: sample, and replace an end.)"""
        ids = [self._ending_ids(c) for c in rows]
        draws = [c.chance() for c in rows]
        chances = chances_of(logits, rows, ids, draws)
        for control, draw, chance in zip(rows, draws, chances, strict=True):
            if draw < chance and not (control.guards_end() and control.forbids_end()):
                control.decide()
                self.decided.append(control)
                if control.guards_end():
                    control.end_came()
                else:
                    control.ended_without_delimiter()
            if control.forcing():
                self.forcing.append(control)
        places = [c.row for c, ending in zip(rows, ids, strict=True) for _ in ending]
        logits[places, [i for ending in ids for i in ending]] = -math.inf

    def _ending_ids(self, control: Control) -> list[int]:
        """The ids that would end the thought here: end marks, and the delimiter's last token where the others are written."""
        before = control.think_close[:-1]
        whole = not before or control.output[-len(before) :] == before
        return (
            [*control.ends, control.think_close[-1]] if whole and control.guards_end() else list(control.ends)
        )

    def _release(self) -> None:
        """Rows whose span is written wait for what is due next, be it at this very position."""
        for control in self.forcing:
            if not control.forcing():
                self._schedule(control)
        self.forcing = [c for c in self.forcing if c.forcing()]

    def _force(self, logits: torch.Tensor) -> None:
        """One number a row, and not a row of the vocabulary's size: beside ``CERTAIN`` any other token's probability is 0."""
        rows, ids = [c.row for c in self.forcing], [c.force() for c in self.forcing]
        logits[rows, ids] = CERTAIN

    def _watch(self, logits: torch.Tensor) -> None:
        """End the thoughts whose confidence has fallen below what they may go on with."""
        live = [c for c in self.watched if not c.done and not c.forcing()]
        for control, sure in zip(live, token_confidence(logits, live), strict=True):
            if control.heard(sure):
                control.decide()
                self.decided.append(control)
                control.close_now()
                if control.arrive():
                    self.forcing.append(control)


def instructions(control: Control) -> dict[str, Any]:
    """The JSON form that travels in ``extra_args``."""
    step = {"step": control.step} if control.step else {}
    more = (
        step
        | ({"signals": True} if control.signals else {})
        | ({"key": control.key} if control.key is not None else {})
    )
    return {EXTRA_ARGS_KEY: control.instructions() | more}
