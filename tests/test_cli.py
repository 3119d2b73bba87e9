"""The command line as its users meet it: exit codes, JSON, errors in a line, resume after kill -9."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import LIMIT_S
from ttc import nano, watch
from ttc.policies import POLICIES, parse
from ttc.types import Branch, Brief, Generate, Outcome, Problem, Routine

TTC = [sys.executable, "-m", "ttc.cli.main"]
TASK = "rg:chain_sum?min_terms=4&max_terms=5"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parents[1])}


def ttc(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command's end; ``more`` is for its environment."""
    return subprocess.run(
        [*TTC, *arguments], capture_output=True, text=True, env=ENV | more, timeout=LIMIT_S, check=False
    )


class Here:
    """Runs command lines in this process, which spares the imports of a new one: for what no process of its own need show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", ENV["COLUMNS"])

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        from ttc.cli.main import main

        self._patch.setattr(sys, "argv", ["ttc", *arguments])
        handlers = {word: signal.getsignal(word) for word in (signal.SIGINT, signal.SIGTERM)}
        self._capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            for word, handler in handlers.items():
                signal.signal(word, handler)
        out, err = self._capsys.readouterr()
        return subprocess.CompletedProcess([*TTC, *arguments], int(end.value.code or 0), out, err)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["solve", "1 + 1 =", "--budget", "20 parsecs"], "unknown unit 'parsecs'"),
        (["solve", "1 + 1 =", "--budget", "-3 tokens"], "budget"),
        (["solve", "1 + 1 =", "--budget-scope", "galaxy"], "'problem' or 'run'"),
        (["solve", "1 + 1 =", "--policy", "best-of-m"], "did you mean 'best-of-n'"),
        (["solve", "1 + 1 =", "--policy", "best-of-n?n=none"], "wants int for n"),
        (["solve", "1 + 1 =", "--model", "nano-zz"], "there is no 'nano-zz'"),
        (["solve", "1 + 1 =", "--engine", "llama"], "use 'vllm' or 'openai:URL'"),
        (["solve", "1 + 1 =", "--engine", "openai:http://127.0.0.1:9"], "127.0.0.1:9"),
        (["solve", "1 + 1 =", "--effort", "2"], "(0, 1]"),
        (["solve", "1 + 1 =", "--policy", "beam"], "--reward"),
        (
            ["solve", "1 + 1 =", "--policy", "beam", "--reward", "nano-s-proces"],
            "use one of nano-s-outcome, nano-s-process",
        ),
        (
            ["solve", "1 + 1 =", "--policy", "beam", "--reward", "nano-s-outcome"],
            "use a process reward model",
        ),
        (
            ["solve", "1 + 1 =", "--policy", "beam", "--reward", "http://127.0.0.1:9"],
            "127.0.0.1:9 does not answer",
        ),
        (["solve", "1 + 1 =", "--verifier", "oracle"], "oracle"),
        (["solve", "1 + 1 =", "--context", "0"], "context: 0 tokens"),
        (["demo", "--n", "0"], "at least 1"),
        (["solve", "1 + 1 =", "--n", "8"], "-p 'self-consistency?n=8'"),
        (["solve", "1 + 1 =", "--model", ""], "the name is empty"),
        (["solve", "1 + 1 =", "--kv-when", "always"], "add --kv-budget"),
        (["solve", "1 + 1 =", "--policy", "adaptive?over=beams"], "unknown policy 'beams'"),
        (["solve"], "no problem given"),
        (["solv"], "did you mean 'solve'"),
        (["solve", "--polcy", "greedy"], "--polcy: no such option of 'ttc solve'; did you mean --policy?"),
        (["solve", "1 + 1 =", "--n"], "'--n' requires"),
        (["solve", "1", "+", "1"], "put quotes round"),
        (["cost", "-m", "Qwen3-8B", "-n", "many"], "--samples: 'many'"),
        (["bench", "overhead", "--problems=0"], "--problems: '0'"),
        (["cost"], "--model: not given"),
        (["solve", "1 + 1 =", "--task", TASK], "several sources"),
        (["solve", "--task", "rg:chain_sums"], "chain_sum"),
        (["solve", "--task", "rg:chain_sum?terms=4"], "terms"),
        (["solve", "--input", "/no/such/file.jsonl"], "file.jsonl"),
    ],
)
def test_bad_input_is_one_line_with_the_mend_and_exit_code_2(
    here: Here, arguments: list[str], words: str
) -> None:
    done = here(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("word", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_run_has_begun_is_a_word_and_exit_code_3(word: str) -> None:
    code = (
        "import signal, sys, ttc.problems\n"
        "from ttc.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
        f"ttc.problems.load = lambda **given: signal.raise_signal(signal.{word})\n"
        "sys.argv = ['ttc', 'solve', '1 + 1 =']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "ttc: stopped\n")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "empty"),
        ('{"id": "a", "prompt": "1 + 1 ="}\n{"id": "a", "prompt": "2 + 2 ="}\n', "line 1"),
        ('{"id": "a", "prompt": "1 + 1 ="}\n{"id": "b", "prompt": \n', ":2"),
        ('{"id": "a", "prompt": "1 + 1 =", "anwser": "2"}\n', "did you mean 'answer'"),
        ('{"id": "a"}\n', "prompt"),
    ],
)
def test_bad_rows_name_their_line(here: Here, tmp_path: Path, rows: str, words: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(rows)
    done = here("solve", "--input", str(file))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_models_and_version_need_no_engine() -> None:
    assert "solve" in ttc("--help").stdout
    listed = json.loads(ttc("models", "--json").stdout)
    assert [set(m) for m in listed] == [{"name", "path", "params", "context", "tasks", "pass_at_1"}] * len(
        nano.catalog()
    )
    assert all(set(m["pass_at_1"]) == set(m["tasks"]) for m in listed)
    shown = ttc("models").stdout
    assert all(m["name"] in shown for m in listed)
    assert "62" in next(line for line in shown.splitlines() if "chain_sum?min_terms=3" in line)
    assert ttc("--version").stdout.strip() == "0.1.0"
    assert ttc("nonsense").returncode == 2


def test_policies_are_listed_with_what_parse_takes(here: Here) -> None:
    rows = json.loads(here("policies", "--json").stdout)
    assert [row["name"] for row in rows] == list(POLICIES)
    for row in rows:
        given = "&".join(f"{k}={'' if v is None else v}" for k, v in row["options"].items())
        assert parse(f"{row['name']}?{given}") == parse(row["name"])
        assert row["about"]
    shown = here("policies").stdout
    assert all(f"\n{row['name']}" in f"\n{shown}" for row in rows)
    assert "self-certainty" in here("policies", "best-of-n").stdout
    assert "did you mean 'best-of-n'" in here("policies", "best-of-m").stderr
    own = here("policies", "tests.test_cli:Struck")
    assert own.returncode == 0 and own.stdout.startswith("tests.test_cli:Struck")


def test_a_report_says_what_was_bought_at_most_and_why_it_ended(here: Here, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"budget": {"amount": 4000, "unit": "tokens", "scope": "problem"}}')
    bought = {"problem_id": "a", "what": "generate 2", "why": "two", "price": 1300.0, "remaining": 4000.0}
    (tmp_path / "decisions.jsonl").write_text(json.dumps(bought) + "\n")
    row = {
        "problem": "a",
        "answer": "7",
        "verdict": {"correct": True},
        "stop": "gave-up",
        "error": "",
        "votes": {},
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    told = here("report", str(tmp_path)).stdout
    assert "a: 7 (right), 0 tokens, given up" in told
    assert "generate 2: two, at most 1.3k tokens" in told


SPENT = {
    "tokens", "tokens_generated", "tokens_forced", "tokens_probe", "tokens_judge", "tokens_prompt", "eflops", "eflops_kinetics",
    "flops", "bytes", "kv_tokens", "seconds", "dollars",
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.slow
def test_solve_json_is_one_object_and_keeps_the_budget(here: Here, tmp_path: Path) -> None:
    done = here(
        "solve",
        "--task",
        TASK,
        "--n",
        "12",
        "--budget",
        "600 tokens",
        "--json",
        "--out",
        str(tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert summary["problems"] == summary["answered"] == summary["scored"] == 12
    assert summary["overrun"] == 0
    assert set(summary["spent"]) == SPENT
    assert summary["budget"] == {"amount": 600, "unit": "tokens", "scope": "problem"}
    assert sum(summary["stopped"].values()) == 12
    low, high = summary["accuracy_ci95"]
    assert low <= summary["accuracy"] <= high

    rows = [json.loads(line) for line in (tmp_path / "run" / "branches.jsonl").read_text().splitlines()]
    assert len(rows) == summary["samples"]
    generated = sum(
        r["charge"].get("tokens_generated", 0) + r["charge"].get("tokens_forced", 0) for r in rows
    )
    assert generated == summary["spent"]["tokens"]

    again = here(
        "solve",
        "--task",
        TASK,
        "--n",
        "12",
        "--budget",
        "600 tokens",
        "--json",
        "--out",
        str(tmp_path / "run"),
    )
    second = json.loads(again.stdout)
    assert second["resumed"] == 12
    for same in ("correct", "accuracy", "stopped", "samples"):
        assert second[same] == summary[same]
    assert second["spent"]["tokens"] == summary["spent"]["tokens"]

    other = here(
        "solve", "--task", TASK, "--n", "12", "--budget", "700 tokens", "--out", str(tmp_path / "run")
    )
    assert other.returncode == 2
    assert "budget" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.engine
@pytest.mark.slow
def test_a_prompt_longer_than_the_context_is_refused_before_work_or_skipped(
    here: Here, tmp_path: Path
) -> None:
    file, out = tmp_path / "problems.jsonl", tmp_path / "run"
    rows = [
        {"id": "short", "prompt": "1 + 2 =", "answer": "3"},
        {"id": "long", "prompt": "1 + " * 200, "answer": "3"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["solve", "--input", str(file), "--context", "256", "--out", str(out), "--max-thinking", "32"]
    refused = here(*command)
    assert refused.returncode == 2, refused.stderr
    assert "prompt: long has" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not out.exists(), "nothing was begun"
    done = here(*command, "--skip-bad-rows", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["problems"], summary["answered"], summary["skipped_rows"]) == (1, 1, 1)


@dataclass(frozen=True, slots=True)
class Struck:
    """Self-consistency in a process that sends itself the signal STRUCK_BY as soon as STRUCK_AT branches are in its ledger."""

    n: int = 6
    name = "struck"

    def run(self, problem: Problem, brief: Brief) -> Routine:
        routine = parse(f"self-consistency?n={self.n}").run(problem, brief)
        work = next(routine)
        while True:
            assert isinstance(work, Generate)
            reply = yield replace(work, until=self.arrived)
            try:
                work = routine.send(reply)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    def arrived(self, done: Sequence[Branch]) -> bool:
        ARRIVED.append(done[-1])
        watch.NOTE_SECONDS = 0.0  # what runs is noted after each step
        if len(ARRIVED) == int(os.environ.get("STRUCK_AT", "0")):
            os.kill(os.getpid(), signal.Signals[os.environ["STRUCK_BY"]])
        return False


ARRIVED: list[Branch] = []
STRIKES = [
    "--task", TASK, "--n", "12", "--policy", "tests.test_cli:Struck", "--budget", "4k tokens", "--concurrency", "8",
]  # fmt: skip


@pytest.mark.engine
@pytest.mark.slow
def test_kill_9_then_the_same_command_loses_nothing_and_samples_nothing_twice(
    here: Here, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["solve", *STRIKES, "--json", "--out", str(out)]
    killed = ttc(*command, STRUCK_BY="SIGKILL", STRUCK_AT="30")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    branches = out / "branches.jsonl"
    whole = [json.loads(line) for line in branches.read_text().splitlines()]
    finished = {(r["problem"], r["index"]) for r in whole}
    assert len(whole) == len(finished) == 30, "what has ended is on disk"

    done = here(*command)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    rows = [json.loads(line) for line in branches.read_text().splitlines()]
    cut = [row for row in rows if row.get("interrupted")]
    assert len(cut) <= 8, "what was under way when it was killed"
    spent = [row["charge"].get(f"tokens_{kind}", 0) for row in rows for kind in ("generated", "forced")]
    assert summary["spent"]["tokens"] == sum(spent), "and its tokens are counted"
    assert not (out / "running.json").exists()
    keys = [(r["problem"], r["index"]) for r in rows if not r.get("interrupted")]
    assert len(keys) == len(set(keys)) == 72, "each branch sampled once, none lost"
    assert rows[:30] == whole, "what was there is untouched"
    assert summary["problems"] == summary["answered"] == 12
    results = [json.loads(line)["problem"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == len(set(results)) == 12


@pytest.mark.engine
@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_resume_and_exits_3(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = ttc("solve", *STRIKES, "--out", str(out), STRUCK_BY="SIGINT", STRUCK_AT="20")
    assert done.returncode == 3, done.stderr
    assert "of 12 answered" in done.stdout
    assert "the same command resumes" in done.stderr
    assert f"to go on: {shlex.join(['ttc', 'solve', *STRIKES, '--out', str(out)])}\n" in done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (out / "branches.jsonl").read_text().splitlines()]
    assert 20 < len(rows) < 50, "those that had ended, and those that ran, cut"


def test_a_served_nano_model_is_priced_by_its_name() -> None:
    from ttc.cli.solve import _shape

    assert _shape("nano-s").params == next(m.params for m in nano.catalog() if m.name == "nano-s")
    assert _shape("Qwen3-0.6B").params > 5e8
