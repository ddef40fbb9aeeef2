"""Rows of a task as text, before tokenization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Prefix of the ids that rows without an id get.
POSITION_PREFIX = "#"


@dataclass(frozen=True)
class Answer:
    """An accepted answer to a question.

    Attributes:
        text: the answer as written in the context.
        start: index of its first character in the context; -1 if the data does not give it.
    """

    text: str
    start: int = -1


@dataclass(frozen=True)
class Example:
    """One row in one language.

    Attributes:
        id: key by which rows of two languages are matched.
        texts: text column -> text, in the task's order.
        label: str: the class name (classification) or the letter of the choice (multiple choice). Tuple of str: one tag
            for each of `words` (token classification) or the labels that apply (multi-label). float: regression.
        answers: accepted answers (question answering).
        words: the words of the text (token classification); empty if only the text is known, as in a translation.
    """

    id: str
    texts: dict[str, str] = field(default_factory=dict)
    label: Any = None
    answers: tuple[Answer, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A row in the target language and, if a source is read, the same row in the source language."""

    target: Example
    source: Example | None = None


def position_id(index: int) -> str:
    """Return the id of a row without an id: its position.

    >>> position_id(0)
    '#0'
    """
    return f"{POSITION_PREFIX}{index}"
