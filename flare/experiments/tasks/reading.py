"""Reading a split of a language, from a folder or the hub; see `.files` and `.hub`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from ..utils.names import checked_text
from .data_sets import DATA_SETS, translatable
from .errors import DataError
from .examples import Example
from .files import SPLITS, find_file, read_folder, write_split
from .hub import check_parallel, hub_note, read_hub
from .inferred import inferred_labels, inferred_tags, label_table
from .parallel import ParallelColumns, has_parallel, read_parallel
from .registry import NAMED, Task

__all__ = ["data_notes", "has_split", "read_split", "resolve_labels", "write_split"]

Data = str | os.PathLike[str] | ParallelColumns | None


def read_split(task: Task, data: Data, language: str, split: str) -> list[Example]:
    """The rows of one split of one language.

    Args:
        task: says which columns are read.
        data: a folder, a hub id, `ParallelColumns`, or None for the task's own data set on the hub.
        language: name of the folder; from the hub, a name or code of the table of languages.
        split: "train", "valid" or "test".

    Raises:
        DataError: what is missing or wrong, and what is there.
        UserError: an unknown split.
    """
    _check(split)
    if isinstance(data, ParallelColumns):
        return read_parallel(task, data, language, split)
    folder = _folder(data)
    if folder is not None:
        return read_folder(task, folder, language, split)
    return read_hub(task, _hub_id(task, data), language, split)


def has_split(task: Task, data: Data, language: str, split: str) -> bool:
    """Whether a split is there: whether there is a file for it, or, from the hub, whether it can be loaded."""
    _check(split)
    if isinstance(data, ParallelColumns):
        return has_parallel(data, split)
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
        DataError: labels that look like mistakes; see `flare.experiments.tasks.inferred`.
    """
    return shown_labels(task, data, language)[0]


def shown_labels(task: Task, data: Data, language: str) -> tuple[Task, list[str]]:
    """As `resolve_labels`; also a table of labels and rows, empty where the labels were given."""
    if task.kind not in NAMED or task.labels is not None:
        return task, []
    rows, where = read_split(task, data, language, "train"), f"{data or task.hub_id}, {language}/train"
    counts = inferred_tags(rows) if task.kind == "token-classification" else inferred_labels(rows, where)
    named = task.with_labels(list(counts))
    return named, [f"labels, taken from the {language} training rows (--labels sets them):", *label_table(counts)]


def data_notes(task: Task, data: Data, split: str, languages: Sequence[str]) -> list[str]:
    """Return what a user should know about where the rows of a split come from; usually nothing.

    Args:
        languages: whose own rows are read; two of them are paired.

    Raises:
        DataError: two languages whose rows are not translations of each other.
    """
    if isinstance(data, ParallelColumns) or _folder(data) is not None:
        return []
    hub_id = _hub_id(task, data)
    if len(set(languages)) == 2:
        check_parallel(hub_id, *languages)
    return hub_note(hub_id, split, languages)


def all_targets(task: Task, data: Data, source: str) -> tuple[list[str], list[str]]:
    """Return every language but the source, for `--target all`, and notes.

    Of a folder: its sub-folders with a test split. Of the tasks' data sets on the hub: those that NLLB can translate.

    Raises:
        UserError: it is not known which languages there are, or there are none.
    """
    folder = None if isinstance(data, ParallelColumns) else _folder(data)
    notes: list[str] = []
    if isinstance(data, ParallelColumns):
        raise UserError("--target all is for a folder per language; with --target-column, name the languages")
    if folder is not None:
        names = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
        found = [name for name in names if name != source and find_file(folder, name, "test") is not None]
    else:
        hub_id = _hub_id(task, data)
        if hub_id not in DATA_SETS:
            raise UserError(f"--target all: the languages of {hub_id} are not known here; name those you want")
        found, lost = translatable(DATA_SETS[hub_id], source)
        notes = [f"--target all leaves out {', '.join(lost)}: NLLB has no tag for it"] if lost else []
    if not found:
        raise UserError(f"--target all: {data or task.hub_id} has no language but {source}")
    return found, [*notes, f"--target all: {', '.join(found)}"]


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
        raise DataError(f"task {task.name} is for data of your own: name their folder, or a hub id, with --data")
    return task.hub_id
