"""One table with the texts of several languages side by side.

    id,english,acehnese,label

It is a folder with a file per split (train.csv, test.csv, ...), a DatasetDict that save_to_disk wrote, or one file with
a column ``split``. Ids and labels are those of both languages; the texts of a language come from its own columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from .errors import DataError
from .examples import Example
from .files import SPLITS, examples_of, no_split, split_file
from .registry import Task
from .tables import SUFFIXES, Table, is_saved, read_table

SPLIT_COLUMN = "split"
#: Stands for the target language's name in a column's.
LANGUAGE = "{language}"
#: Kinds whose answers are parts of the text, so that each language has its own.
_OWN_ANSWERS = ("qa", "token-classification")


@dataclass(frozen=True)
class ParallelColumns:
    """Where the rows are, in place of a folder of languages.

    path: a folder with a file per split, or one file with a column "split".
    source_language: name of the language that `source_columns` hold.
    source_columns, target_columns: one column for each of the task's text columns. {language} in a target's column
        stands for the language's name.
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
        """Return the columns of a language's texts.

        Raises:
            UserError: none are named.
        """
        is_source = language == self.source_language
        named, flag = (
            (self.source_columns, "--source-column") if is_source else (self.target_columns, "--target-column")
        )
        if named is None:
            raise UserError(f"{flag} is missing: name the column of {self.path} that holds the {language} text")
        return tuple(column.replace(LANGUAGE, language) for column in named)


def check_targets(data: ParallelColumns, targets: Sequence[str]) -> None:
    """Raise UserError where several targets would share one column."""
    if data.target_columns is not None and len(targets) > 1 and not any(LANGUAGE in one for one in data.target_columns):
        raise UserError(
            f"--target-column {' '.join(data.target_columns)} is one language's, and --target names {len(targets)}; "
            f"write {LANGUAGE} in place of the language's name, such as text_{LANGUAGE}"
        )


def read_parallel(task: Task, data: ParallelColumns, language: str, split: str) -> list[Example]:
    """Return one split of one language.

    Raises:
        DataError: the split, a column or the rows are missing, or the table cannot be read.
        UserError: no column is named for the language, or the task has answers of each language's own.
    """
    if task.kind in _OWN_ANSWERS:
        raise UserError(
            f"--source-column and --target-column: the answers of a {task.kind} task are parts of each language's "
            "text, so one column of them cannot serve both languages; use one folder per language"
        )
    columns = data.columns(language)
    if len(columns) != len(task.text_columns):
        raise UserError(
            f"task {task.name} has {len(task.text_columns)} text columns ({', '.join(task.text_columns)}); got "
            f"{len(columns)} of the {language} text ({', '.join(columns)}): name one for each, in this order"
        )
    table, where = _split_of(data.path, split)
    named = replace(task, text_columns=columns)  # so that errors name the table's columns
    rows = examples_of(table, named, where)
    return [replace(row, texts=dict(zip(task.text_columns, row.texts.values(), strict=True))) for row in rows]


def has_parallel(data: ParallelColumns, split: str) -> bool:
    """Whether the table has rows of a split."""
    if _one_file(data.path):
        return bool(_rows_of(read_table(data.path), split, str(data.path)))
    return split_file(data.path, split) is not None


def _split_of(path: Path, split: str) -> tuple[Table, str]:
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    if not _one_file(path):
        file = split_file(path, split)
        if file is None:
            raise no_split(path, split)
        return read_table(file), str(file)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise DataError(f"--data {path}: files are read as {', '.join(SUFFIXES)}; got {path.suffix or 'no ending'}")
    table = read_table(path)
    rows = _rows_of(table, split, str(path))
    if not rows:
        there = sorted({str(row[SPLIT_COLUMN]) for row in table.rows})
        raise DataError(f"{path} has no rows whose {SPLIT_COLUMN} is {split}; it has {', '.join(there) or 'none'}")
    return replace(table, rows=rows), f"{path} ({split})"


def _one_file(path: Path) -> bool:
    return path.is_file() or is_saved(path)


def _rows_of(table: Table, split: str, where: str) -> list[dict[str, Any]]:
    if SPLIT_COLUMN not in table.columns:
        raise DataError(
            f"{where} is one file without a column {SPLIT_COLUMN!r}, so it is not known which rows are for training "
            f"and which for the test; add one with {', '.join(SPLITS)}, or give a folder with a file for each. It has "
            f"{', '.join(table.columns)}"
        )
    known = {name: one for one, names in SPLITS.items() for name in names}
    is_class = table.names.get(SPLIT_COLUMN)
    found = []
    for index, row in enumerate(table.rows):
        value = row.get(SPLIT_COLUMN)
        name = is_class(value) if is_class is not None and isinstance(value, int) else str(value).strip().lower()
        if name not in known:
            raise DataError(
                f"{where}, row {index} (counted from 0): its {SPLIT_COLUMN} is {value!r}; accepted: {', '.join(known)}"
            )
        if known[name] == split:
            found.append(row)
    return found
