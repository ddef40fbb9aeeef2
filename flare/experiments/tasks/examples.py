"""Data classes for the rows of a task before tokenization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Prefix of the id that `position_id` makes for a row without an id.
POSITION_PREFIX = "#"


@dataclass(frozen=True)
class Answer:
    """An accepted answer to a question.

    Attributes:
        text: the answer as written in the context.
        start: index of the answer's first character in the context; -1 if the data does not give the index.
    """

    text: str
    start: int = -1


@dataclass(frozen=True)
class Example:
    """One row in one language.

    Attributes:
        id: key by which rows of two languages are matched.
        texts: text column -> text, in the task's order.
        label: a str, the class name (classification) or the letter of the choice (multiple choice); a tuple of str, one
            tag for each of `words` (token classification) or the labels that apply (multi-label); a float (regression);
            None if the row has no label.
        answers: accepted answers (question answering); empty for other kinds of task.
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
    """Return the id for a row whose data has no id. It is made from the row's position.

    >>> position_id(0)
    '#0'
    """
    return f"{POSITION_PREFIX}{index}"
