"""A run directory of ours as a pool: branches from ``branches.jsonl``, right or wrong from ``results.jsonl``.

The ledger keeps no gold answers, but every class of answers was judged when its problem ended: ``right`` lists those that are
correct, and a branch is right if its vote is among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttc.costmodel.records import Pool, PooledProblem, rows_of
from ttc.errors import InputError


def pool_of_run(folder: Path) -> Pool:
    """The finished branches of a run; raises InputError where the run has no judged results."""
    rows = rows_of(_text(folder / "branches.jsonl", folder), str(folder / "branches.jsonl"))
    results = {
        str(r["problem"]): r for r in rows_of(_text(folder / "results.jsonl", folder), "results.jsonl")
    }
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("interrupted") or row["completion"].get("finish") in ("denied", "error", "abort"):
            continue
        grouped.setdefault(str(row["problem"]), []).append(row)
    problems = []
    for problem, branches in grouped.items():
        branches.sort(key=lambda branch: int(branch["index"]))
        result = results.get(problem)
        if result is None or result.get("verdict") is None:
            continue  # not finished, or a problem without gold
        problems.append(_problem(problem, branches, result))
    if not problems:
        raise InputError(f"pool {folder}: no problem has a verdict; run it on problems with an answer field")
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        run = {}
    prompts = [b["completion"].get("prompt_tokens", 0) for group in grouped.values() for b in group]
    return Pool(
        folder.name,
        tuple(problems),
        model=run.get("model"),
        task=run.get("task"),
        kv_budget=run.get("kv_budget"),
        effort=run.get("effort"),
        prompt_tokens=float(np.mean(prompts)),
    )


def _problem(problem: str, branches: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> PooledProblem:
    codes = {str(vote): 0 for vote in result["right"]}
    final = []
    for branch in branches:
        vote = branch.get("vote")
        final.append(-1 if vote is None else codes.setdefault(str(vote), max(codes.values(), default=0) + 1))
    tokens = [
        float(b["completion"].get("generated_tokens", 0) + b["completion"].get("forced_tokens", 0))
        for b in branches
    ]
    unprobed = np.empty((len(branches), 0), dtype=np.int64)
    return PooledProblem(problem, np.array(tokens), np.array(final, dtype=np.int64), unprobed)


def _text(file: Path, folder: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        raise InputError(f"pool {folder}: no {file.name} in it; give a run folder or a pool file") from None
