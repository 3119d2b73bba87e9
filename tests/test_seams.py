"""What a policy, a reward model and a verifier of one's own are shown, and what is told of them when they break."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ttc
from tests.conftest import make_problems
from ttc.api import Run, Settings
from ttc.engine.fake import FakeEngine, Script
from ttc.errors import InputError
from ttc.jobs import Traits
from ttc.types import Branch, Brief, Control, Generate, Outcome, Problem, Request, Routine, Score, Verdict

HERE = Path(__file__).name


def knowing() -> FakeEngine:
    """Every branch has the right answer."""
    return FakeEngine(writer=lambda request, issued: Script(5, request.problem.gold or "?", 1))


def posed(**meta: Any) -> Problem:
    text = ({"role": "user", "content": "6*7"},)
    told = {"prompt_tokens": 20, "task": "rg:some", "entry": {"answer": "42"}, **meta}
    return Problem("p", text, "42", f"{__name__}:Looking", told)


class Listening(FakeEngine):
    """Keeps the problems of its requests."""

    def submit(self, ticket: int, request: Request) -> None:
        SEEN_BY_THE_ENGINE.append(request.problem)
        super().submit(ticket, request)


SEEN_BY_THE_ENGINE: list[Problem] = []
SEEN_BY_THE_VERIFIER: list[Problem] = []


class Looking:
    """A verifier that keeps what it was shown."""

    name = "looking"

    def verify(self, problem: Problem, answer: str) -> Verdict:
        SEEN_BY_THE_VERIFIER.append(problem)
        return Verdict(answer == problem.gold, float(answer == problem.gold))

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        return a == b

    def close(self) -> None: ...


@dataclass(slots=True)
class Peeking:
    """Keeps what it is shown, and answers with a reference if it finds one."""

    seen: list[Problem] = field(default_factory=list)
    name = "peeking"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        self.seen.append(problem)
        reply = yield Generate((brief.request(problem, 0), brief.request(problem, 1)))
        yield Score(reply.branches)
        return Outcome(reply.branches[0].vote, "samples", {str(reply.branches[0].vote): 2.0})


def test_neither_policy_nor_reward_model_sees_the_reference_and_the_verifier_does() -> None:
    policy, scored = Peeking(), []

    def reward(problem: Problem, texts: Sequence[str]) -> list[float]:
        scored.append(problem)
        return [1.0] * len(texts)

    SEEN_BY_THE_VERIFIER.clear()
    SEEN_BY_THE_ENGINE.clear()
    engine = Listening(writer=lambda request, issued: Script(5, request.problem.gold or "?", 1))
    [result] = ttc.run([posed()], engine=engine, policy=policy, reward=reward)
    for problem in (*policy.seen, *scored, *SEEN_BY_THE_ENGINE):
        assert problem.gold is None and "42" not in repr(problem)
        assert problem.meta == {"prompt_tokens": 20, "task": "rg:some"}
        assert problem.id == "p" and problem.text == "6*7"
    assert policy.seen and scored and SEEN_BY_THE_ENGINE
    assert [p.gold for p in SEEN_BY_THE_VERIFIER] and SEEN_BY_THE_VERIFIER[0] == posed()
    assert result.verdict == Verdict(True, 1.0), "the judge has the whole problem"


def test_a_problem_without_a_reference_is_shown_as_it_is() -> None:
    problem = Problem("p", ({"role": "user", "content": "6*7"},), meta={"task": "own"})
    assert problem.posed() is problem


@dataclass(frozen=True, slots=True)
class OfItsOwn:
    """A policy with fields of its own whose names mean something in ``Traits``, or to nobody."""

    needs: str = "patience"
    efforts: int = 3
    cap: int = 1
    total: int = 1
    text: str = "a title of mine"
    step: int = 7
    effort: float = 0.3
    control: str = "mine"
    check_room: bool = True
    planned: bool = True
    traits: str = "brave"
    name = "of-its-own"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        reply = yield Generate((brief.request(problem, 0),))
        return Outcome(reply.branches[0].vote, "samples", {self.text: 1.0})


def test_a_policys_fields_are_its_own_whatever_their_names() -> None:
    run = Run(make_problems(2), knowing(), Settings(policy=OfItsOwn()))
    assert [p.text for p in run.problems] == ["question 0", "question 1"], "nothing is put behind them"
    assert run.policy == OfItsOwn() and run.notices == []
    assert [r.answer for r in run.results()] == ["0", "1"]


@dataclass(frozen=True, slots=True)
class Telling:
    """A policy that says what it needs, in the one way there is."""

    traits: Traits
    name = "telling"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        efforts = self.traits.efforts or (brief.effort,)
        reply = yield Generate(tuple(brief.request(problem, i, effort=e) for i, e in enumerate(efforts)))
        return Outcome(reply.branches[0].vote, "samples")


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (Traits(needs=("reward",)), "telling scores with a reward model"),
        (Traits(needs=("heat",)), "telling needs heat, which the fake engine can't measure"),
        (Traits(needs=("effort",)), "telling needs a model that was trained for levels of effort"),
        (Traits(needs=("control",), control=lambda limit: Control(("Wait",), at=(limit + 1,))), "at"),
    ],
)
def test_what_traits_ask_for_is_refused_where_it_is_not_there(told: Traits, says: str) -> None:
    engine = knowing()
    with pytest.raises(InputError, match=says):
        Run(make_problems(1), engine, Settings(policy=Telling(told)))
    assert engine.counters().requests == 0


def test_traits_are_heard() -> None:
    seen: list[int] = []
    told = Traits(
        text="Think briefly.",
        efforts=(0.25, 1.0),
        check_room=lambda room, thinking: seen.append(thinking),
        cap=33,
    )
    engine = FakeEngine(writer=lambda request, issued: Script(5, str(request.effort), 1), effort_tokens=2)
    run = Run(make_problems(1), engine, Settings(policy=Telling(told)))
    assert run.problems[0].text == "question 0\nThink briefly."
    assert seen == [33]
    [result] = run.results()
    assert {b.vote for b in result.branches} == {"0.25", "1.0"}


MORE: Any = "more"


# -- what breaks in them -------------------------------------------------------------------------------------------------------
def _divide(by: int) -> float:
    return 1 / by  # the line that is told


@dataclass(frozen=True, slots=True)
class Breaking:
    """A policy with a mistake: in its own code, in its ``until``, or in what it yields or returns."""

    how: str
    name = "breaking"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        if self.how == "at once":
            _divide(0)

        def until(done: Sequence[Branch]) -> bool:
            return _divide(int(self.how != "until")) > 2

        yield Generate((brief.request(problem, 0),), until)
        if self.how == "yields":
            yield MORE
        if self.how == "returns":
            return "42"  # type: ignore[return-value]
        raise ValueError("none\nof these")


def _line(text: str) -> int:
    return Path(__file__).read_text().split("\n").index(text) + 1


@pytest.mark.parametrize(
    ("how", "says", "line"),
    [
        ("at once", "ZeroDivisionError: division by zero", "    return 1 / by  # the line that is told"),
        ("until", "ZeroDivisionError: division by zero", "    return 1 / by  # the line that is told"),
        ("later", "ValueError: none of these", '        raise ValueError("none\\nof these")'),
        ("yields", "TypeError: its run yielded 'more', which is no Generate, Score or Steer", "            yield MORE"),
        ("returns", "TypeError: its run returned '42', which is no Outcome", ""),
    ],
)  # fmt: skip
def test_a_policys_own_mistake_is_told_with_its_place_and_its_traceback_kept(
    how: str, says: str, line: str, tmp_path: Path
) -> None:
    [result] = ttc.run(make_problems(1), engine=knowing(), policy=Breaking(how), out=tmp_path)
    where = f" (tests/{HERE}:{_line(line)})" if line else ""
    assert (
        result.error.replace(str(Path(__file__).parent.parent) + "/", "")
        == f"policy breaking: {says}" + where
    )
    assert result.traceback.startswith("Traceback") and says.split(":")[0] in result.traceback
    [row] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["traceback"] == result.traceback
    assert "\n" not in result.error


def test_a_run_without_mistakes_keeps_no_traceback(tmp_path: Path) -> None:
    [result] = ttc.run(make_problems(1), engine=knowing(), policy="greedy", out=tmp_path)
    assert result.traceback == ""
    assert "traceback" not in (tmp_path / "results.jsonl").read_text()


@dataclass(frozen=True, slots=True)
class Saying:
    """Says what it is told to of its second problem, and counts in numpy's numbers."""

    answer: Any
    votes: Any
    name = "saying"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        counted: Any = np.arange(2)
        reply = yield Generate(tuple(brief.request(problem, i) for i in counted))
        if problem.id == "1":
            return Outcome(self.answer, "samples", self.votes)
        votes: Any = {"7": np.float32(1.5), "8": np.int64(2)}
        return Outcome(reply.branches[0].vote, "samples", votes)


