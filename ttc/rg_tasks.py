"""Reasoning-gym's side of a problem: draw an item, score an answer, compare two answers. Runs only in
``ttc.verify_worker``.

Items are drawn in the child because several datasets depend on string hashing or on the global random
generator (both fixed there), and because a dataset's scorer evals the text that it scores.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import random
import typing
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ttc.answers import number, plain
from ttc.errors import InputError

CORRECT = 1.0 - 1e-9
_SENTINEL = "\u2205 no answer"
"""Equals no answer: a scorer that takes it for some answer's gold cannot tell that answer from others."""


class Spec(typing.NamedTuple):
    """``rg:NAME?k=v&k=v`` in parts; ``text`` is its canonical form (settings in order of name)."""

    name: str
    settings: Mapping[str, str]
    text: str


def parse_spec(text: str) -> Spec:
    """The parts of a task specification such as ``rg:chain_sum?max_terms=4``."""
    name, _, query = text.removeprefix("rg:").partition("?")
    settings: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key or key in settings:
            fault = "given twice" if key in settings else "not of the form name=value"
            raise InputError(f"task {text!r}: {part!r} is {fault}; write rg:NAME?name=value&name=value")
        settings[key] = unquote(value)
    if not name:
        raise InputError(f"task {text!r}: no dataset named; write rg:NAME, for example rg:chain_sum")
    ordered = "&".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return Spec(name, settings, f"rg:{name}" + (f"?{ordered}" if ordered else ""))


def draw(task: str, seed: int) -> dict[str, Any]:
    """The item that ``task`` gives for ``seed``: ``question``, ``answer`` (None where many are right) and
    ``entry`` for scoring.

    Reasoning-gym seeds item i of a dataset with seed + i, so that neighbouring seeds share items; a fresh
    one-item dataset for each (hashed) seed does not.
    """
    random.seed(seed)
    dataset = _dataset(task, seed)
    try:
        item = dataset[0]
    except Exception as error:
        raise InputError(
            f"task {task!r} cannot draw with these settings ({_line(error)}); change them"
        ) from None
    answer = item["answer"]
    entry = {"answer": encode(answer), "metadata": encode(item["metadata"])}
    return {
        "question": item["question"],
        "answer": None if answer is None else str(answer),
        "entry": entry,
        "grade": grade(item["metadata"]),
    }


def grade(metadata: Mapping[str, Any]) -> int | None:
    """How hard an item is, for the tasks that the embedded reasoners know: digits to add (chain_sum), products of digits
    (products), numbers to join (countdown). None for other tasks; grades of different tasks do not compare."""
    match metadata.get("source_dataset"):
        case "chain_sum":
            return int(metadata["num_terms"] * metadata["num_digits"])
        case "products":
            return int(metadata["num_digits"] ** metadata["num_terms"])
        case "countdown":
            return len(metadata["numbers"])
        case _:
            return None


def score(task: str, entry: Mapping[str, Any], question: str, answer: str) -> tuple[float, str]:
    """The dataset's own score of ``answer`` (of the text as written or, if that is not right, freed of LaTeX
    dress) and a note.

    A scorer that fails on a text it cannot parse (several do) gives it 0: the answer is at fault, not the
    verifier.
    """
    item = {"question": question, "answer": decode(entry["answer"]), "metadata": decode(entry["metadata"])}
    dataset = _scorer(task)
    best, note = 0.0, ""
    for text in dict.fromkeys((answer, answer.strip(), plain(answer))):
        try:
            best = max(best, float(dataset.score_answer(text, item)))
        except MemoryError:
            raise
        except Exception as error:
            note = f"scorer: {type(error).__name__}: {_line(error)}"
        if best >= CORRECT:
            return 1.0, ""
    return best, note


