"""Parallel data from a folder or the Hugging Face hub.

A folder has one sub-folder per language, each with train.csv, valid.csv and test.csv of the columns id, text and label
(the layout of NusaX-Senti). From the hub, `datasets.load_dataset(id, language)` must give the same splits and columns;
there languages are named as the data set's configurations are (NusaX-Senti: "eng", "ace"). Rows of two languages
belong together where they have the same id; what has no counterpart is dropped and counted.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .corpus import Pair
from .settings import DemoError

COLUMNS = ("id", "text", "label")


class Row(NamedTuple):
    """One labelled text of one language."""

    id: str
    text: str
    label: str


@dataclass(frozen=True)
class ParallelData:
    """Source rows for fine-tuning, pairs for the adapters and for the evaluation, and what was dropped on the way."""

    labels: tuple[str, ...]
    finetune: list[Row]
    train: list[Pair]
    test: list[Pair]
    notes: list[str]


def load_parallel(data: str, source: str, target: str) -> ParallelData:
    """Read and align two languages.

    Args:
        data: a folder (see the module) or a hub id.
        source: the language the base is fine-tuned on.
        target: the language the adapters are for.

    Raises:
        DemoError: data, a language, a split or a column is missing, or nothing aligns.
    """
    read = _read_folder if Path(data).expanduser().is_dir() else _read_hub
    notes: list[str] = []
    splits: dict[str, list[Pair]] = {}
    finetune: list[Row] = []
    for split in ("train", "test"):
        source_rows, target_rows = read(data, source, split), read(data, target, split)
        if split == "train":
            finetune = source_rows
        splits[split], news = align(source_rows, target_rows, source, target, split)
        notes += news
        if not splits[split]:
            raise DemoError(
                f"--data {data}: no id of {split} occurs in both {source} ({len(source_rows)} rows) and {target} "
                f"({len(target_rows)} rows); rows belong together by their id column"
            )
    labels = tuple(sorted({row.label for row in finetune}))
    unknown = sorted({pair.label for pair in (*splits["train"], *splits["test"])} - set(labels))
    if unknown:
        raise DemoError(f"--data {data}: {target} has labels that {source}/train lacks: {', '.join(unknown)}")
    if len(labels) < 2:
        raise DemoError(f"--data {data}: {source}/train has only the label {labels}; two or more are needed")
    return ParallelData(labels, finetune, splits["train"], splits["test"], notes)


def align(
    source_rows: list[Row], target_rows: list[Row], source: str = "source", target: str = "target", split: str = "rows"
) -> tuple[list[Pair], list[str]]:
    """Pair rows by id, in the target's order; return the pairs and a line for every kind of row that was dropped.

    Dropped: ids without a counterpart, ids that occur twice in a language (which text belongs to which is unknown),
    pairs whose labels differ, and pairs with an empty text.
    """
    notes = []

    def unique(rows: list[Row], language: str) -> dict[str, Row]:
        count: dict[str, int] = {}
        for row in rows:
            count[row.id] = count.get(row.id, 0) + 1
        kept = {row.id: row for row in rows if count[row.id] == 1}
        if len(kept) < len(rows):
            notes.append(f"{split}: {len(rows) - len(kept)} rows of {language} dropped, their ids occur more than once")
        return kept

    sources, targets = unique(source_rows, source), unique(target_rows, target)
    for missing, language, other in (
        (targets.keys() - sources.keys(), target, source),
        (sources.keys() - targets.keys(), source, target),
    ):
        if missing:
            notes.append(f"{split}: {len(missing)} rows of {language} dropped, no row of {other} has their id")
    both = [(sources[key], row) for key, row in targets.items() if key in sources]
    same = [(s, t) for s, t in both if s.label == t.label]
    if len(same) < len(both):
        notes.append(f"{split}: {len(both) - len(same)} pairs dropped, their labels differ")
    full = [(s, t) for s, t in same if s.text.strip() and t.text.strip()]
    if len(full) < len(same):
        notes.append(f"{split}: {len(same) - len(full)} pairs dropped, a text is empty")
    return [Pair(t.id, s.text, t.text, t.label) for s, t in full], notes


def _read_folder(data: str, language: str, split: str) -> list[Row]:
    folder = Path(data).expanduser()
    path = folder / language / f"{split}.csv"
    if not path.parent.is_dir():
        there = sorted(item.name for item in folder.iterdir() if item.is_dir())
        raise DemoError(f"{folder} has no folder {language!r}; languages there: {', '.join(there) or 'none'}")
    if not path.is_file():
        raise DemoError(f"{path} is missing; every language needs train.csv and test.csv with {', '.join(COLUMNS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if lacking:
                raise DemoError(
                    f"{path} has no column {', '.join(lacking)}; it has {', '.join(reader.fieldnames or [])}"
                )
            return [Row(line["id"] or "", line["text"] or "", line["label"] or "") for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DemoError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error


def _read_hub(data: str, language: str, split: str) -> list[Row]:
    from datasets import ClassLabel, load_dataset

    if data.startswith((".", "/", "~")):
        raise DemoError(f"--data {data}: no such folder")
    try:
        try:
            rows: Any = load_dataset(data, language, split=split)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps its own conversion of data sets that come with a loading script.
            rows = load_dataset(data, language, split=split, revision="refs/convert/parquet")
    except Exception as error:  # the hub, the network and the data set's files each raise kinds of their own
        raise DemoError(
            f"--data {data}: neither a folder here nor a data set that can be loaded from the hub, with {language!r} "
            f"as its configuration and {split!r} as split ({type(error).__name__}: {error})"
        ) from error
    lacking = [name for name in COLUMNS if name not in rows.column_names]
    if lacking:
        raise DemoError(
            f"--data {data}: {language}/{split} has no column {', '.join(lacking)}; it has "
            f"{', '.join(rows.column_names)}"
        )
    feature = rows.features["label"]
    name = feature.int2str if isinstance(feature, ClassLabel) else str
    return [Row(str(row["id"]), row["text"] or "", name(row["label"])) for row in rows]
