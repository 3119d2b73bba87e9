"""Problems from where people keep them: a text, a JSONL file, a reasoning-gym task, a Hugging Face data set.

All that is wrong with the input is said here, before any work starts, as one line that names the field, the
value and the mend. Owns the JSON form of a problem that the run ledger keeps.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttc import hf_tasks, verify
from ttc.errors import InputError, VerifierError
from ttc.rg_tasks import parse_spec
from ttc.rows import check_text, parse_row, user
from ttc.sandbox import leave, take
from ttc.types import Problem, seed_for

DRAW_LIMIT_S = 60.0
"""The longest that one reasoning-gym item may take; some settings have no items and are searched for ever."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Problems, a line for each row of the file that was skipped as bad, and the columns that went into ``Problem.meta``."""

    problems: tuple[Problem, ...]
    skipped: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


def load(
    *,
    text: str | None = None,
    input: str | Path | None = None,
    task: str | None = None,
    n: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    verifier: str | None = None,
) -> Loaded:
    """Problems from exactly one source, at most ``n`` (a file: its first n; a task: n drawn with ``seed``).

    ``verifier`` overrides the one that each problem would have. An unknown verifier is refused here.
    """
    sources = {"text": text, "input": input, "task": task}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        fault = f"several sources of problems ({', '.join(given)})" if given else "no problem given"
        raise InputError(f"{fault}; give one of a text, --input FILE.jsonl or --task rg:NAME")
    _check_count(n)
    if verifier is not None:
        verify.verifier(verifier).close()
        if verifier == "rg" and not (task or "").startswith("rg:"):
            raise InputError("verifier 'rg' scores only problems of --task rg:NAME; use 'exact' or 'math'")
    if input is not None:
        loaded = from_jsonl(input, skip_bad_rows=skip_bad_rows)
        loaded = replace(loaded, problems=loaded.problems[:n])
    elif task is not None:
        loaded = Loaded(tuple(from_task(task, n, seed)))
    else:
        loaded = Loaded(tuple(from_text(text or "")))
    if verifier is not None:
        loaded = replace(loaded, problems=tuple(replace(p, verifier=verifier) for p in loaded.problems))
    return loaded


def from_text(text: str) -> list[Problem]:
    """The one problem that ``text`` poses; its id is made from the text."""
    if not text.strip():
        raise InputError("the problem's text is empty; write the question")
    check_text(text, "the problem's text")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return [Problem(f"text-{digest}", user(text))]


def from_jsonl(path: str | Path, *, skip_bad_rows: bool = False) -> Loaded:
    """The problems of a JSONL file: rows with ``prompt`` or ``messages`` and, if wanted, ``id``, ``answer``,
    ``verifier``, ``meta``. Other columns are kept in ``Problem.meta`` and named in ``Loaded.extras``; one that is a slip of the pen
    away from these is an error.

    Bad rows raise InputError, or with ``skip_bad_rows`` are left out and reported. A file without one good
    row is an error.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(
            f"input {str(path)!r} cannot be read ({error.strerror}); give a JSONL file"
        ) from None
    problems: list[Problem] = []
    skipped: list[str] = []
    first_seen: dict[str, int] = {}
    extras: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem, more = parse_row(line, number)
            if earlier := first_seen.get(problem.id):
                raise InputError(f"id {problem.id!r} is already that of line {earlier}; make ids unique")
        except InputError as error:
            message = f"{path}:{number}: {error}"
            if not skip_bad_rows:
                raise InputError(message) from None
            skipped.append(message)
            continue
        first_seen[problem.id] = number
        problems.append(problem)
        extras |= dict.fromkeys(more)
    if skipped and not problems:
        raise InputError(f"{path}: not one good row among {len(skipped)}; the first: {skipped[0]}")
    if not problems:
        raise InputError(f"{path}: the file is empty; put one JSON object on each line")
    return Loaded(tuple(problems), tuple(skipped), tuple(extras))


def from_task(spec: str, n: int | None, seed: int) -> list[Problem]:
    """``n`` problems of ``rg:NAME[?k=v&k=v]`` (reasoning-gym) or ``hf:ID[:SPLIT][?config=NAME]`` (Hugging
    Face data sets; n None: all rows), drawn with ``seed``."""
    _check_count(n)
    if spec.startswith("rg:"):
        if n is None:
            raise InputError(f"task {spec!r} makes as many problems as asked for; say how many with --n")
        return _from_reasoning_gym(spec, n, seed)
    if spec.startswith("hf:"):
        return [
            Problem(row.id, row.messages, row.gold, meta={"task": spec})
            for row in hf_tasks.rows(spec, n, seed)
        ]
    raise InputError(f"task {spec!r} is of no known kind; write rg:NAME (reasoning-gym) or hf:ID[:SPLIT]")


def _check_count(n: int | None) -> None:
    if n is not None and n < 1:
        raise InputError(f"n is {n}; give the number of problems, at least 1")


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """``problem`` as plain JSON; ``problem_from_json`` gives an equal one back."""
    return {
        "id": problem.id,
        "messages": [dict(message) for message in problem.messages],
        "gold": problem.gold,
        "verifier": problem.verifier,
        "meta": dict(problem.meta),
    }


def problem_from_json(row: Mapping[str, Any]) -> Problem:
    """The inverse of ``problem_to_json``."""
    messages = tuple(dict(message) for message in row["messages"])
    return Problem(row["id"], messages, row["gold"], row["verifier"], row["meta"])


def _from_reasoning_gym(task: str, n: int, seed: int) -> list[Problem]:
    """Item i is drawn from the hash of (seed, task, i). An item whose question was drawn before is passed
    over, so ids may have gaps, and the first problems of a larger n are those of a smaller one."""
    spec = parse_spec(task)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(f"task {task!r} needs reasoning_gym, which is missing: pip install 'ttc[tasks]'")
    sandbox = take("rg")
    found: dict[str, Problem] = {}
    try:
        for index in itertools.count():
            if index > 20 * len(found) + 200:
                fault = f"only {len(found)} different questions in {index} draws, {n} wanted"
                raise InputError(f"task {task!r}: {fault}; lower n or widen the settings")
            item_seed = seed_for(seed, spec.text, index) % 2**31
            item = sandbox.call("draw", DRAW_LIMIT_S, task=spec.text, seed=item_seed)
            meta = {"task": spec.text, "seed": seed, "index": index, "entry": item["entry"]}
            if item["grade"] is not None:
                meta["grade"] = item["grade"]
            identity, messages = f"{spec.text}/{seed}/{index}", user(item["question"])
            found.setdefault(item["question"], Problem(identity, messages, item["answer"], "rg", meta))
            if len(found) == n:
                break
    except VerifierError as error:
        raise InputError(f"task {task!r} cannot be drawn ({error}); change its settings") from None
    finally:
        leave(sandbox)  # its child scores what it drew
    return list(found.values())