def equal(task: str, a: str, b: str) -> bool:
    """True if the dataset's scorer takes each of the two for right when the other is the gold answer.

    The problem's metadata is withheld: a scorer that checks a solution (countdown) would call any two right
    answers equal and so tell the vote which answers are right. Scorers that need it, or that cannot tell an
    answer from ``_SENTINEL``, fall back to equal text (up to white space and LaTeX dress) or equal numbers:
    two different right answers are then two answers.
    """
    a, b = plain(a), plain(b)
    if a == b:
        return True
    if any(_blind(task, x, _SENTINEL) >= CORRECT for x in (a, b)):
        return False
    if _blind(task, a, b) >= CORRECT and _blind(task, b, a) >= CORRECT:
        return True
    decided = _blind(task, a, a) >= CORRECT and _blind(task, b, b) >= CORRECT
    return not decided and number(a) is not None and number(a) == number(b)


def _blind(task: str, answer: str, gold: str) -> float:
    """The score of ``answer`` by the gold answer alone; 0 where the scorer needs more."""
    try:
        return float(_scorer(task).score_answer(answer, {"question": "", "answer": gold, "metadata": {}}))
    except MemoryError:
        raise
    except Exception:
        return 0.0


@functools.lru_cache(maxsize=16)
def _scorer(task: str) -> Any:
    return _dataset(task, 0)


def _dataset(task: str, seed: int) -> Any:
    """A dataset of one item; its settings are checked here for name and type, by reasoning-gym for sense."""
    from reasoning_gym.factory import DATASETS

    spec = parse_spec(task)
    if spec.name not in DATASETS:
        near = difflib.get_close_matches(spec.name, DATASETS, 3) or [n for n in DATASETS if spec.name in n]
        hint = f"did you mean {', '.join(near[:3])}?" if near else "chain_sum, gcd and countdown are some"
        raise InputError(f"task {task!r}: reasoning-gym has no dataset {spec.name!r}; {hint}")
    if spec.name == "composite":
        raise InputError("task 'rg:composite': mixtures are not supported; name one dataset")
    dataset_class, config_class = DATASETS[spec.name]
    values = {key: _value(task, config_class, key, text) for key, text in spec.settings.items()}
    try:
        return dataset_class(config=config_class(**values, seed=seed, size=1))
    except (AssertionError, ValueError, TypeError) as error:
        raise InputError(
            f"task {task!r}: reasoning-gym refuses these settings ({_line(error)}); change them"
        ) from None


def _value(task: str, config_class: Any, key: str, text: str) -> Any:
    """The setting ``key``, read from text as the type that the dataset's config declares."""
    from pydantic import TypeAdapter, ValidationError

    fields = {f.name: f for f in dataclasses.fields(config_class)}
    if key in ("seed", "size"):
        flag = "--seed" if key == "seed" else "--n"
        raise InputError(f"task {task!r}: {key!r} is set by the run; use {flag}")
    if key not in fields:
        names = ", ".join(sorted(fields.keys() - {"seed", "size"}))
        raise InputError(f"task {task!r}: no setting {key!r}; it has {names}")
    hint = typing.get_type_hints(config_class)[key]
    default = fields[key].default
    if hint is tuple and isinstance(default, tuple) and default:
        hint = tuple[type(default[0]), ...]  # type: ignore[misc]
    candidates: list[Any] = [None] if text.lower() in ("none", "null") else [text, text.split(",")]
    if text[:1] in ("[", "{"):
        candidates = [_json(text), text]
    for candidate in candidates:
        try:
            value = TypeAdapter(hint).validate_python(candidate)
        except ValidationError:
            continue
        if not isinstance(value, float) or math.isfinite(value):
            return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise InputError(f"task {task!r}: {key} is {text!r}; give a value of type {wanted}")


def encode(value: Any) -> Any:
    """``value`` as plain JSON from which ``decode`` restores tuples, sets, dictionaries with other keys and
    odd floats."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | int):
        return str(value) if isinstance(value, str) else int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"__dict__": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"__set__": [encode(item) for item in sorted(value, key=repr)]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return encode(value.tolist())
    return str(value)


def decode(value: Any) -> Any:
    """The inverse of ``encode``."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        match next(iter(value.items())):
            case ("__tuple__", items):
                return tuple(decode(item) for item in items)
            case ("__set__", items):
                return {decode(item) for item in items}
            case ("__dict__", items):
                return {decode(key): decode(item) for key, item in items}
            case ("__float__", text):
                return float(text)
    return {key: decode(item) for key, item in value.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
