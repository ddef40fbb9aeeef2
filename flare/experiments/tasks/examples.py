"""What a row of a task is, before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer of a question.

    text: as it stands in the context.
    start: its first character in the context; -1 where the data do not say.
    """

    text: str
    start: int = -1


@dataclass(frozen=True)
class Example:
    """One row of one language.

    id: what rows of two languages are matched by.
    texts: text column -> text, in the task's order.
    label: a str: name of the class (classification) or letter of the choice (multiple choice); a tuple of str: one tag
        for each of `words` (token classification) or the classes that hold (multi-label); a float (regression).
    answers: accepted answers (question answering).
    words: the words of the text (token classification); empty where only the text is known, as in a translation.
    """

    id: str
    texts: dict[str, str] = field(default_factory=dict)
    label: Any = None
    answers: tuple[Answer, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A row of the target language, and the same row in the source language where there is one."""

    target: Example
    source: Example | None = None
