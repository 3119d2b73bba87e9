"""Where the answer stands in a model's text, and its normal form."""

from __future__ import annotations

import doctest
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttc import answers
from ttc.answers import canonical, detect_format, extract, number, plain
from ttc.types import AnswerFormat

BOXED = AnswerFormat(extract="boxed")
TAG = AnswerFormat(extract="tag")
LINE = AnswerFormat(extract="last-line")
TAIL = AnswerFormat(extract="tail")
ALOUD = AnswerFormat(think_open="", think_close="", extract="boxed")


def test_doctests() -> None:
    assert doctest.testmod(answers).failed == 0


@pytest.mark.parametrize(
    ("format", "text", "answer"),
    [
        (BOXED, "<think>x</think>So \\boxed{42}.", "42"),
        (BOXED, "<think>x</think>\\boxed{1} or rather \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        (BOXED, "<think>x</think>\\fbox{7}", "7"),
        (BOXED, "<think>x</think>\\boxed {7}", "7"),
        (BOXED, "<think>x</think>\\\\boxed{7}", "7"),
        (BOXED, "<think>x</think>\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        (BOXED, "<think>x</think>the set {1,2 and then \\boxed{5}", "5"),
        (BOXED, "<think>x</think>\\boxed{x = \\boxed{5}}", "5"),
        (BOXED, "<think>x</think>\\boxed{3} \\boxed{ }", "3"),
        (BOXED, "<think>x\n</think>\n\n**Final Answer**\n\\boxed{12", "12"),
        (BOXED, "<think>x</think>**Final Answer**\n\\boxed{\\frac{1}{2", "\\frac{1}{2"),
        (BOXED, "<think>x</think>\\boxed{3} and \\boxed{", "3"),
        (BOXED, "<think>x</think><answer> 9 </answer>", "9"),
        (BOXED, "<think>x</think>The final answer is 9.", "9"),
        (BOXED, "<think>x</think>**Answer:** -9", "-9"),
        (BOXED, "<think>x</think>It is\n-9.", "-9"),
        (BOXED, "<think>x</think>", None),
        (BOXED, "<think>x</think></think>", None),
        (BOXED, "<think>x</think>\\boxed{7}</think></think> ", "7"),
        (BOXED, "<think>x</think>\\boxed{5}<think>y</think>", "5"),
        (BOXED, "<think>x\n</think>\n\n**Final Answer**\n\\boxed{", None),
        (BOXED, "<think>x</think>\\boxed{}.", None),
        (BOXED, "<think>x</think> \n ", None),
        (BOXED, "<think>a</think>\\boxed{1}<think>b</think>\\boxed{2}", "2"),
        (BOXED, "<think>a</think>\\boxed{1}<think>or \\boxed{2}", "1"),
        (BOXED, "<think>perhaps 12", None),
        (BOXED, "<think>so \\boxed{12} it is", "12"),
        (BOXED, "<think>so \\boxed{12", None),
        (BOXED, "<think>Put it in \\boxed{}. The answer is 3", None),
        (TAG, "<think>x</think><answer>1</answer> no <answer>2</answer>", "2"),
        (TAG, "<think>x</think><answer>1</answer> no <answer>", "1"),
        (TAG, "<think>x</think><answer>2", "2"),
        (TAG, "<think>x</think>\\boxed{8}", "8"),
        (LINE, "<think>x</think>blah\nFinal answer: 3.5.\n\n", "3.5"),
        (LINE, "<think>x</think>Final answer: \\boxed{4}.", "4"),
        (LINE, "<think>x</think>**42**", "42"),
        (LINE, "<think>x</think>So the answer is: **42**", "42"),
        (LINE, "<think>x</think>answer: answer: -1/2", "-1/2"),
        (LINE, "<think>still thinking\n5", None),
        (TAIL, "<think>x</think> 42 ", "42"),
        (TAIL, "<think>x</think>", None),
        (TAIL, "1+2=3", None),
        (ALOUD, "First 2+2.\n\nFinal answer: \\boxed{4", "4"),
        (ALOUD, "First 2+2.\n\nFinal answer: \\boxed{", None),
        (ALOUD, "It is 4", "It is 4"),
    ],
)
def test_extract(format: AnswerFormat, text: str, answer: str | None) -> None:
    assert extract(text, format) == answer


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000,
        "}" * 100_000,
        "\\boxed{" * 15_000,
        "\\boxed{" * 15_000 + "}" * 15_000,
        "\\" * 100_000,
        "<answer>" * 12_000,
        "answer:" * 15_000,
        "answer is " * 10_000,
        "final answer is" + " " * 100_000,
        "*" * 100_000,
        "\\boxed" + " " * 100_000,
        "\n" * 100_000,
        "</think>" * 12_000,
    ],
)
@pytest.mark.parametrize("format", [BOXED, TAG, LINE, TAIL, ALOUD], ids=lambda f: f.extract + f.think_close)
def test_hostile_text_ends(text: str, format: AnswerFormat) -> None:
    """Quadratic scanning of these takes minutes, which the suite's own time would show."""
    for whole in (text, f"<think>x</think>{text}"):
        found = extract(whole, format)
        assert found is None or found


@given(
    st.text(alphabet="\\boxed{}fra<answer>/thinkis: .\n1", max_size=80),
    st.sampled_from([BOXED, TAG, LINE, TAIL]),
)
def test_extract_never_gives_an_empty_answer(text: str, format: AnswerFormat) -> None:
    for whole in (text, f"<think></think>{text}"):
        found = extract(whole, format)
        assert found is None or found.strip() == found != ""


@given(st.text(alphabet="abc{}123 ", max_size=30).filter(lambda s: s.strip()))
def test_a_box_is_found_whatever_is_balanced_in_it(content: str) -> None:
    depth, kept = 0, ""
    for sign in content:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        kept += sign if depth >= 0 else ""
        depth = max(depth, 0)
    kept += "}" * depth
    if kept.strip():
        assert extract(f"<think></think>so \\boxed{{{kept}}} is it", BOXED) == kept.strip()


def test_an_unfinished_thought_has_no_answer() -> None:
    for format in (BOXED, TAG, LINE, TAIL):
        assert extract("<think>\nI see that the final answer is 5.\n5", format) is None


QWEN3 = "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"


def test_detect_format() -> None:
    qwen3 = detect_format(QWEN3, lambda token: True)
    assert (qwen3.think_open, qwen3.think_close) == ("<think>", "</think>")
    assert qwen3.close_text == "\n</think>\n\n**Final Answer**\n\\boxed{"
    assert qwen3.lead_text == "\n\n**Final Answer**\n\\boxed{"
    assert (qwen3.extract, qwen3.answer_tokens) == ("boxed", 64)
    assert detect_format("[THINK] {{ x }} [/THINK]", lambda token: False).think_close == "[/THINK]"
    assert detect_format(None, lambda token: token == "</think>").think_close == "</think>"
    spoken = detect_format("{{ messages }}", lambda token: True)
    assert (spoken.think_close, spoken.close_text) == ("", "\n\nFinal answer: \\boxed{")
    assert extract(f"2+2 is 4{spoken.close_text}4}}", spoken) == "4"
    assert extract(f"<think>2+2{qwen3.close_text}4", qwen3) == "4"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", Fraction(3)),
        ("3.0", Fraction(3)),
        ("-3.50", Fraction(-7, 2)),
        ("+ 3", Fraction(3)),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1e3", Fraction(1000)),
        ("2.5e-1", Fraction(1, 4)),
        ("6/4", Fraction(3, 2)),
        ("1/0", None),
        ("", None),
        (".", None),
        ("-", None),
        ("12,34", None),
        ("1e9999", None),
        ("inf", None),
        ("nan", None),
        ("0x10", None),
        ("9" * 5000, None),
        ("٣", None),
    ],
)
def test_number(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@given(st.fractions(max_denominator=10**6))
def test_numbers_survive_writing(value: Fraction) -> None:
    assert number(str(value)) == value
    assert canonical(f" ${value}$. ") == canonical(str(value))


@given(st.text(alphabet="aB1.,$\\{} \n/-", max_size=60))
def test_canonical_is_stable(text: str) -> None:
    assert canonical(text) == canonical(f"  {text}  ")
    plain(text)


def test_plain() -> None:
    assert plain("\\(x+1\\)") == "x+1"
    assert plain("\\text{Yes}") == "Yes"
    assert plain("50\\%") == "50%"
    assert plain("\\left(1,\\ 2\\right)") == "(1, 2)"
    assert plain("a   b\n c ") == "a b\nc"
    assert plain("wait...") == "wait..."
    assert canonical("1,000") == canonical("1e3") == canonical("$1000.0$")
    assert canonical("Hello  World") == canonical("hello world")


def test_a_fraction_is_rewritten_only_where_it_stands_alone() -> None:
    for text in ("\\frac{1}{2}", "$\\dfrac{1}{2}$.", " \\tfrac{1}{2} "):
        assert canonical(text) == "=1/2"
    assert canonical("-\\frac{1}{2}") == "=-1/2"
    assert plain("(\\frac{1}{2}, \\frac{3}{4})") == "(1/2, 3/4)"
    assert plain("x = \\frac{1}{2}") == "x = 1/2"
    for mixed in ("2\\frac{1}{2}", "\\frac{1}{2}5", "2^\\frac{1}{2}", "\\frac{1}{2}x", "(2)\\frac{1}{2}"):
        assert plain(mixed) == mixed  # no 21/2, no 1/25, no 2^1/2
        assert number(plain(mixed)) is None


def test_thousands_in_latex() -> None:
    assert canonical("1{,}000") == canonical("1\\,000") == canonical("1,000") == canonical("1000")
