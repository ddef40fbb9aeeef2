"""Parse the rows of a file or hub data set into examples: check columns, convert label indices, read answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..utils.json_files import parsed
from .cell_parsing import accepts_indices, label_of, needed_columns, text_of, texts_of
from .data_error import DataError, some_ids
from .examples import Answer, Example, position_id
from .registry import NAMED, Task

#: Column names that suggest ids, in lower case and with letters only.
_ID_LIKE_NAMES = frozenset(
    ("id", "ids", "idx", "uid", "uuid", "guid", "rowid", "exampleid", "sentenceid", "textid", "itemid", "sampleid")
)
#: Kind of task -> further options that name its columns.
_COLUMN_OPTIONS = {
    "multiple-choice": " and --choice-columns",
    "multi-label": " (if every label has its own column of 0 and 1, name these columns with --labels)",
}


def examples_from(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    task: Task,
    where: str,
    name_of: Callable[[Any], str] | None = None,
) -> list[Example]:
    """Return the examples of one split.

    Args:
        rows: one mapping column -> value per row.
        columns: the columns of the split.
        task: determines which columns are needed.
        where: file or data set, named in error messages.
        name_of: function that returns the label of a class index; None if the data set does not name its classes.

    Raises:
        DataError: a column is missing, there are no rows, a row's label is not one of the task's labels, or a cell (a
            text, label or answer) cannot be parsed.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{where} has no rows; an empty split cannot be used")
    needed = [*needed_columns(task, columns), *(task.id_columns if task.id_columns != ("id",) else ())]
    missing = [column for column in needed if column not in columns]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}. Rename your column, "
            f"or name it with --text-columns, --label-column and --id-column{_COLUMN_OPTIONS.get(task.kind, '')}"
        )
    examples = [_example(row, index, columns, task, where, name_of) for index, row in enumerate(rows)]
    if task.kind in NAMED:
        check_labels(examples, task, where)
    return examples


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
        id=text_of(id_of(row, task.id_columns), f"{place}: id")
        if set(task.id_columns) <= set(columns)
        else position_id(index),
        texts=texts,
        label=None if task.kind == "qa" else label_of(row, task, name_of, words, place),
        answers=_answers(row, where, index) if task.kind == "qa" else (),
        words=words,
    )


def check_labels(examples: Sequence[Example], task: Task, where: str) -> None:
    """Check that the label of every row is one of the task's labels.

    Raises:
        DataError: a row has another label. The message lists such labels, the number of rows that have them, and some
            ids of these rows.
    """
    known = task.labels
    wrong: set[str] = set()
    ids = []
    for row in examples:
        if task.kind == "token-classification" and row.label is None:
            continue  # a row that is only read as a source has no tags
        labels = row.label if isinstance(row.label, tuple) else (row.label,)
        bad = {str(label or "(empty)") for label in labels if not label or (known is not None and label not in known)}
        if bad:
            wrong |= bad
            ids.append(row.id)
    if wrong:
        names = sorted(wrong)
        accepted = ", ".join(known) if known else "any text that is not empty"
        accepted += ", or their indices from 0" if accepts_indices(task) else ""
        raise DataError(
            f"{where}: {len(ids)} of {len(examples)} rows have a label that is not a label of task {task.name}: "
            f"{', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''} "
            f"{some_ids(ids)}; accepted: {accepted}"
        )


def check_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], task: Task, where: str) -> None:
    """Check that rows can be paired by their ids.

    Raises:
        DataError: a row has no id, an id occurs twice, or there is no id column but a column whose name suggests ids
            (rows would silently be paired by position).
    """
    if not set(task.id_columns) <= set(columns):
        names = id_like(columns, task)
        if names and task.id_columns == ("id",):
            raise DataError(
                f"{where} has no column id, and its column {names[0]!r} looks like an id column: rows would be "
                "paired by position. Name the column with --id-column, or remove it if the rows of all languages are "
                "in the same order"
            )
        return
    first_row: dict[str, int] = {}
    for index, row in enumerate(rows):
        row_id = id_of(row, task.id_columns)
        if not row_id.strip():
            raise DataError(
                f"{where}, row {index} (counted from 0) has no id; give every row an id, or remove the id column"
            )
        if row_id in first_row:
            raise DataError(
                f"{where}, row {index} (counted from 0): row {first_row[row_id]} has the same id {row_id!r}, so rows "
                "of two languages cannot be paired; give every row a different id"
            )
        first_row[row_id] = index


def id_like(columns: Sequence[str], task: Task) -> list[str]:
    """Return the columns whose names suggest ids, except the task's text columns and label column."""
    read = {*task.text_columns, task.label_column}
    return [name for name in columns if re.sub("[^a-z]", "", name.casefold()) in _ID_LIKE_NAMES and name not in read]


def id_of(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return the id of a row, joined from these columns. It is "" if one of their cells is empty or missing."""
    values = [row.get(column) for column in columns]
    texts = [
        str(int(value)) if isinstance(value, float) and value.is_integer() else "" if value is None else str(value)
        for value in values
    ]
    return "-".join(texts) if all(text.strip() for text in texts) else ""


def _answers(row: Mapping[str, Any], where: str, index: int) -> tuple[Answer, ...]:
    """Return the accepted answers of a row.

    They are in the column `answers`, as {"text": [...], "answer_start": [...]} as in SQuAD (written as JSON in a CSV
    file), or in the columns `answer` and `answer_start`.
    """
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
