"""One row of a JSONL file as a problem. Every fault is said as one line: the field, its value, the mend."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from ttc import verify
from ttc.errors import InputError
from ttc.types import Messages, Problem, default_verifier

KEYS = ("id", "prompt", "messages", "answer", "verifier", "meta")
ROLES = ("system", "user", "assistant", "tool")
_TYPES: dict[type, str] = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}


def parse_row(line: bytes, number: int) -> tuple[Problem, tuple[str, ...]]:
    """The problem on line ``number`` (without an ``id`` it is called after the line), and the columns that are in its ``meta``
    because they are no key of ours."""
    row = _object(line)
    extras = tuple(key for key in row if key not in KEYS)
    for key in extras:
        if meant := _slip(key):
            raise InputError(
                f"unknown key {key!r}; did you mean {meant!r}? keys are {', '.join(KEYS)}; put others into meta, or rename it"
            )
    if ("prompt" in row) == ("messages" in row):
        raise InputError(
            f"give exactly one of 'prompt' and 'messages' (the row has {', '.join(row) or 'none'})"
        )
    identity = _field(row, "id", (str, int), "a string or an integer")
    answer = _field(row, "answer", (str, int, float), "a string or a number")
    name = _field(row, "verifier", (str,), "a string")
    meta = _field(row, "meta", (dict,), "an object")
    if name is not None:
        verify.verifier(name).close()
        if name == "rg":
            raise InputError("verifier 'rg' scores only problems of --task rg:NAME; use 'exact' or 'math'")
    given = f"line-{number}" if identity is None else str(identity)
    if not given.strip():
        raise InputError(f"id is {identity!r}; give it a name, or leave the key out")
    check_text(given, "id")
    messages = user(_text(row, "prompt")) if "prompt" in row else _messages(row["messages"])
    gold = _text(row, "answer") if isinstance(answer, str) else None if answer is None else json.dumps(answer)
    kept = _kept(extras, row, meta or {})
    return Problem(given, messages, gold, name or default_verifier(), kept), extras


def _slip(key: str) -> str | None:
    """The key of ours that ``key`` is a slip of the pen away from: other capitals, or a letter or two."""
    for ours in KEYS:
        if key.strip().lower() == ours:
            return ours
        alike = difflib.SequenceMatcher(None, key.lower(), ours).ratio() >= 0.8
        if alike and len(ours) > 2 and abs(len(key) - len(ours)) <= 1:
            return ours
    return None


def _kept(extras: tuple[str, ...], row: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` with the row's other columns."""
    for key in extras:
        if key in meta:
            raise InputError(f"{key!r} is a column and in meta; keep one of the two")
    return {**meta, **{key: row[key] for key in extras}}


def user(text: str) -> Messages:
    """A conversation of one question."""
    return ({"role": "user", "content": text},)


def check_text(text: str, what: str) -> None:
    """Refuse what cannot be written as UTF-8 (half a surrogate pair): it would fail in mid-run."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{what} holds {half!r}, half of a surrogate pair; write whole characters") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({_short(error)}); put one JSON object on the line") from None
    if not isinstance(row, dict):
        raise InputError(f'of type {_kind(row)}; write an object: {{"prompt": "...", "answer": "..."}}')
    return row


def _field(row: Mapping[str, Any], key: str, types: tuple[type, ...], wanted: str) -> Any:
    """The value of an optional key; null is the same as no key."""
    value = row.get(key)
    if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
        raise _mistyped(key, value, wanted)
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise _mistyped(key, value, "a string")
    if not value.strip():
        raise InputError(f"{key} is empty; write it, or leave it out")
    check_text(value, key)
    return value


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise _mistyped("messages", value, "a list of {role, content} that is not empty")
    for position, message in enumerate(value):
        where = f"messages[{position}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise _mistyped(where, message, "an object with role and content, no more")
        if message["role"] not in ROLES:
            raise InputError(f"{where}.role is {_short(json.dumps(message['role']))}; use {', '.join(ROLES)}")
        try:
            _text(message, "content")
        except InputError as error:
            raise InputError(f"{where}.{error}") from None
    if value[-1]["role"] != "user":
        raise InputError(f"messages end with role {value[-1]['role']!r}; end with the user's question")
    return tuple(value)


def _mistyped(what: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{what} is of type {_kind(value)} ({_short(json.dumps(value))}); give {wanted}")


def _kind(value: Any) -> str:
    return _TYPES.get(type(value), "number")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
