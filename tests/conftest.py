"""Shared by all tests: no network, no hub, quiet engines."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.waiting import LIMIT_S
from ttc import judge as jury
from ttc import problems as drawing
from ttc import sandbox
from ttc.engine import http_stream, openai
from ttc.types import Problem, Verdict

# What ttc waits for by the clock is waited for longer here: a machine that stands still for seconds fails no test.
sandbox.START_LIMIT_S = drawing.DRAW_LIMIT_S = http_stream.CONNECT_S = openai.CLOSE_S = LIMIT_S
(openai.OpenAIEngine.__init__.__kwdefaults__ or {})["timeout_s"] = LIMIT_S
vars(jury).update(LIMIT_S=60.0, VOTE_LIMIT_S=60.0)  # a model may write what takes for ever to judge

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("new examples", settings.get_profile("any machine"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "any machine"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with real engines come first: they take longest, and two workers should end together. Where vLLM is not installed (the
    core alone), such tests are skipped, and say so."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in engines)
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


class PlainJudge:
    """Answers after ``</think>``, equality of strings: a judge without child processes."""

    slow = False

    def answer(self, problem: Problem, text: str) -> str | None:
        return text.split("</think>", 1)[1].strip() or None if "</think>" in text else None

    def vote(self, problem: Problem, answer: str) -> str:
        return answer

    def verdict(self, problem: Problem, answer: str | None) -> Verdict | None:
        return (
            None if problem.gold is None else Verdict(answer == problem.gold, float(answer == problem.gold))
        )

    def forget(self, problem: Problem) -> None: ...


@pytest.fixture
def judge() -> PlainJudge:
    return PlainJudge()


def make_problems(count: int, prompts: Sequence[int] = (20,), **changes: Any) -> list[Problem]:
    return [
        Problem(
            f"p{i}", ({"role": "user", "content": f"question {i}"},), gold=str(i),
            meta={"prompt_tokens": prompts[i % len(prompts)]}, **changes,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def problems() -> Callable[..., list[Problem]]:
    return make_problems
