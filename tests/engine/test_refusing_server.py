"""A server that begins to refuse every call (a key withdrawn, a model taken down) ends the run, not each problem."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest

import ttc
from tests.conftest import make_problems
from tests.engine.http_engine import request, run, serving
from tests.engine.mock_server import Call, Script
from ttc.engine.http_runner import REFUSALS
from ttc.errors import EngineError
from ttc.types import Result


class Server:
    """Answers ``good`` calls, then refuses with ``status`` for as long as ``refuses``."""

    def __init__(self, good: int, status: int) -> None:
        self.good, self.status, self.refuses, self.calls = good, status, True, 0

    def __call__(self, call: Call) -> Script:
        self.calls += 1
        if self.calls > self.good and self.refuses:
            return Script(status=self.status, message="no such key")
        return Script("so</think>7")


@pytest.mark.parametrize(
    ("status", "mend"),
    [(401, "set OPENAI_API_KEY"), (403, "see what the key"), (404, "see whether the server")],
)
def test_a_run_ends_early_where_the_server_refuses_every_call_and_resumes(
    status: int, mend: str, tmp_path: Path
) -> None:
    model, results = Server(6, status), deque[Result]()
    problems = make_problems(60)
    with serving(model, concurrency=1) as (engine, _):  # in turn: no answer comes late, between refusals
        stream = ttc.run(problems, engine=engine, policy="greedy", budget="2k tokens", out=tmp_path)
        says = rf"has refused {REFUSALS} branches in a row \(HTTP {status}: no such key\); {mend}"
        with pytest.raises(EngineError, match=says):
            results.extend(stream)
        assert model.calls == 6 + REFUSALS
        saved = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert [row["answer"] for row in saved if not row["error"]] == ["7"] * 6
        model.refuses = False
    with serving(model, concurrency=2) as (engine, server):
        again = list(ttc.run(problems, engine=engine, policy="greedy", budget="2k tokens", out=tmp_path))
        assert len(server.calls) == 54
    assert [r.answer for r in again] == ["7"] * 60


def test_refusals_between_answers_end_no_run() -> None:
    """One that can't be answered here and there is its own problem's failure."""
    model = lambda call: Script(status=404, message="gone") if call.number % 3 else Script("so</think>7")  # noqa: E731
    with serving(model, concurrency=1) as (engine, _):
        done = run(engine, [request(index=i) for i in range(3 * REFUSALS)])
    assert [c.finish for c in done].count("error") == 2 * REFUSALS


def test_what_one_request_can_not_have_is_no_refusal_of_all() -> None:
    with serving(lambda call: Script(status=400, message="too long"), concurrency=1) as (engine, _):
        done = run(engine, [request(index=i) for i in range(2 * REFUSALS)])
    assert {c.error for c in done} == {"HTTP 400: too long"}
