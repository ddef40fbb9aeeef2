"""Examples from rows as a file or the hub gives them: columns checked, labels named, answers read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..json_files import parsed
from .alignment import position_id
from .errors import DataError, some_ids
from .examples import Answer, Example
from .registry import Task

#: Names of columns that look like ids, without all but their letters.
_IDS = frozenset(
    ("id", "ids", "idx", "uid", "uuid", "guid", "rowid", "exampleid", "sentenceid", "textid", "itemid", "sampleid")
)


def examples_from(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    task: Task,
    where: str,
    name_of: Callable[[Any], str] | None = None,
) -> list[Example]:
    """The examples of one split.

    Args:
        rows: column -> value.
        columns: the columns there are.
        task: says which ones are needed.
        where: the file or data set, for the messages.
        name_of: index -> label, where the data set knows it.

    Raises:
        DataError: a column is missing, there are no rows, a label is none of the task's, an answer cannot be read.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{where} has no rows; an empty split cannot be used")
    answer_columns = ("answers", "answer") if task.kind == "qa" else ()
    needed = [*task.text_columns, *([task.label_column] if task.kind == "classification" else [])]
    lacking = [column for column in needed if column not in columns]
    if answer_columns and not any(column in columns for column in answer_columns):
        lacking.append("answers (or answer)")
    if lacking:
        raise DataError(
            f"{where} has no column {', '.join(lacking)}; it has {', '.join(columns) or 'none'}. Rename the column, or "
            "name yours with --text-columns and --label-column"
        )
    found = [
        Example(
            id=position_id(index) if "id" not in columns else _text(_id(row.get("id")), f"{where}, row {index}: id"),
            texts={column: _text(row.get(column), f"{where}, row {index}: {column}") for column in task.text_columns},
            label=_label(row.get(task.label_column), task, name_of, f"{where}, row {index}: {task.label_column}")
            if task.kind == "classification"
            else None,
            answers=_answers(row, where, index) if task.kind == "qa" else (),
        )
        for index, row in enumerate(rows)
    ]
    if task.kind == "classification":
        check_labels(found, task, where)
    return found


def check_labels(examples: Sequence[Example], task: Task, where: str) -> None:
    """Refuse labels that are none of the task's.

    Raises:
        DataError: naming the labels, how many rows have them, and some of their ids.
    """
    known = task.labels
    wrong = [row for row in examples if not row.label or (known is not None and row.label not in known)]
    if wrong:
        labels = sorted({row.label or "(empty)" for row in wrong})
        accepted = ", ".join(known) if known else "any text that is not empty"
        accepted += ", or their indices from 0" if _indices_count(task) else ""
        raise DataError(
            f"{where}: {len(wrong)} of {len(examples)} rows have a label that is none of task {task.name}'s: "
            f"{', '.join(map(repr, labels[:5]))}{', ...' if len(labels) > 5 else ''} "
            f"{some_ids([row.id for row in wrong])}; accepted: {accepted}"
        )


def check_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], task: Task, where: str) -> None:
    """Refuse ids that rows cannot be paired by.

    Raises:
        DataError: a row without an id, an id that occurs twice, or a column that seems to hold ids and is named
            otherwise, so that rows would be paired by their position.
    """
    if "id" not in columns:
        read = {*task.text_columns, task.label_column}
        near = [name for name in columns if re.sub("[^a-z]", "", name.casefold()) in _IDS and name not in read]
        if near:
            raise DataError(
                f"{where} has no column id, and its column {near[0]!r} looks like one: rows would be paired by their "
                "position. Rename it to id, or remove it if the rows of all languages stand in one order"
            )
        return
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = _id(row.get("id"))
        if not name.strip():
            raise DataError(
                f"{where}, row {index} (counted from 0) has no id; give every row one, or remove the column"
            )
        if name in first:
            raise DataError(
                f"{where}, row {index} (counted from 0): the id {name!r} is row {first[name]}'s too, so that it is not "
                "known which rows of two languages belong together; give every row an id of its own"
            )
        first[name] = index


def _id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else "" if value is None else str(value)


def _text(value: Any, where: str) -> str:
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(f"{where} holds a {type(value).__name__} ({str(value)[:40]}); it must be a text")
    text = "" if value is None or value != value else str(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where} holds half a character (a lone surrogate): {text[:40]!r}; write the text in UTF-8")
    return text


def _label(value: Any, task: Task, name_of: Callable[[Any], str] | None, where: str) -> str:
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(
            f"{where} holds a {type(value).__name__} ({str(value)[:40]}); a row has one label, a name or an index"
        )
    if name_of is not None and isinstance(value, int) and value >= 0:
        value = name_of(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a column of integers with gaps becomes on its way
    label = _text(value, where).strip()
    if task.labels is not None and label.isdecimal() and int(label) < len(task.labels) and _indices_count(task):
        return task.labels[int(label)]
    return label


def _indices_count(task: Task) -> bool:
    """Whether a number can stand for a label: not where the labels are numbers, of which it would be a wrong one."""
    return task.labels is not None and not any(label.isdecimal() for label in task.labels)


def _answers(row: Mapping[str, Any], where: str, index: int) -> tuple[Answer, ...]:
    """SQuAD's {"text": [...], "answer_start": [...]} (in a CSV file as JSON), or answer and answer_start."""
    try:
        value = row.get("answers")
        if isinstance(value, str):
            value = parsed(value) if value.strip() else None
        if value is None:
            text = row.get("answer")
            value = {"text": [] if text in (None, "") else [text], "answer_start": [row.get("answer_start")]}
        texts = [str(text) for text in _as_list(value["text"])]
        starts = _as_list(value.get("answer_start"))
        starts = [-1 if start in (None, "") else int(float(start)) for start in starts]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{where}, row {index}: its answers cannot be read ({type(error).__name__}: {error}); accepted: "
            '{"text": ["..."], "answer_start": [0]}, or columns answer and answer_start'
        ) from error
    starts += [-1] * (len(texts) - len(starts))
    return tuple(Answer(text, start) for text, start in zip(texts, starts, strict=False) if text.strip())


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, (list, tuple)) else [value]
