"""The Python API on the fake engine, and rewards, needs, asyncio."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import ttc
from tests.conftest import make_problems
from tests.waiting import LIMIT_S
from ttc.api import Options, Run, Settings
from ttc.budget import Budget
from ttc.engine.fake import FakeEngine, Script
from ttc.engine.protocol import StepReport
from ttc.errors import InputError
from ttc.policies import SelfConsistency
from ttc.simulate import load
from ttc.types import Problem, Request


class Liking:
    """A reward model that likes the answer "8", and reads ``price`` tokens a text."""

    def __init__(self, price: int = 1) -> None:
        self.price = price

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return self.price * len(texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [float(text.endswith("8")) for text in texts]


def mixed() -> FakeEngine:
    return FakeEngine(writer=lambda request, issued: Script(10, "8" if request.index == 3 else "7", 1))


def test_a_problem_in_an_answer_out() -> None:
    result = ttc.solve(make_problems(1)[0], engine=mixed(), budget="2k tokens", policy="self-consistency?n=5")
    assert result.answer == "7"
    assert result.votes == {"7": 4.0, "8": 1.0}
    assert result.cost.tokens == 5 * 12
    assert result.cost.eflops > result.cost.flops > 0
    assert result.decisions[0].what == "generate 5"


def test_run_yields_each_problem_once() -> None:
    results = list(
        ttc.run(make_problems(7), engine=mixed(), policy="greedy", budget="1M tokens", scope="run")
    )
    assert sorted(r.problem_id for r in results) == [f"p{i}" for i in range(7)]


def test_best_of_n_by_a_reward_model_charges_what_it_reads() -> None:
    [result] = ttc.run(make_problems(1), engine=mixed(), policy="best-of-n?n=5&score=reward", reward=Liking())
    assert result.answer == "8"
    assert result.charge.tokens_judge == 5
    assert result.charge.tokens == 5 * 12 + 5


def test_a_reward_model_that_the_budget_cannot_pay_for_leaves_the_vote() -> None:
    policy, budget = "best-of-n?n=5&score=reward", "500 tokens"
    [result] = ttc.run(make_problems(1), engine=mixed(), policy=policy, reward=Liking(200), budget=budget)
    assert result.answer == "7"
    assert result.charge.tokens == 5 * 12


def varied() -> FakeEngine:
    """Every branch of a problem has an answer of its own."""
    return FakeEngine(writer=lambda request, issued: Script(5 + request.index, str(request.index), 1))


@pytest.mark.parametrize("measure", ["mean_logprob", "self_certainty"])
def test_confidence_policies_choose_by_confidence(measure: str) -> None:
    for policy in ("best-of-n?n=6&score=", "weighted-vote?n=6&weight="):
        results = list(ttc.run(make_problems(8), engine=varied(), policy=policy + measure.replace("_", "-")))
        for result in results:
            surest = max(result.branches, key=lambda b: getattr(b.completion, measure))
            assert result.answer == surest.vote
        assert len({r.answer for r in results}) > 1


class Deaf(FakeEngine):
    @property
    def info(self):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(super().info, signals=("mean-logprob",), name="deaf")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("best-of-n", "needs self-certainty, which the deaf engine can't measure"),
        ("best-of-n?score=reward", "reward model"),
    ],
)
def test_what_a_policy_needs_is_checked_before_it_starts(policy: str, words: str) -> None:
    engine = Deaf()
    with pytest.raises(InputError, match=words):
        Run(make_problems(1), engine, Settings(policy=policy))
    assert engine.counters().requests == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "3 bananas"}, "budget"),
        ({"effort": 1.5}, "effort"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_k": -3}, "top-k"),
        ({"intensity": 0.0}, "intensity"),
        ({"price": {"usd_per_m_input": -3.0}}, "price-input"),
        ({"max_thinking_tokens": 0}, "max-thinking"),
        ({"kv_budget": 512}, "kv-budget"),
        ({"budget": "$1"}, "dollars need a price"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Run(make_problems(1), FakeEngine(), Settings(**settings))  # type: ignore[arg-type]


def test_dollars_are_charged_by_the_token() -> None:
    price = {"usd_per_m_input": 1.0, "usd_per_m_output": 10.0}
    [result] = ttc.run(make_problems(1), engine=mixed(), policy="greedy", budget="$0.01", price=price)
    assert result.charge.dollars == pytest.approx((20 * 1.0 + 12 * 10.0) / 1e6)


def test_event_loops_have_the_same() -> None:
    async def both() -> tuple[str | None, list[str]]:
        one = await ttc.asolve(make_problems(1)[0], engine=mixed(), policy="greedy")
        many = [r.problem_id async for r in ttc.arun(make_problems(4), engine=mixed(), policy="greedy")]
        return one.answer, many

    answer, many = asyncio.run(both())
    assert answer == "7"
    assert sorted(many) == ["p0", "p1", "p2", "p3"]


def test_kinetics_shares_the_prompt_over_the_branches() -> None:
    """The sum over branches equals Kinetics Eq. 4 for N equal branches of one prompt."""
    from ttc.costmodel import kinetics

    engine = FakeEngine(writer=lambda request, issued: Script(10, "7", 1))
    [result] = ttc.run(make_problems(1), engine=engine, policy="self-consistency?n=5")
    shape = engine.info.shape
    assert shape is not None
    expected = kinetics(shape, prompt_tokens=20, generated_tokens=12, samples=5).eflops()
    assert result.charge.eflops_kinetics == pytest.approx(float(expected), rel=1e-12)


def test_closing_bytes_equal_every_weight_pass_once() -> None:
    """Charged weight reads add up to the engine's steps: none is charged twice, none is lost."""
    engine = FakeEngine(writer=lambda request, issued: Script(10 + request.index, "7", 1), concurrency=3)
    [result] = ttc.run(make_problems(1), engine=engine, policy="self-consistency?n=5")
    reads = sum(b.completion.weight_reads or 0.0 for b in result.branches)
    assert reads == pytest.approx(engine.counters().steps)


