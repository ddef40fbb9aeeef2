"""A folder of data: one sub-folder per language, one file per split.

    DATA/<language>/<split>.csv | .jsonl | .parquet        UTF-8, with or without a byte order mark

Splits are train, valid (validation, dev) and test. A language is called whatever its folder is called.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic_files import replacing
from ..names import folder_name
from .errors import DataError
from .examples import Example
from .registry import Task
from .rows import check_ids, examples_from

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}
SUFFIXES = (".csv", ".jsonl", ".parquet")


def find_file(folder: Path, language: str, split: str) -> Path | None:
    """The file of a split, or None.

    Raises:
        DataError: several files could be meant.
        UserError: the language cannot be a folder's name.
    """
    folder_name(language, "the language")
    names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in SUFFIXES]
    there = [folder / language / name for name in names if (folder / language / name).is_file()]
    if len(there) > 1:
        raise DataError(
            f"{folder / language} has several files for {split}: {', '.join(p.name for p in there)}; keep one of them"
        )
    return there[0] if there else None


def read_folder(task: Task, folder: Path, language: str, split: str) -> list[Example]:
    """One split of one language; see the module.

    Raises:
        DataError: the language, the split, a column or the rows are missing, or the file cannot be read.
    """
    path = find_file(folder, language, split)
    if path is None and not (folder / language).is_dir():
        there = sorted(item.name for item in folder.iterdir() if item.is_dir())
        raise DataError(f"{folder} has no folder {language!r}; languages there: {', '.join(there) or 'none'}")
    if path is None:
        there = sorted(item.name for item in (folder / language).iterdir())
        there = [*there[:10], *(["..."] if len(there) > 10 else [])]
        raise DataError(
            f"{folder / language / SPLITS[split][0]}.csv is missing, and so is any other {split} split "
            f"({', '.join(SPLITS[split])} as {', '.join(SUFFIXES)}); files there: {', '.join(there) or 'none'}"
        )
    rows, columns = _READERS[path.suffix](path)
    check_ids(rows, columns, task, str(path))
    return examples_from(rows, columns, task, str(path))


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: a quotation mark that is never closed would swallow the rows after it
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            _check_head(path, head)
            rows, wrong = [], []
            for fields in reader:
                if len(fields) == len(head):
                    rows.append(dict(zip(head, fields, strict=True)))
                elif fields:
                    wrong.append((reader.line_num, len(fields)))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    if wrong:
        line, count = wrong[0]
        raise DataError(
            f"{path}, line {line}: {count} fields where the head has {len(head)} ({', '.join(head)})"
            f"{f'; so are {len(wrong) - 1} more rows' if len(wrong) > 1 else ''}. A text with a comma or a line break "
            "needs quotation marks around it, and one inside it is written twice"
        )
    return rows, head


def _check_head(path: Path, head: list[str]) -> None:
    twice = sorted({name for name in head if head.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {', '.join(map(repr, twice))} stands in the head twice; rename one")
    if len(head) == 1 and any(mark in head[0] for mark in ";\t|"):
        raise DataError(f"{path}: the fields must be separated by commas; its head is {head[0]!r}")


def _read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, number = [], 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("it is not an object")
                    rows.append(row)
    except (ValueError, OSError, RecursionError) as error:  # also what UTF-8 and JSON raise
        raise DataError(f"{path}, line {max(number, 1)}: no JSON object in UTF-8 ({error})") from error
    # A key that only some rows have is a column all the same; a missing value shows up as an empty text or label.
    return rows, list(dict.fromkeys(key for row in rows for key in row))


def _read_parquet(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install pyarrow, or write the data as CSV or JSON lines") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}") from error
    return table.to_pylist(), list(table.column_names)


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a data file (column -> value) and its columns, nothing of which is checked.

    Raises:
        DataError: its name does not end as one of `SUFFIXES`, or it cannot be read.
    """
    if path.suffix not in _READERS:
        raise DataError(f"{path}: its name must end in {', '.join(SUFFIXES)}")
    return _READERS[path.suffix](path)


def to_row(example: Example, task: Task) -> dict[str, Any]:
    """What `write_split` writes of an example: id, texts, and label or answers."""
    row: dict[str, Any] = {"id": example.id, **{column: example.texts[column] for column in task.text_columns}}
    if task.kind == "classification":
        row[task.label_column] = example.label
    else:
        row["answers"] = {
            "text": [answer.text for answer in example.answers],
            "answer_start": [answer.start for answer in example.answers],
        }
    return row


def write_split(path: str | os.PathLike[str], examples: Sequence[Example], task: Task) -> None:
    """Write a split as JSON lines; it is there whole or not at all. An existing file of that name is replaced."""
    with replacing(Path(path)) as file:
        for example in examples:
            file.write(json.dumps(to_row(example, task), ensure_ascii=False) + "\n")
