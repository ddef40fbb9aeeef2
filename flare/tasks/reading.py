"""Reading a split of a language, from a folder or the hub; see `flare.tasks.files` and `flare.tasks.hub`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..names import checked_text
from .errors import DataError
from .examples import Example
from .files import SPLITS, find_file, read_folder, write_split
from .hub import hub_note, read_hub
from .inferred import inferred_labels, label_table
from .registry import Task

__all__ = ["data_notes", "has_split", "read_split", "resolve_labels", "write_split"]

Data = str | os.PathLike[str] | None


def read_split(task: Task, data: Data, language: str, split: str) -> list[Example]:
    """The rows of one split of one language.

    Args:
        task: says which columns are read.
        data: a folder, a hub id, or None for the task's own data set on the hub.
        language: name of the folder; from the hub, a name or code of the table of languages.
        split: "train", "valid" or "test".

    Raises:
        DataError: what is missing or wrong, and what is there.
        UserError: an unknown split.
    """
    _check(split)
    folder = _folder(data)
    if folder is not None:
        return read_folder(task, folder, language, split)
    return read_hub(task, _hub_id(task, data), language, split)


def has_split(task: Task, data: Data, language: str, split: str) -> bool:
    """Whether a split is there: whether there is a file for it, or, from the hub, whether it can be loaded."""
    _check(split)
    folder = _folder(data)
    if folder is not None:
        return find_file(folder, language, split) is not None
    try:
        read_hub(task, _hub_id(task, data), language, split)
    except DataError:
        return False
    return True


def resolve_labels(task: Task, data: Data, language: str) -> Task:
    """The task with its labels, which are those of a language's training rows where none were given.

    Integers are ordered by value, names by the alphabet.

    Raises:
        DataError: labels that look like mistakes; see `flare.tasks.inferred`.
    """
    return shown_labels(task, data, language)[0]


def shown_labels(task: Task, data: Data, language: str) -> tuple[Task, list[str]]:
    """As `resolve_labels`; also a table of labels and rows, empty where the labels were given."""
    if task.kind != "classification" or task.labels is not None:
        return task, []
    counts = inferred_labels(read_split(task, data, language, "train"), f"{data or task.hub_id}, {language}/train")
    named = task.with_labels(list(counts))
    return named, [f"labels, taken from the {language} training rows (--labels sets them):", *label_table(counts)]


def data_notes(task: Task, data: Data, split: str) -> list[str]:
    """What a user should know about where a split comes from; usually nothing."""
    return hub_note(_hub_id(task, data), split) if _folder(data) is None else []


def _check(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is not known; one of {', '.join(SPLITS)}")


def _folder(data: Data) -> Path | None:
    if data is None:
        return None
    try:
        folder = Path(checked_text(os.fspath(data), "--data")).expanduser()
    except RuntimeError as error:  # "~somebody" whose home is not known
        raise DataError(f"--data {data}: {error}; write the whole path") from error
    if folder.is_dir():
        return folder
    path_like = not isinstance(data, str) or data.startswith((".", "/", "~")) or "\\" in data or data.count("/") > 1
    if folder.exists() or path_like:
        what = "this is not a folder" if folder.exists() else "no such folder"
        raise DataError(f"--data {data}: {what}; give a folder with one sub-folder per language, or a hub id")
    return None


def _hub_id(task: Task, data: Data) -> str:
    if data is not None:
        return str(data)
    if task.hub_id is None:
        raise DataError(f"task {task.name} is for data of your own: name their folder, or a hub id, with --data")
    return task.hub_id
