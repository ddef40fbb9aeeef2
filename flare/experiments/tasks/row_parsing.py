"""Examples from rows as a file or the hub gives them: columns checked, labels named, answers read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..utils.json_files import parsed
from .alignment import position_id
from .errors import DataError, some_ids
from .examples import Answer, Example
from .kinds import indices_count, label_of, needed_columns, text_of, texts_of
from .registry import NAMED, Task

#: Names of columns that look like ids, without all but their letters.
_IDS = frozenset(
    ("id", "ids", "idx", "uid", "uuid", "guid", "rowid", "exampleid", "sentenceid", "textid", "itemid", "sampleid")
)
#: What else names columns in a kind of task.
_MORE_NAMES = {
    "multiple-choice": " and --choice-columns",
    "multi-label": " (columns of 0 and 1, one for each label: with --labels)",
}


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
    needed = [*needed_columns(task, columns), *(task.id_columns if task.id_columns != ("id",) else ())]
    lacking = [column for column in needed if column not in columns]
    if lacking:
        raise DataError(
            f"{where} has no column {', '.join(lacking)}; it has {', '.join(columns) or 'none'}. Rename the column, or "
            f"name yours with --text-columns, --label-column and --id-column{_MORE_NAMES.get(task.kind, '')}"
        )
    found = [_example(row, index, columns, task, where, name_of) for index, row in enumerate(rows)]
    if task.kind in NAMED:
        check_labels(found, task, where)
    return found


def _example(
    row: Mapping[str, Any],
    index: int,
    columns: Sequence[str],
    task: Task,
    where: str,
    name_of: Callable[[Any], str] | None,
) -> Example:
    place = f"{where}, row {index}"
    texts, words = texts_of(row, task, place)
    return Example(
        id=text_of(_id(row, task), f"{place}: id") if set(task.id_columns) <= set(columns) else position_id(index),
        texts=texts,
        label=None if task.kind == "qa" else label_of(row, task, name_of, words, place),
        answers=_answers(row, where, index) if task.kind == "qa" else (),
        words=words,
    )


def check_labels(examples: Sequence[Example], task: Task, where: str) -> None:
    """Refuse labels that are none of the task's.

    Raises:
        DataError: naming the labels, how many rows have them, and some of their ids.
    """
    known = task.labels
    wrong: set[str] = set()
    ids = []
    for row in examples:
        if task.kind == "token-classification" and row.label is None:
            continue  # a source
        labels = row.label if isinstance(row.label, tuple) else (row.label,)
        bad = {str(label or "(empty)") for label in labels if not label or (known is not None and label not in known)}
        if bad:
            wrong |= bad
            ids.append(row.id)
    if wrong:
        names = sorted(wrong)
        accepted = ", ".join(known) if known else "any text that is not empty"
        accepted += ", or their indices from 0" if indices_count(task) else ""
        raise DataError(
            f"{where}: {len(ids)} of {len(examples)} rows have a label that is none of task {task.name}'s: "
            f"{', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''} "
            f"{some_ids(ids)}; accepted: {accepted}"
        )


def check_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], task: Task, where: str) -> None:
    """Refuse ids that rows cannot be paired by.

    Raises:
        DataError: a row without an id, an id that occurs twice, or a column that seems to hold ids and is named
            otherwise, so that rows would be paired by their position.
    """
    if not set(task.id_columns) <= set(columns):
        read = {*task.text_columns, task.label_column}
        near = [name for name in columns if re.sub("[^a-z]", "", name.casefold()) in _IDS and name not in read]
        if near and task.id_columns == ("id",):
            raise DataError(
                f"{where} has no column id, and its column {near[0]!r} looks like one: rows would be paired by their "
                "position. Name it with --id-column, or remove it if the rows of all languages stand in one order"
            )
        return
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = _id(row, task)
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


def _id(row: Mapping[str, Any], task: Task) -> str:
    values = [row.get(column) for column in task.id_columns]
    texts = [
        str(int(value)) if isinstance(value, float) and value.is_integer() else "" if value is None else str(value)
        for value in values
    ]
    return "-".join(texts) if all(text.strip() for text in texts) else ""


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
