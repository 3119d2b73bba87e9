"""How a run looks: live progress on stderr, results and the closing table. Words and scaling of units, no logic."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from ttc.budget import Budget, format_amount

if TYPE_CHECKING:
    from ttc.jobs import Status
    from ttc.types import Problem, Result

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)
if not stdout.is_terminal and "COLUMNS" not in os.environ:
    stdout.width = 160  # a pipe or a file has no edge: what is one line stays one
_REFRESH_SECONDS = 0.2
_WIDE = 100
"""Columns from which there is room for a bar and for what matters less."""


def note(words: object, *, whole: bool = False) -> None:
    """A line of ttc's own on stderr; on a terminal it goes on below between two words, but where it is ``whole``: to be copied."""
    stderr.print(f"ttc: {words}", markup=False, soft_wrap=whole or not stderr.is_terminal)


def show(what: RenderableType, console: Console = stdout) -> None:
    """A table or a text of several lines; off a terminal without the blanks that fill lines up."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as drawn:
        console.print(what)
    for line in drawn.get().splitlines():
        console.print(line.rstrip(), markup=False, soft_wrap=True)


class _Facts(ProgressColumn):
    """What there is to say, in one line; what a narrow terminal has no room for is cut off."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["facts"]), no_wrap=True, overflow="ellipsis")


