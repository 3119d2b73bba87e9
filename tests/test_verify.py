"""Right and wrong, equal and different; and children that hang, crash, misbehave and go away."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import LIMIT_S, until
from ttc.errors import InputError, VerifierError
from ttc.problems import from_task
from ttc.rg_tasks import decode, encode
from ttc.types import Problem, Verdict
from ttc.verifiers import Exact, Math, ReasoningGym
from ttc.verify import AnswerClasses, Verifier, can_verify, classes, verifier

HANGS = "9^{9^{9^9}}"

GYM_TASKS = (
    "ab", "arc_1d", "base_conversion", "basic_arithmetic", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "complex_arithmetic", "count_bits", "countdown", "decimal_chain_sum", "family_relationships",
    "fraction_simplification", "gcd", "knights_knaves", "lcm", "letter_counting", "mini_sudoku",
    "number_filtering", "number_sorting", "power_function", "prime_factorization", "products", "rearc",
    "simple_equations", "spell_backward", "word_sorting",
)  # fmt: skip


def problem(gold: str | None = "5", name: str = "math", **meta: Any) -> Problem:
    return Problem("p", ({"role": "user", "content": "?"},), gold, name, meta)


def gone(pid: int) -> bool:
    """True if the process has ended (a zombie that its new parent has not yet reaped counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def math() -> Iterator[Math]:
    made = Math(limit_s=LIMIT_S)
    yield made
    made.close()


@pytest.fixture(scope="module")
def gym() -> Iterator[ReasoningGym]:
    made = ReasoningGym(limit_s=LIMIT_S)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("3.0", "3", True),
        ("1/2", "0.5", True),
        ("\\frac{1}{2}", "0.5", True),
        ("1,000", "1000", True),
        (" Yes.", "yes", True),
        ("$5$", "5", True),
        ("1e400", "2e400", False),
        ("inf", "1e999999", False),
        ("0.1", "0.10000000000000000000001", False),
        ("9007199254740993", "9007199254740992", False),
        ("a b", "ab", False),
    ],
)
def test_exact(a: str, b: str, same: bool) -> None:
    exact = Exact()
    assert exact.equivalent(problem(), a, b) is same
    assert exact.verify(problem(a), b) == Verdict(same, float(same))


