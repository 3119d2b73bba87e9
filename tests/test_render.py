"""What a run looks like on a terminal: progress, tables in narrow places."""

from __future__ import annotations

import pytest
from rich.console import Console

from ttc.budget import Budget
from ttc.cli import render
from ttc.cli.render import Live, in_pieces, print_summary
from ttc.jobs import Status
from ttc.types import Charge

TASK = "rg:countdown?min_numbers=4&max_numbers=4&max_value=20&min_target=10&max_target=99"


def test_a_tasks_name_breaks_at_its_seams_only() -> None:
    assert in_pieces(TASK, 100) == TASK
    lines = in_pieces(TASK, 50).split("\n")
    assert all(len(line) <= 50 and line[-1] in "?&" for line in lines[:-1])
    assert "".join(line.strip() for line in lines) == TASK


@pytest.mark.parametrize("width", [80, 120])
def test_progress_fits_the_terminal_and_tells_what_is_left(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=width, force_terminal=False)
    monkeypatch.setattr(render, "stderr", console)
    live = Live(Budget(20_000, "tokens", "problem"), 300, quiet=False)
    status = Status(
        problems=300, done=40, scored=40, correct=31, running=64, seconds=2.0, charge=Charge(400_000)
    )
    live.update(status)
    assert " left" not in live._facts(status), "no pace is known yet"
    status.done, status.seconds = 100, 8.0
    facts = live._facts(status)
    assert "0:20 left" in facts, "200 more at ten a second, whatever was done before this session"
    assert len("300/300 ") + len(facts) <= width - (13 if width >= 100 else 0)
    assert ("64 running" in facts) == (width == 120)
    status.done, status.seconds = 103, 1000.0
    assert "left" in live._facts(status)


def test_the_closing_table_counts_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    spent = dict.fromkeys(
        ("tokens", "tokens_generated", "tokens_forced", "tokens_prompt", "tokens_probe", "tokens_judge"), 5
    ) | {"flops": 0, "dollars": 0, "seconds": 1.0}
    summary = {
        "accuracy": None, "problems": 4, "answered": 3, "failed": 1, "skipped_rows": 0, "resumed": 0, "samples": 12,
        "failed_samples": 3, "retried_samples": 2, "steps": 40, "stopped": {"failed": 1, "samples": 3}, "overrun": 0,
        "budget": {"amount": 9, "unit": "tokens", "scope": "problem"}, "spent": spent,
    }  # fmt: skip
    print_summary(summary, Console(width=120))
    shown = capsys.readouterr().out
    assert "12  (3 of them failed, 2 attempts made again, 40 steps of a search apart)" in shown
    assert "1 failed, 3 with all samples" in shown
