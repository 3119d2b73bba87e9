"""The driver on the fake engine: it keeps the engine full, and says what it bought and why."""

from __future__ import annotations

from tests.conftest import make_problems
from tests.driving import make_driver
from ttc.budget import Budget
from ttc.engine.fake import FakeEngine, Script
from ttc.policies import parse


def test_the_engine_is_kept_full_across_problems() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(20, "7", 1), concurrency=16)
    list(make_driver(engine, parse("self-consistency?n=4"), Budget(10_000, "tokens")).run(make_problems(32)))
    work = engine.counters()
    assert work.output_tokens / work.steps > 0.9 * 16


def test_same_answers_and_ledgers_at_any_concurrency() -> None:
    outcomes = []
    for concurrency in (1, 3, 64):
        engine = FakeEngine(concurrency=concurrency)
        results = make_driver(engine, parse("self-consistency?n=5"), Budget(100_000, "tokens")).run(
            make_problems(10)
        )
        outcomes.append(
            {r.problem_id: (r.answer, dict(sorted(r.votes.items())), r.charge.tokens) for r in results}
        )
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_decisions_say_what_was_bought_and_why() -> None:
    engine = FakeEngine(writer=lambda request, issued: Script(40, "7", 2))
    [result] = make_driver(engine, parse("self-consistency?n=50"), Budget(300, "tokens")).run(
        make_problems(1)
    )
    assert [d.what.split()[0] for d in result.decisions] == ["generate", "deny"]
    assert all(d.why and d.problem_id == "p0" for d in result.decisions)
