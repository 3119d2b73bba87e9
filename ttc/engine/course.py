"""The course of one branch: what is to be forced where, as a state machine over its output. No torch: the processor inside vLLM and
the fake engine for tests run the same one.

What is forced at a position depends on the output alone (``force``), so asking twice for one position (a prefill that is cut, a
sample thrown away by a preemption) executes nothing twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ttc.errors import InputError
from ttc.types import Control as Steering

FAR = 1 << 60
_BITS64 = (1 << 64) - 1
LOOP_EVERY = 32
"""Tokens between two looks for a loop."""
LOOP_SPAN = 24
"""Least tokens that must be repetition before a loop is a loop (short periods are repeated more often)."""
LONGEST_PERIOD = 256


@dataclass(slots=True, eq=False)
class Course:
    """``due``: output position (tokens) at which the thought must end, or, if it has, at which the answer's own room begins.
    ``think_close``: ids that end a thought ([]: none, the thought counts as closed from the start); ``close`` are forced at ``due``
    while the thought is open, ``lead`` once it is closed ([]: none). The rest is ``ttc.types.Control`` in ids. ``seed`` decides,
    with the position, whether an end of thought that is replaced would have been sampled there.
    """

    MORE: ClassVar[tuple[str, ...]] = ()
    """Keys of instructions beside ``INSTRUCTIONS``."""

    due: int = FAR
    think_close: list[int] = field(default_factory=list)
    close: list[int] = field(default_factory=list)
    lead: list[int] = field(default_factory=list)
    triggers: list[list[int]] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    relative: bool = False
    at_end: int = 0
    min_thinking: int = 0
    loop_repeats: int = 0
    stop_below: float | None = None
    stop_window: int = 128
    stop_top_k: int = 20
    seed: int = 0
    opened: bool = True  # False: the thought was closed before this output begins (a step of an answer)
    bare: bool = False  # what closed it is the last that stands before this output

    output: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)  # what is being forced, from output position ``span_at``
    span_at: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)  # (position, length) of all that was begun
    begun: int = 0  # triggers begun
    inserted: int = 0  # texts begun on the controller's word
    ends_used: int = 0
    checkpoint: int = 0  # index into ``at``
    base: int = 0  # where the last trigger ended
    looped: bool = False
    next_look: int = LOOP_EVERY
    closed_by_force: bool = False
    done: bool = False  # the closing at ``due`` was begun (or found unnecessary)
    recent: deque[float] = field(default_factory=deque)
    recent_sum: float = 0.0
    seen: int = 0  # output length up to which confidences were taken
    before: tuple[Any, ...] | None = None  # what ``take_back`` goes back to

    # -- where it is -----------------------------------------------------------------------------------------------------
    def thought_closed(self) -> bool:
        """True if the sequence that ends a thought is in the output (or the model has none)."""
        end, out = self.think_close, self.output
        if not end or not self.opened:
            return True
        first, width, start = end[0], len(end), 0
        while True:
            try:
                start = out.index(first, start)
            except ValueError:
                return False
            if out[start : start + width] == end:
                return True
            start += 1

    def must_answer(self) -> bool:
        """True if the thought has just been closed: an end here would leave no answer."""
        end = self.think_close
        return bool(end) and (self.output[-len(end) :] == end if self.output else self.bare)

    @property
    def largest(self) -> int:
        """The largest id in what may be forced."""
        texts = (self.think_close, self.close, self.lead, *self.triggers)
        return max((max(ids) for ids in texts if ids), default=-1)

    def written(self) -> list[int]:
        """The output as far as it is known: where vLLM schedules ahead, it holds a place (-1) for the token under way."""
        return self.output[:-1] if self.output and self.output[-1] < 0 else list(self.output)

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.output) - bool(self.output and self.output[-1] < 0)

    @property
    def forced(self) -> int:
        """Tokens inserted so far."""
        written = len(self.output)
        return sum(max(0, min(length, written - at)) for at, length in self.spans)

    def next_position(self) -> int:
        """The output length at which ``arrive`` has something to look at."""
        nearest = FAR if self.done else self.due
        if not self.done:
            nearest = min(nearest, self._next_checkpoint())
            if self.loop_repeats:
                nearest = min(nearest, self.next_look)
        return nearest

    def _next_checkpoint(self) -> int:
        if self.checkpoint >= len(self.at) or not self.triggers:
            return FAR
        return self.at[self.checkpoint] + (self.base if self.relative else 0)

    # -- what happens ----------------------------------------------------------------------------------------------------
    def arrive(self) -> bool:
        """Begin whatever is due at this output length. True if a span has been begun."""
        here = len(self.output)
        if self.forcing():
            return False
        if here >= self.due:
            return self._end_thought()
        if here >= self._next_checkpoint():
            self.checkpoint += 1
            if not self.thought_closed():
                return self._trigger()
        if self.loop_repeats and here >= self.next_look:
            self.next_look = here + LOOP_EVERY
            if not self.thought_closed() and self._loops():
                if not self.looped and self._trigger():
                    self.looped = True
                    return True
                self.due = here
                return self._end_thought()
        return False

    def forcing(self) -> bool:
        """True if the token at this position is one to be forced."""
        return bool(self.span) and len(self.output) < self.span_at + len(self.span)

    def force(self) -> int:
        """The id to be forced at this position (``forcing()`` is true)."""
        return self.span[len(self.output) - self.span_at]

    def guards_end(self) -> bool:
        """True if an end of the (open) thought here would be replaced by a trigger, or made impossible."""
        if len(self.output) < self.min_thinking:
            return True
        return self.ends_used < self.at_end and self._fits()

    def forbids_end(self) -> bool:
        """True if there is nothing to stand in for an end of thought that comes too early (or before its first token)."""
        return not self.output or (len(self.output) < self.min_thinking and not self._fits())

    def end_came(self) -> None:
        """The model would end its thought here, and ``guards_end``: a trigger is forced instead."""
        if len(self.output) >= self.min_thinking:
            self.ends_used += 1
        if self.checkpoint < len(self.at):
            self.checkpoint += 1
        self._trigger()

    def ended_without_delimiter(self) -> None:
        """The model would end its text inside the thought: the whole delimiter is forced instead."""
        self._begin(self.think_close)

    def close_now(self) -> None:
        """The controller's word: the thought ends at this position; a trigger that is being written is cut short."""
        if self.done:
            return
        here = len(self.output)
        self.due = min(self.due, here)
        if self.forcing():
            kept = here - self.span_at
            self.span, self.spans[-1] = self.span[:kept], (self.span_at, kept)

    def insert_now(self, ids: list[int]) -> bool:
        """The controller's word: ``ids`` are forced here, if the thought is open and they fit before its cap."""
        if self.done or self.forcing() or self.thought_closed() or len(self.output) + len(ids) >= self.due:
            return False
        self._begin(ids)
        self.inserted += 1
        return True

    def unless_closed(self) -> None:
        """Take back the controller's text if the token that was under way when it came has ended the thought."""
        here = len(self.output)
        if (
            self.span
            and self.span_at == here
            and not self.done
            and self.spans[-1:] == [(here, len(self.span))]
            and self.thought_closed()
        ):
            self.span, self.inserted = [], self.inserted - 1
            self.spans.pop()

    def decide(self) -> None:
        """What is begun now rests on logits, and those of a prefill that is cut are of another position: no token will follow."""
        if self.before is not None and self.before[0] == len(self.output):
            return
        self.before = (len(self.output), *(getattr(self, name) for name in _DECIDED), list(self.spans))

    def take_back(self) -> None:
        """Undo what was decided at this position, if no token followed."""
        if self.before is not None and self.before[0] == len(self.output):
            for name, value in zip(_DECIDED, self.before[1:-1], strict=True):
                setattr(self, name, value)
            self.spans = self.before[-1]
        self.before = None

    def chance(self) -> float:
        """A number in [0, 1) from the branch's seed and the position only: SplitMix64 (Steele et al., OOPSLA 2014)."""
        x = (self.seed + (len(self.output) + 1) * 0x9E3779B97F4A7C15) & _BITS64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _BITS64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _BITS64
        return ((x ^ (x >> 31)) >> 11) / (1 << 53)

    def heard(self, confidence: float) -> bool:
        """The confidence (nats) at this position (a second replaces the first). True if the mean of the last ``stop_window`` is
        below ``stop_below``."""
        if self.seen > len(self.output):
            self.recent_sum -= self.recent.pop()
        self.seen = len(self.output) + 1
        self.recent.append(confidence)
        self.recent_sum += confidence
        if len(self.recent) > self.stop_window:
            self.recent_sum -= self.recent.popleft()
        full = len(self.recent) == self.stop_window
        return full and self.stop_below is not None and self.recent_sum < self.stop_below * self.stop_window

    # -- inside ----------------------------------------------------------------------------------------------------------
    def _fits(self) -> bool:
        """A trigger fits if the model has at least one token to say after it."""
        return bool(self.triggers) and len(self.output) + len(self._next_trigger()) < self.due

    def _next_trigger(self) -> list[int]:
        return self.triggers[self.begun % len(self.triggers)]

    def _trigger(self) -> bool:
        if not self._fits():
            return False
        ids = self._next_trigger()
        self.begun += 1
        self._begin(ids)
        self.base = self.span_at + len(ids)
        return True

    def _end_thought(self) -> bool:
        self.done = True
        closed = self.thought_closed()
        self.closed_by_force = not closed
        return self._begin(self.lead if closed else self.close)

    def _begin(self, ids: list[int]) -> bool:
        if not ids:
            return False
        self.span, self.span_at = list(ids), len(self.output)
        self.spans.append((self.span_at, len(ids)))
        return True

    def _loops(self) -> bool:
        """True if the free tokens at the end are one period, ``loop_repeats`` times over and ``LOOP_SPAN`` tokens at the least."""
        out, start = self.output, self.base
        here = len(out)
        last = out[here - 1]
        for period in range(1, min(LONGEST_PERIOD, (here - start) // max(self.loop_repeats, 2)) + 1):
            if out[here - 1 - period] != last:
                continue
            span = max(period * self.loop_repeats, LOOP_SPAN)
            if here - span < start:
                continue
            if out[here - span + period :] == out[here - span : here - period]:
                return True
        return False

    # -- as plain values -------------------------------------------------------------------------------------------------
    def instructions(self) -> dict[str, Any]:
        """The JSON form that travels in ``extra_args``: fields that differ from their defaults."""
        return {name: getattr(self, name) for name in INSTRUCTIONS if getattr(self, name) != DEFAULTS[name]}

    @classmethod
    def of(cls, instructions: Mapping[str, Any]) -> Self:
        """Raises ValueError for an unknown key or a value of the wrong kind, naming it."""
        known = (*INSTRUCTIONS, *cls.MORE)
        values: dict[str, Any] = {}
        for name, value in instructions.items():
            if name not in known:
                raise ValueError(f"unknown key {name!r}; use {', '.join(known)}")
            if not _sound(name, value):
                raise ValueError(f"{name!r} can't be {value!r}")
            values[name] = (
                [list(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value
            )
        return cls(**values)

    def read_back(self) -> None:
        """Read from the output what was forced, for a Course that was not there (in another process). A trigger that the model
        wrote by itself where one was due can't be told apart."""
        out, here = self.output, len(self.output)
        while self.triggers and self.begun < 1 + len(self.at) + self.at_end + self.min_thinking:
            ids = self._next_trigger()
            found = next(
                (i for i in range(self.base, here) if out[i : i + len(ids)] == ids[: here - i]
                 and (self.at_end or self.min_thinking or i == max(self._next_checkpoint(), self.base))),
                None,
            )  # fmt: skip
            if found is None:
                break
            self.begun += 1
            self.ends_used += found < self._next_checkpoint() and self.ends_used < self.at_end
            self.checkpoint += self.checkpoint < len(self.at)
            self.span, self.span_at, self.base = list(ids), found, found + len(ids)
            self.spans.append((found, len(ids)))
        while self._next_checkpoint() < here:  # passed without a trigger: it did not fit
            self.checkpoint += 1
        written = out[self.due :]
        for span in (self.close, self.lead):
            if span and written and written[: len(span)] == span[: len(written)]:
                self.done, self.span, self.span_at = True, list(span), self.due
                self.spans.append((self.due, len(span)))
                self.closed_by_force = span is self.close
                return


def check_words(control: Steering, think_close: str) -> None:
    """Raise InputError for a trigger that would itself end the thought."""
    for text in control.triggers:
        if think_close.strip() in text:
            raise InputError(
                f"trigger: {text!r} holds {think_close.strip()!r}, which ends the thought; use other words, or a cap to end it"
            )


def check_fits(control: Steering, lengths: Sequence[int], thinking: int) -> None:
    """Raise InputError for a trigger (``lengths``: the tokens of each) that finds no place in a thought of at most ``thinking``
    tokens, with a token to say after it: it would silently never be begun."""
    firsts = [control.at[0]] if control.at else []
    firsts += [1] if control.at_end or control.min_thinking else []
    firsts += [LOOP_EVERY] if control.loop_repeats else []
    if not firsts:
        return
    for text, length in zip(control.triggers, lengths, strict=True):
        if min(firsts) + length >= thinking:
            raise InputError(
                f"trigger: {text!r} has {length} tokens and can begin at {min(firsts)} at the earliest, which leaves nothing of a"
                f" thought of {thinking}; use a shorter one, or raise the cap (cap, --max-thinking or the budget) to at least"
                f" {min(firsts) + length + 1}"
            )


_DECIDED = (
    "due", "span", "span_at", "begun", "ends_used", "checkpoint", "base", "closed_by_force", "done",
)  # fmt: skip
"""What a decision by logits changes, beside ``spans``."""

INSTRUCTIONS = (
    "due", "think_close", "close", "lead", "triggers", "at", "relative", "at_end", "min_thinking", "loop_repeats", "stop_below",
    "stop_window", "stop_top_k", "seed", "opened", "bare",
)  # fmt: skip
"""What a request may ask for."""
STEERING = ("relative", "at_end", "min_thinking", "loop_repeats", "stop_below", "stop_window", "stop_top_k")
"""Of these, what ``ttc.types.Control`` has under the same name and needs no tokenizer."""
DEFAULTS: Mapping[str, Any] = {name: getattr(Course(), name) for name in INSTRUCTIONS}


def _sound(name: str, value: Any) -> bool:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, int) and v >= 0 for v in value)

    if name == "triggers":
        return isinstance(value, list) and all(ids(v) and v for v in value)
    if name in ("think_close", "close", "lead", "at", "step"):
        return ids(value)
    if name in ("relative", "opened", "bare", "signals"):
        return isinstance(value, bool)
    if name == "stop_below":
        return value is None or isinstance(value, (int, float))
    if name == "loop_repeats" and value == 1:
        return False  # once is no loop
    least = 1 if name in ("stop_window", "stop_top_k") else 0
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
