"""A data set of the Hugging Face hub: one configuration per language, or TyDiQA's one for all.

XNLI and NusaX-Senti name configurations by codes ("sw", "ace"), which the table of languages knows; configurations of
other data sets are named by the user. TyDiQA-GoldP is one configuration ("secondary_task") in which a row's id begins
with its language; it has no test split, so its validation split is the test here, and a tenth of its training rows,
chosen by their id, is for validation.
"""

from __future__ import annotations

import hashlib
from typing import Any

from .errors import DataError
from .examples import Example
from .files import SPLITS
from .languages import data_set_code
from .registry import TASKS, Task
from .rows import examples_from

_TYDIQA = "google-research-datasets/tydiqa"
_TYDIQA_CONFIGURATION = "secondary_task"
_NOT_REACHED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout")
_VALID_SHARE = 10  # one row in so many
_SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


def read_hub(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    """One split of one language; see the module.

    Raises:
        DataError: the data set, the configuration, the split or a column is missing.
    """
    if hub_id == _TYDIQA:
        return _read_tydiqa(task, hub_id, language, split)
    configuration = configuration_of(hub_id, language)
    rows = _load(hub_id, configuration, _SPLIT_NAMES[split])
    return _examples(rows, task, f"{hub_id}, {configuration}/{split}")


def configuration_of(hub_id: str, language: str) -> str:
    """The name of a language's configuration: the table's for the paper's data sets, else as the user wrote it."""
    known = next((task.name for task in TASKS.values() if task.hub_id == hub_id), None)
    return data_set_code(known, language) if known else language


def hub_note(hub_id: str, split: str) -> list[str]:
    """What has to be said about a split of a data set."""
    if hub_id != _TYDIQA:
        return []
    if split == "test":
        return ["test: the data set has no test split; this is its validation split"]
    kept = "one" if split == "valid" else "nine"
    return [f"{split}: {kept} in ten of the data set's training rows, chosen by their id (it has no split of its own)"]


def _read_tydiqa(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    name = data_set_code("tydiqa", language)
    rows = _load(hub_id, _TYDIQA_CONFIGURATION, ("validation",) if split == "test" else ("train",))
    rows = rows.filter(lambda row: _wanted(row["id"], name, split))
    return _examples(rows, task, f"{hub_id}, {name}/{split}")


def _wanted(row_id: str, language: str, split: str) -> bool:
    if row_id.partition("-")[0] != language:
        return False
    for_valid = int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % _VALID_SHARE == 0
    return split == "test" or for_valid == (split == "valid")


def _load(hub_id: str, configuration: str, splits: tuple[str, ...]) -> Any:
    from datasets import load_dataset

    failures = []
    for split in splits:
        try:
            try:
                return load_dataset(hub_id, configuration, split=split)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                # The hub keeps its own conversion of data sets that come with a loading script.
                return load_dataset(hub_id, configuration, split=split, revision="refs/convert/parquet")
        except Exception as error:  # the hub, the network and the data set's files each raise kinds of their own
            failures.append(f"{split}: {type(error).__name__}: {' '.join(str(error).split())}")
            if isinstance(error, ConnectionError) or type(error).__name__ in _NOT_REACHED:
                break  # each further split would be tried for minutes
    raise DataError(
        f"--data {hub_id}: neither a folder here nor a data set that can be loaded from the hub, with "
        f"{configuration!r} as its configuration and {splits[0]!r} as split ({'; '.join(failures)})"
    )


def _examples(rows: Any, task: Task, where: str) -> list[Example]:
    from datasets import ClassLabel

    feature = rows.features.get(task.label_column)
    feature = getattr(feature, "feature", feature)  # of a list, its items'
    name_of = feature.int2str if isinstance(feature, ClassLabel) else None
    return examples_from(rows, list(rows.column_names), task, where, name_of)


assert set(_SPLIT_NAMES) == set(SPLITS)