@pytest.mark.parametrize(
    ("answer", "votes", "says"),
    [
        ("7", {"7": float("inf")}, "ValueError: the votes for '7' weigh inf; give a finite number"),
        ("7", {"7": float("nan")}, "ValueError: the votes for '7' weigh nan; give a finite number"),
        ("7", {"7": np.float32("-inf")}, "ValueError: the votes for '7' weigh -inf; give a finite number"),
        (7, {"7": 1.0}, "TypeError: an answer is a text, not 7"),
        ("7", {7: 1.0}, "TypeError: an answer is a text, not 7"),
        ("7", {"7": "many"}, "ValueError: could not convert string to float: 'many'"),
    ],
)
def test_what_no_ledger_can_hold_fails_its_problem_and_not_the_run(
    answer: Any, votes: Any, says: str, tmp_path: Path
) -> None:
    problems = [Problem(str(i), ({"role": "user", "content": "?"},), "7", "exact") for i in range(3)]
    settings = Settings(policy=Saying(answer, votes), budget="9k tokens")
    first, failed, last = sorted(
        Run(problems, knowing(), settings, out=tmp_path).results(), key=lambda result: result.problem_id
    )
    assert says in failed.error
    assert HERE in failed.error
    for good in (first, last):
        assert (good.answer, good.votes, good.error) == ("7", {"7": 1.5, "8": 2.0}, "")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_verdicts_in_numpys_numbers_are_verdicts() -> None:
    correct: Any = np.bool_(True)
    half: Any = np.float32(0.5)
    assert Verdict(correct, half) == Verdict(True, 0.5)
    assert type(Verdict(correct, 1).correct) is bool
    for score in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Verdict(True, score)
