"""A run directory of ours as a pool: branches from ``branches.jsonl``, right or wrong from ``results.jsonl``.

The ledger keeps no gold answers, but every class of answers was judged when its problem ended: ``right`` lists those that are
correct, and a branch is right if its vote is among them. Anytime answers that the run asked for are the pool's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from ttc.costmodel.records import Pool, PooledProblem, rows_of
from ttc.errors import InputError

CONFIDENCES = {"mean-logprob": "mean_logprob", "self-certainty": "self_certainty"}
"""Measures of confidence, as requests name them, and where a completion keeps them."""


def pool_of_run(folder: Path, *, cut: bool = False) -> Pool:
    """The finished branches of a run; raises InputError where the run has no judged results, or is a search's. ``cut``: also those
    that its policy cut after an anytime answer, as branches of that length with that answer: what a replay of the run needs, and
    what an estimate of accuracy or length must leave out."""
    rows = rows_of(_text(folder / "branches.jsonl", folder), str(folder / "branches.jsonl"))
    results = {
        str(r["problem"]): r for r in rows_of(_text(folder / "results.jsonl", folder), "results.jsonl")
    }
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["completion"].get("partial"):
            raise InputError(
                f"pool {folder}: its policy searched step by step, and steps are no samples; use a run of whole branches"
            )
        finish = row["completion"].get("finish")
        was_cut = cut and finish == "abort" and bool(row.get("probes"))
        if row.get("interrupted") or (finish in ("denied", "error", "abort") and not was_cut):
            continue
        grouped.setdefault(str(row["problem"]), []).append(row)
    every = gcd(*(int(at) for rows in grouped.values() for row in rows for at, _ in row.get("probes", ())))
    problems = []
    for problem, branches in grouped.items():
        branches.sort(key=lambda branch: int(branch["index"]))
        result = results.get(problem)
        if result is None or result.get("verdict") is None:
            continue  # not finished, or a problem without gold
        problems.append(_problem(problem, branches, result, every))
    if not problems:
        raise InputError(f"pool {folder}: no problem has a verdict; run it on problems with an answer field")
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        run = {}
    prompts = [_prompt_of(b["completion"]) for group in grouped.values() for b in group]
    return Pool(
        folder.name,
        tuple(problems),
        model=run.get("model"),
        task=run.get("task"),
        probe_every=every,
        kv_budget=run.get("kv_budget"),
        effort=run.get("effort"),
        prompt_tokens=float(np.mean(prompts)),
        thinking_tokens=int(run.get("thinking_limit") or 0),
    )


def _prompt_of(completion: Mapping[str, Any]) -> int:
    """The problem's own prompt, in tokens: of several calls the first one's."""
    calls = completion.get("calls")
    return int(calls[0][0] if calls else completion.get("prompt_tokens", 0))


def _problem(
    problem: str, branches: Sequence[Mapping[str, Any]], result: Mapping[str, Any], every: int
) -> PooledProblem:
    codes = {str(vote): 0 for vote in result["right"]}

    def code(vote: object) -> int:
        return -1 if vote is None else codes.setdefault(str(vote), max(codes.values(), default=0) + 1)

    tokens = [
        float(b["completion"].get("generated_tokens", 0) + b["completion"].get("forced_tokens", 0))
        for b in branches
    ]
    told = [[(int(at), code(vote)) for at, vote in b.get("probes", ())] for b in branches]
    final = [
        answers[-1][1] if branch["completion"].get("finish") == "abort" else code(branch.get("vote"))
        for branch, answers in zip(branches, told, strict=True)
    ]
    for row, answers in enumerate(told):  # it was still running when it was asked
        tokens[row] = max(tokens[row], answers[-1][0] + 1.0) if answers else tokens[row]
    width = max((at for answers in told for at, _ in answers), default=0) // every if every else 0
    probes = np.full((len(branches), width), -1, dtype=np.int64)
    for row, answers in enumerate(told):
        for at, answer in answers:
            probes[row, at // every - 1 :] = answer
    measured = {name: [b["completion"].get(key) for b in branches] for name, key in CONFIDENCES.items()}
    confidence = {name: np.array(row, dtype=float) for name, row in measured.items() if None not in row}
    return PooledProblem(
        problem, np.array(tokens), np.array(final, dtype=np.int64), probes, confidence=confidence
    )


def _text(file: Path, folder: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        raise InputError(f"pool {folder}: no {file.name} in it; give a run folder or a pool file") from None
    except UnicodeDecodeError:
        raise InputError(f"pool {folder}: {file.name} is no text in UTF-8; move it away") from None
