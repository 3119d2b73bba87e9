"""Text from token ids: put together here where a tokenizer's decoder does no more, and then just what it would say."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from ttc import nano
from ttc.engine.model import load_model_files
from ttc.engine.vllm_spelling import Spelling
from ttc.types import Problem

tokenizers = pytest.importorskip("tokenizers")


def _spelling(fast: Any, cleans: bool = False) -> Spelling:
    """A ``Spelling`` of this tokenizer, in the wrapper that transformers gives it."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return "slow: " + str(fast.decode(ids, skip_special_tokens=skip_special_tokens))

    wrapped = SimpleNamespace(
        backend_tokenizer=fast, encode=encode, decode=decode, eos_token_id=None, clean_up_tokenization_spaces=cleans
    )  # fmt: skip
    return Spelling(wrapped, load_model_files("nano-xs"))


def _bytes() -> Any:
    """A byte-level BPE with tokens that hold parts of characters, special ones, and added ones outside its alphabet."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>", "<think>"], show_progress=False
    )
    made.train_from_iterator(["Grüße, 日本語 😀 naïve café\n\tx² ≤ 1"] * 20, trainer)
    made.add_tokens(["日本", "a b", "Ġx", "<effort 1>"])
    return made


def _fused() -> Any:
    return tokenizers.Tokenizer.from_file(f"{nano.resolve('nano-xs')}/tokenizer.json")


@pytest.mark.parametrize("make", [_bytes, _fused])
def test_the_pieces_say_what_the_decoder_says(make: Any) -> None:
    fast, lot = make(), random.Random(0)
    spelling, size = _spelling(fast), fast.get_vocab_size()
    spelling._decode = None  # not asked
    for length in [0, 1, *(lot.randrange(40) for _ in range(2000))]:
        ids = [lot.randrange(size) for _ in range(length)]
        assert spelling.text(ids) == fast.decode(ids, skip_special_tokens=False)


def test_an_id_beyond_the_tokenizer_is_left_to_it() -> None:
    fast = _bytes()
    ids = [5, fast.get_vocab_size() + 3, 6]
    assert _spelling(fast).text(ids) == fast.decode(ids, skip_special_tokens=False)


def test_any_mark_of_the_end_is_no_text() -> None:
    """Llama 3 and Qwen 3 have marks beside their tokenizer's own, at which vLLM ends a text, too."""
    wrapped = _spelling(_fused()).tokenizer
    wrapped.eos_token_id = 1
    spelling = Spelling(wrapped, load_model_files("nano-xs"), ends=[7, 8])
    for mark in (1, 7, 8):
        assert spelling.text([5, 7, 6, mark]) == spelling.text([5, 7, 6])
    assert spelling.text([5, 7, 6, 9]) != spelling.text([5, 7, 6])


def test_decoders_that_do_more_are_asked() -> None:
    """WordPiece joins words by rules of its own, and a tokenizer that cleans up changes the text afterwards."""
    fast = _bytes()
    fast.decoder = tokenizers.decoders.WordPiece(prefix="##")
    ids = list(range(40, 60))
    assert _spelling(fast).text(ids) == fast.decode(ids, skip_special_tokens=False)
    cleaning = _bytes()
    assert _spelling(cleaning, cleans=True).text(ids) == "slow: " + cleaning.decode(
        ids, skip_special_tokens=False
    )


def test_a_prompt_is_remembered_by_all_of_its_messages() -> None:
    """One id and one question under two instructions are two prompts."""
    spelling = _spelling(_fused())

    def template(messages: list[dict[str, str]], **options: Any) -> list[int]:
        rendered.append(messages)
        return [len(m["content"]) for m in messages]

    rendered: list[list[dict[str, str]]] = []
    spelling.tokenizer.apply_chat_template = template
    question = {"role": "user", "content": "1+1"}
    plain = Problem("0", (question,))
    briefly, slowly = (
        Problem("0", ({"role": "system", "content": c}, question)) for c in ("Briefly.", "Slowly, please.")
    )
    for _ in range(2):
        assert [spelling.prompt(p, None) for p in (plain, briefly, slowly)] == [[3], [8, 3], [15, 3]]
    before = len(rendered)
    assert spelling.prompt(slowly, None) is spelling.prompt(slowly.posed(), None)
    assert spelling.prompt(slowly, 0.5) == [15, 3]
    assert len(rendered) == before + 1
