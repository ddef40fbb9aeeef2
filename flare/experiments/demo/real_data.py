"""Parallel data from a folder or the Hugging Face hub, as the demo wants them.

A folder has one sub-folder per language, each with a train and a test split of the columns id, text and label (the
layout of NusaX-Senti; `..tasks.files` has the details). From the hub, `datasets.load_dataset(id, language)` must
give the same splits and columns; there languages are named as the data set's configurations are (NusaX-Senti: "eng",
"ace"). Rows of two languages belong together where they have the same id; what has no counterpart is dropped and
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..tasks import Example, get_task, read_split
from ..tasks.alignment import match
from ..tasks.examples import POSITION_PREFIX
from ..tasks.label_inference import inferred_labels, label_table
from ..utils.errors import UserError
from .corpus import Pair
from .demo_settings import DemoError

_TASK = get_task("classification")


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
    table: list[str]  # labels and their counts


def load_parallel(data: str, source: str, target: str) -> ParallelData:
    """Read and align two languages.

    Args:
        data: a folder (see the module) or a hub id.
        source: the language the base is fine-tuned on.
        target: the language the adapters are for.

    Raises:
        DemoError: data, a language, a split or a column is missing, or nothing aligns.
    """
    notes: list[str] = []
    splits: dict[str, list[Pair]] = {}
    finetune: list[Row] = []
    for split in ("train", "test"):
        source_rows, target_rows = _read(data, source, split), _read(data, target, split)
        if split == "train":
            finetune = source_rows
        splits[split], news = align(source_rows, target_rows, source, target, split)
        notes += news
        if not splits[split]:
            raise DemoError(
                f"--data {data}: no id of {split} occurs in both {source} ({len(source_rows)} rows) and {target} "
                f"({len(target_rows)} rows); rows belong together by their id column"
            )
    try:
        counts = inferred_labels(
            [Example(row.id, label=row.label) for row in finetune], f"--data {data}, {source}/train"
        )
    except UserError as error:
        raise DemoError(_without_options(error)) from error
    labels = tuple(counts)
    unknown = sorted({pair.label for pair in (*splits["train"], *splits["test"])} - set(labels))
    if unknown:
        raise DemoError(f"--data {data}: {target} has labels that {source}/train lacks: {', '.join(unknown)}")
    if len(labels) < 2:
        raise DemoError(f"--data {data}: {source}/train has only the label {labels}; two or more are needed")
    return ParallelData(labels, finetune, splits["train"], splits["test"], notes, label_table(counts))


def _without_options(error: UserError) -> str:
    """Return an error's text; where it advises options that other commands have, say that this one has them not."""
    named = [name for name in ("--text-columns", "--label-column", "--labels") if name in str(error)]
    if not named:
        return str(error)
    return f"{error} ({' and '.join(named)}: options of flare finetune and train, which the demo does not have)"


def align(
    source_rows: list[Row], target_rows: list[Row], source: str = "source", target: str = "target", split: str = "rows"
) -> tuple[list[Pair], list[str]]:
    """Pair rows by id, in the target's order; return the pairs and a line for every kind of row that was dropped.

    Dropped: ids without a counterpart, ids that occur twice in a language (which text belongs to which is unknown),
    pairs whose labels differ, and pairs with an empty text.
    """
    pairs, drops = match(_examples(target_rows), _examples(source_rows), target, source, split)
    made = [
        Pair(pair.target.id, pair.source.texts["text"], pair.target.texts["text"], pair.target.label or "")
        for pair in pairs
        if pair.source is not None
    ]
    return made, [drop.text for drop in drops]


def _examples(rows: Sequence[Row]) -> list[Example]:
    return [Example(row.id, {"text": row.text}, row.label) for row in rows]


def _read(data: str, language: str, split: str) -> list[Row]:
    try:
        found = read_split(_TASK, data, language, split)
    except UserError as error:
        raise DemoError(_without_options(error)) from error
    if found[0].id.startswith(POSITION_PREFIX):
        raise DemoError(f"--data {data}: {language}/{split} has no column id, by which rows belong together")
    return [Row(row.id, row.texts["text"], row.label or "") for row in found]
