"""Read a split of a language from a folder, a parallel table or the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from ..utils.names import checked_text
from .data_error import DataError
from .data_sets import DATA_SETS, translatable
from .examples import Example
from .files import SPLITS, find_file, read_folder
from .hub import check_parallel, has_hub, hub_note, read_hub
from .label_inference import inferred_labels, inferred_tags, label_table
from .parallel_table import ParallelColumns, has_parallel, read_parallel
from .registry import NAMED, Task

Data = str | os.PathLike[str] | ParallelColumns | None


def read_split(task: Task, data: Data, language: str, split: str) -> list[Example]:
    """Return the rows of one split of one language.

    Args:
        task: determines which columns are read.
        data: a folder, a hub id, `ParallelColumns`, or None for the task's data set on the hub.
        language: name of the language's folder; for `ParallelColumns`, the source language or the name that replaces
            "{language}" in the target columns; for a data set on the hub that `.data_sets` lists, a name or code of
            the language (see `.languages`); for another data set on the hub, the language's configuration.
        split: "train", "valid" or "test".

    Raises:
        DataError: a file, column or row is missing or wrong; the message lists what was found.
        UserError: the split is not known.
    """
    _check_split(split)
    if isinstance(data, ParallelColumns):
        return read_parallel(task, data, language, split)
    folder = _folder(data)
    if folder is not None:
        return read_folder(task, folder, language, split)
    return read_hub(task, _hub_id(task, data), language, split)


def has_split(task: Task, data: Data, language: str, split: str) -> bool:
    """Return whether a split exists.

    In a folder, this means that the split has a file; in a parallel table, that it has a file or rows; on the hub, that
    the data set has it.

    Raises:
        DataError: the hub cannot be reached, or the data set cannot be loaded for another reason than its splits.
    """
    _check_split(split)
    if isinstance(data, ParallelColumns):
        return has_parallel(data, split)
    folder = _folder(data)
    if folder is not None:
        return find_file(folder, language, split) is not None
    return has_hub(_hub_id(task, data), language, split)


def resolve_labels(task: Task, data: Data, language: str) -> Task:
    """Return the task with labels. If it has no labels yet, they are taken from a language's training rows.

    Class names are sorted alphabetically, integers by value. Of IOB2 tags, O comes first.

    Raises:
        DataError: labels look like mistakes; see `label_inference.inferred_labels`.
    """
    return shown_labels(task, data, language)[0]


def shown_labels(task: Task, data: Data, language: str) -> tuple[Task, list[str]]:
    """Return the task with labels, as `resolve_labels` does, and the lines of a table of labels and row counts.

    For token classification, the table counts the words with each tag. There are no lines if the task already has its
    labels or its kind has no named labels.
    """
    if task.kind not in NAMED or task.labels is not None:
        return task, []
    rows, where = read_split(task, data, language, "train"), f"{data or task.hub_id}, {language}/train"
    tags = task.kind == "token-classification"
    counts = inferred_tags(rows) if tags else inferred_labels(rows, where)
    heading = f"labels, taken from the {language} training rows (--labels sets them):"
    table = [heading, *label_table(counts, "words" if tags else "rows")]
    return task.with_labels(list(counts)), table


def data_notes(task: Task, data: Data, split: str, languages: Sequence[str]) -> list[str]:
    """Return notes on where the rows of a split come from; usually none.

    Args:
        languages: the languages whose rows are read from `data`. If there are two, their rows will be paired.

    Raises:
        DataError: the rows of the two languages are not translations of each other.
    """
    if isinstance(data, ParallelColumns) or _folder(data) is not None:
        return []
    hub_id = _hub_id(task, data)
    if len(set(languages)) == 2:
        check_parallel(hub_id, *languages)
    return hub_note(hub_id, split, languages)


def all_targets(task: Task, data: Data, source: str) -> tuple[list[str], list[str]]:
    """Return the target languages that `--target all` stands for, and notes.

    These are all languages except the source. For a folder, they are its sub-folders with a test split. For a task's
    data set on the hub, they are the languages that NLLB can translate.

    Raises:
        UserError: `data` is `ParallelColumns`, the data set's languages are not known to this package, or the source is
            the only language.
    """
    folder = None if isinstance(data, ParallelColumns) else _folder(data)
    notes: list[str] = []
    if isinstance(data, ParallelColumns):
        raise UserError("--target all needs one folder per language; with --target-column, name the languages")
    if folder is not None:
        names = sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
        targets = [name for name in names if name != source and find_file(folder, name, "test") is not None]
    else:
        hub_id = _hub_id(task, data)
        if hub_id not in DATA_SETS:
            raise UserError(f"--target all: the languages of {hub_id} are not known; name the languages you want")
        targets, untranslatable = translatable(DATA_SETS[hub_id], source)
        if untranslatable:
            notes = [f"--target all leaves out languages without an NLLB tag: {', '.join(untranslatable)}"]
    if not targets:
        raise UserError(f"--target all: {data or task.hub_id} has no language except {source}")
    return targets, [*notes, f"--target all: {', '.join(targets)}"]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is not known; accepted: {', '.join(SPLITS)}")


def _folder(data: Data) -> Path | None:
    if data is None:
        return None
    try:
        folder = Path(checked_text(os.fspath(data), "--data")).expanduser()
    except RuntimeError as error:  # "~user" without a known home directory
        raise DataError(f"--data {data}: {error}; write the full path") from error
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise DataError(
            f"--data {data}: this is one file; name its columns with --source-column and --target-column, or give a "
            "folder with one sub-folder per language"
        )
    path_like = not isinstance(data, str) or data.startswith((".", "/", "~")) or "\\" in data or data.count("/") > 1
    if folder.exists() or path_like:
        what = "this is not a folder" if folder.exists() else "no such folder"
        raise DataError(f"--data {data}: {what}; give a folder with one sub-folder per language, or a hub id")
    return None


def _hub_id(task: Task, data: Data) -> str:
    if data is not None:
        return str(data)
    if task.hub_id is None:
        raise DataError(f"task {task.name} is for your own data: give a folder or a hub id with --data")
    return task.hub_id
