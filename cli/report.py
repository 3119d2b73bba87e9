"""``ttc report``: what a run bought, problem by problem, and why it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttc.errors import InputError

if TYPE_CHECKING:
    from ttc.costmodel.intervals import Estimate


def report(
    run: Annotated[Path, typer.Argument(help="A run directory (ttc solve --out).")],
    problem: Annotated[str | None, typer.Option("--problem", help="Only this problem.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")
    ] = False,
) -> None:
    """Show, per problem, the tree of what was bought, what each branch said, and why it stopped."""
    told = read(run, problem)
    reached = _accuracy(told)
    if as_json:
        about = reached and {
            "accuracy": reached.mean,
            "accuracy_ci95": reached.interval,
            "scored": reached.problems,
        }
        print(json.dumps({"run": str(run), "problems": told} | (about or {})))
        return
    from rich.markup import escape
    from rich.tree import Tree

    from ttc.budget import format_amount
    from ttc.cli.render import ENDS
    from ttc.cli.render import stdout as console

    unit = _unit(run)
    for each in told:
        mark = {True: "right", False: "wrong", None: "not judged"}[each["correct"]]
        answer = escape(str(each["answer"]))
        ended = ENDS.get(each["stop"], each["stop"]) or "not finished"
        tree = Tree(f"{escape(each['problem'])}: {answer} ({mark}), {each['tokens']:,} tokens, {ended}")
        for decision in each["decisions"]:
            price = (
                f", at most {format_amount(decision['price'], unit)}" if decision["price"] and unit else ""
            )
            tree.add(escape(f"{decision['what']}: {decision['why']}{price}"))
        branches = tree.add(f"{len(each['branches'])} branches")
        for branch in each["branches"]:
            probes = f", {branch['probes']} probes" if branch["probes"] else ""
            words = f"#{branch['index']} {branch['finish']} after {branch['tokens']:,} tokens{probes}: {branch['answer']}"
            branches.add(escape(words))
        if each["error"]:
            tree.add(escape(f"failed: {each['error']}"))
        console.print(tree)
    if reached and len(told) > 1:
        console.print(
            f"accuracy {reached.mean:.1%} of {reached.problems} judged problems "
            f"(95 % interval {reached.low:.1%} to {reached.high:.1%})"
        )


def _unit(run: Path) -> str:
    """The unit of the run's budget ("" where run.json tells of none)."""
    try:
        return str(
            json.loads((run / "run.json").read_text(encoding="utf-8")).get("budget", {}).get("unit", "")
        )
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"report: {run / 'run.json'} is damaged ({error}); resume the run or mend the file"
        ) from None


def _accuracy(told: Sequence[Mapping[str, Any]]) -> Estimate | None:
    from ttc.costmodel.intervals import proportion

    judged = [each["correct"] for each in told if each["correct"] is not None]
    return proportion(sum(judged), len(judged)) if judged else None


def read(run: Path, problem: str | None = None) -> list[dict[str, Any]]:
    """The run's problems in the order of their first decision. Raises InputError where there is no run."""
    if not (run / "run.json").is_file():
        raise InputError(f"report {run}: no run.json there; give a directory that 'ttc solve --out' made")
    told: dict[str, dict[str, Any]] = {}

    def of(row: Mapping[str, Any], key: str) -> dict[str, Any]:
        blank: dict[str, Any] = {
            "answer": None,
            "correct": None,
            "stop": "",
            "tokens": 0,
            "error": "",
            "votes": {},
        }
        return told.setdefault(
            str(row[key]), {"problem": str(row[key]), **blank, "decisions": [], "branches": []}
        )

    for row in _rows(run / "decisions.jsonl"):
        of(row, "problem_id")["decisions"].append({k: row[k] for k in ("what", "why", "price", "remaining")})
    for row in _rows(run / "branches.jsonl"):
        done = row["completion"]
        tokens = done.get("generated_tokens", 0) + done.get("forced_tokens", 0)
        entry = of(row, "problem")
        entry["tokens"] += tokens + done.get("probe_tokens", 0)
        entry["branches"].append({
            "index": row["index"], "finish": done["finish"], "tokens": tokens, "answer": row["answer"],
            "probes": len(row.get("probes", ())),
        })  # fmt: skip
    for row in _rows(run / "results.jsonl"):
        verdict = row["verdict"]
        of(row, "problem").update(
            answer=row["answer"], correct=None if verdict is None else bool(verdict.get("correct", False)), stop=row["stop"],
            error=row["error"], votes=row["votes"],
        )  # fmt: skip
    if problem is not None and problem not in told:
        raise InputError(f"report: no problem {problem!r} in this run; it has {', '.join(list(told)[:5])}, …")
    return [told[problem]] if problem is not None else list(told.values())


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a torn last one (the run was killed) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"report: {path} is damaged ({error}); resume the run or mend the line") from error


__all__ = ["read", "report"]