class NoRun:
    name = "no-run"


@pytest.mark.parametrize(
    ("problems", "settings", "says"),
    [
        (["6*7"], {}, "'6.7' is no ttc.Problem"),
        ([*make_problems(2), *make_problems(1)], {}, "the id 'p0' is there twice"),
        ([Problem("g", ({"role": "user", "content": "6*7"},), 42)], {}, "the answer 42 of 'g' is no text; write '42'"),  # type: ignore[arg-type]
        (make_problems(1), {"budget": 2000}, "2000 has no unit"),
        (make_problems(1), {"temperature": "hot"}, "temperature: 'hot' is no number"),
        (make_problems(1), {"effort": "high"}, "effort: 'high' is no number"),
        (make_problems(1), {"seed": 1.5}, "seed: 1.5 is no whole number"),
        (make_problems(1), {"top_k": 1.5}, "top_k: 1.5 is no whole number"),
        (make_problems(1), {"max_thinking_tokens": 2.5}, "is no whole number"),
        (make_problems(1), {"price": {"usd": 1}}, "usd_per_m_input and usd_per_m_output"),
        (make_problems(1), {"budget": Budget(9e4, "tokens"), "scope": "run"}, "is for each problem; say it there"),
        (make_problems(1), {"policy": NoRun()}, "NoRun has no name or no run"),
        (make_problems(1), {"policy": SelfConsistency}, "is a class; give a value of it, SelfConsistency"),
    ],
)  # fmt: skip
def test_what_is_no_problem_policy_or_budget_is_said_in_one_line(
    problems: list[Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Run(problems, FakeEngine(), Settings(**settings))


def test_the_keywords_of_run_and_solve_are_the_fields_of_settings() -> None:
    """Type checkers see each of them, with its type."""
    told, kept = get_type_hints(Options), get_type_hints(Settings)
    assert told == kept


class Halting(FakeEngine):
    """Its steps stop after the fifth until it may ``go`` on."""

    def __init__(self, writer: Callable[[Request, int], Script]) -> None:
        super().__init__(writer=writer)
        self.go = threading.Event()

    def step(self) -> StepReport:
        if self.counters().steps >= 5:
            assert self.go.wait(LIMIT_S)
        return super().step()


def test_a_cancelled_asolve_spends_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stop = Halting(lambda request, issued: Script(300, "7", 1)), Run.stop

    def stop_and_go(run: Run) -> None:
        stop(run)
        engine.go.set()

    monkeypatch.setattr(Run, "stop", stop_and_go)

    async def leave() -> None:
        options: Options = {"policy": "self-consistency?n=400", "budget": "100M tokens"}
        working = asyncio.create_task(ttc.asolve(make_problems(1)[0], engine=engine, out=tmp_path, **options))
        while engine.counters().steps < 5:
            await asyncio.sleep(0.001)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(leave())
    spent = engine.counters()
    assert not engine._live and spent.requests == engine.concurrency, (
        "nothing runs, and nothing new was begun"
    )
    rows = [json.loads(line) for line in (tmp_path / "branches.jsonl").read_text().splitlines()]
    told = sum(
        row["charge"].get("tokens_generated", 0) + row["charge"].get("tokens_forced", 0) for row in rows
    )
    assert told == spent.output_tokens
    assert ttc.solve(make_problems(1)[0], engine=engine, policy="greedy").answer == "7"


def test_an_asolve_that_is_cancelled_as_the_engine_opens_spends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opening, go, engine = threading.Event(), threading.Event(), mixed()

    def start(model: str, name: str) -> FakeEngine:
        opening.set()
        assert go.wait(LIMIT_S)
        return engine

    monkeypatch.setattr("ttc.api.start_engine", start)

    async def leave() -> None:
        working = asyncio.create_task(ttc.asolve("6*7", engine="slow to open"))
        while not opening.is_set():
            await asyncio.sleep(0)
        working.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(leave())
    assert engine.counters().requests == 0


@pytest.mark.parametrize(
    ("tasks", "told"), [(("rg:a", "rg:a"), "rg:a"), (("rg:a", "rg:b"), None), ((None, None), None)]
)
def test_a_run_directory_names_the_task_of_its_problems(
    tasks: tuple[str | None, ...], told: str | None, tmp_path: Path
) -> None:
    problems = [
        replace(p, meta={**p.meta, **({"task": task} if task else {})})
        for p, task in zip(make_problems(len(tasks)), tasks, strict=True)
    ]
    list(ttc.run(problems, engine=mixed(), policy="greedy", out=tmp_path / "run"))
    assert load(tmp_path / "run").task == told


def test_what_a_policy_computes_once_is_there_before_the_clock_begins() -> None:
    from ttc.policies.posterior import value_table

    value_table.cache_clear()
    this = Run(make_problems(1), FakeEngine(), Settings(policy="adaptive", budget="9 s"))
    assert value_table.cache_info().currsize == 1
    this.jury.close()


def test_an_infinite_temperature_is_refused() -> None:
    with pytest.raises(InputError, match="temperature: inf is no temperature"):
        Settings(temperature=float("inf")).check()
