"""Read rows from the Hugging Face hub.

A data set on the hub has one configuration per language. `.data_sets` lists the configurations of the tasks' data
sets. For other data sets, the name that the user gives to a language must be the name of its configuration.

TyDiQA-GoldP is an exception: it has a single configuration ("secondary_task") for all languages, and a row's id starts
with its language. It has no test split, so its validation split serves as the test split, and a tenth of its training
rows, chosen by a hash of their id, serves as the validation split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from .data_error import DataError
from .data_sets import DATA_SETS, SPLIT_NAMES, english_rows
from .examples import Example
from .registry import Task
from .row_parsing import examples_from
from .tables import class_names

_TYDIQA = "google-research-datasets/tydiqa"
_TYDIQA_CONFIGURATION = "secondary_task"
#: Names of exception types of huggingface_hub and httpx that mean that the hub cannot be reached.
_NETWORK_ERRORS = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout")
_VALID_FRACTION = 10  # one training row in ten is a validation row


class NoSplit(DataError):
    """A data set on the hub that does not have a split."""


def read_hub(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    """Return one split of one language.

    Raises:
        NoSplit: the data set does not have the split.
        DataError: the hub cannot be reached, or the data set, the configuration or a column is missing.
        UserError: the language is not known, or a data set of `.data_sets` does not have it.
    """
    if hub_id == _TYDIQA:
        return _read_tydiqa(task, hub_id, language, split)
    other = english_rows(hub_id, language, split)
    place, configuration = _place(hub_id, language, split)
    rows = _load(place, configuration, SPLIT_NAMES[split])
    return _examples(rows, task, f"{place}, {configuration}/{split}", other.renamed if other is not None else None)


def has_hub(hub_id: str, language: str, split: str) -> bool:
    """Return whether a data set has a split of a language. The split is loaded, but its rows are not parsed.

    Raises:
        DataError: the split cannot be loaded for another reason.
        UserError: the language is not known, or a data set of `.data_sets` does not have it.
    """
    if hub_id == _TYDIQA:
        DATA_SETS[hub_id].configuration(language)
        return True
    try:
        _load(*_place(hub_id, language, split), SPLIT_NAMES[split])
    except NoSplit:
        return False
    return True


def _place(hub_id: str, language: str, split: str) -> tuple[str, str]:
    """Return the data set and the configuration that the rows of a split are read from."""
    known, other = DATA_SETS.get(hub_id), english_rows(hub_id, language, split)
    if other is not None:
        return other.hub_id, other.configuration
    if known is not None and split not in known.splits:
        if known.english:
            advice = "translate the English rows (flare translate, then flare train --target-text mt)"
        else:
            advice = (
                "put your own rows and the test split of the data set, with the same columns, into one folder per "
                "language, and give the parent folder of these folders with --data"
            )
        raise NoSplit(f"{hub_id} has no {split} split, only {', '.join(known.splits)}: {advice}")
    return hub_id, language if known is None else known.configuration(language)


def check_parallel(hub_id: str, source: str, target: str) -> None:
    """Raise DataError if a data set's rows in two languages are not translations of each other."""
    known = DATA_SETS.get(hub_id)
    if known is not None and not known.parallel:
        raise DataError(
            f"{hub_id}: its {target} and {source} rows are not translations of each other. Use machine-translated "
            "text: flare translate, then flare train with --source-text mt (the target's rows and their translation) "
            "or --target-text mt"
        )


def hub_note(hub_id: str, split: str, languages: Iterable[str]) -> list[str]:
    """Return notes on where the rows of a split come from, for the languages that are read."""
    if hub_id != _TYDIQA:
        others = [english_rows(hub_id, name, split) for name in languages]
        return [f"{split}: {other.note} ({other.hub_id})" for other in others if other is not None]
    if split == "test":
        return ["test: the data set has no test split; its validation split is used instead"]
    share = "one" if split == "valid" else "nine"
    return [
        f"{split}: {share} in ten of the data set's training rows, chosen by their id (the data set's validation split "
        "serves as the test split)"
    ]


def _read_tydiqa(task: Task, hub_id: str, language: str, split: str) -> list[Example]:
    name = DATA_SETS[hub_id].configuration(language)
    rows = _load(hub_id, _TYDIQA_CONFIGURATION, ("validation",) if split == "test" else ("train",))
    rows = rows.filter(lambda row: _in_split(row["id"], name, split))
    return _examples(rows, task, f"{hub_id}, {name}/{split}")


def _in_split(row_id: str, language: str, split: str) -> bool:
    if row_id.partition("-")[0] != language:
        return False
    for_valid = int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % _VALID_FRACTION == 0
    return split == "test" or for_valid == (split == "valid")


def _load(hub_id: str, configuration: str, splits: tuple[str, ...]) -> Any:
    """Return the first of the splits that can be loaded.

    Raises:
        NoSplit: the data set has none of the splits.
        DataError: loading failed for another reason.
    """
    from datasets import load_dataset

    failures, unknown = [], True
    for split in splits:
        try:
            try:
                return load_dataset(hub_id, configuration, split=split)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                # For data sets with a loading script, the hub has a copy converted to Parquet in this revision.
                return load_dataset(hub_id, configuration, split=split, revision="refs/convert/parquet")
        except Exception as error:  # the hub, the network and the files raise many different types
            failures.append(f"{split}: {type(error).__name__}: {' '.join(str(error).split())}")
            unknown = unknown and isinstance(error, ValueError) and "unknown split" in str(error).lower()
            if isinstance(error, ConnectionError) or type(error).__name__ in _NETWORK_ERRORS:
                break  # every further attempt would wait minutes for its timeout
    raise (NoSplit if unknown else DataError)(
        f"--data {hub_id}: neither a folder on this machine nor a data set that can be loaded from the hub with "
        f"configuration {configuration!r} and split {splits[0]!r} ({'; '.join(failures)})"
    )


def _examples(rows: Any, task: Task, where: str, renamed: Mapping[str, str] | None = None) -> list[Example]:
    name_of = class_names(rows.features).get(task.label_column)
    if name_of is not None and renamed:
        hub_name = name_of
        name_of = lambda index: renamed.get(hub_name(index), hub_name(index))  # noqa: E731
    return examples_from(rows.to_list(), list(rows.column_names), task, where, name_of)  # faster than its iterator
