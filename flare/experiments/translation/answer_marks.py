"""Carry answer spans through a translation with marks, as EasyProject does (Chen et al., ACL Findings 2023).

Two marks are put around the answer, the marked text is translated, and the text between the marks of the translation is
the translated answer. If the translation lost, doubled or reordered the marks, the span is lost.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from ..tasks import Answer

# Chen et al. found that translation preserves square brackets best. The other pairs are for texts that contain square
# brackets.
PAIRS = (("[", "]"), ("{", "}"), ("<", ">"), ("«", "»"))
# Characters that models write instead of square brackets, mostly in Chinese and Japanese (from Chen et al.'s code).
_VARIANTS = {"[": "［【《", "]": "］】》"}

_NO_SPACE_BEFORE = (".", ",")
# First words of the Unicode names of letters in scripts that write no space between words. Korean separates words, but
# its particles follow a name without a space.
_WITHOUT_SPACES = (
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI ", "NEW TAI LUE", "JAVANESE", "BALINESE"),
    *(
        "CJK",
        "IDEOGRAPHIC",
        "HIRAGANA",
        "HENTAIGANA",
        "KATAKANA",
        "BOPOMOFO",
        "YI ",
        "HANGUL",
        "FULLWIDTH",
        "HALFWIDTH",
    ),
)

NO_ANSWER = "no answer"
NOT_FOUND = "the answer is not at its place in the text"
NO_PAIR = "the text holds every kind of mark"
LOST = "marks lost"
DOUBLED = "marks doubled"
OUT_OF_ORDER = "marks out of order"
EMPTY = "nothing between the marks"


class MarksLost(Exception):
    """The answer span of a row is lost. The message is the reason; provenance.json counts the rows for each reason."""


@dataclass(frozen=True)
class Marked:
    """A text with marks around a span.

    Attributes:
        text: the text with the marks. A space separates each mark from the span.
        pair: the opening and the closing mark.
    """

    text: str
    pair: tuple[str, str]


def mark(context: str, answer: Answer) -> Marked:
    """Return a context with marks around an answer.

    If the answer's start is not given, the context must contain the answer exactly once.

    Raises:
        MarksLost: the answer is blank or not at the given start; no start is given and the context does not contain the
            answer exactly once; or every kind of mark occurs in the context.
    """
    text, start = answer.text, answer.start
    if start < 0 and text and context.count(text) == 1:
        start = context.index(text)
    if start < 0 or not text.strip() or context[start : start + len(text)] != text:
        raise MarksLost(NOT_FOUND)
    for pair in PAIRS:
        characters = set("".join(one + _VARIANTS.get(one, "") for one in pair))
        if not characters & set(context):
            before, after = context[:start], context[start + len(text) :]
            return Marked(f"{before}{pair[0]} {text.strip()} {pair[1]}{after}", pair)
    raise MarksLost(NO_PAIR)


def recover(translation: str, pair: tuple[str, str]) -> tuple[str, Answer]:
    """Return the translation without its marks, and the answer with its position.

    Raises:
        MarksLost: a mark is lost, doubled or out of order, or there is no text between the marks.
    """
    translation = _normalized(translation, pair)
    opening, closing = (translation.count(one) for one in pair)
    if not opening or not closing:
        raise MarksLost(LOST)
    if opening > 1 or closing > 1:
        raise MarksLost(DOUBLED)
    first, last = translation.index(pair[0]), translation.index(pair[1])
    if last < first:
        raise MarksLost(OUT_OF_ORDER)
    before, span, after = translation[:first], translation[first + 1 : last], translation[last + 1 :]
    answer = span.strip()
    if not answer:
        raise MarksLost(EMPTY)
    before, after = _without_extra_spaces(before, after)
    # The model may write "a[ b ]c" without outer spaces. Scripts that separate words need these spaces.
    if span[0].isspace() and _separates_words(before[-1:]):
        before += " "
    if span[-1].isspace() and _separates_words(after[:1]):
        after = " " + after
    return before + answer + after, Answer(answer, len(before))


def remove(translation: str, pair: tuple[str, str]) -> str:
    """Return the translation without any remaining marks."""
    translation = _normalized(translation, pair)
    for one in pair:
        while one in translation:
            before, _, after = translation.partition(one)
            # of the two spaces around a mark, one remains
            after = after.lstrip() if not before or before[-1].isspace() else after
            before = before.rstrip() if after[:1] in _NO_SPACE_BEFORE else before
            translation = "".join(_without_extra_spaces(before, after))
    return translation.strip()


def _normalized(translation: str, pair: tuple[str, str]) -> str:
    """Replace variants of the marks, and merge adjacent repetitions of a mark (as the code of Chen et al. does)."""
    for one in pair:
        for variant in _VARIANTS.get(one, ""):
            translation = translation.replace(variant, one)
        translation = re.sub(rf"{re.escape(one)}(?:\s*{re.escape(one)})+", one, translation)
    return translation


def _without_extra_spaces(before: str, after: str) -> tuple[str, str]:
    """Remove spaces that belong to a mark: at the ends of the text, and before a full stop or comma."""
    if re.match(r"\s+[.,](\s|$)", after):
        after = after.lstrip()
    return before if before.strip() else "", after if after.strip() else ""


def _separates_words(character: str) -> bool:
    """Return whether a character is a letter or digit of a script that puts spaces between words."""
    return character.isalnum() and not unicodedata.name(character, "").startswith(_WITHOUT_SPACES)
