"""Read the input of `flare predict`: rows with texts, and their source texts from columns or a second file."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..tasks import DataError, Example, Task
from ..tasks.cell_parsing import CHOICES, text_of, texts_of
from ..tasks.data_error import some_ids
from ..tasks.examples import position_id
from ..tasks.files import read_rows
from ..tasks.metrics import check_metric_packages
from ..tasks.row_parsing import examples_from, id_like, id_of
from ..tasks.tables import Table
from ..utils.errors import UserError
from ..utils.json_files import parsed
from .predict_settings import PredictSettings
from .source_texts import Texts

Row = dict[str, Any]
Words = tuple[str, ...]
#: Start of a cell that holds a list of texts, written as JSON or Python. Other cells with "[" are sentences.
_LIST = re.compile(r"""\s*\[\s*["'\]]""")


@dataclass(frozen=True)
class Input:
    """Rows to predict.

    Attributes:
        rows: the rows of the input, each a dict with all its columns.
        texts: for each row, a dict from the task's text column to the text.
        words: for each row, the words to tag (token classification); empty for other kinds of task.
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
    words: list[Words]
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
    table, where = _read(settings.input, "--input")
    rows, columns = table.rows, table.columns
    given = _by_task_column(task, settings.text_columns or task.text_columns, "--text-columns")
    names = _with_choice_list(given, task, columns, CHOICES)
    cells = [_texts(row, names, task, f"{where}, row {index}") for index, row in enumerate(rows)]
    _require_columns(list(names.values()), columns, where, "--text-columns")
    texts = [text for text, _ in cells]
    words: list[Words] = [()] * len(rows)
    if task.kind == "token-classification":  # the words of a sentence are separated by white space
        words = [listed or tuple(" ".join(text.values()).split()) for text, listed in cells]
    ids = _ids(rows, _id_columns(task, columns))
    output_columns = {column: f"source_{name}" for column, name in given.items()}
    default = given if settings.source_input is not None else output_columns
    source_names = _by_task_column(task, settings.source_columns or tuple(default.values()), "--source-columns")
    if settings.source_input is not None:
        sources = _read_sources(table, settings.source_input, source_names, task)
        where_sources = f"{settings.source_input}"
    else:
        output_columns = source_names
        source_names = _with_choice_list(source_names, task, columns, f"source_{CHOICES}")
        if settings.source_columns is not None:
            _require_columns(list(source_names.values()), columns, where, "--source-columns")
        present = all(name in columns for name in source_names.values())
        sources = [
            _texts(row, source_names, task, f"{where}, row {n}")[0] if present else None for n, row in enumerate(rows)
        ]
        where_sources = f"column {', '.join(dict.fromkeys(source_names.values()))}"
    truth, notes = _truth(table, task, texts, words, ids, settings.label_column, where)
    return Input(rows, texts, words, sources, where_sources, output_columns, ids, truth, notes)


def _read(name: str, option: str) -> tuple[Table, str]:
    """Return the rows of a file or of standard input ("-"), and the input's name for messages."""
    if name != "-":
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"{option} {name}: no such file")
        table, where = read_rows(path), str(path)
    else:
        where = "standard input"
        rows: list[Row] = []
        for number, line in enumerate(sys.stdin, 1):
            try:
                row = parsed(line) if line.strip() else {}
            except ValueError as error:
                raise DataError(f"{where}, line {number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f'{where}, line {number}: not a JSON object, such as {{"text": "..."}}')
            rows += [row] if row else []
        table = Table(rows, list(dict.fromkeys(key for row in rows for key in row)))
    if not table.rows:
        raise DataError(f"{where} has no rows")
    return table, where


def _by_task_column(task: Task, names: tuple[str, ...], option: str) -> dict[str, str]:
    """Return a dict from each text column of the task to the column of the input that holds its text."""
    if len(names) != len(task.text_columns):
        raise UserError(
            f"{option}: one column is needed for each of {', '.join(task.text_columns)}; got {', '.join(names)}"
        )
    return dict(zip(task.text_columns, names, strict=True))


def _with_choice_list(names: dict[str, str], task: Task, columns: Sequence[str], choices: str) -> dict[str, str]:
    """Return the names of the columns. If the column `choices` replaces the choice columns, they all have its name."""
    if choices not in columns or {names[column] for column in task.choice_columns} <= set(columns):
        return names
    return {**names, **dict.fromkeys(task.choice_columns, choices)}


def _require_columns(names: Sequence[str], columns: Sequence[str], where: str, option: str) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns)}. Name yours with {option}"
        )


