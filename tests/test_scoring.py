"""Scores: asked for beside the run, charged and written down once, and missed by no problem that has chains to answer with."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_problems
from tests.driving import Dies, jobs_of, make_driver, total
from tests.engine.http_engine import serving
from tests.engine.mock_server import Call, Script
from tests.waiting import LIMIT_S
from ttc import driver as driver_module
from ttc.api import Run, Settings
from ttc.budget import Budget
from ttc.engine.fake import FakeEngine, random_writer
from ttc.errors import EngineError
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.types import AnswerFormat, Problem, Score

SEARCHES = (
    "beam?n=4&width=2&tokens=9",
    "dvts?n=4&width=2&tokens=9",
    "particles?n=3&tokens=9",
    "best-of-n?n=3&score=reward",
)


@dataclass
class Judge:
    """A process reward model; ``read`` keeps the texts that it was given."""

    slow: bool = False
    at_once: int = 1
    read: list[tuple[str, ...]] = field(default_factory=list)

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return sum(len(text) // 3 + 1 for text in texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        self.read.append(tuple(texts))
        return [len(text) % 10 / 10 for text in texts]


@dataclass
class Hanging(Judge):
    """Scores of the first problem do not come before ``gate`` is open."""

    slow: bool = True
    gate: threading.Event = field(default_factory=threading.Event)
    in_time: bool = True
    asked: threading.Event = field(default_factory=threading.Event)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        if problem.id == "p0":
            self.asked.set()
            self.in_time &= self.gate.wait(LIMIT_S)
        return super().score(problem, texts)


def test_other_problems_go_on_while_a_score_is_awaited() -> None:
    judge, problems = Hanging(), make_problems(5)
    engine = FakeEngine(concurrency=2)
    driver = make_driver(engine, parse("best-of-n?n=3&score=reward"), Budget(900, "tokens"), reward=judge)

    def when_all_have_run(status: object) -> None:
        if driver.status.samples == 15:
            judge.gate.set()

    driver.on_step = when_all_have_run
    results = list(driver.run(problems))
    assert judge.in_time, "the others were sampled while the first problem's scores were awaited"
    assert all(r.answer for r in results)
    assert driver.overrun == 0


@pytest.mark.parametrize(
    ("policy", "slow", "at_once", "calls"),
    [("best-of-n?n=3&score=reward", False, 1, 12), ("particles?n=2&tokens=2", True, 2, 30)],
)
def test_a_server_is_kept_at_work_while_a_score_hangs(
    policy: str, slow: bool, at_once: int, calls: int
) -> None:
    """Whatever the reward model: behind an engine that is a server, it is asked beside the loop that hears it; and as many scores
    at once as it takes."""
    judge = Hanging(slow=slow, at_once=at_once)
    others = 0

    def model(call: Call) -> Script:
        nonlocal others
        if "question 0" not in call.prompt:
            others += 1
            if others == calls:
                judge.gate.set()
        return Script("tttt#4" if "#" not in call.prompt else "4")

    form = AnswerFormat(think_open="<", think_close="#", close_text="#", answer_tokens=6)
    with serving(model, opens="<", format=form, concurrency=3) as (engine, _):
        run = Run(make_problems(5), engine, Settings(policy=policy, budget="500 tokens"), reward=judge)
        results = list(run.results())
    assert judge.in_time, "calls of the other problems were made, and their ends heard, meanwhile"
    assert [r.answer for r in results] == ["4"] * 5


class Ticking(FakeEngine):
    """Its time goes on whether it works or not: while it has nothing to do, about as much between two looks as they wait."""

    def clock(self) -> float:
        self.now += 1e-3 if self._live else 3e-3
        return self.now


@pytest.mark.parametrize("slow", [True, False])
def test_time_is_kept_whatever_the_reward_model_does(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "LOOK_SECONDS", 0.01)
    engine = (Ticking if slow else FakeEngine)(random_writer(mean_thinking=1e9))

    class Sluggish(Hanging):
        def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
            if not self.slow:
                engine.now += 0.3
                return Judge.score(self, problem, texts)
            return super().score(problem, texts)

    judge = Sluggish(slow=slow)
    driver = make_driver(
        engine, parse("beam?n=4&width=2&tokens=9"), Budget(1.5, "seconds"), cap=500, reward=judge
    )
    [result] = driver.run(make_problems(1))
    judge.gate.set()
    assert result.answer is not None, result.decisions
    assert driver.overrun == 0
    if slow:
        assert any("too late" in d.why for d in result.decisions)


@dataclass
class Breaking(Judge):
    """Answers ``good`` times, then no more."""

    good: int = 0

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        if len(self.read) >= self.good:
            raise EngineError("the reward server is gone")
        return super().score(problem, texts)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("policy", SEARCHES)
def test_a_reward_model_that_breaks_costs_the_scores_and_is_named(policy: str, good: int, slow: bool) -> None:
    driver = make_driver(
        FakeEngine(), parse(policy), Budget(9000, "tokens"), reward=Breaking(slow=slow, good=good)
    )
    results = list(driver.run(make_problems(3)))
    assert all(r.answer is not None for r in results)
    assert any("reward: EngineError: the reward server is gone" in r.error for r in results)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.integers(0, 150), policy=st.sampled_from(SEARCHES), slow=st.booleans())
def test_a_resumed_search_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, steps: int, policy: str, slow: bool
) -> None:
    """No step is sampled and no text is read twice, and what both sessions cost is what one would have."""
    directory, problems = tmp_path_factory.mktemp("run"), make_problems(3)
    budget, whole_judge = Budget(20_000, "tokens"), Judge()
    whole = list(make_driver(FakeEngine(), parse(policy), budget, reward=whole_judge).run(problems))

    judge, first = Judge(slow), Ledger.open(directory, {})
    dying = Dies(steps, concurrency=5)
    with contextlib.suppress(EngineError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttc.scoring.LAST_WORD_S", LIMIT_S)
        list(make_driver(dying, parse(policy), budget, ledger=first, reward=judge).run(problems))
    first.close()
    second = Ledger.open(directory, {})
    lost = sum(charge.tokens for charges in second.interrupted.values() for charge in charges)
    driver = make_driver(FakeEngine(), parse(policy), budget, ledger=second, reward=judge)
    results = {r.problem_id: r for r in driver.run(problems)}
    second.close()
    assert {r.problem_id: (r.answer, r.votes) for r in whole} == {
        p: (r.answer, r.votes) for p, r in results.items()
    }
    assert sorted(judge.read) == sorted(whole_judge.read)
    assert total(list(results.values())).tokens == total(whole).tokens + lost


def test_scores_that_an_interrupted_run_did_not_wait_for_count_as_spent(tmp_path: Path) -> None:
    judge, problems = Hanging(), make_problems(1)
    ledger = Ledger.open(tmp_path / "run", {})
    policy = parse("best-of-n?n=2&score=reward")
    driver = make_driver(FakeEngine(), policy, Budget(900, "tokens"), ledger=ledger, reward=judge)
    driver.on_step = lambda status: driver.stop() if judge.asked.is_set() else None
    assert list(driver.run(problems)) == []
    ledger.close()
    [line] = [json.loads(text) for text in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    assert line["scores"] is None and line["charge"]["tokens_judge"] > 0
    judge.gate.set()
    again = Ledger.open(tmp_path / "run", {})
    driver = make_driver(FakeEngine(), policy, Budget(900, "tokens"), ledger=again, reward=judge)
    [result] = driver.run(problems)
    assert result.charge.tokens_judge == 2 * line["charge"]["tokens_judge"], "read twice, and paid twice"
    again.close()


def test_work_without_branches_is_no_question() -> None:
    driver = make_driver(FakeEngine(), parse("greedy"), Budget(900, "tokens"), reward=Judge())
    [job] = jobs_of(driver, make_problems(1))
    assert driver.scoring.ask(job, Score(())) is not None
