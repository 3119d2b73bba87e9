"""An HTTP engine on a scripted server, and how tests run branches through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests import waiting
from tests.engine.mock_server import Call, MockServer, Model, Script
from ttc.engine.openai import OpenAIEngine
from ttc.types import AnswerFormat, Completion, Problem, Request

FORM = AnswerFormat(close_text="</think>A", answer_tokens=6)
PROBLEM = Problem("p", ({"role": "user", "content": "1+1"},))
THINKS = "<think>"


def request(thinking: int = 40, index: int = 0, **changes: Any) -> Request:
    return Request(PROBLEM, index, 1000 + index, thinking, **changes)


@contextmanager
def serving(
    model: Model, *, exact: bool = True, opens: str = THINKS, **options: Any
) -> Iterator[tuple[OpenAIEngine, MockServer]]:
    """A mock server with an engine on it; afterwards every thread and connection must be gone."""
    settings: dict[str, Any] = {
        "format": FORM,
        "backoff_s": 0.001,
        "timeout_s": waiting.LIMIT_S,
        "stream_interval": 1,
    } | options
    before = set(threading.enumerate())
    with MockServer(model, exact=exact, opens=opens) as server:
        engine = OpenAIEngine(f"openai:{server.url}", **settings)
        try:
            yield engine, server
        finally:
            engine.close()
        assert not engine._running
    waiting.until(lambda: not set(threading.enumerate()) - before, what="no thread is left")


def run(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Completion]:
    """All of them at once, in request order."""
    for ticket, one in enumerate(requests):
        engine.submit(ticket, one)
    return collect(engine, range(len(requests)))


def collect(engine: OpenAIEngine, tickets: Sequence[int] | range) -> list[Completion]:
    found: dict[int, Completion] = {}
    waiting.until(
        lambda: all(t in found for t in tickets),
        lambda: found.update(engine.step().finished),
        "all have ended",
    )
    return [found[t] for t in tickets]


def until(engine: OpenAIEngine, condition: Callable[[], bool]) -> None:
    waiting.until(condition, engine.step)


def seen(engine: OpenAIEngine, tokens: int, branches: int = 1) -> None:
    """Step until that many branches have shown that many tokens."""
    shown: set[int] = set()

    def step() -> None:
        shown.update(t for t, p in engine.step().progress.items() if p.tokens >= tokens)

    waiting.until(lambda: len(shown) >= branches, step, f"{branches} branches have {tokens} tokens")


def while_nothing_ends(engine: OpenAIEngine) -> None:
    for _ in range(10):
        assert not engine.step().finished


def answers_by(thought: str, answer: str) -> Model:
    """Thinks, closes, answers; asked to go on after a close it only answers."""

    def model(call: Call) -> Script:
        return Script(answer if "</think>" in call.prompt else f"{thought}</think>{answer}")

    return model
