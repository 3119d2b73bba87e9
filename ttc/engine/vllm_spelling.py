"""A model's texts in its own tokens, and back: prompts, what is forced into a chain, where a step of a search ends.

Owns the tokenizer of an in-process engine, and refuses what it makes nothing of. No vLLM here, no requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ttc.engine.course import FAR, STEERING, check_fits, check_words
from ttc.engine.model import ModelFiles
from ttc.errors import InputError
from ttc.types import Control, Messages, Problem

MOST_PROMPTS = 4096
"""Prompts that are remembered."""


class Spelling:
    """How the model of ``files`` spells. ``close``: what ends a thought by force; ``lead``: what then leads to the answer; ``end``:
    the delimiter alone ([]: it has none); ``room``: tokens that closing and answering take. ``ends`` are the model's marks of the
    end of a text, beside its tokenizer's own (many have several)."""

    def __init__(self, tokenizer: Any, files: ModelFiles, ends: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._ends = {tokenizer.eos_token_id, *ends}
        self.name = files.name
        self.close = self.ids(files.format.close_text)
        self.lead = self.ids(files.format.lead_text)
        self.delimiter = files.format.think_close
        self.end = self.ids(self.delimiter)
        self.room = max(len(self.close), len(self.lead)) + files.format.answer_tokens
        fast: Any = getattr(tokenizer, "backend_tokenizer", None) if not _cleans(tokenizer) else None
        # transformers' own decode does what the fast one does, and is several times as long about it
        self._decode: Any = getattr(fast, "decode", tokenizer.decode)
        self._pieces: list[bytes] = _pieces(fast)
        self._prompts: dict[tuple[str, float | None], tuple[Messages, list[int]]] = {}
        self._spans: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def prompt(self, problem: Problem, effort: float | None) -> list[int]:
        known = self._prompts.get((problem.id, effort))
        if known is not None and known[0] == problem.messages:
            return known[1]
        options = {"effort": effort} if effort is not None else {}
        ids = list(
            self.tokenizer.apply_chat_template(
                [dict(m) for m in problem.messages],
                tokenize=True, add_generation_prompt=True, return_dict=False, **options,
            )
        )  # fmt: skip
        if len(self._prompts) > MOST_PROMPTS:
            self._prompts.clear()
        self._prompts[problem.id, effort] = problem.messages, ids
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The output as text without the end-of-sequence mark; other special tokens (delimiters of thought) are kept."""
        kept = ids[:-1] if ids and ids[-1] in self._ends else ids
        try:
            return b"".join(map(self._pieces.__getitem__, kept)).decode("utf-8", "replace")
        except IndexError:  # no table, or an id that the tokenizer does not know
            return str(self._decode(list(kept), skip_special_tokens=False))

    def opened(self, ids: Sequence[int]) -> bool:
        """True unless ``ids`` end the thought that the prompt opens."""
        width = len(self.end)
        return not (width and any(list(ids[i : i + width]) == self.end for i in range(len(ids) - width + 1)))

    def steering(self, control: Control | None) -> dict[str, Any]:
        """A request's control in ids. Raises InputError for a trigger that this tokenizer makes nothing of."""
        if control is None:
            return {}
        return {
            "triggers": [self.trigger(text) for text in control.triggers],
            "at": list(control.at),
            **{name: getattr(control, name) for name in STEERING},
        }

    def trigger(self, text: str) -> list[int]:
        ids = self._spans.get(text)
        if ids is None:
            ids = self.ids(text)
            if not ids:
                raise InputError(f"trigger: {text!r} is no token of {self.name}'s; give some words")
            if self.tokenizer.unk_token_id in ids:
                raise InputError(f"trigger: {self.name} has no token for a part of {text!r}; use other words")
            self._spans[text] = ids
        return ids

    def step(self, text: str) -> list[int]:
        """Every token with ``text`` in it: behind any of them a step ends. Raises InputError if there is none."""
        ids = self._spans.get("step " + text)
        if ids is None:
            size = len(self.tokenizer)
            special = set(self.tokenizer.all_special_ids)
            words = self.tokenizer.batch_decode([[i] for i in range(size)])
            ids = [i for i, word in enumerate(words) if text in word and i not in special]
            if not ids:
                raise InputError(
                    f"step: no single token of {self.name}'s has {text!r} in it; use another delimiter, or step_tokens alone"
                )
            self._spans["step " + text] = ids
        return ids

    def check_control(self, control: Control, thinking: int = FAR) -> None:
        """Raise InputError for a control that no branch of this model can follow in ``thinking`` tokens."""
        if not self.end:
            raise InputError(
                f"think-close: {self.name} has no delimiter that ends a thought, so nothing can be forced inside one;"
                " name it with --think-close, or use a policy that does not steer"
            )
        check_words(control, self.delimiter)
        triggers = self.steering(control)["triggers"]
        check_fits(control, [len(ids) for ids in triggers], thinking)

    def check_steps(self, text: str) -> None:
        """Raise InputError for a delimiter of steps that no token of this model has in it ("": none)."""
        if text:
            self.step(text)


def _cleans(tokenizer: Any) -> bool:
    """True if the tokenizer changes a text after decoding it."""
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", True))


def _pieces(tokenizer: Any) -> list[bytes]:
    """What each id of a fast tokenizer stands for, where its decoder does no more than to put that together ([]: it does more). A
    long chain is then text in a third of the time, in which the engine would stand still."""
    kind = type(getattr(tokenizer, "decoder", None)).__name__
    if kind not in ("Fuse", "ByteLevel"):
        return []
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size(with_added_tokens=True))]
    if kind == "Fuse":
        return [token.encode() for token in tokens]
    of = _bytes_of_letters()
    return [bytes(map(of.__getitem__, t)) if of.keys() >= set(t) else t.encode() for t in tokens]


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte in a vocabulary. Printable ones of Latin-1 are themselves, the others
    the letters from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def with_delimiter(files: ModelFiles, think_close: str) -> ModelFiles:
    """The model's files with another closing delimiter of thought."""
    if not think_close.strip():
        raise InputError(
            "think-close: an empty delimiter ends no thought; give the model's own, such as '</think>'"
        )
    form = replace(files.format, think_close=think_close, close_text=think_close)
    return replace(files, format=form)
