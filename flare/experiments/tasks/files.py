"""Read and write a data folder with one sub-folder per language and one file per split.

    DATA/<language>/<split>.csv | .tsv | .json | .jsonl | .parquet, or a folder written by save_to_disk
    DATA/<language>/<split>.conll | .txt                   words and tags; read if the split has none of the files above

Splits are train, valid (also validation, dev) and test. The name of a sub-folder is the name of the language. `.tables`
describes the file formats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.atomic_files import replacing
from ..utils.names import folder_name
from .cell_parsing import SENTENCE, needed_columns
from .data_error import DataError
from .examples import Example
from .registry import Task
from .row_parsing import check_ids, examples_from
from .tables import SUFFIXES, TAGGED, Table, check_keys, find_tables, read_table

#: Split -> accepted names of its file, without the suffix.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}


def find_file(folder: Path, language: str, split: str) -> Path | None:
    """Return the path of a split: a file, or a folder that save_to_disk wrote. Return None if the split is missing.

    Raises:
        DataError: several files have a name of the split, or the only match is neither a file nor such a folder.
        UserError: the language's name is not a valid folder name.
    """
    return split_file(folder / folder_name(language, "the language"), split)


def split_file(folder: Path, split: str) -> Path | None:
    """Return the file of a split, given the folder that holds the splits; see `find_file`."""
    matches: list[Path] = []
    for suffixes in (SUFFIXES, TAGGED):
        matches = matches or [path for name in SPLITS[split] for path in find_tables(folder, name, suffixes)]
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise DataError(f"{folder} has several files for {split}: {names}; keep one of them")
    if not matches:
        for path in (folder / f"{name}{suffix}" for name in SPLITS[split] for suffix in (*SUFFIXES, *TAGGED)):
            if os.path.lexists(path):
                raise DataError(f"{path} is not a file (it is a folder, a FIFO, or a broken link); replace it")
    return matches[0] if matches else None


def read_folder(task: Task, folder: Path, language: str, split: str) -> list[Example]:
    """Return one split of one language.

    Raises:
        DataError: the language, the split, a column or the rows are missing, or the file cannot be read.
    """
    path = find_file(folder, language, split)
    if path is None and not (folder / language).is_dir():
        languages = sorted(item.name for item in folder.iterdir() if item.is_dir())
        raise DataError(f"{folder} has no folder {language!r}; its folders: {', '.join(languages) or 'none'}")
    if path is None:
        raise no_split(folder / language, split)
    return examples_of(read_table(path), task, str(path))


def examples_of(table: Table, task: Task, where: str) -> list[Example]:
    """Return the rows of a table as examples. Check that every row has the needed columns, ids, labels and answers."""
    needed = (*task.id_columns, *needed_columns(task, table.columns))
    check_keys(table.rows, [column for column in needed if column in table.columns], where)
    check_ids(table.rows, table.columns, task, where)
    return examples_from(table.rows, table.columns, task, where, table.names.get(task.label_column))


def no_split(folder: Path, split: str) -> DataError:
    """Return the error for a missing split, with the accepted names and the files in the folder."""
    names = sorted(item.name for item in folder.iterdir())
    names = [*names[:10], *(["..."] if len(names) > 10 else [])]
    return DataError(
        f"{folder / SPLITS[split][0]}.csv is missing, and so is any other {split} split ({', '.join(SPLITS[split])} "
        f"as {', '.join(SUFFIXES)}, or a folder that save_to_disk wrote); files in the folder: "
        f"{', '.join(names) or 'none'}"
    )


def read_rows(path: Path) -> Table:
    """Return the rows of a data file, without checking them.

    Raises:
        DataError: the file's suffix is not in `SUFFIXES`, or the file cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: its name must end in {', '.join(SUFFIXES)}")
    return read_table(path)


def to_row(example: Example, task: Task) -> dict[str, Any]:
    """Return the row that `write_split` writes: the id, the texts, and the label or the answers.

    The row of a token classification has the id and the sentence, without words and tags.
    """
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
    """Write a split as JSON lines, atomically. An existing file of that name is replaced."""
    with replacing(Path(path)) as file:
        for example in examples:
            file.write(json.dumps(to_row(example, task), ensure_ascii=False) + "\n")
