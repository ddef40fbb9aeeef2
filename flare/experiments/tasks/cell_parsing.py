"""Parse the cells of a row for each kind of task: texts, words, class names, tags, choices, sets of labels, numbers."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .data_error import DataError
from .registry import Task

NameOf = Callable[[Any], str]
#: Column of the whole sentence. A token-classification row that is only used as a source may have this column instead
#: of words and tags.
SENTENCE = "text"
#: Column with the list of all choices of a multiple-choice row, accepted instead of one column per choice.
CHOICES = "choices"
_PYTHON_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def needed_columns(task: Task, columns: Sequence[str]) -> list[str]:
    """Return the columns that a split needs.

    Some kinds of task accept several column layouts (see `flare.experiments.tasks.registry`). The columns that the
    split has (`columns`) decide which layout applies. If a QA split has no column of answers, the last item is the text
    "answers (or answer)", for the error message.
    """
    if task.kind == "qa":
        has_answers = "answers" in columns or "answer" in columns
        return [*task.text_columns, *([] if has_answers else ["answers (or answer)"])]
    if task.kind == "token-classification" and _has_sentence(task, columns):
        return [SENTENCE]
    if task.kind == "multiple-choice" and CHOICES in columns and not set(task.choice_columns) <= set(columns):
        return [*task.context_columns, CHOICES, task.label_column]
    if _has_column_per_label(task, columns):
        return list(task.text_columns)
    return [*task.text_columns, task.label_column]


def texts_of(row: Mapping[str, Any], task: Task, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return a mapping from each text column to its text, and the words.

    The words are empty if the task is not a token classification, or if the row has a sentence instead of words.

    Raises:
        DataError: a cell that must hold a text or a list holds something else, a text contains a lone surrogate (see
            `text_of`), or the number of choices is wrong.
    """
    if task.kind == "token-classification":
        column = task.text_columns[0]
        if _has_sentence(task, row):
            return {column: text_of(row[SENTENCE], f"{where}: {SENTENCE}")}, ()
        words = tuple(text_of(word, f"{where}: {column}") for word in _list_of(row.get(column), f"{where}: {column}"))
        return {column: " ".join(words)}, words
    cells = dict(row)
    if CHOICES in row and not set(task.choice_columns) <= set(row):
        choices = _list_of(row[CHOICES], f"{where}: {CHOICES}", ";")
        if len(choices) != len(task.choice_columns):
            raise DataError(
                f"{where}: {len(choices)} choices, but task {task.name} has {len(task.choice_columns)}; every row "
                "needs one choice for each of --choice-columns"
            )
        cells |= dict(zip(task.choice_columns, choices, strict=True))
    return {column: text_of(cells.get(column), f"{where}: {column}") for column in task.text_columns}, ()


def label_of(row: Mapping[str, Any], task: Task, name_of: NameOf | None, words: Sequence[str], where: str) -> Any:
    """Return the label of a row (see `Example.label`), or None for a token-classification row without words.

    For classes, tags and sets of labels, `row_parsing.check_labels` checks later that the task has these labels.

    Args:
        row: column -> value.
        task: a task of any kind except "qa".
        name_of: function that returns the label of a class index; None if the data set does not name its classes.
        words: the words of the row (token classification); empty for other kinds of task.
        where: file and row, named in error messages.

    Raises:
        DataError: a cell cannot be parsed, or the row does not have one tag for each word.
    """
    value, cell = row.get(task.label_column), f"{where}: {task.label_column}"
    if task.kind == "token-classification":
        if not words:
            return None
        tags = tuple(_tag(tag, task, name_of, cell) for tag in _list_of(value, cell))
        if len(tags) != len(words):
            raise DataError(f"{cell} has {len(tags)} tags, but {task.text_columns[0]} has {len(words)} words")
        return tags
    if task.kind == "multiple-choice":
        return _choice(value, task, cell)
    if task.kind == "multi-label":
        return _set_of_labels(row, task, name_of, cell)
    if task.kind == "regression":
        return _number(value, cell)
    return _class(value, task, name_of, cell)


def text_of(value: Any, where: str, *, numbers: bool = True, word_lists: bool = False) -> str:
    """Return a cell as text, and a missing value as "".

    Args:
        value: the cell.
        where: file, row and column, named in error messages.
        numbers: whether numbers and other scalar values are accepted. They are converted by str(), except NaN, which
            becomes "".
        word_lists: whether lists of words are accepted. The words are joined with spaces.

    Raises:
        DataError: the type of the cell is not accepted, or its text contains a lone surrogate (half of a character that
            UTF-16 writes in two parts).
    """
    if word_lists and isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if isinstance(value, list | tuple | dict | bytes) or not (numbers or value is None or isinstance(value, str)):
        raise DataError(f"{where} holds a {type(value).__name__} ({str(value)[:40]}); it must be a text")
    text = "" if value is None or value != value else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # only a surrogate cannot be encoded
        raise DataError(
            f"{where} holds half a character (a lone surrogate): {text[:40]!r}; write the text in UTF-8"
        ) from None
    return text


