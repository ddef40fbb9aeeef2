"""What a row's cells mean in each kind of task: words, tags, choices, sets of labels, numbers."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import DataError
from .registry import Task

NameOf = Callable[[Any], str]
#: The column with a whole sentence, of rows that are only read as a source.
SENTENCE = "text"
#: The column with a list of all choices.
CHOICES = "choices"


def needed_columns(task: Task, columns: Sequence[str]) -> list[str]:
    """Return the columns that a split must have, given those it has; see `flare.experiments.tasks.registry`."""
    if task.kind == "qa":
        named = "answers" in columns or "answer" in columns
        return [*task.text_columns, *([] if named else ["answers (or answer)"])]
    if task.kind == "token-classification" and task.text_columns[0] not in columns and SENTENCE in columns:
        return [SENTENCE]
    if task.kind == "multiple-choice" and CHOICES in columns and not set(task.choice_columns) <= set(columns):
        return [*task.context_columns, CHOICES, task.label_column]
    if _one_column_each(task, columns):
        return list(task.text_columns)
    return [*task.text_columns, task.label_column]


def texts_of(row: Mapping[str, Any], task: Task, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return text column -> text, and the words of a token classification.

    Raises:
        DataError: a cell that is no text, or no list where one is needed.
    """
    if task.kind == "token-classification":
        column = task.text_columns[0]
        if column not in row and SENTENCE in row:
            return {column: text_of(row[SENTENCE], f"{where}: {SENTENCE}")}, ()
        words = tuple(text_of(word, f"{where}: {column}") for word in _listed(row.get(column), f"{where}: {column}"))
        return {column: " ".join(words)}, words
    given = dict(row)
    if CHOICES in row and not set(task.choice_columns) <= set(row):
        choices = _listed(row[CHOICES], f"{where}: {CHOICES}", ";")
        if len(choices) != len(task.choice_columns):
            raise DataError(
                f"{where}: {len(choices)} choices where task {task.name} has {len(task.choice_columns)}; every row has "
                "as many as --choice-columns names"
            )
        given |= dict(zip(task.choice_columns, choices, strict=True))
    return {column: text_of(given.get(column), f"{where}: {column}") for column in task.text_columns}, ()


def label_of(row: Mapping[str, Any], task: Task, name_of: NameOf | None, words: Sequence[str], where: str) -> Any:
    """Return what is right for a row (see `Example.label`), None where it has none.

    Args:
        row: column -> value.
        task: of any kind but "qa".
        name_of: index -> label, where the data set knows it.
        words: of a token classification.
        where: file and row, for the messages.

    Raises:
        DataError: a cell that cannot be read. Names are not compared with the task's: see `rows.check_labels`.
    """
    value, cell = row.get(task.label_column), f"{where}: {task.label_column}"
    if task.kind == "token-classification":
        if not words:
            return None
        tags = tuple(_tag(tag, task, name_of, cell) for tag in _listed(value, cell))
        if len(tags) != len(words):
            raise DataError(f"{cell} has {len(tags)} tags and {task.text_columns[0]} {len(words)} words")
        return tags
    if task.kind == "multiple-choice":
        return _choice(value, task, cell)
    if task.kind == "multi-label":
        return _set_of_labels(row, task, name_of, cell)
    if task.kind == "regression":
        return _number(value, cell)
    return _class(value, task, name_of, cell)


def text_of(value: Any, where: str) -> str:
    """Return a cell as text; DataError for a list."""
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(f"{where} holds a {type(value).__name__} ({str(value)[:40]}); it must be a text")
    text = "" if value is None or value != value else str(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where} holds half a character (a lone surrogate): {text[:40]!r}; write the text in UTF-8")
    return text


def indices_count(task: Task) -> bool:
    """Whether a number can stand for a label: not where the labels are numbers, of which it would be a wrong one."""
    return task.labels is not None and not any(label.isdecimal() for label in task.labels)


def _class(value: Any, task: Task, name_of: NameOf | None, where: str) -> str:
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(
            f"{where} holds a {type(value).__name__} ({str(value)[:40]}); a row has one label, a name or an index"
        )
    if name_of is not None and isinstance(value, int) and value >= 0:
        value = name_of(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a column of integers with gaps becomes on its way
    label = text_of(value, where).strip()
    if task.labels is not None and label.isdecimal() and int(label) < len(task.labels) and indices_count(task):
        return task.labels[int(label)]
    return label


def _tag(value: Any, task: Task, name_of: NameOf | None, where: str) -> str:
    tag = _class(value, task, name_of, where)
    if tag.isdecimal() and task.labels is None:
        raise DataError(f"{where} holds numbers; name the tags in the order of their numbers with --labels")
    if task.labels is None and tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
        raise DataError(f"{where} holds {tag!r}; tags are O, B-TYPE and I-TYPE (IOB2)")
    return tag


def _choice(value: Any, task: Task, where: str) -> str:
    letters = task.labels or ()
    said = text_of(int(value) if isinstance(value, float) and value.is_integer() else value, where).strip()
    if said.upper() in letters:
        return said.upper()
    number = int(said) - task.first_choice if said.isdecimal() else -1
    if not 0 <= number < len(letters):
        raise DataError(
            f"{where} is {said!r}; accepted: {', '.join(letters)}, or the choice's number counted from "
            f"{task.first_choice} (write letters where yours are counted otherwise)"
        )
    return letters[number]


def _set_of_labels(row: Mapping[str, Any], task: Task, name_of: NameOf | None, where: str) -> tuple[str, ...]:
    known = task.labels
    if known is not None and _one_column_each(task, row):
        values = [row[label] for label in known]
    else:
        values = _listed(row.get(task.label_column), where, ";")
    marks = [str(value).strip().lower() for value in values]
    marks = [{"1.0": "1", "true": "1", "0.0": "0", "false": "0"}.get(mark, mark) for mark in marks]
    if known is not None and len(marks) == len(known) and set(marks) <= {"0", "1"} and indices_count(task):
        return tuple(label for label, mark in zip(known, marks, strict=True) if mark == "1")
    names = [_class(value, task, name_of, where) for value in values]
    if known is None and any(name.isdecimal() for name in names):
        raise DataError(f"{where} holds numbers; name the labels in the order of their numbers with --labels")
    given = [name for name in names if name]
    return tuple(given) if known is None else tuple(sorted(dict.fromkeys(given), key=_place(known)))


def _place(known: Sequence[str]) -> Callable[[str], int]:
    return lambda name: known.index(name) if name in known else len(known)


def _one_column_each(task: Task, columns: Any) -> bool:
    """Whether a multi-label split has a column for each label."""
    named = task.kind == "multi-label" and task.labels is not None and task.label_column not in columns
    return named and all(label in columns for label in task.labels or ())


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is {value!r}; a regression needs a number") from error
    if not math.isfinite(number):
        raise DataError(f"{where} is {value!r}; a regression needs a finite number")
    return number


def _listed(value: Any, where: str, mark: str | None = None) -> list[Any]:
    """Return a list as it is, or read from a text: JSON, a Python list, or items with `mark` (or spaces) between."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [item.strip() for item in text.split(mark)] if text else []
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text)
                break
            except (ValueError, SyntaxError, RecursionError):
                continue
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} holds {str(value)[:40]!r}; it must be a list")
    return list(value)
