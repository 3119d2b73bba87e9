"""The engine for tests: same protocol, no model. Seeded, and able to fail, hang and answer differently when asked again.

Branch lengths, answers and mishaps are drawn from the request's seed and the engine's own; one ``step`` adds one token to every
running branch, as continuous batching does, and its own counters count independently of what it reports per branch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ttc.costmodel import ModelShape
from ttc.engine.course import FAR, Course, check_fits
from ttc.engine.protocol import Counters, EngineInfo, Probed, Progress, StepReport
from ttc.types import AnswerFormat, Completion, Control, Fork, Problem, Request, Sampling

TINY_SHAPE = ModelShape.from_config({
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 128, "tie_word_embeddings": True,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Script:
    """What one branch will do: think for ``thinking`` tokens, then write ``answer`` in ``answer_tokens``; or fail after
    ``fails_at`` output tokens; or stop moving after ``hangs_at``."""

    thinking: int
    answer: str
    answer_tokens: int = 2
    fails_at: int | None = None
    hangs_at: int | None = None


Writer = Callable[[Request, int], Script]
"""(request, how often it was issued before) -> what happens."""


def random_writer(
    *,
    mean_thinking: float = 40.0,
    p_right: float = 0.6,
    p_fail: float = 0.0,
    p_hang: float = 0.0,
    flaky: bool = False,
    stubborn: bool = False,
) -> Writer:
    """Geometric thinking lengths; the gold answer with ``p_right``, else one of three wrong ones; mishaps at random positions.
    ``flaky``: a request issued again is drawn anew, as from a real engine at another batch size. ``stubborn``: that
    may fail, too."""

    def write(request: Request, issued: int) -> Script:
        rng = random.Random(f"{request.seed}/{issued if flaky else 0}")
        thinking = min(int(rng.expovariate(1 / mean_thinking)), 100_000)
        gold = request.problem.gold or "0"
        answer = gold if rng.random() < p_right else f"{gold}{rng.choice('123')}"
        fails = rng.randint(0, thinking + 2) if rng.random() < p_fail and (stubborn or issued == 0) else None
        hangs = rng.randint(0, thinking + 2) if rng.random() < p_hang else None
        return Script(thinking, answer, rng.randint(1, 4), fails, hangs)

    return write


THOUGHT, CLOSE, CLOSING, ANSWER, WORD = range(5)
"""The fake's tokens: a thought's, its closing delimiter, the rest of a closing span, an answer's; each word of a trigger is one."""

BLOCK = 16
"""Tokens of a KV block: what an anytime answer computes again."""


@dataclass(slots=True)
class _Live:
    request: Request
    script: Script
    course: Course
    reads: float = 0.0
    thought: int = 0  # tokens of thinking of its own
    answered: int = 0
    probe_every: int = 0
    next_probe: int = 0
    forks: list[Fork] = field(default_factory=list)

    @property
    def output(self) -> int:
        return len(self.course.output)


