"""Answer spans through a translation: EasyProject (Chen et al., ACL Findings 2023).

Two marks are set around the answer, the marked text is translated, and the answer of the translation is what stands
between the marks there. A translation that lost them, doubled them or turned them round has no span.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..tasks import Answer

# Square brackets are what Chen et al. found to survive best; the others are for texts that hold some.
PAIRS = (("[", "]"), ("{", "}"), ("<", ">"), ("«", "»"))
# What models write in place of square brackets, in Chinese and Japanese above all (as in the authors' release).
_VARIANTS = {"[": "［【《", "]": "］】》"}

_CLOSE = (".", ",")

NO_ANSWER = "no answer"
NOT_FOUND = "the answer is not at its place in the text"
NO_PAIR = "the text holds every kind of mark"
LOST = "marks lost"
DOUBLED = "marks doubled"
TURNED = "marks out of order"
EMPTY = "nothing between the marks"


class MarksLost(Exception):
    """A row has no span; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Marked:
    """A text with marks around a span.

    text: with the marks, each set off from the span by a space.
    pair: the opening and the closing mark.
    """

    text: str
    pair: tuple[str, str]


def mark(context: str, answer: Answer) -> Marked:
    """Set marks around an answer.

    An answer without a start is looked up, where it occurs only once.

    Raises:
        MarksLost: the answer is not where it should be, or there is no mark that the text does not hold already.
    """
    text, start = answer.text, answer.start
    if start < 0 and text and context.count(text) == 1:
        start = context.index(text)
    if start < 0 or not text.strip() or context[start : start + len(text)] != text:
        raise MarksLost(NOT_FOUND)
    for pair in PAIRS:
        taken = set("".join(one + _VARIANTS.get(one, "") for one in pair))
        if not taken & set(context):
            before, after = context[:start], context[start + len(text) :]
            return Marked(f"{before}{pair[0]} {text.strip()} {pair[1]}{after}", pair)
    raise MarksLost(NO_PAIR)


def recover(translation: str, pair: tuple[str, str]) -> tuple[str, Answer]:
    """The translation without marks, and the answer with its place in it.

    Raises:
        MarksLost: a mark is lost, doubled or out of order, or nothing stands between them.
    """
    translation = _plain(translation, pair)
    opening, closing = (translation.count(one) for one in pair)
    if not opening or not closing:
        raise MarksLost(LOST)
    if opening > 1 or closing > 1:
        raise MarksLost(DOUBLED)
    first, last = translation.index(pair[0]), translation.index(pair[1])
    if last < first:
        raise MarksLost(TURNED)
    before, span, after = translation[:first], translation[first + 1 : last], translation[last + 1 :]
    answer = span.strip()
    if not answer:
        raise MarksLost(EMPTY)
    before, after = _joint(before, after)
    # "a[ b ]c" was written without the marks' outer spaces; scripts that set none need none
    if span[0].isspace() and _letter(before[-1:]):
        before += " "
    if span[-1].isspace() and _letter(after[:1]):
        after = " " + after
    return before + answer + after, Answer(answer, len(before))


def remove(translation: str, pair: tuple[str, str]) -> str:
    """The translation without whatever is left of the marks."""
    translation = _plain(translation, pair)
    for one in pair:
        while one in translation:
            before, _, after = translation.partition(one)
            # a mark stood between spaces; one of them is enough
            after = after.lstrip() if not before or before[-1].isspace() else after
            translation = "".join(_joint(before.rstrip() if after[:1] in _CLOSE else before, after))
    return translation.strip()


def _plain(translation: str, pair: tuple[str, str]) -> str:
    """Variants of the marks become the marks; two directly beside each other are one, as in the authors' release."""
    for one in pair:
        for variant in _VARIANTS.get(one, ""):
            translation = translation.replace(variant, one)
        translation = re.sub(rf"{re.escape(one)}(?:\s*{re.escape(one)})+", one, translation)
    return translation


def _joint(before: str, after: str) -> tuple[str, str]:
    """Spaces that the marks brought along, taken out: at the text's ends, and before a full stop or comma."""
    if re.match(r"\s+[.,](\s|$)", after):
        after = after.lstrip()
    return before if before.strip() else "", after if after.strip() else ""


def _letter(character: str) -> bool:
    """Whether it is a letter or digit of a script that sets words apart."""
    return character.isalnum() and ord(character) < 0x0E00
