"""Rows from the Hugging Face hub: one configuration per language, or TyDiQA's one for all.

`.data_sets` knows the configurations of the tasks' data sets; those of others are named by the user.
TyDiQA-GoldP is one configuration ("secondary_task") in which a row's id begins with its language; it has no test split,
so its validation split is the test here, and a tenth of its training rows, chosen by their id, is for validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from .data_sets import DATA_SETS, SPLIT_NAMES, english_rows
from .errors import DataError
from .examples import Example
from .registry import Task
from .row_parsing import examples_from
from .tables import class_names

_TYDIQA = "google-research-datasets/tydiqa"
_TYDIQA_CONFIGURATION = "secondary_task"
_NOT_REACHED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout")
_VALID_SHARE = 10  # one row in so many


def read_hub(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    """One split of one language; see the module.

    Raises:
        DataError: the data set, the configuration, the split or a column is missing.
    """
    if hub_id == _TYDIQA:
        return _read_tydiqa(task, hub_id, language, split)
    known, other = DATA_SETS.get(hub_id), english_rows(hub_id, language, split)
    if other is not None:
        rows = _load(other.hub_id, other.configuration, SPLIT_NAMES[split])
        return _examples(rows, task, f"{other.hub_id}, {other.configuration}/{split}", other.renamed)
    if known is not None and split not in known.splits:
        raise DataError(
            f"{hub_id} has no {split} split, only {', '.join(known.splits)}: "
            + (
                "translate the English rows (flare translate, then flare train --target-text mt)"
                if known.english
                else "put your own rows, in its columns, and its test split into folders, and name them with --data"
            )
        )
    configuration = language if known is None else known.configuration(language)
    rows = _load(hub_id, configuration, SPLIT_NAMES[split])
    return _examples(rows, task, f"{hub_id}, {configuration}/{split}")


def check_parallel(hub_id: str, source: str, target: str) -> None:
    """Raise DataError where a data set's own rows of two languages are not translations of each other."""
    known = DATA_SETS.get(hub_id)
    if known is not None and not known.parallel:
        raise DataError(
            f"{hub_id}: its {target} and {source} rows are not translations of each other. Use machine-translated "
            "text: flare translate, then flare train with --source-text mt (the target's rows and their translation) "
            "or --target-text mt"
        )


def hub_note(hub_id: str, split: str, languages: Iterable[str]) -> list[str]:
    """What has to be said about a split of a data set, read in these languages."""
    if hub_id != _TYDIQA:
        others = [english_rows(hub_id, one, split) for one in languages]
        return [f"{split}: {one.note} ({one.hub_id})" for one in others if one is not None]
    if split == "test":
        return ["test: the data set has no test split; this is its validation split"]
    kept = "one" if split == "valid" else "nine"
    return [f"{split}: {kept} in ten of the data set's training rows, chosen by their id (it has no split of its own)"]


def _read_tydiqa(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    name = DATA_SETS[hub_id].configuration(language)
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


def _examples(rows: Any, task: Task, where: str, renamed: Mapping[str, str] | None = None) -> list[Example]:
    name_of = class_names(rows.features).get(task.label_column)
    if name_of is not None and renamed:
        own = name_of
        name_of = lambda index: renamed.get(own(index), own(index))  # noqa: E731
    return examples_from(rows, list(rows.column_names), task, where, name_of)