def _texts(row: Row, names: dict[str, str], task: Task, where: str) -> tuple[Texts, Words]:
    """Return a dict from the task's column to the text of a row, and the words of a token classification.

    There are no words if the cell holds a sentence. A missing text becomes "". A list of words is joined with spaces.
    """
    cells = {column: row.get(name) for column, name in names.items()}
    if task.kind == "token-classification":
        value = cells[task.text_columns[0]]
        if isinstance(value, list | tuple) or (isinstance(value, str) and _LIST.match(value)):
            return texts_of(cells, task, where)
    if len({names[column] for column in task.choice_columns}) == 1:  # one column holds all choices
        choices = cells[task.choice_columns[0]]
        return texts_of({**{column: cells[column] for column in task.context_columns}, CHOICES: choices}, task, where)
    return {
        column: text_of(cells[column], f"{where}: {name}", numbers=False, word_lists=True)
        for column, name in names.items()
    }, ()


def _id_columns(task: Task, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the id columns of the task or, if they are not among the columns, "id"; () if there is neither."""
    return next((names for names in (task.id_columns, ("id",)) if set(names) <= set(columns)), ())


def _ids(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return the id of every row. A row without an id is named by its position."""
    return [id_of(row, columns) or position_id(index) for index, row in enumerate(rows)]


def _read_sources(table: Table, name: str, columns: dict[str, str], task: Task) -> list[Texts | None]:
    """Return the source of every row from a second file.

    Rows are matched by id if both files have the id columns of the task or a column id, otherwise by position. A row
    whose id does not occur in the second file has no source (None).
    """
    rows = table.rows
    source_table, where = _read(name, "--source-input")
    source_rows = source_table.rows
    columns = _with_choice_list(columns, task, source_table.columns, CHOICES)
    _require_columns(list(columns.values()), source_table.columns, where, "--source-columns")
    texts = [_texts(row, columns, task, f"{where}, row {index}")[0] for index, row in enumerate(source_rows)]
    id_columns = _id_columns(task, [column for column in table.columns if column in source_table.columns])
    if id_columns:
        by_id: dict[str, Texts] = {}
        for index, (row, source) in enumerate(zip(source_rows, texts, strict=True)):
            row_id = id_of(row, id_columns)
            if not row_id:
                raise DataError(
                    f"{where}, row {index} (counted from 0) has no {' and '.join(id_columns)}, by which the rows of "
                    "the two files are matched; give every row an id, or remove the column from one of the files if "
                    "their rows are in the same order"
                )
            if row_id in by_id:
                raise DataError(f"{where}: the id {row_id} occurs more than once; ids must be unique")
            by_id[row_id] = source
        sources = [by_id.get(id_of(row, id_columns)) for row in rows]
        if not any(sources):
            ids = _ids(rows, id_columns)
            raise DataError(f"{where}: none of its ids occurs in --input, which has {some_ids(ids)[1:-1]}")
        return sources
    _check_order(table, source_table, task, where)
    if len(source_rows) != len(rows):
        raise DataError(
            f"{where} has {len(source_rows)} rows and --input has {len(rows)} rows. Give both an id column, or the "
            "same number of rows in the same order"
        )
    return list(texts)


def _check_order(table: Table, source_table: Table, task: Task, where: str) -> None:
    """Check that ids in columns with other names than id do not contradict matching by position.

    Raises:
        DataError: two columns whose names suggest ids hold the same ids in different rows.
    """
    for name in id_like(table.columns, task):
        ids = [id_of(row, [name]) for row in table.rows]
        for source_name in id_like(source_table.columns, task):
            source_ids = [id_of(row, [source_name]) for row in source_table.rows]
            if ids != source_ids and set(ids) & set(source_ids) - {""}:
                raise DataError(
                    f"{where} and --input have no common column id, so their rows would be matched by position, but "
                    f"its column {source_name} and the column {name} of --input hold the same ids in different rows. "
                    "Rename both columns to id, or remove one of them if the rows are in the same order"
                )


def _truth(
    table: Table,
    task: Task,
    texts: Sequence[Texts],
    words: Sequence[Words],
    ids: Sequence[str],
    label_column: str | None,
    where: str,
) -> tuple[list[Example] | None, list[str]]:
    """Return `Input.truth` and `Input.notes`: the rows with their labels or answers, and no notes.

    If a row has no label or answer, return None and no notes. If the labels or answers cannot be used, return None and
    a note that says why.
    """
    rows, columns = table.rows, table.columns
    label = label_column or task.label_column
    if label_column is not None and label_column not in columns:
        raise DataError(f"{where} has no column {label_column} (--label-column); it has {', '.join(columns)}")
    needed = [label] if task.kind != "qa" else [one for one in ("answers", "answer") if one in columns]
    if not needed or not all(one in columns and row.get(one) not in (None, "") for row in rows for one in needed[:1]):
        return None, []
    renamed = []
    for row, row_texts, row_words, row_id in zip(rows, texts, words, ids, strict=True):
        cells: Row = {column: list(row_words) for column in task.text_columns} if row_words else dict(row_texts)
        renamed.append({**row, **cells, "id": row_id, task.label_column: row.get(label)})
    try:
        check_metric_packages(task)
        by_id = replace(task, id_columns=("id",))
        return examples_from(renamed, list(renamed[0]), by_id, where, table.names.get(label)), []
    except UserError as error:
        return None, [f"the predictions are not scored: {error}"]
