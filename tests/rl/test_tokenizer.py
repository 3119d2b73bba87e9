"""The plain encoder, the Hugging Face tokenizer and the chat template agree."""

from __future__ import annotations

import random

import pytest

from ttc.rl import tokenizer
from ttc.rl.model import size_config
from ttc.rl.traces import Corpus

pytest.importorskip("transformers")
EXAMPLE = tokenizer.CHAIN_SUM_PHRASE + "4 + 3 - 2 ="


def corpus(seed: int = 0) -> Corpus:
    return Corpus(random.Random(seed), size_config("s")["data"], frozenset())


def test_a_trace_survives_its_text_and_is_tokenised_alike_by_both() -> None:
    hf, traces = tokenizer.hf_tokenizer(), corpus()
    for _ in range(200):
        trace = traces.draw(1.0)
        text = tokenizer.decode(trace.ids)
        assert tokenizer.encode(text) == trace.ids
        assert hf(text, add_special_tokens=False).input_ids == trace.ids
        assert hf.decode(trace.ids) == text


def test_any_prompt_can_be_encoded() -> None:
    hf = tokenizer.hf_tokenizer()
    rng = random.Random(1)
    pool = [
        *tokenizer.VOCABULARY[len(tokenizer.SPECIAL) :],
        "é",
        "Wait,",
        "½",
        "😀",
        "\t",
        "\r\n",
        "Waiting",
        "So",
        "  ",
    ]
    for _ in range(300):
        text = "".join(rng.choices(pool, k=12))
        assert hf(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert tokenizer.encode("é") == [tokenizer.UNK]


@pytest.mark.parametrize("effort", [None, 0.0, 0.1, 0.25, 0.3, 0.5, 0.51, 0.75, 0.9, 1, 3.0])
def test_the_chat_template_renders_the_training_format(effort: float | None) -> None:
    message = [{"role": "user", "content": EXAMPLE}]
    rendered = tokenizer.hf_tokenizer().apply_chat_template(
        message, effort=effort, add_generation_prompt=True, tokenize=False
    )
    assert rendered == tokenizer.prompt(EXAMPLE, effort)


def test_the_template_leaves_effort_out_when_it_is_not_given() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2 ="},
        {"role": "assistant", "content": "<think></think>3"},
    ]
    rendered = tokenizer.hf_tokenizer().apply_chat_template(messages, tokenize=False)
    assert rendered == "<bos><|user|>1 + 2 =<|assistant|><think></think>3<eos>"
