"""The input of `flare predict`: rows of texts, and their source texts from columns or a second file."""

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
from .sources import Texts

Row = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """rows: as they came. texts, sources: of each row, by the task's columns. where: what the sources come from.

    columns: the source's, as the output names them. ids: of each row. truth: rows with label or answers, where all
    have them, else None; notes: why not, if that is worth knowing.
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
    """Read the texts, and their sources where there are some.

    Raises:
        DataError: a file, a column or a text is missing or wrong, or the two files do not fit together.
    """
    assert settings.input is not None
    rows, columns, where = _read(settings.input, "--input")
    names = dict(zip(task.text_columns, _named(settings.text_columns, task, "--text-columns"), strict=True))
    texts = [_row(row, names, f"{where}, row {index}") for index, row in enumerate(rows)]
    _need(list(names.values()), columns, where, "--text-columns")
    ids = [str(row["id"]) if row.get("id") not in (None, "") else position_id(n) for n, row in enumerate(rows)]
    out = {column: f"source_{name}" for column, name in names.items()}
    if settings.source_input is not None:
        named = names.values() if settings.source_columns is None else settings.source_columns
        theirs = dict(zip(task.text_columns, _named(tuple(named), task, "--source-columns"), strict=True))
        sources = _matched(rows, ids, settings.source_input, theirs)
        found = f"{settings.source_input}"
    else:
        named = out.values() if settings.source_columns is None else settings.source_columns
        theirs = dict(zip(task.text_columns, _named(tuple(named), task, "--source-columns"), strict=True))
        if settings.source_columns is not None:
            _need(list(theirs.values()), columns, where, "--source-columns")
        there = all(name in columns for name in theirs.values())
        sources = [_row(row, theirs, f"{where}, row {n}") if there else None for n, row in enumerate(rows)]
        found = f"column {', '.join(theirs.values())}"
        out = theirs
    truth, notes = _truth(rows, columns, task, names, settings.label_column, where)
    return Input(rows, texts, sources, found, out, ids, truth, notes)


def _read(name: str, option: str) -> tuple[list[Row], list[str], str]:
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


def _named(columns: tuple[str, ...] | None, task: Task, option: str) -> tuple[str, ...]:
    if columns is None:
        return task.text_columns
    if len(columns) != len(task.text_columns):
        raise UserError(f"{option}: one is needed for each of {', '.join(task.text_columns)}; got {', '.join(columns)}")
    return columns


def _need(names: Sequence[str], columns: Sequence[str], where: str, option: str) -> None:
    lacking = [name for name in names if name not in columns]
    if lacking:
        raise DataError(
            f"{where} has no column {', '.join(lacking)}; it has {', '.join(columns)}. Name yours with {option}"
        )


def _row(row: Row, names: dict[str, str], where: str) -> Texts:
    """Return the texts of a row; a missing text is empty, and a list of words is joined with spaces."""
    return {
        column: text_of(row.get(name), f"{where}: {name}", numbers=False, word_lists=True)
        for column, name in names.items()
    }


def _matched(rows: Sequence[Row], ids: Sequence[str], name: str, columns: dict[str, str]) -> list[Texts | None]:
    """The source of every row from a second file: by id where both have ids, else by position."""
    theirs, there, where = _read(name, "--source-input")
    _need(list(columns.values()), there, where, "--source-columns")
    texts = [_row(row, columns, f"{where}, row {index}") for index, row in enumerate(theirs)]
    if all("id" in row for row in rows) and "id" in there:
        by_id: dict[str, Texts] = {}
        for row, source in zip(theirs, texts, strict=True):
            if str(row.get("id")) in by_id:
                raise DataError(
                    f"{where}: the id {row.get('id')} occurs more than once; which text belongs is not known"
                )
            by_id[str(row.get("id"))] = source
        found = [by_id.get(one) for one in ids]
        if not any(found):
            raise DataError(f"{where}: none of its ids is an id of --input {some_ids(ids)}")
        return found
    if len(theirs) != len(rows):
        raise DataError(
            f"{where} has {len(theirs)} rows and --input {len(rows)}: without an id column in both, there must be as "
            "many, in one order"
        )
    return list(texts)


def _truth(
    rows: Sequence[Row], columns: Sequence[str], task: Task, names: dict[str, str], label_column: str | None, where: str
) -> tuple[list[Example] | None, list[str]]:
    """The rows with their labels or answers, where they have some that are the task's."""
    label = label_column or task.label_column
    if label_column is not None and label_column not in columns:
        raise DataError(f"{where} has no column {label_column} (--label-column); it has {', '.join(columns)}")
    needed = [label] if task.kind != "qa" else [one for one in ("answers", "answer") if one in columns]
    if not needed or not all(one in columns and row.get(one) not in (None, "") for row in rows for one in needed[:1]):
        return None, []
    renamed = [
        {**row, **{own: row.get(name) for own, name in names.items()}, task.label_column: row.get(label)}
        for row in rows
    ]
    try:
        check_metric_packages(task)
        return examples_from(renamed, list(renamed[0]), task, where), []
    except UserError as error:
        return None, [f"nothing is scored: {error}"]
