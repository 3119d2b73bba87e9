"""One branch over HTTP as a state machine without I/O: which call comes next, with how many tokens, and what
it all cost.

A server knows only ``max_tokens``, so a branch is a chain of calls. The first may use what is left of
``thinking_tokens``; where the thought is still open at its end (or is steered to one), ``close_text`` is
written into the prompt and a second call answers in the room; where the answer was still being written, it
goes on in the room. A call that was cut (a dropped connection, a cancellation) is counted for all that the
server may have sampled, and the next has that much less. Hence, whatever the server does inside
``max_tokens``: generated + forced <= thinking_tokens + room_tokens.

A branch of a search pauses at the end of its step: where the server stopped it at the step's text, or at ``step_tokens``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ttc.engine.course import Course
from ttc.engine.http_stream import BYTES_PER_TOKEN, Delta, Usage
from ttc.types import AnswerFormat, Completion, Finish, Fork, Request


@dataclass(frozen=True, slots=True)
class Span:
    """A text to insert and its tokens: exactly (``ids``), or, where ``ids`` is None, by the estimate by which the room
    is reserved, too."""

    text: str
    ids: tuple[int, ...] | None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.ids is not None else -(-len(self.text.encode()) // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Spans:
    """What may be inserted into a branch: ``close`` ends an open thought; ``open_close`` an empty one that
    was never opened; ``lead`` stands before an unfinished answer ("" : nothing); ``begin`` before an empty
    one."""

    close: Span
    open_close: Span
    lead: Span
    begin: Span

    @staticmethod
    def texts(form: AnswerFormat) -> tuple[str, str, str, str]:
        """The four texts in the order of the fields."""
        tail = form.close_text.partition(form.think_close)[2] if form.think_close else form.close_text
        if not form.think_close:
            return "", "", form.lead_text, form.lead_text or tail
        return form.close_text, form.think_open + form.close_text, form.lead_text, form.lead_text or tail

    @property
    def most_tokens(self) -> int:
        return max(self.close.tokens, self.open_close.tokens, self.lead.tokens, self.begin.tokens)


@dataclass(slots=True)
class _Call:
    """The call that is running: ``counted`` are tokens seen in events, ``usage`` the server's last word."""

    max_tokens: int
    accepted: bool = False
    text: str = ""
    counted: int = 0
    usage: Usage | None = None
    finish: str = ""
    ids: int = 0

    @property
    def tokens(self) -> int:
        return self.usage.completion if self.usage is not None else self.counted


