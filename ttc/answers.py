"""From a model's text to its answer: where it stands, how a model's format is recognised, its normal form.

Owns no notion of right or wrong (``ttc.verify`` does). Everything here is linear in the length of the text,
whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from ttc.types import AnswerFormat

_DELIMITERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_BRACES = re.compile(r"\\{1,4}(?:boxed|fbox)\s{0,8}\{|\\\\|\\[{}]|[{}]")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(r"\b(?:final )?answer(?: is|:)[ \t]{0,8}:?", re.IGNORECASE)
_LEAD = re.compile(
    r"[\s*_#>]*(?:(?:so|thus|hence|therefore),?\s{1,4})?(?:the\s)?(?:final\s)?answer"
    r"(?:[\s*_]{0,8}:|\s{1,8}is\b\s{0,8}:?|\s{0,8}=)[\s*_]*",
    re.IGNORECASE,
)
_EMPTY_BOX = re.compile(r"\\{1,4}(?:boxed|fbox)\s{0,8}\{\s{0,8}(?:\}|$)")
_NUMBER = re.compile(
    r"([+-]?)\s?([0-9]{1,3}(?:,[0-9]{3}){1,300}|[0-9]{1,1000})?(?:\.([0-9]{0,1000}))?"
    r"(?:[eE]([+-]?[0-9]{1,3}))?(?:\s?/\s?([0-9]{1,1000}))?"
)
_FRACTION = re.compile(
    r"(?<![\w)\]}!.^])\\[dt]?frac\{(-?[0-9]{1,400})\}\{([0-9]{1,400})\}(?![\w(\[{!.^\\]|\.[0-9])"
)
"""One that stands by itself: 2\\frac{1}{2} is no 21/2, and what \\frac{1}{2}x would be in a line is not sure."""
_LONGEST_LINE = 400
"""A last line longer than this is prose, not an answer that was merely not boxed."""


def extract(text: str, format: AnswerFormat) -> str | None:
    """The answer that stands where ``format`` says, else where models also put it; None if there is none.

    An answer follows the last ``think_close`` that has something behind it. A thought that never closed has an answer only if a
    complete box or tag stands in it: its last line is no answer. A box or tag that the token cap cut off counts in the
    answer part, since the engine forces ``\\boxed{`` when the thought must end.

    >>> extract("<think>6*7</think>So \\\\boxed{\\\\frac{84}{2}}.", AnswerFormat(extract="boxed"))
    '\\\\frac{84}{2}'
    """
    part = text
    if format.think_close:
        thought, closed, part = text.rpartition(format.think_close)
        while not part.strip() and format.think_close in thought:  # it closes again behind its answer
            thought, closed, part = thought.rpartition(format.think_close)
        if not closed:
            return _boxed(text, cut_off=False) or _tagged(text, cut_off=False)
        if format.think_open:  # it may have begun to think again after the answer
            part = part.partition(format.think_open)[0]
    if format.extract == "tail":
        return part.strip() or None
    orders: dict[str, tuple[Callable[[str], str | None], ...]] = {
        "boxed": (_boxed, _tagged, _phrase, _last_line),
        "tag": (_tagged, _boxed, _phrase, _last_line),
        "last-line": (_last_line,),
    }
    return next((answer for find in orders[format.extract] if (answer := find(part))), None)


def detect_format(chat_template: str | None, vocab_has: Callable[[str], bool]) -> AnswerFormat:
    """The format of an ordinary Hugging Face model: it answers in ``\\boxed{}``, and thinks between the
    delimiters that its chat template names (without a template: that its vocabulary holds), if any."""
    for think_open, think_close in _DELIMITERS:
        if vocab_has(think_close) if chat_template is None else think_close in chat_template:
            lead = "\n\n**Final Answer**\n\\boxed{"
            return AnswerFormat(think_open, think_close, f"\n{think_close}{lead}", lead, "boxed", 64)
    lead = "\n\nFinal answer: \\boxed{"
    return AnswerFormat("", "", lead, lead, "boxed", 64)


def plain(text: str) -> str:
    """``text`` freed of dress that does not change an answer: white space at the ends, ``$``, LaTeX spacing,
    ``\\text{}``, simple ``\\frac{}{}``, the final period. Case and lines stay.

    >>> plain("$\\\\dfrac{1}{2}$.")
    '1/2'
    """
    text = text.strip()
    for opened, closed in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opened) and text.endswith(closed) and len(text) >= 4:
            text = text[2:-2]
    text = re.sub(r"\\[!,;:]|\\(?:left|right)(?![a-z])", "", text)
    for dressed, bare in (("\\ ", " "), ("\\%", "%"), ("\\$", "$"), ("{,}", ","), ("\u2212", "-")):
        text = text.replace(dressed, bare)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\{([^{}]{0,2000})\}", r"\1", text)
    text = _FRACTION.sub(r"\1/\2", text)
    text = text.strip().strip("$").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip().rstrip("$")
    return "\n".join(re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in text.splitlines())


def number(text: str) -> Fraction | None:
    """The exact value of a plain number (thousands separators, decimals, exponent, fraction), else None.

    >>> number("1,000.50"), number("-3/6"), number("1e999999")
    (Fraction(2001, 2), Fraction(-1, 2), None)
    """
    match = _NUMBER.fullmatch(text) if len(text) <= 2100 else None
    if match is None:
        return None
    sign, whole, decimals, exponent, denominator = match.groups()
    if not whole and not decimals:
        return None
    if denominator and (decimals is not None or exponent or not int(denominator)):
        return None
    digits = (whole or "").replace(",", "") + (decimals or "")
    scale = Fraction(10) ** (int(exponent or 0) - len(decimals or ""))
    value = Fraction(int(digits), int(denominator or 1)) * scale
    return -value if sign == "-" else value


def canonical(text: str) -> str:
    """The normal form by which ``exact`` compares: equal numbers have one form, other text is compared
    without case and with white space collapsed."""
    text = plain(text)
    value = number(text)
    return f"={value}" if value is not None else " ".join(text.casefold().split())


def _boxed(text: str, cut_off: bool = True) -> str | None:
    """The content of the last ``\\boxed{}`` that has any (of nested ones the innermost); with ``cut_off``
    also one that the end of the text left open."""
    closed, last, stack = None, -1, []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{" or (len(token) > 2 and token[-1] == "{"):
            stack.append((match.end(), token != "{"))
        elif token == "}" and stack:
            start, is_box = stack.pop()
            if is_box and start > last and (content := text[start : match.start()].strip()):
                closed, last = content, start
    if cut_off:
        start = max((start for start, is_box in stack if is_box), default=-1)
        if start > last and (content := text[start:].strip().partition("\n\n")[0].strip()):
            return content
    return closed


def _tagged(text: str, cut_off: bool = True) -> str | None:
    """The content of the last ``<answer>…</answer>`` that has any; with ``cut_off`` also an open one's."""
    found, start = None, -1
    for match in _TAG.finditer(text):
        if not match.group(1):
            start = match.end()
        elif start >= 0:
            found, start = text[start : match.start()].strip() or found, -1
    if cut_off and start >= 0:
        return text[start:].strip() or found
    return found


def _phrase(text: str) -> str | None:
    """What follows the last "(final) answer is" or "answer:" on its line."""
    for match in reversed(list(_PHRASE.finditer(text))[-64:]):
        line, _, _ = text[match.end() : match.end() + _LONGEST_LINE].lstrip(" *_:").partition("\n")
        if answer := _undress(line):
            return answer
    return None


def _last_line(text: str) -> str | None:
    """The last line that is not empty, without lead-in and final period; a box or tag in it is opened."""
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if len(line) > _LONGEST_LINE:
        return None
    return _boxed(line) or _tagged(line) or _undress(line)


def _undress(line: str) -> str | None:
    """``line`` without lead-ins ("Answer:"), empty boxes, emphasis, final period; None if that was all."""
    line = _EMPTY_BOX.sub("", line)
    while lead := _LEAD.match(line):
        line = line[lead.end() :]
    line = line.strip().strip("*_").strip()
    if line.endswith(".") and not line.endswith(".."):
        line = line[:-1].rstrip(" *_")
    return None if line.strip(" #*_").casefold() in ("", "answer", "final answer") else line