def accepts_indices(task: Task) -> bool:
    """Return whether the data may give labels by their indices: the labels are known, and none of them is a number."""
    return task.labels is not None and not any(label.isdecimal() for label in task.labels)


def _class(value: Any, task: Task, name_of: NameOf | None, where: str) -> str:
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(
            f"{where} holds a {type(value).__name__} ({str(value)[:40]}); a row has one label, a name or an index"
        )
    if name_of is not None and isinstance(value, int) and value >= 0:
        value = name_of(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # an integer column with missing values is read as floats
    label = text_of(value, where).strip()
    if task.labels is not None and label.isdecimal() and int(label) < len(task.labels) and accepts_indices(task):
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
    text = text_of(int(value) if isinstance(value, float) and value.is_integer() else value, where).strip()
    if text.upper() in letters:
        return text.upper()
    index = int(text) - task.first_choice if text.isdecimal() else -1
    if not 0 <= index < len(letters):
        raise DataError(
            f"{where} is {text!r}; accepted: {', '.join(letters)}, or the choice's number counted from "
            f"{task.first_choice} (if your data counts from another number, write letters)"
        )
    return letters[index]


def _set_of_labels(row: Mapping[str, Any], task: Task, name_of: NameOf | None, where: str) -> tuple[str, ...]:
    known = task.labels
    per_label = known is not None and _has_column_per_label(task, row)
    values = [row[label] for label in known or ()] if per_label else _list_of(row.get(task.label_column), where, ";")
    flags = [str(value).strip().lower() for value in values]
    flags = [{"1.0": "1", "true": "1", "0.0": "0", "false": "0"}.get(flag, flag) for flag in flags]
    wrong = [index for index, flag in enumerate(flags) if flag not in ("0", "1")]
    if per_label and wrong:
        raise DataError(
            f"{where}: the column {(known or ())[wrong[0]]!r} holds {values[wrong[0]]!r}; the column of a label must "
            "hold 1 or 0 (the label applies or not)"
        )
    # two values 0 and 1 may be labels; of three or more, one occurs twice, so they are not
    unambiguous = per_label or len(flags) > 2 or (name_of is None and accepts_indices(task))
    if known is not None and len(flags) == len(known) and not wrong and unambiguous:
        return tuple(label for label, flag in zip(known, flags, strict=True) if flag == "1")
    names = [_class(value, task, name_of, where) for value in values]
    if known is None and any(name.isdecimal() for name in names):
        raise DataError(f"{where} holds numbers; name the labels in the order of their numbers with --labels")
    numbers = [flag for flag in flags if flag.isdecimal()]
    if len(set(numbers)) < len(numbers):
        raise DataError(
            f"{where} holds {str(values)[:40]}, in which a number occurs twice; write every label once, or one 0 or 1 "
            f"for each label{f' ({len(known)})' if known is not None else ''}"
        )
    names = [name for name in names if name]
    if known is None:
        return tuple(names)
    return tuple(sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in known else len(known)))


def _has_sentence(task: Task, columns: Any) -> bool:
    """Return whether a split of a token-classification task has the sentence instead of words and tags.

    If the column of the words has the sentence's name, the column of tags is missing beside a sentence.
    """
    words = task.text_columns[0]
    return SENTENCE in columns and (words not in columns or (words == SENTENCE and task.label_column not in columns))


def _has_column_per_label(task: Task, columns: Any) -> bool:
    """Return whether a split of a multi-label task has one column for each label, instead of the label column."""
    labels_known = task.kind == "multi-label" and task.labels is not None and task.label_column not in columns
    return labels_known and all(label in columns for label in task.labels or ())


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is {value!r}; a regression needs a number") from error
    if not math.isfinite(number):
        raise DataError(f"{where} is {value!r}; a regression needs a finite number")
    return number


def _list_of(value: Any, where: str, separator: str | None = None) -> list[Any]:
    """Return a cell as a list; a missing value is an empty list.

    A text is parsed as a JSON list, as a Python list, or as items between separators (default: white space).
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [item.strip() for item in text.split(separator)] if text else []
        for parse in (json.loads, _python_list):
            try:
                value = parse(text)
                break
            except (ValueError, SyntaxError, RecursionError):
                continue
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} holds {str(value)[:40]!r}; it must be a list, with commas between its items")
    return list(value)


def _python_list(text: str) -> Any:
    """Evaluate a Python literal.

    Raises:
        ValueError: two strings follow each other without a comma, as in an array that pandas wrote to a CSV file.
            Python would join them.
        SyntaxError: the text is not a Python literal.
    """
    if re.search(r"""['"]\s*['"]""", text) and re.search(r"''\s*''", _PYTHON_STRING.sub("''", text)):
        raise ValueError("a comma is missing between two strings")
    return ast.literal_eval(text)