@dataclass(slots=True)
class FakeEngine:
    """See the module. ``clock`` advances by ``step_seconds`` a step, so that tests of seconds need no waiting."""

    writer: Writer = field(default_factory=random_writer)
    concurrency: int = 8
    context: int = 4096
    prompt_tokens: int = 20
    effort_tokens: int = 0  # that each digit of an effort takes in the prompt
    close_tokens: int = 3
    answer_room: int = 5
    steerable: bool = True
    probes: bool = False
    step_seconds: float = 0.01
    now: float = 0.0
    _live: dict[int, _Live] = field(default_factory=dict)
    _issued: dict[tuple[str, int], int] = field(default_factory=dict)
    _golds: dict[str, str] = field(default_factory=dict)
    _ended: list[tuple[int, Completion]] = field(default_factory=list)
    _counts: dict[str, int] = field(
        default_factory=lambda: {"requests": 0, "output_tokens": 0, "prompt_tokens": 0, "steps": 0}
    )
    peak: int = 0
    closed: bool = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="fake", model="fake", context=self.context, concurrency=self.concurrency, format=AnswerFormat(),
            sampling=Sampling(), steerable=self.steerable, shape=TINY_SHAPE,
            signals=("mean-logprob", "self-certainty"), identity={"model": "fake"}, inserts=True,
            probe_tokens=self.room_tokens if self.probes else None, probe_prefill=BLOCK if self.probes else None,
        )  # fmt: skip

    @property
    def room_tokens(self) -> int:
        return self.close_tokens + self.answer_room

    def check_steps(self, text: str) -> None:
        """A step may end behind any text; in truth only ``step_tokens`` ends one."""

    def check_control(self, control: Control, thinking: int = FAR) -> None:
        """Every control can be followed whose triggers fit into ``thinking`` tokens."""
        check_fits(control, [len(text.split()) for text in control.triggers], thinking)

    def clock(self) -> float:
        return self.now

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        if (
            problem.gold is not None
        ):  # a run asks for the prompts of its problems as they are, and then with no reference in them
            self._golds[problem.id] = problem.gold
        told = self.effort_tokens * len(f"{effort:g}") if effort is not None else 0
        return int(problem.meta.get("prompt_tokens", self.prompt_tokens)) + told

    def _prompt(self, request: Request) -> int:
        """The prompt as it is charged: with what the request goes on from (of a text alone each byte is a token)."""
        begun = len(request.prefix_ids) or len(request.prefix.encode())
        return self.count_prompt(request.problem, request.effort) + begun

    def submit(self, ticket: int, request: Request) -> None:
        if len(self._live) >= self.concurrency:
            raise AssertionError("the driver may not have more in flight than the engine's concurrency")
        if request.problem.gold is None and request.problem.id in self._golds:
            known = replace(request.problem, gold=self._golds[request.problem.id])
            request = replace(request, problem=known)
        key = (request.problem.id, request.index)
        issued = self._issued.get(key, 0)
        self._issued[key] = issued + 1
        self._counts["requests"] += 1
        control = request.control or Control()
        course = Course(
            due=request.thinking_tokens, think_close=[CLOSE], close=[CLOSE, *[CLOSING] * (self.close_tokens - 1)],
            triggers=[[WORD] * len(text.split()) for text in control.triggers], at=list(control.at), relative=control.relative,
            at_end=control.at_end, min_thinking=control.min_thinking, loop_repeats=control.loop_repeats, seed=request.seed,
        )  # fmt: skip
        course.opened = CLOSE not in request.prefix_ids
        thought = request.prefix_ids.count(THOUGHT)
        self._live[ticket] = _Live(request, self.writer(request, issued), course, thought=thought)
        self.peak = max(self.peak, len(self._live))
        if request.probe_every:
            self.probe(ticket, request.probe_from, request.probe_every)

    def probe(self, ticket: int, start: int, every: int) -> None:
        live = self._live.get(ticket)
        if live is not None and self.probes:
            live.probe_every = every
            live.next_probe = -(-max(start, live.output, 1) // every) * every

    def step(self) -> StepReport:
        self.now += self.step_seconds
        moved: dict[int, Progress] = {}
        report = StepReport(self._ended, moved)
        self._ended = []
        moving = [
            (t, b) for t, b in self._live.items() if b.script.hangs_at is None or b.output < b.script.hangs_at
        ]
        if moving:
            self._counts["steps"] += 1
        for ticket, live in moving:
            live.reads += 1 / len(moving)
            self._advance(ticket, live, report, moved)
        return report

    def _advance(self, ticket: int, live: _Live, report: StepReport, moved: dict[int, Progress]) -> None:
        if live.script.fails_at is not None and live.output >= live.script.fails_at:
            report.finished.append((ticket, self._end(ticket, "error")))
            return
        if live.output == 0:
            self._counts["prompt_tokens"] += self._prompt(live.request)
        self._counts["output_tokens"] += 1
        course = live.course
        while not course.forcing() and course.next_position() <= live.output:
            course.arrive()
        closed = course.thought_closed()
        ends = not course.forcing() and not closed and live.thought >= live.script.thinking
        if ends and course.guards_end():  # it may not end: it thinks on, half as long again
            if not course.forbids_end():
                course.end_came()
            ends, live.thought = False, live.script.thinking // 2
        if course.forcing():
            course.output.append(course.force())
        elif closed:
            course.output.append(ANSWER)
            live.answered += 1
        elif ends:
            course.output.append(CLOSE)
        else:
            course.output.append(THOUGHT)
            live.thought += 1
        written = live.answered >= live.script.answer_tokens
        if live.request.pauses and live.output == live.request.step_tokens and not written:
            report.finished.append((ticket, self._end(ticket, "length", partial=True)))
        elif written or live.output >= course.due + self.room_tokens:
            report.finished.append((ticket, self._end(ticket, "stop" if written else "length")))
        else:
            moved[ticket] = Progress(live.output, live.reads)
            if live.probe_every and live.output >= live.next_probe and not course.thought_closed():
                self._fork(ticket, live, report)

    def _fork(self, ticket: int, live: _Live, report: StepReport) -> None:
        """An anytime answer, at once: the least of a block is found in the cache, and it is alone in all its steps."""
        live.next_probe = (live.output // live.probe_every + 1) * live.probe_every
        prompt, tokens = self._prompt(live.request) + live.output, self.close_tokens + 1
        live.forks.append(Fork(prompt, max(prompt - BLOCK, 0), tokens, float(tokens)))
        self._counts["output_tokens"] += tokens
        self._counts["prompt_tokens"] += prompt
        report.probes.append(Probed(ticket, live.output, f"thinking</think>{live.script.answer}"))

    def _end(
        self, ticket: int, finish: Literal["stop", "length", "abort", "error"], *, partial: bool = False
    ) -> Completion:
        live = self._live.pop(ticket)
        rng = random.Random(live.request.seed)
        thinks = not live.course.thought_closed() or partial or finish in ("abort", "error")
        text = (
            f"<{live.request.index}>"
            if partial
            else "thinking"
            if thinks
            else f"thinking</think>{live.script.answer}"
        )
        return Completion(
            text=text, finish=finish, prompt_tokens=self._prompt(live.request) if live.output else 0,
            generated_tokens=live.output - live.course.forced, forced_tokens=live.course.forced, weight_reads=live.reads,
            closed=live.course.closed_by_force, triggers=live.course.begun + live.course.inserted,
            token_ids=tuple(live.course.output),
            partial=partial, forks=tuple(live.forks), probe_tokens=sum(fork.output_tokens for fork in live.forks),
            mean_logprob=-rng.random() if live.request.signals else None,
            self_certainty=rng.random() if live.request.signals else None,
            error="the fake engine was told to fail" if finish == "error" else "",
        )  # fmt: skip

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        if ticket in self._live:
            self._live[ticket].course.close_now()

    def insert(self, ticket: int, text: str) -> None:
        if ticket in self._live:
            self._live[ticket].course.insert_now([WORD] * len(text.split()))

    def abort(self, tickets: Sequence[int]) -> None:
        self._ended.extend((t, self._end(t, "abort")) for t in tickets if t in self._live)

    def counters(self) -> Counters:
        return Counters(**self._counts)

    def close(self) -> None:
        self.closed = True