class Live:
    """Progress of a run: problems done, spent against budget, accuracy so far, time left, tokens a second. Use as a context manager
    and pass ``update`` as the run's ``on_step``. On a terminal a live line; else a plain line every ten seconds.
    ``quiet``: nothing."""

    def __init__(self, budget: Budget, problems: int, *, quiet: bool) -> None:
        self.budget, self.problems, self.quiet = budget, problems, quiet
        self.console = stderr
        self._shown = 0.0
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Live:
        if not self.quiet and self.console.is_terminal:
            bar = [BarColumn(bar_width=12)] if self.console.width >= _WIDE else []
            self._progress = Progress(
                *bar, TextColumn("{task.completed}/{task.total}"), _Facts(Column(no_wrap=True)),
                console=self.console, transient=True, refresh_per_second=5,
            )  # fmt: skip
            self._task = self._progress.add_task("solve", total=self.problems, facts="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, status: Status) -> None:
        now = time.monotonic()
        self._first = self._first or (status.done, status.seconds)
        wait = _REFRESH_SECONDS if self._progress is not None else 10.0
        if self.quiet or now - self._shown < wait:
            return
        self._shown = now
        if self._progress is not None:
            self._progress.update(self._task, completed=status.done, facts=self._facts(status))
        else:
            self.console.print(
                f"{status.done}/{status.problems} problems  {self._facts(status)}", soft_wrap=True
            )

    def _facts(self, status: Status) -> str:
        from ttc.costmodel.intervals import proportion
        from ttc.pricing import spent_in

        unit = self.budget.unit
        whole = self.budget.amount * (status.problems if self.budget.scope == "problem" else 1)
        spent = spent_in(unit, status.charge) if unit != "seconds" else status.seconds
        spent += status.running_tokens if unit == "tokens" else 0
        tokens = status.charge.tokens - status.replayed_tokens + status.running_tokens
        reached = proportion(status.correct, status.scored)
        parts = [
            f"{_without_unit(format_amount(spent, unit), unit)} of {format_amount(whole, unit)}",
            f"{status.correct / status.scored:.1%} right ({reached.low:.0%} to {reached.high:.0%})"
            if status.scored
            else "",
            self._left(status),
            f"{tokens / status.seconds:,.0f} tok/s" if status.seconds else "",
            f"{status.running} running" if self.console.width >= _WIDE else "",
        ]
        return "  ".join(part for part in parts if part)

    def _left(self, status: Status) -> str:
        """How long the rest takes at this session's pace ("" before some problems are done)."""
        done, seconds = self._first or (0, 0.0)
        if status.done - done < 3:
            return ""
        left = (status.problems - status.done) * (status.seconds - seconds) / (status.done - done)
        hours, minutes = divmod(int(left) // 60, 60)
        return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{int(left) % 60:02} left"


def in_pieces(task: str, width: int) -> str:
    """A task's name in lines of at most ``width`` characters that break behind "?" and "&" only."""
    lines = [""]
    for piece in re.split(r"(?<=[?&])", task):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def print_answer(
    problem: Problem, result: Result, console: Console = stdout, *, thought: bool = False
) -> None:
    """One problem in full: the question, the votes and the answer; with ``thought`` also what one sample wrote."""
    console.print(Text(problem.text, style="dim"))
    usable = [b for b in result.branches if b.usable]
    if thought and usable:
        told = max(usable, key=lambda b: (b.vote == result.answer, -abs(b.completion.output_tokens - 120)))
        console.print(Text(f"one of {len(usable)} samples: {_short(told.completion.text, 600)}", style="dim"))
    if result.error:
        console.print(Text(f"failed: {result.error}", style="red"))
    for answer, weight in sorted(result.votes.items(), key=lambda item: -item[1]):
        mark = "→" if answer == result.answer else " "
        console.print(Text(f" {mark} {_short(answer, 60)}  {_weight(weight)}"))
    verdict = result.verdict
    said = "" if verdict is None else ("  right" if verdict.correct else f"  wrong, it is {problem.gold}")
    console.print(Text.assemble("answer: ", (str(result.answer), "bold"), said))


def print_line(problem: Problem, result: Result, console: Console = stderr) -> None:
    """One problem in a line: verdict, answer, votes."""
    verdict = result.verdict
    mark, style = ("?", "") if verdict is None else (("✓", "green") if verdict.correct else ("✗", "red"))
    if result.error:
        mark, style = "!", "red"
    scores = any(w != int(w) for w in result.votes.values())
    votes = "  ".join(
        f"{_short(a, 10)} ({_weight(w)})" if scores else f"{_short(a, 10)}×{_weight(w)}"
        for a, w in sorted(result.votes.items(), key=lambda item: -item[1])[:4]
    )
    question = _short(
        problem.text.removeprefix("State the final answer to the following arithmetic problem: "), 36
    )
    line = Text.assemble(
        (mark, style), f" {question:36}  ", (f"{_short(str(result.answer), 14):14}", "bold"), f"  {votes}"
    )
    if result.error:
        line.append(f"  {_short(result.error, 70)}", style="red")
    console.print(line, overflow="ellipsis", no_wrap=True)


def print_summary(summary: Mapping[str, Any], console: Console = stdout, *, replayed_tokens: int = 0) -> None:
    """The closing table of a run, of whose tokens ``replayed_tokens`` were spent before this session."""
    spent, budget = summary["spent"], summary["budget"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    if summary["accuracy"] is not None:
        low, high = summary["accuracy_ci95"]
        scored = f"{summary['correct']} of {summary['scored']}"
        table.add_row(
            "accuracy", f"{summary['accuracy']:.1%}  ({scored} right; 95 % interval {low:.1%} to {high:.1%})"
        )
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    skipped = f", {summary['skipped_rows']} bad rows skipped" if summary["skipped_rows"] else ""
    resumed = f", {summary['resumed']} of them from the run directory" if summary["resumed"] else ""
    table.add_row(
        "problems", f"{summary['answered']} of {summary['problems']} answered{failed}{skipped}{resumed}"
    )
    ends = ", ".join(f"{count} {ENDS.get(why, why)}" for why, count in sorted(summary["stopped"].items()))
    table.add_row("ended", ends)
    table.add_row("samples", _samples(summary))
    table.add_row(
        "tokens",
        f"{spent['tokens']:,}  ({spent['tokens_generated']:,} generated, {spent['tokens_forced']:,} forced"
        f"{_kinds(spent)}; prompts {spent['tokens_prompt']:,} apart)",
    )
    if spent["flops"]:
        table.add_row(
            "compute",
            f"{format_amount(spent['eflops'], 'eflops')} full, {format_amount(spent['eflops_kinetics'], 'eflops')} kinetics"
            f"  ({_si(spent['flops'])}FLOPs, {_si(spent['bytes'])}B moved)",
        )
    if spent["dollars"]:
        table.add_row("price", f"${spent['dollars']:.4g}")
    rate = (spent["tokens"] - replayed_tokens) / spent["seconds"] if spent["seconds"] else 0.0
    since = " since it was resumed" if replayed_tokens else ""
    table.add_row("time", f"{spent['seconds']:.1f} s{since}  ({rate:,.0f} tokens a second)")
    whole = format_amount(budget["amount"], budget["unit"])
    over = (
        f"exceeded by {format_amount(summary['overrun'], budget['unit'])}" if summary["overrun"] else "kept"
    )
    table.add_row(
        "budget", f"{whole} {'a problem' if budget['scope'] == 'problem' else 'for the run'}: {over}"
    )
    show(table, console)


ENDS = {
    "samples": "with all samples",
    "budget": "out of budget",
    "confident": "sure before that",
    "gave-up": "given up",
    "failed": "failed",
}
"""What ``Result.stop`` says of a problem."""


def _samples(summary: Mapping[str, Any]) -> str:
    more = (
        (summary["failed_samples"], "of them failed"),
        (summary["retried_samples"], "attempts made again"),
        (summary["steps"], "steps of a search apart"),
    )
    parts = ", ".join(f"{count:,} {what}" for count, what in more if count)
    return f"{summary['samples']:,}" + (f"  ({parts})" if parts else "")


def _without_unit(amount: str, unit: str) -> str:
    return amount.removesuffix(f" {unit}")


def _kinds(spent: Mapping[str, float]) -> str:
    named = {"probe": spent["tokens_probe"], "judge": spent["tokens_judge"]}
    return "".join(f", {count:,} {kind}" for kind, count in named.items() if count)


def _si(value: float) -> str:
    for letter, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g} "


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _weight(weight: float) -> str:
    return f"{weight:g}" if weight == int(weight) else f"{weight:.3f}"