@dataclass(slots=True)
class HTTPBranch:
    """See the module. ``prompt`` is the prompt's length (exact or estimated); ``prompt_opens`` whether the
    chat template itself opens the thought (None: unknown); ``unseen`` the most tokens that a server may hold
    back between two events. ``course``: how the thought is steered; by the server itself (``native``), or by ending
    calls at each checkpoint and writing the trigger into the next prompt. ``continues``: a call goes on where the last one ended
    (else it may think anew before it answers, which is no part of the answer). ``prefix_ids`` are the request's beginning in
    tokens, ``step_ids`` the step's text, if that is one token."""

    request: Request
    form: AnswerFormat
    spans: Spans
    thinking: int
    room: int
    prompt: int
    prompt_opens: bool | None
    unseen: int = 0
    course: Course | None = None
    native: bool = False
    continues: bool = True
    whole: bool = False  # the running call, or the last, has all of the thought and its answer: the server closes the one itself
    prefix_ids: tuple[int, ...] = ()
    step_ids: tuple[int, ...] = ()
    text: str = ""
    ids: list[int] = field(default_factory=list)
    ids_known: bool = True
    generated: int = 0
    forced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0
    accepted: int = 0
    made: list[Fork] = field(default_factory=list)  # the calls that were accepted
    answering: bool = False
    closed_by_force: bool = False
    steered: bool = False
    partial: bool = False
    at_step: bool = False
    _answer_left: int = 0
    _last: Literal["", "stop", "length", "cut"] = ""
    _call: _Call | None = None
    _folding: bool = False
    _logprobs: list[tuple[int, float]] = field(default_factory=list)  # with their places among ``ids``

    # -- what comes next ---------------------------------------------------------------------------
    def next_tokens(self) -> int:
        """``max_tokens`` of the next call, once what must stand before it is inserted; 0: all is done."""
        if not self.answering:
            left = self.thinking - self.generated - self.forced
            if self._pauses:
                step = self.request.step_tokens - self.generated - self.forced
                if self.at_step or (self._last in ("length", "cut") and step <= 0):
                    self.partial = True
                    return 0
                if self._last != "stop":
                    return step
            if self.course is not None and self.native and not (self.steered or self.ids or self._pauses):
                self.whole = True
                return left + self.room
            if self.whole and self._last == "length":
                return 0
            self.whole = False
            if (
                self.course is not None
                and not self.native
                and self.ids_known
                and left > 0
                and not self.steered
            ):
                left = min(left, self._follow(self.course))
            if self._last == "stop" and self._answered():
                return 0
            if self._last not in ("stop", "length") and left > 0 and not self.steered:
                return left + (self.room if self._never_interrupted() else 0)
            self._begin_answer()
        elif self._last in ("stop", "length"):
            return 0
        return max(self._answer_left, 0)

    @property
    def _pauses(self) -> bool:
        """True if the branch may pause: it is a step, the thought may be longer, and nobody has told it to answer."""
        return self.request.pauses_within(self.thinking) and not self.steered

    @property
    def thinking_open(self) -> bool:
        """True if the thought is open."""
        return self._thinking(stopped=False)

    @property
    def finish(self) -> Finish:
        """How a branch that is done has ended: by itself, or at its cap."""
        return "stop" if self._last == "stop" else "length"

    @property
    def least_passes(self) -> int:
        """Calls accepted so far, and those that the branch still needs at the least."""
        return self.accepted + (1 if self.answering else 2)

    @property
    def output_tokens(self) -> int:
        """Tokens so far, the running call's included."""
        return self.generated + self.forced + (self._call.tokens if self._call is not None else 0)

    @property
    def turn(self) -> str:
        """What is written, as the content of an assistant turn: a thought that the template had opened is
        opened here, since templates do so only for a turn that has not begun."""
        written, form = self._written(), self.form
        opened = not form.think_close or form.think_open in written or form.think_close not in written
        return written if opened else form.think_open + written

    def restart_if_cut(self) -> None:
        """Forget a thought that was cut and that the server can't go on from. What it cost stays charged."""
        if self._last == "cut" and not self.answering:
            self.text, self.ids, self._folding = "", [], False

    # -- steering ----------------------------------------------------------------------------------
    def steering(self) -> dict[str, Any]:
        """Fields of the next call: instructions for a server that executes them, else where to stop."""
        course = self.course
        if self._pauses and self.request.step_text and not self.answering:
            told = {"stop": [self.request.step_text], "include_stop_str_in_output": True}
            return told | ({"stop_token_ids": list(self.step_ids)} if self.step_ids else {})
        if course is None or self.answering:
            return {}
        if self.native and not self.ids:
            course.close, course.lead = list(self.spans.close.ids or ()), list(self.spans.lead.ids or ())
            return {"vllm_xargs": {"ttc": json.dumps(course.instructions())}}
        self.native = False  # a call that goes on behind a break: positions have moved
        if self.request.control is None:
            self.course = None  # a cap alone is kept by the calls' lengths
            return {}
        guarded = course.ends_used < course.at_end or len(self.ids) < course.min_thinking
        if guarded and not course.thought_closed():
            return {"stop_token_ids": course.think_close[-1:]}
        return {}

    def _follow(self, course: Course) -> int:
        """Write what is due at this point of the thought; returns the tokens until something may be due again."""
        if self._last == "cut" and course.output != self.ids:
            course.output[:] = self.ids
            course.read_back()
        course.output[:] = self.ids
        if self._last == "stop" and self.ids:
            self._stopped(course)
        while self._last != "stop" and course.next_position() <= len(self.ids) and not course.done:
            course.arrive()
            self._write(course)
        if self._last == "length" and len(self.ids) < course.due:
            self._last = ""
        return (
            max(course.next_position() - len(self.ids), 0) if not course.thought_closed() else self.thinking
        )

    def _stopped(self, course: Course) -> None:
        """The model would end its thought, or its text: where the course stands in for that, do so and go on."""
        last = self.ids.pop()
        course.output[:] = self.ids
        if course.thought_closed():
            self.ids.append(last)
        elif course.guards_end() and not course.forbids_end():
            course.end_came()
            self._write(course)
            self._last = ""
        else:
            self.ids.append(last)
            if last == course.think_close[-1]:  # a stop of ours, which the text does not show
                self.text, self._last = self.text + self.form.think_close, ""
        course.output[:] = self.ids

    def _write(self, course: Course) -> None:
        if course.forcing():
            span = course.span[len(self.ids) - course.span_at :]
            self.ids += span
            self.text += self.trigger_texts[(course.begun - 1) % len(self.trigger_texts)]
            self.forced += len(span)
            course.output[:] = self.ids

    @property
    def trigger_texts(self) -> tuple[str, ...]:
        return self.request.control.triggers if self.request.control is not None else ()

    def _never_interrupted(self) -> bool:
        """True if nothing could be inserted at the thinking cap, so that one call can have it all."""
        return not self.form.think_close and not self.form.lead_text

    def _written(self) -> str:
        return self.request.prefix + self.text

    def _answered(self) -> bool:
        """True if a branch that stopped by itself has an answer: text after its thought, or text without any
        thought."""
        return not self._thinking(stopped=True) and bool(self._answer_text().strip())

    def _answer_text(self) -> str:
        written, close = self._written(), self.form.think_close
        return written.rpartition(close)[2] if close and close in written else written

    def _thinking(self, *, stopped: bool) -> bool:
        """True if the thought is open. Where it is unknown whether the template opens one, a text that
        stopped by itself has not been a thought, and one that was cut has."""
        written, form = self._written(), self.form
        if not form.think_close or form.think_close in written:
            return False
        if self.prompt_opens or not form.think_open or form.think_open in written:
            return True
        return self.prompt_opens is None and not stopped and bool(written.strip())

    def _begin_answer(self) -> None:
        """Insert what makes the model answer, once, and set the room for it."""
        stopped = self._last == "stop"
        if stopped and self.ids and self.ids_known:
            self.ids.pop()  # the end-of-sequence token, which the text does not show
        if self._thinking(stopped=stopped):
            span, self.closed_by_force = self.spans.close, True
        elif self._answer_text().strip():
            span = self.spans.lead
        elif self.form.think_close and self.form.think_close not in self._written():
            span, self.closed_by_force = self.spans.open_close, True
        else:
            span = self.spans.begin
        self.text += span.text
        self.ids.extend(span.ids or ())
        self.forced += span.tokens
        self.answering, self._folding = True, False
        left = self.thinking + self.room - self.generated - self.forced
        self._answer_left = min(self.form.answer_tokens if span.tokens else self.room, left)

    # -- the running call --------------------------------------------------------------------------
    def begin(self, max_tokens: int) -> None:
        self._call = _Call(max_tokens)
        self.calls += 1

    def receive(self, delta: Delta) -> bool:
        """Take in one event; False once the server has gone past ``max_tokens``, which ends the call."""
        call = self._call
        if call is None:
            return False
        call.accepted = True
        call.counted += delta.tokens
        call.usage = delta.usage or call.usage
        call.finish = delta.finish or call.finish
        if delta.thought:
            if not self._folding and not (self.answering and self.continues):
                self.text += self.form.think_open or "<think>"
                self._folding = True
            self.text += delta.thought
        call.text += delta.text
        if delta.text:
            if self._folding:
                self.text += self.form.think_close or "</think>"
                self._folding = False
            self.text += delta.text
        self._logprobs.extend(enumerate(delta.logprobs, len(self.ids)))
        self.ids.extend(delta.ids)
        call.ids += len(delta.ids)
        if delta.text and not delta.ids:
            self.ids_known = False
        return bool(call.finish) or call.tokens <= call.max_tokens

    def hang_up(self) -> None:
        """The call is being cancelled. If the server has not said a word yet, it may have begun all the same."""
        if self._call is not None:
            self._call.accepted = True

    def end(self, *, cut: bool) -> None:
        """The call is over; ``cut``: it did not come to its own end. Nothing is counted for a call that was
        never accepted; for one that was cut, at least one token, and what the server may have sampled unseen."""
        call, self._call = self._call, None
        if call is None:
            return
        self._last = "cut" if cut else "stop" if call.finish not in ("length", "") else "length"
        if not cut and not call.finish:
            self._last = "length" if call.tokens >= call.max_tokens else "stop"
        if not call.accepted:
            return
        step = self.request.step_text
        self.at_step = bool(step) and self._last == "stop" and self._pauses and call.text.endswith(step)
        self.accepted += 1
        tokens = call.tokens
        if cut:
            tokens = min(max(tokens, 1) + self.unseen, max(call.max_tokens, tokens))
        prompt = call.usage.prompt if call.usage is not None and call.usage.prompt else self._prompt_now(call)
        cached = call.usage.cached if call.usage is not None else 0
        self.made.append(Fork(prompt, min(cached, prompt), tokens, None))
        self.generated += tokens
        self._answer_left -= tokens
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        if self._last == "stop" and call.ids and self._logprobs:
            self._logprobs.pop()  # the end-of-sequence token says nothing of the answer

    def _prompt_now(self, call: _Call) -> int:
        """The prompt of a call whose server counted nothing: ours, and what had been written before it."""
        return self.prompt + max(len(self.ids) - call.ids, 0) if self.ids_known else self.prompt

    # -- the end -----------------------------------------------------------------------------------
    def completion(self, finish: Finish, error: str = "") -> Completion:
        inserted = triggers = 0
        logprobs = self._logprobs
        if self.course is not None:
            if self.native:
                self.course.output[:] = self.ids
                self.course.read_back()
                inserted = self.course.forced
                forced = {place for at, length in self.course.spans for place in range(at, at + length)}
                logprobs = [(place, value) for place, value in logprobs if place not in forced]
                self.closed_by_force = self.closed_by_force or self.course.closed_by_force
            triggers = self.course.begun
        return Completion(
            text=self.text,
            finish=finish,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated - inserted,
            forced_tokens=self.forced + inserted,
            triggers=triggers,
            calls=tuple(self.made) if len(self.made) > 1 else (),
            cached_tokens=self.cached_tokens,
            token_ids=tuple(self.ids) if self.ids_known else (),
            closed=self.closed_by_force,
            partial=self.partial,
            mean_logprob=sum(value for _, value in logprobs) / len(logprobs) if logprobs else None,
            error=error,
        )
