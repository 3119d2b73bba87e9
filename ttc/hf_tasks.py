"""Rows of a Hugging Face data set as questions and gold answers. Owns the guess of which column is which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ttc.answers import extract
from ttc.errors import InputError
from ttc.types import AnswerFormat, Messages, seed_for

QUESTIONS = ("prompt", "question", "problem", "messages", "query", "instruction", "input")
ANSWERS = ("answer", "gold", "final_answer", "target", "solution", "output")
_SPLITS = ("test", "validation", "train")
_HASHES = re.compile(r"####[ \t]*([^\n]{1,1000})")
_BOXED_ONLY = AnswerFormat(think_close="\x00", extract="boxed")
"""Under this format a text is an unfinished thought: only a complete box or tag is taken from it."""


class Row(NamedTuple):
    """One question of a data set; ``gold`` is None where the set has no answers."""

    id: str
    messages: Messages
    gold: str | None


def rows(task: str, n: int | None, seed: int) -> list[Row]:
    """``n`` rows of ``hf:ID[:SPLIT][?config=NAME]`` chosen by ``seed`` (all if None), in the set's order."""
    name, _, query = task.removeprefix("hf:").partition("?")
    name, _, split = name.partition(":")
    key, _, config = query.partition("=")
    if not name or (query and (key != "config" or not config)):
        raise InputError(
            f"task {task!r} is malformed; write hf:ID[:SPLIT][?config=NAME], for example hf:openai/gsm8k:test"
        )
    data, split = _data(task, name, split or None, config or None)
    if n is not None and n > len(data):
        raise InputError(
            f"task {task!r}: n is {n}, but split {split!r} has {len(data)} rows; lower n to {len(data)}"
        )
    order = (
        sorted(range(len(data)), key=lambda i: seed_for(seed, task, i)) if n is not None else range(len(data))
    )
    return convert(task, f"hf:{name}:{split}", data, sorted(order[:n]))


def convert(task: str, prefix: str, data: Any, indices: Sequence[int]) -> list[Row]:
    """The rows of ``data`` (anything with ``column_names`` and integer indexing) at ``indices``."""
    names = list(data.column_names)
    question = next((name for name in QUESTIONS if name in names), None)
    answer = next((name for name in ANSWERS if name in names and name != question), None)
    mend = "save the rows as JSONL and use --input"
    if question is None:
        wanted, given = ", ".join(QUESTIONS), ", ".join(names)
        raise InputError(f"task {task!r}: no column of {wanted} among {given}; {mend}")
    found = []
    for index in indices:
        record: Mapping[str, Any] = data[index]
        identity = f"{prefix}/{index}"
        messages = _messages(record[question])
        if not messages:
            raise InputError(f"task {task!r}: row {index} has no text in column {question!r}; {mend}")
        found.append(Row(identity, messages, None if answer is None else gold(record[answer])))
    return found


def gold(value: Any) -> str | None:
    """The final answer in an answer column: after GSM8K's ``####``, in a ``\\boxed{}``, or the whole of it;
    None if empty."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, list | tuple | dict):
        return None
    text = str(value).strip()
    if hashes := _HASHES.findall(text):
        return str(hashes[-1]).strip() or None
    return extract(text, _BOXED_ONLY) or text or None


def _messages(value: Any) -> Messages:
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if isinstance(value, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    ):
        kept = [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
        while kept and kept[-1]["role"] == "assistant":  # a conversation with its answer
            kept.pop()
        return tuple(kept)
    return ()


def _data(task: str, name: str, split: str | None, config: str | None) -> tuple[Any, str]:
    """The data set's split, downloaded or from the cache, and the split's name."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"task {task!r} needs datasets, which is not installed: pip install 'ttc[tasks]'"
        ) from None
    try:
        if config is None:
            configs = datasets.get_dataset_config_names(name)
            config = next((c for c in ("default", "main", *configs) if c in configs), None)
            if len(configs) > 1 and config not in ("default", "main"):
                parts = ", ".join(configs[:12])
                raise InputError(f"task {task!r}: the set has parts; add ?config= and one of {parts}")
        splits = list(datasets.get_dataset_split_names(name, config))
        split = split or next((s for s in (*_SPLITS, *splits) if s in splits), "train")
        if split not in splits:
            raise InputError(f"task {task!r}: no split {split!r}; it has {', '.join(splits)}")
        return datasets.load_dataset(name, config, split=split), split
    except InputError:
        raise
    except (
        Exception
    ) as error:  # the library raises dozens of kinds: unknown set, no network, gated, bad files
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        mend = "check the name and the network, or save the rows as JSONL and use --input"
        raise InputError(f"task {task!r} cannot be loaded ({reason}); {mend}") from None
