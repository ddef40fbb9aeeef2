"""Read a table with the texts of several languages in parallel columns.

    id,english,acehnese,label

The table is a folder with one file per split (train.csv, test.csv, ...), a DatasetDict written by save_to_disk, or a
single file or Dataset (written by save_to_disk) with a column ``split``. All languages share the ids and labels; each
language has its own text columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from .data_error import DataError
from .examples import Example
from .files import SPLITS, examples_of, no_split, split_file
from .registry import Task
from .tables import SUFFIXES, Table, is_saved, read_table

SPLIT_COLUMN = "split"
#: Placeholder for the language's name in a column's name.
LANGUAGE = "{language}"
#: Kinds of task whose answers are parts of the text and therefore differ between languages.
_ANSWERS_IN_TEXT = ("qa", "token-classification")


@dataclass(frozen=True)
class ParallelColumns:
    """Location and columns of a parallel table.

    Attributes:
        path: a folder with one file per split, or a single file or saved Dataset with a column "split".
        source_language: name of the language in `source_columns`.
        source_columns, target_columns: one column for each of the task's text columns; None if no columns were named.
            "{language}" in a target column is replaced by the language's name.
    """

    path: Path
    source_language: str
    source_columns: tuple[str, ...] | None = None
    target_columns: tuple[str, ...] | None = None

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def columns(self, language: str) -> tuple[str, ...]:
        """Return the text columns of a language.

        Raises:
            UserError: no columns were named for the language.
        """
        is_source = language == self.source_language
        named, flag = (
            (self.source_columns, "--source-column") if is_source else (self.target_columns, "--target-column")
        )
        if named is None:
            raise UserError(f"{flag} is missing: name the column of {self.path} that holds the {language} text")
        return tuple(column.replace(LANGUAGE, language) for column in named)


def check_targets(data: ParallelColumns, targets: Sequence[str]) -> None:
    """Raise UserError if several targets would share one column."""
    if data.target_columns is not None and len(targets) > 1 and not any(LANGUAGE in one for one in data.target_columns):
        raise UserError(
            f"--target-column {' '.join(data.target_columns)} is the column of one language, but --target names "
            f"{len(targets)}; write {LANGUAGE} in place of the language's name, such as text_{LANGUAGE}"
        )


def read_parallel(task: Task, data: ParallelColumns, language: str, split: str) -> list[Example]:
    """Return one split of one language.

    Raises:
        DataError: the split, a column or the rows are missing, or the table cannot be read.
        UserError: no columns are given for the language, their number differs from the task's number of text columns,
            or the task's answers differ between languages.
    """
    if task.kind in _ANSWERS_IN_TEXT:
        raise UserError(
            f"--source-column and --target-column: the answers of a {task.kind} task are parts of each language's "
            "text, so both languages cannot share one column of answers; use one folder per language"
        )
    columns = data.columns(language)
    if len(columns) != len(task.text_columns):
        raise UserError(
            f"task {task.name} has {len(task.text_columns)} text columns ({', '.join(task.text_columns)}); got "
            f"{len(columns)} for the {language} text ({', '.join(columns)}): name one column for each text column, in "
            "this order"
        )
    table, where = _split_of(data.path, split)
    rows = examples_of(table, replace(task, text_columns=columns), where)  # so that errors name columns of the table
    return [replace(row, texts=dict(zip(task.text_columns, row.texts.values(), strict=True))) for row in rows]


def has_parallel(data: ParallelColumns, split: str) -> bool:
    """Return whether a split exists: as a file in the folder, or as rows of the single table."""
    if _one_table(data.path):
        return bool(_rows_of(read_table(data.path), split, str(data.path)))
    return split_file(data.path, split) is not None


def _split_of(path: Path, split: str) -> tuple[Table, str]:
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    if not _one_table(path):
        file = split_file(path, split)
        if file is None:
            raise no_split(path, split)
        return read_table(file), str(file)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise DataError(
            f"--data {path}: the file name must end in {', '.join(SUFFIXES)}; got {path.suffix or 'no ending'}"
        )
    table = read_table(path)
    rows = _rows_of(table, split, str(path))
    if not rows:
        splits = sorted({str(row[SPLIT_COLUMN]) for row in table.rows})
        raise DataError(f"{path} has no rows whose {SPLIT_COLUMN} is {split}; it has {', '.join(splits) or 'none'}")
    return replace(table, rows=rows), f"{path} ({split})"


def _one_table(path: Path) -> bool:
    return path.is_file() or is_saved(path)


def _rows_of(table: Table, split: str, where: str) -> list[dict[str, Any]]:
    if SPLIT_COLUMN not in table.columns:
        raise DataError(
            f"{where} is one table without a column {SPLIT_COLUMN!r}, so training and test rows cannot be "
            f"distinguished; add the column with the values {', '.join(SPLITS)}, or give a folder with one file per "
            f"split. The columns of the table are {', '.join(table.columns)}"
        )
    known = {name: key for key, names in SPLITS.items() for name in names}
    class_name = table.names.get(SPLIT_COLUMN)
    rows = []
    for index, row in enumerate(table.rows):
        value = row.get(SPLIT_COLUMN)
        name = class_name(value) if class_name is not None and isinstance(value, int) else str(value).strip().lower()
        if name not in known:
            raise DataError(
                f"{where}, row {index} (counted from 0): its {SPLIT_COLUMN} is {value!r}; accepted: {', '.join(known)}"
            )
        if known[name] == split:
            rows.append(row)
    return rows
