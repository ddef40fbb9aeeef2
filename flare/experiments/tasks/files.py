"""A folder of data: one sub-folder per language, one file per split.

    DATA/<language>/<split>.csv | .tsv | .json | .jsonl | .parquet, or what save_to_disk wrote
    DATA/<language>/<split>.conll | .txt                   words and tags (`.conll`), if there is no other

Splits are train, valid (validation, dev) and test. A language is called whatever its folder is called. What the files
look like stands in `.tables`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.atomic_files import replacing
from ..utils.names import folder_name
from .errors import DataError
from .examples import Example
from .kinds import SENTENCE, needed_columns
from .registry import Task
from .row_parsing import check_ids, examples_from
from .tables import SUFFIXES, TAGGED, Table, check_keys, find_tables, read_table

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}


def find_file(folder: Path, language: str, split: str) -> Path | None:
    """Return the file of a split, the folder that save_to_disk wrote, or None.

    Raises:
        DataError: several files could be meant, or what has the name is not a file.
        UserError: the language cannot be a folder's name.
    """
    return split_file(folder / folder_name(language, "the language"), split)


def split_file(folder: Path, split: str) -> Path | None:
    """As `find_file`, in the folder that holds the splits."""
    there: list[Path] = []
    for suffixes in (SUFFIXES, TAGGED):
        there = there or [path for name in SPLITS[split] for path in find_tables(folder, name, suffixes)]
    if len(there) > 1:
        raise DataError(f"{folder} has several files for {split}: {', '.join(p.name for p in there)}; keep one of them")
    if not there:
        names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in (*SUFFIXES, *TAGGED)]
        for path in (folder / name for name in names):
            if os.path.lexists(path):
                raise DataError(f"{path} is not a file (a folder, a FIFO, or a link to something that is gone)")
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
        raise no_split(folder / language, split)
    table = read_table(path)
    return examples_of(table, task, str(path))


def examples_of(table: Table, task: Task, where: str) -> list[Example]:
    """Return the examples of a table, all checks made: keys, ids, columns, labels, answers."""
    needed = (*task.id_columns, *needed_columns(task, table.columns))
    check_keys(table.rows, [column for column in needed if column in table.columns], where)
    check_ids(table.rows, table.columns, task, where)
    return examples_from(table.rows, table.columns, task, where, table.names.get(task.label_column))


def no_split(folder: Path, split: str) -> DataError:
    """Return the error for a folder without a split: which names are accepted, and what is there."""
    there = sorted(item.name for item in folder.iterdir())
    there = [*there[:10], *(["..."] if len(there) > 10 else [])]
    return DataError(
        f"{folder / SPLITS[split][0]}.csv is missing, and so is any other {split} split ({', '.join(SPLITS[split])} "
        f"as {', '.join(SUFFIXES)}, or a folder that save_to_disk wrote); files there: {', '.join(there) or 'none'}"
    )


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a data file (column -> value) and its columns, nothing of which is checked.

    Raises:
        DataError: its name does not end as one of `SUFFIXES`, or it cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: its name must end in {', '.join(SUFFIXES)}")
    table = read_table(path)
    return table.rows, table.columns


def to_row(example: Example, task: Task) -> dict[str, Any]:
    """What `write_split` writes of an example: id, texts, and label or answers; of tagged words the sentence."""
    if task.kind == "token-classification":
        return {"id": example.id, SENTENCE: example.texts[task.text_columns[0]]}
    row: dict[str, Any] = {"id": example.id, **{column: example.texts[column] for column in task.text_columns}}
    if task.kind != "qa":
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