def test_math(math: Math) -> None:
    for gold, right in (
        ("5", "5.0"),
        ("\\frac{1}{2}", "0.5"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\{1, 2\\}", "{2, 1}"),
        ("\\text{Yes}", "yes"),
        ("1,000", "1000"),
        ("3", "x=3"),
    ):
        assert math.verify(problem(gold), right).correct, (gold, right)
        assert math.equivalent(problem(gold), right, gold), (gold, right)
    for gold, wrong in (
        ("5", "6"),
        ("5", "-5"),
        ("1/3", "0.33"),
        ("stop", "post"),
        ("(1,2)", "(2,1)"),
        ("A", "B"),
    ):
        assert not math.verify(problem(gold), wrong).correct, (gold, wrong)
        assert not math.equivalent(problem(gold), wrong, gold), (gold, wrong)


def test_mixed_numbers_are_sums(math: Math) -> None:
    for gold, answer, right in (
        ("10.5", "2\\frac{1}{2}", False),
        ("2.5", "2\\frac{1}{2}", True),
        ("3", "1\\frac{4}{2}", True),
        ("17", "3\\frac{4}{2}", False),
        ("1000", "1{,}000", True),
    ):
        assert math.verify(problem(gold), answer).correct is right
        assert math.equivalent(problem(), answer, gold) is right


def test_math_decides_plain_answers_without_a_child() -> None:
    made = Math()
    assert made.verify(problem("1000"), "1,000.0").correct
    assert not made.verify(problem("17"), "18").correct
    assert not made.verify(problem("monday"), "tuesday").correct
    assert made._sandbox.pid is None


def test_a_hostile_expression_times_out_and_the_next_answer_is_judged() -> None:
    made = Math(limit_s=0.5)
    with pytest.raises(VerifierError, match=r"no verdict within 0\.5 s"):
        made.verify(problem(), HANGS)
    second, third = made._sandbox.pid, made._sandbox._next
    assert third is not None
    with pytest.raises(VerifierError, match=r"no verdict within 0\.5 s"):
        made.verify(problem(), HANGS)
    assert made._sandbox.pid == third.process.pid != second, "it stood by when the second was killed"
    made._limit_s = LIMIT_S
    assert made.verify(problem("x+1"), "1+x").correct
    made.close()


@pytest.mark.parametrize("text", ["(" * 1900, "\\frac{" * 300, "x" * 10**6])
def test_other_hostile_text_is_wrong_or_an_error_never_a_hang(text: str) -> None:
    made = Math(limit_s=0.5)
    try:
        assert not made.verify(problem(), text).correct
    except VerifierError:
        pass
    finally:
        made.close()


@pytest.mark.parametrize("task", GYM_TASKS)
def test_gold_is_right_and_a_perturbed_gold_is_wrong(task: str, gym: ReasoningGym) -> None:
    for seed in (1, 2**31 - 1):
        item = gym._sandbox.call("draw", LIMIT_S, task=f"rg:{task}", seed=seed)
        posed = Problem(
            f"rg:{task}", ({"role": "user", "content": item["question"]},), item["answer"], "rg",
            {"task": f"rg:{task}", "entry": item["entry"]},
        )  # fmt: skip
        gold = item["answer"]
        assert gym.verify(posed, gold) == Verdict(True, 1.0)
        assert gym.verify(posed, f" {gold.strip()} ").correct
        wrong = f"x{gold}7"
        assert not gym.verify(posed, wrong).correct
        assert gym.equivalent(posed, gold, f"{gold} ")
        assert not gym.equivalent(posed, gold, wrong)


def test_equality_of_reasoning_gym_follows_its_scorer_but_never_its_solution(gym: ReasoningGym) -> None:
    def entry(answer: str | None, **metadata: Any) -> dict[str, Any]:
        return {"answer": answer, "metadata": metadata}

    sums = problem("-12", "rg", task="rg:chain_sum", entry=entry("-12"))
    assert gym.equivalent(sums, "1,000", "1000.0")
    assert not gym.equivalent(sums, "12", "-12")
    assert gym.verify(sums, "$-12$.").correct
    count = problem(None, "rg", task="rg:countdown", entry=entry("1 + 5", numbers=[1, 5], target=6))
    assert gym.verify(count, "1 + 5").correct
    assert gym.verify(count, "5 + 1").correct
    assert not gym.equivalent(count, "1 + 5", "5 + 1"), "two right answers must not vote together"
    assert gym.equivalent(count, "1  + 5", "1 + 5")
    blind = problem("True", "rg", task="rg:game_of_life_halting", entry=entry("True"))
    assert not gym.equivalent(blind, "True", "False"), "this scorer takes any text for right"


def test_a_scorer_evals_but_reaches_nothing(gym: ReasoningGym, tmp_path: Path) -> None:
    """reasoning-gym's spiral_matrix evals the answer: no file, no process, no exit, no noise on the pipe."""
    posed = problem("1 2", "rg", task="rg:spiral_matrix", entry={"answer": "1 2", "metadata": {}})
    victim = tmp_path / "file"
    for evil in (
        f"[open({str(victim)!r}, 'w').write('x')]",
        f"[__import__('os').system('touch {victim}')]",
        f"[__import__('subprocess').run(['touch', {str(victim)!r}])]",
        f"[__import__('os').kill({os.getpid()}, 9)]",
        "[print('{}')]",
        "[input()]",
        "exit(3)",
        "__import__('os').environ.__getitem__('TTC_SECRET').split()",
    ):
        with contextlib.suppress(VerifierError):
            assert not gym.verify(posed, evil).correct
    assert not victim.exists()
    assert gym.verify(posed, "1 2").correct


def test_memory_is_bounded(gym: ReasoningGym) -> None:
    posed = problem("1 2", "rg", task="rg:spiral_matrix", entry={"answer": "1 2", "metadata": {}})
    assert gym.verify(posed, "['1', '2'] if len('x' * (1 << 20)) else []").score > 0
    assert gym.verify(posed, "['1', '2'] if len('x' * (1 << 31)) else []").score == 0
    assert gym.verify(posed, "1 2").correct


def test_a_call_that_sleeps_is_killed_by_the_wall_clock() -> None:
    sleeper = ReasoningGym(limit_s=0.2)
    posed = problem("1 2", "rg", task="rg:spiral_matrix", entry={"answer": "1 2", "metadata": {}})
    with pytest.raises(VerifierError, match="no verdict"):
        sleeper.verify(posed, "[__import__('time').sleep(1000)]")
    sleeper.close()


def test_a_child_that_crashed_is_replaced() -> None:
    made = Math(limit_s=LIMIT_S)
    assert made.verify(problem("x+1"), "1+x").correct
    pid = made._sandbox.pid
    assert pid is not None
    os.kill(pid, 9)
    until(lambda: gone(pid))
    assert made.verify(problem("x+2"), "2+x").correct
    assert made._sandbox.pid != pid
    made.close()
    made.close()


def test_no_child_survives_close_or_collection() -> None:
    made = Math(limit_s=LIMIT_S)
    made.verify(problem("x+1"), "1+x")
    first = made._sandbox.pid
    made.close()
    made.verify(problem("x+1"), "1+x")
    second = made._sandbox.pid
    del made
    gc.collect()
    for pid in (first, second):
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_child_that_drew_the_problems_is_ready_to_score_them() -> None:
    (drawn,) = from_task("rg:chain_sum?min_terms=2&max_terms=2", 1, 0)
    first, second = ReasoningGym(limit_s=LIMIT_S), ReasoningGym(limit_s=LIMIT_S)
    pid = first._sandbox.pid
    assert pid is not None
    unowned = second._sandbox.pid
    assert unowned is None, "a child has one owner"
    second.start()
    assert first.verify(drawn, str(drawn.gold)).correct
    assert second.verify(drawn, str(drawn.gold)).correct
    other = second._sandbox.pid
    assert other != pid
    first.close()
    second.close()
    assert other is not None
    assert gone(other), "one waits for the next owner, the others end"
    third = ReasoningGym(limit_s=LIMIT_S)
    assert third._sandbox.pid == pid
    assert first._sandbox.pid is None
    third._sandbox.close()
    assert gone(pid)


def test_a_script_is_not_run_again_and_its_death_ends_the_child(tmp_path: Path) -> None:
    """It has no main guard, lies beside a file named like a standard module, and is killed."""
    (tmp_path / "types.py").write_text("raise SystemExit('shadowed')")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "print('main ran', flush=True)\n"
        "from ttc.verifiers import Math\n"
        "from ttc.types import Problem\n"
        f"judge = Math(limit_s={LIMIT_S})\n"
        "judge.verify(Problem('p', ({'role': 'user', 'content': '?'},), 'x+1'), '1+x')\n"
        "maps = open(f'/proc/{judge._sandbox.pid}/maps').read()\n"
        "print('torch' in maps, judge._sandbox.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    first, second = done.stdout.splitlines()
    torch, pid = second.split()
    assert (first, torch, done.returncode) == ("main ran", "False", -9)
    until(lambda: gone(int(pid)))


class Moody:
    """A third-party verifier: the first letter decides; breaks on answers that hold "!"."""

    name = "moody"

    def __init__(self) -> None:
        self.calls = 0

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return Verdict(answer == problem.gold, 1.0)

    def equivalent(self, problem: Problem, a: str, b: str) -> bool:
        self.calls += 1
        if "!" in a + b:
            raise RuntimeError("moody")
        return a[:1] == b[:1]

    def close(self) -> None:
        pass


def test_classes_by_first_seen() -> None:
    moody = Moody()
    groups = AnswerClasses(moody, problem())
    assert [groups.representative(a) for a in ("ab", "ba", "ac", "ab", "bb")] == [
        "ab",
        "ba",
        "ab",
        "ab",
        "ba",
    ]
    calls = moody.calls
    assert groups.representative("ac") == "ab"
    assert moody.calls == calls, "memoised"
    assert classes(problem(), ["1/2", "0.5", "3", ".50"], Exact()) == {
        "1/2": ("1/2", "0.5", ".50"),
        "3": ("3",),
    }


@given(st.lists(st.sampled_from(["a", "ab", "a!", "b!", "b", "bc", "c"]), max_size=12))
def test_broken_answers_stand_alone_and_break_no_other(answers: list[str]) -> None:
    moody = Moody()
    groups = AnswerClasses(moody, problem())
    for answer in answers:
        named = groups.representative(answer)
        if "!" in answer:
            assert named == answer
        else:
            assert named == next(a for a in answers if a[0] == answer[0] and "!" not in a)
    assert {failure.answer for failure in groups.failures} <= {a for a in answers if "!" in a}
    if any("!" not in a for a in answers):
        assert {failure.answer for failure in groups.failures} == {a for a in answers if "!" in a}


def test_a_hostile_vote_costs_its_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hostile = Math(limit_s=LIMIT_S), []
    judged = made._sandbox.call

    def call(op: str, limit_s: float, **answers: str) -> Any:
        """Only what would never end is in a hurry."""
        if HANGS not in answers.values():
            return judged(op, limit_s, **answers)
        hostile.append(answers)
        return judged(op, 0.5, **answers)

    monkeypatch.setattr(made._sandbox, "call", call)
    groups = AnswerClasses(made, problem())
    assert [groups.representative(a) for a in (HANGS, "5", "x+1", "5.0", HANGS)] == [
        HANGS,
        "5",
        "x+1",
        "5",
        HANGS,
    ]
    assert [failure.answer for failure in groups.failures] == [HANGS]
    assert len(hostile) == 2, "in one comparison, and in asking which of the two is to blame"
    made.close()


def test_on_a_budget_of_seconds_votes_wait_for_no_import() -> None:
    from ttc.judge import Jury
    from ttc.types import AnswerFormat
    from ttc.verifiers import HURRIED_LIMIT_S

    jury, posed = Jury(AnswerFormat(), hurried=True), problem("7", "math")
    jury.start([posed])
    voting = jury._voting["math"]
    assert isinstance(voting, Math)
    assert voting._limit_s == HURRIED_LIMIT_S
    for child in (voting._sandbox._child, voting._sandbox._next):
        assert child is not None
        assert child._greeted, "its imports are done, and those of what takes its place"
    jury.close()


def test_names() -> None:
    assert [type(verifier(name)) for name in ("exact", "math", "rg")] == [Exact, Math, ReasoningGym]
    assert all(isinstance(verifier(name), Verifier) for name in ("exact", "math", "rg"))
    assert isinstance(verifier("ttc.verifiers:Exact"), Exact)
    with pytest.raises(InputError, match=r"'none' is unknown; use exact, math, rg, or pkg\.mod:Class"):
        verifier("none")
    for bad in ("ttc.verify:Nothing", "no.such.module:X", "ttc.types:Problem", "pathlib:Path"):
        with pytest.raises(InputError, match="verifier"):
            verifier(bad)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("math", "rg"):
        with pytest.raises(InputError, match=r"pip install 'ttc\[tasks\]'"):
            verifier(name)


def test_no_gold_no_verdict(gym: ReasoningGym) -> None:
    assert not can_verify(problem(None))
    assert can_verify(problem("5"))
    assert can_verify(problem(None, "rg"))
    with pytest.raises(VerifierError, match="no gold"):
        Exact().verify(problem(None), "5")
    with pytest.raises(VerifierError, match="not from a rg: task"):
        gym.verify(problem("5", "rg"), "5")
    with pytest.raises(VerifierError, match="no dataset"):
        gym.verify(problem("5", "rg", task="rg:nonesuch", entry={"answer": "5", "metadata": {}}), "5")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
            | st.frozensets(st.integers(), max_size=3).map(set)
        ),
        max_leaves=8,
    )
)
def test_entries_round_trip(value: Any) -> None:
    assert decode(encode(value)) == value
