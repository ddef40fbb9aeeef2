"""Read the input of `flare predict`: rows with texts, and their source texts from columns or a second file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks import DataError, Example, Task
from ..tasks.cell_parsing import text_of
from ..tasks.data_error import some_ids
from ..tasks.examples import position_id
from ..tasks.files import read_rows
from ..tasks.metrics import check_metric_packages
from ..tasks.row_parsing import examples_from
from ..utils.errors import UserError
from ..utils.json_files import parsed
from .predict_settings import PredictSettings
from .source_texts import Texts

Row = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """Rows to predict.

    Attributes:
        rows: the rows of the input, each a dict with all its columns.
        texts: for each row, a dict from the task's text column to the text.
        sources: for each row, a dict from the task's text column to the source text, or None for a row without source.
        where: the file or the columns that the sources come from, for messages.
        columns: dict from the task's text column to the output column that holds its source text.
        ids: id of each row. A row without an id is named by its position.
        truth: the rows with their label or answers, to score the predictions. None if a row has neither, or if they
            cannot be used.
        notes: lines that say why the labels or answers cannot be used.
    """

    rows: list[Row]
    texts: list[Texts]
    sources: list[Texts | None]
    where: str
    columns: dict[str, str]
    ids: list[str]
    truth: list[Example] | None
    notes: list[str]


def read_input(settings: PredictSettings, task: Task) -> Input:
    """Read the texts of the input, and their source texts if the input or a second file has them.

    Raises:
        DataError: a file or a column is missing, a text is wrong, or the two files do not match.
        UserError: --text-columns or --source-columns names more or fewer columns than the task has.
    """
    assert settings.input is not None
    rows, columns, where = _read(settings.input, "--input")
    names = _by_task_column(task, settings.text_columns, "--text-columns")
    texts = [_texts(row, names, f"{where}, row {index}") for index, row in enumerate(rows)]
    _require_columns(list(names.values()), columns, where, "--text-columns")
    ids = [str(row["id"]) if row.get("id") not in (None, "") else position_id(n) for n, row in enumerate(rows)]
    output_columns = {column: f"source_{name}" for column, name in names.items()}
    default = names if settings.source_input is not None else output_columns
    source_names = _by_task_column(task, settings.source_columns or tuple(default.values()), "--source-columns")
    if settings.source_input is not None:
        sources = _read_sources(rows, ids, settings.source_input, source_names)
        where_sources = f"{settings.source_input}"
    else:
        if settings.source_columns is not None:
            _require_columns(list(source_names.values()), columns, where, "--source-columns")
        present = all(name in columns for name in source_names.values())
        sources = [_texts(row, source_names, f"{where}, row {n}") if present else None for n, row in enumerate(rows)]
        where_sources = f"column {', '.join(source_names.values())}"
        output_columns = source_names
    truth, notes = _truth(rows, columns, task, names, settings.label_column, where)
    return Input(rows, texts, sources, where_sources, output_columns, ids, truth, notes)


def _read(name: str, option: str) -> tuple[list[Row], list[str], str]:
    """Return the rows of a file or of standard input ("-"), their columns, and the input's name for messages."""
    if name != "-":
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"{option} {name}: no such file")
        rows, columns = read_rows(path)
        where = str(path)
    else:
        where, rows = "standard input", []
        for number, line in enumerate(sys.stdin, 1):
            try:
                row = parsed(line) if line.strip() else {}
            except ValueError as error:
                raise DataError(f"{where}, line {number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f'{where}, line {number}: not a JSON object, such as {{"text": "..."}}')
            rows += [row] if row else []
        columns = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        raise DataError(f"{where} has no rows")
    return rows, columns, where


def _by_task_column(task: Task, columns: tuple[str, ...] | None, option: str) -> dict[str, str]:
    """Return a dict from each text column of the task to the column of the input that holds its text."""
    names = task.text_columns if columns is None else columns
    if len(names) != len(task.text_columns):
        raise UserError(
            f"{option}: one column is needed for each of {', '.join(task.text_columns)}; got {', '.join(names)}"
        )
    return dict(zip(task.text_columns, names, strict=True))


def _require_columns(names: Sequence[str], columns: Sequence[str], where: str, option: str) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns)}. Name yours with {option}"
        )


def _texts(row: Row, names: dict[str, str], where: str) -> Texts:
    """Return a dict from the task's column to the text of a row.

    A missing text becomes "". A list of words is joined with spaces.
    """
    return {
        column: text_of(row.get(name), f"{where}: {name}", numbers=False, word_lists=True)
        for column, name in names.items()
    }


def _read_sources(rows: Sequence[Row], ids: Sequence[str], name: str, columns: dict[str, str]) -> list[Texts | None]:
    """Return the source of every row from a second file.

    Rows are matched by id if both files have a column id, otherwise by position. A row whose id does not occur in the
    second file has no source (None).
    """
    source_rows, source_columns, where = _read(name, "--source-input")
    _require_columns(list(columns.values()), source_columns, where, "--source-columns")
    texts = [_texts(row, columns, f"{where}, row {index}") for index, row in enumerate(source_rows)]
    if all("id" in row for row in rows) and "id" in source_columns:
        by_id: dict[str, Texts] = {}
        for row, source in zip(source_rows, texts, strict=True):
            if str(row.get("id")) in by_id:
                raise DataError(f"{where}: the id {row.get('id')} occurs more than once; ids must be unique")
            by_id[str(row.get("id"))] = source
        sources = [by_id.get(one) for one in ids]
        if not any(sources):
            raise DataError(f"{where}: none of its ids occurs in --input, which has {some_ids(ids)[1:-1]}")
        return sources
    if len(source_rows) != len(rows):
        raise DataError(
            f"{where} has {len(source_rows)} rows and --input has {len(rows)} rows. Give both an id column, or the "
            "same number of rows in the same order"
        )
    return list(texts)


def _truth(
    rows: Sequence[Row], columns: Sequence[str], task: Task, names: dict[str, str], label_column: str | None, where: str
) -> tuple[list[Example] | None, list[str]]:
    """Return `Input.truth` and `Input.notes`: the rows with their labels or answers, and no notes.

    If a row has no label or answer, return None and no notes. If the labels or answers cannot be used, return None and
    a note that says why.
    """
    label = label_column or task.label_column
    if label_column is not None and label_column not in columns:
        raise DataError(f"{where} has no column {label_column} (--label-column); it has {', '.join(columns)}")
    needed = [label] if task.kind != "qa" else [one for one in ("answers", "answer") if one in columns]
    if not needed or not all(one in columns and row.get(one) not in (None, "") for row in rows for one in needed[:1]):
        return None, []
    renamed = [
        {**row, **{column: row.get(name) for column, name in names.items()}, task.label_column: row.get(label)}
        for row in rows
    ]
    try:
        check_metric_packages(task)
        return examples_from(renamed, list(renamed[0]), task, where), []
    except UserError as error:
        return None, [f"the predictions are not scored: {error}"]
