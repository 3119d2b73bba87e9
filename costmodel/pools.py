"""Recorded results: pools of branches (pools/README format, Kinetics traces, our ledgers) and published
accuracy tables.

Owns reading and checking them; ``accuracy`` makes curves of them. Accuracies leave here as fractions,
lengths as tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ttc.costmodel.ledgers import pool_of_run
from ttc.costmodel.records import Curve, Floats, Pool, PooledProblem, Replayed, rows_of
from ttc.errors import InputError

NO_ANSWER = {"", "ERR", "None", "none", "null"}
CHARS_PER_TOKEN = 3.2  # for traces that keep text and no counts; our rough figure for English mathematics


def read(path: str | Path, **labels: Any) -> list[Pool] | list[Curve] | list[Replayed]:
    """Whatever ``path`` holds: a pool, a table of curves, a Kinetics trace, a run directory of ours, or what
    ``ttc simulate --json`` printed.

    ``labels`` (model, task, kv_budget, …) override what the file says or its name suggests. Raises
    InputError.
    """
    path = Path(path)
    if path.is_dir():
        return [_labelled(pool_of_run(path), labels)]
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(
            f"pool {path}: cannot be read ({error.strerror}); give a pool or run folder"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"pool {path}: is no text in UTF-8; give a pool or run folder") from None
    if path.suffix == ".jsonl":
        if path.name == "branches.jsonl":
            return [_labelled(pool_of_run(path.parent), labels)]
        return [read_trace(text, str(path), **labels)]
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"pool {path}: not JSON ({error}); pools are .json, traces .jsonl") from None
    if isinstance(data, dict) and "models" in data:
        return _token_curves(data, str(path))
    if isinstance(data, dict) and "benchmarks" in data:
        return _kv_curves(data, str(path))
    if isinstance(data, dict) and "policy" in data and "tokens_per_problem" in data:
        return [_replayed(data, str(path))]
    if isinstance(data, list) and data:
        return [_probed_pool(data, path, **labels)]
    raise InputError(f"pool {path}: neither problems nor curves; docs/frontier.md lists the formats")


def _probed_pool(data: list[Any], path: Path, **labels: Any) -> Pool:
    problems, every = [], 0
    for i, row in enumerate(data):
        if not isinstance(row, Mapping) or "each_branch" not in row:
            raise InputError(
                f"pool {path.name}: problem {i} has no each_branch; docs/frontier.md has the format"
            )
        gold = row.get("gold_answer")
        if gold is None or str(gold) in NO_ANSWER:
            raise InputError(f"pool {path.name}: problem {i} has no gold_answer; add it or drop the problem")
        every = int(row.get("probe_freq") or every)
        branches = row["each_branch"]
        if not branches:
            raise InputError(f"pool {path.name}: problem {i} has no branches; remove it or sample it")
        codes = _coder(str(gold))
        width = max(len(b[0]) for b in branches)
        probes = np.full((len(branches), width), -1, dtype=np.int64)
        for s, branch in enumerate(branches):
            row_codes = [codes(a) for a in branch[0]]
            probes[s, : len(row_codes)] = row_codes
            if row_codes:
                probes[s, len(row_codes) :] = row_codes[-1]
        tokens = np.array([_length(b[1], path.name, i) for b in branches])
        final = np.array([codes(b[2]) for b in branches])
        heard = np.array([len(branch[0]) for branch in branches], dtype=np.int64)
        problems.append(PooledProblem(str(row.get("id", i)), tokens, final, probes, heard))
    model, task = _guess(path.stem)
    return _labelled(Pool(path.stem, tuple(problems), model, task, probe_every=every), labels)


def read_trace(text: str, name: str, *, chars_per_token: float = CHARS_PER_TOKEN, **labels: Any) -> Pool:
    """The Kinetics trace JSONL: one line of metadata, then ``query``, ``choices``, ``prediction``,
    ``score`` per branch.

    Traces keep text and no token counts: lengths are characters / ``chars_per_token`` unless a row has
    ``tokens``. A score above 1 is a percentage. Answers are known only as right or wrong, so votes cannot
    be counted from a trace.
    """
    rows = list(rows_of(text, name))
    head: Mapping[str, Any] = rows[0] if rows and "prediction" not in rows[0] else {}
    rows = rows[1:] if head else rows
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    estimated = False
    for i, row in enumerate(rows):
        missing = [key for key in ("query", "prediction", "score") if key not in row]
        if missing:
            raise InputError(
                f"trace {name}: line {i + 2} has no {missing[0]}; docs/frontier.md has the format"
            )
        grouped.setdefault(str(row["query"]), []).append(row)
    if not grouped:
        raise InputError(f"trace {name}: no branches; a trace has a metadata line and one line per branch")
    problems = []
    names = _short(grouped)
    for query, group in grouped.items():
        tokens = []
        for branch in group:
            written = branch.get("tokens", branch.get("token_length"))
            estimated |= written is None
            text_length = len(str(_first(branch["prediction"])))
            tokens.append(float(written) if written is not None else text_length / chars_per_token)
        scores = np.array([float(_first(row["score"])) for row in group])
        scores = scores / 100 if np.any(scores > 1) else scores
        final = np.where(scores >= 0.5, 0, -1)
        unprobed = np.empty((len(group), 0), dtype=np.int64)
        problems.append(PooledProblem(names[query], np.array(tokens), final, unprobed))
    local, block, topk = head.get("attn_local"), head.get("attn_block_size"), head.get("attn_block_topk")
    budget = None
    if local is not None:
        selected = int(block or 0) * int(topk) if topk is not None else int(head.get("attn_topk") or 0)
        budget = int(local) + selected
    model, task = _guess(Path(name).stem)
    pool = Pool(
        Path(name).stem,
        tuple(problems),
        str(head["model"]) if head.get("model") else model,
        str(head["task"]) if head.get("task") else task,
        kv_budget=budget,
        kv_block=int(block) if topk is not None and block else None,
        lengths_estimated=estimated,
    )
    return _labelled(pool, labels)


def _token_curves(data: Mapping[str, Any], name: str) -> list[Curve]:
    curves = []
    for model, tasks in data["models"].items():
        for task, table in tasks.items():
            x, y = np.asarray(table["tokens"], float), np.asarray(table["accuracy"], float)
            curves.append(Curve(model, task, x, _fractions(y, name), "tokens", str(data.get("source", name))))
    return curves


def _kv_curves(data: Mapping[str, Any], name: str) -> list[Curve]:
    curves = []
    for task, table in data["benchmarks"].items():
        x = np.array([math.inf if b is None else float(b) for b in table["kv_budget"]])
        for model, values in table.items():
            if model != "kv_budget":
                y = _fractions(np.asarray(values, float) / 100.0, name)
                curves.append(Curve(model, task, x, y, "kv_budget", str(data.get("source", name))))
    return curves


def _replayed(data: Mapping[str, Any], name: str) -> Replayed:
    try:
        values = [
            data["accuracy"],
            *data["accuracy_ci95"],
            data["tokens_per_problem"],
            data["samples_per_problem"],
        ]
        accuracy, low, high, tokens, samples = (float(v) for v in values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"replay {name}: {error} is missing or no number; write the file anew with 'ttc simulate --json'"
        ) from None
    _fractions(np.array([accuracy, low, high]), name)
    if not (math.isfinite(tokens) and tokens > 0 and math.isfinite(samples) and samples > 0):
        raise InputError(
            f"replay {name}: {tokens:g} tokens in {samples:g} samples a problem; write the file anew with 'ttc simulate --json'"
        )
    source = f"{name}: {data.get('problems')} problems x {data.get('shuffles')} shuffles"
    return Replayed(
        str(data["policy"]),
        data.get("model") or "",
        data.get("task"),
        tokens,
        samples,
        accuracy,
        low,
        high,
        int(data["problems"]) if isinstance(data.get("problems"), int) else 0,
        source,
    )


def _fractions(values: Floats, name: str) -> Floats:
    if not np.all((values >= 0) & (values <= 1)):
        raise InputError(f"curves {name}: an accuracy lies outside 0..1 or is NaN; mend that entry")
    return values


def _coder(gold: str) -> Any:
    codes = {gold: 0}

    def code(answer: Any) -> int:
        text = "" if answer is None else str(answer)
        return -1 if text in NO_ANSWER else codes.setdefault(text, len(codes))

    return code


def _length(value: Any, name: str, problem: int) -> float:
    length = float(value)
    if not (length >= 0 and math.isfinite(length)):
        raise InputError(f"pool {name}: problem {problem} has a branch of {value} tokens; use a finite count")
    return length


def _short(queries: Iterable[str]) -> dict[str, str]:
    """A name for each question: how it begins, and where others begin alike also a digest of it."""
    begins = Counter(query[:60] for query in queries)
    return {
        query: query[:60] + (f"… {sha256(query.encode()).hexdigest()[:8]}" if begins[query[:60]] > 1 else "")
        for query in queries
    }


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _guess(stem: str) -> tuple[str | None, str | None]:
    """Model and task as far as a file name tells them: ``qwen3-8b_aime24`` -> (qwen3-8b, aime24)."""
    parts = stem.lower().split("_")
    task = next((p for p in parts if p.startswith(("aime", "amc", "math", "gpqa", "gsm", "minerva"))), None)
    model = next((p for p in parts if any(ch.isdigit() for ch in p) and p.endswith("b")), None)
    return model, task


def _labelled(pool: Pool, labels: Mapping[str, Any]) -> Pool:
    return replace(pool, **{k: v for k, v in labels.items() if v is not None})


def read_all(paths: Iterable[str | Path], **labels: Any) -> tuple[list[Pool], list[Curve | Replayed]]:
    """Every pool in ``paths``, and every curve or replayed policy."""
    pools: list[Pool] = []
    curves: list[Curve | Replayed] = []
    for path in paths:
        for item in read(path, **labels):
            if isinstance(item, Pool):
                pools.append(item)
            else:
                curves.append(item)
    return pools, curves
