"""The tokenizer of the nano reasoners: characters, digits one by one, and a few whole phrases.

Owns the vocabulary, a plain-Python encoder for training (fast, no dependency) and its export as a Hugging
Face fast tokenizer with the chat template. Both give the same ids (tests/rl/test_tokenizer.py). A tokenizer
travels with the weights, so a vocabulary that grows later leaves shipped models alone.

Format of a conversation, one token per bracketed mark::

    <bos><|user|>PROBLEM[<effort:0.5>]<|assistant|><think>THINKING</think>ANSWER<eos>
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>")
"""Hidden in decoded text. Everything else, the thinking marks too, is visible."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
EFFORT_LEVELS = (0.25, 0.5, 0.75, 1.0)
EFFORTS = tuple(f"<effort:{level}>" for level in EFFORT_LEVELS)
TRIGGERS = (
    "Wait, let me check.",
    "Wait",
    "Wait! Maybe I made some mistakes! I need to rethink from scratch.",  # iterative deepening's sentence
)
CHAIN_SUM_PHRASE = "State the final answer to the following arithmetic problem: "
"""The fixed words of reasoning-gym's chain_sum prompt, one token, so that prompts are short."""

PHRASES = (CHAIN_SUM_PHRASE, "What is ", "So ", " + ", " - ", " = ", " =")
CHARS = (*tuple(chr(code) for code in range(32, 127)), "\n")

PRODUCT_PHRASES = ("Solve the following multiplication: ", ". Give only the result as your final answer.")
COUNTDOWN_PHRASES = (
    (
        "Using all the numbers ",
        ", create an expression that equals ",
        ".\nYou can only use each number once.",
    ),
    ("Find a way to make ", " using all of these numbers: ", ".\nEach number can only be used once."),
    ("Calculate ", " using all of these numbers: ", ".\nEach number may be used at most once."),
)
"""Around numbers and target (first template) or target and numbers."""

COUNTDOWN_ENDING = (
    "\n\nFinal answer format instructions:\n1. Provide your solution as a arithmetic expression (no '=' sign).\n"
    "2. Do not include the target number in the expression.\n3. Use '*' for multiplication.\n4. Use '/' for division.\n"
    "5. Do not include any other text or formatting.\n"
)
"""Reasoning-gym's, word for word (the reasoner reads it as one token)."""

MORE_PHRASES = (
    *PRODUCT_PHRASES,
    " * ",
    *dict.fromkeys(phrase for template in COUNTDOWN_PHRASES for phrase in template),
    COUNTDOWN_ENDING,
)
"""Behind the characters, so that the ids of the vocabulary of the first nano-s keep their meaning."""

VOCABULARY: tuple[str, ...] = (
    *SPECIAL, THINK_OPEN, THINK_CLOSE, *EFFORTS, *TRIGGERS, *PHRASES, *CHARS, *MORE_PHRASES
)  # fmt: skip
ID = {token: index for index, token in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNK = (ID[token] for token in SPECIAL[:4])

CHAT_TEMPLATE = (
    "{{ '<bos>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] }}"
    "{% if loop.last and effort is defined and effort is not none %}"
    "{% set level = ((effort | float) * 4) | round(0, 'ceil') | int %}"
    "{{ ['<effort:0.25>', '<effort:0.25>', '<effort:0.5>', '<effort:0.75>', '<effort:1.0>']"
    "[[[level, 0] | max, 4] | min] }}"
    "{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<eos>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
"""``effort`` (0 to 1, rounded up to a quarter) is optional. System messages are left out: no model was
trained on one."""

_LONG = sorted((token for token in VOCABULARY if len(token) > 1), key=len, reverse=True)
_SPLIT = re.compile("|".join(map(re.escape, _LONG)) + "|.", re.DOTALL)


def encode(text: str) -> list[int]:
    """Token ids of ``text``: leftmost longest phrase, else one character, else <unk>."""
    return [ID.get(piece, UNK) for piece in _SPLIT.findall(text)]


def decode(ids: Iterable[int]) -> str:
    """The text of token ids, special marks included."""
    return "".join(VOCABULARY[index] for index in ids)


def prompt(problem: str, effort: float | None = None) -> str:
    """What the chat template renders for one user message, up to and with ``<think>``."""
    level = "" if effort is None else EFFORTS[max(0, min(3, -int(-effort * 4 // 1) - 1))]
    return f"<bos><|user|>{problem}{level}<|assistant|>{THINK_OPEN}"


def hf_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer for transformers and vLLM: a merge-free BPE with every phrase as an added token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=dict(ID), merges=[], unk_token="<unk>", fuse_unk=False))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in _LONG if token not in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
