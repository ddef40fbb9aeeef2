"""Read parallel data for the demo from a folder or from the Hugging Face hub.

A folder has one sub-folder per language, each with a train and a test split with the columns id, text and label (the
layout of NusaX-Senti; see `..tasks.files`). On the hub, `datasets.load_dataset(id, language)` must return the same
splits and columns; the languages are the names of the data set's configurations (NusaX-Senti: "eng", "ace"). Rows of
two languages are paired by id. `align` says which rows are dropped.
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
from .corpus import SentencePair
from .demo_settings import DemoError

_TASK = get_task("classification")


class LabelledText(NamedTuple):
    """A labelled text in one language."""

    id: str
    text: str
    label: str


@dataclass(frozen=True)
class ParallelData:
    """Rows of two languages.

    Attributes:
        labels: all labels that occur in `finetune`.
        finetune: training rows in the source language, to fine-tune the base model on.
        train: pairs to train the adapters on.
        test: pairs to evaluate on.
        notes: lines that say how many rows were dropped, and why.
        table: lines that list the labels and how often each occurs in `finetune`.
    """

    labels: tuple[str, ...]
    finetune: list[LabelledText]
    train: list[SentencePair]
    test: list[SentencePair]
    notes: list[str]
    table: list[str]


def load_parallel(data: str, source: str, target: str) -> ParallelData:
    """Read and pair the rows of two languages.

    Args:
        data: a folder (see the module's docstring) or a hub id.
        source: language that the base model is fine-tuned on.
        target: language that the adapters are trained for.

    Raises:
        DemoError: the data, a language, a split or a column is missing, no rows can be paired, the target language has
            a label that the source language's training rows lack, or there is only one label.
    """
    notes: list[str] = []
    splits: dict[str, list[SentencePair]] = {}
    finetune: list[LabelledText] = []
    for split in ("train", "test"):
        source_rows, target_rows = _read(data, source, split), _read(data, target, split)
        if split == "train":
            finetune = source_rows
        splits[split], dropped = align(source_rows, target_rows, source, target, split)
        notes += dropped
        if not splits[split]:
            raise DemoError(
                f"--data {data}: no row of {source}/{split} ({len(source_rows)} rows) can be paired with a row of "
                f"{target}/{split} ({len(target_rows)} rows); rows with the same id, the same label and non-empty "
                f"texts are paired. {'; '.join(dropped)}"
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
        raise DemoError(
            f"--data {data}: {source}/train has only the label {labels[0]!r}; two or more labels are needed"
        )
    return ParallelData(labels, finetune, splits["train"], splits["test"], notes, label_table(counts))


def _without_options(error: UserError) -> str:
    """Return the text of an error. If the text names options that the demo does not have, add that they are missing."""
    options = [name for name in ("--text-columns", "--label-column", "--labels") if name in str(error)]
    if not options:
        return str(error)
    return f"{error} (the demo does not have {' and '.join(options)}: only flare finetune and flare train do)"


def align(
    source_rows: list[LabelledText],
    target_rows: list[LabelledText],
    source: str = "source",
    target: str = "target",
    split: str = "rows",
) -> tuple[list[SentencePair], list[str]]:
    """Pair rows by id, in the order of the target rows.

    These rows are dropped: rows whose id is missing in the other language, rows whose id occurs more than once in one
    of the languages (it is not clear which texts belong together), pairs with two different labels, and pairs with an
    empty text.

    Returns:
        The pairs, and one line per reason for dropping rows.
    """
    matched, drops = match(_examples(target_rows), _examples(source_rows), target, source, split)
    pairs = [
        SentencePair(pair.target.id, pair.source.texts["text"], pair.target.texts["text"], pair.target.label or "")
        for pair in matched
        if pair.source is not None
    ]
    return pairs, [drop.text for drop in drops]


def _examples(rows: Sequence[LabelledText]) -> list[Example]:
    return [Example(row.id, {"text": row.text}, row.label) for row in rows]


def _read(data: str, language: str, split: str) -> list[LabelledText]:
    try:
        examples = read_split(_TASK, data, language, split)
    except UserError as error:
        raise DemoError(_without_options(error)) from error
    if examples[0].id.startswith(POSITION_PREFIX):
        raise DemoError(
            f"--data {data}: {language}/{split} has no column id; the demo pairs rows of two languages by this column"
        )
    return [LabelledText(row.id, row.texts["text"], row.label or "") for row in examples]
