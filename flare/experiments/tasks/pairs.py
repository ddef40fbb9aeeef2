"""The rows of one experiment: target-language texts and their source-language counterparts, human or translated.

`flare translate` writes the translation of <from> texts into <to> to TRANSLATIONS/<from>-<to>/<split>.jsonl, with the
ids of what was translated. So the machine-translated text of target language L is in <source>-L, and the
machine-translated source of L's human text in L-<source>.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..utils.errors import UserError
from .alignment import align
from .errors import DataError
from .examples import Example, Pair
from .files import find_file
from .reading import Data, data_notes, read_split
from .registry import Task

TEXTS = ("gold", "mt")


def load_pairs(
    task: Task,
    data: Data,
    source_language: str,
    target_language: str,
    split: str,
    *,
    translations: str | os.PathLike[str] | None = None,
    target_text: str = "gold",
    source_text: str | None = "gold",
    limit: int | None = None,
) -> tuple[list[Pair], list[str]]:
    """Read one split in the target language and, where wanted, in the source language, and pair the rows.

    Args:
        task: the task; where its labels are known, all others are refused.
        data: a folder, a hub id, `ParallelColumns`, or None for the task's data set on the hub.
        source_language, target_language: names of folders, or languages of the hub's data set.
        split: "train", "valid" or "test".
        translations: folder that `flare translate` wrote; needed for "mt".
        target_text: "gold": the target language's own rows; "mt": the source language's, translated.
        source_text: "gold": the source language's own rows; "mt": the target language's, translated; None: no source.
        limit: keep at most so many pairs, the first ones.

    Returns:
        The pairs in the target's order, and a line for everything a user should know (rows left out, with counts).

    Raises:
        DataError: a file, column or row that is missing or wrong, or nothing aligns.
        UserError: an option that does not fit.
    """
    if target_text not in TEXTS or source_text not in (*TEXTS, None):
        raise UserError(
            f"target text and source text are {' or '.join(TEXTS)} (source: or none); got {target_text!r} and "
            f"{source_text!r}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more; got {limit}")
    own = ((source_language, source_text), (target_language, target_text))
    gold = [language for language, text in own if text == "gold"]
    notes = data_notes(task, data, split, gold) if gold else []

    def read(text: str, language: str, other: str) -> list[Example]:
        if text == "gold":
            return read_split(task, data, language, split)
        return read_translation(task, translations, other, language, split)

    targets = read(target_text, target_language, source_language)
    if source_text is None:
        pairs = [Pair(row) for row in targets]
    else:
        sources = read(source_text, source_language, target_language)
        mark = {"gold": "", "mt": " (mt)"}
        pairs, news = align(
            targets,
            sources,
            target_name=target_language + mark[target_text],
            source_name=source_language + mark[source_text],
            split=split,
            translated="mt" in (target_text, source_text),
        )
        notes += news
    if limit is not None and len(pairs) > limit:
        notes.append(f"{split}: the first {limit} of {len(pairs)} rows are used")
        pairs = pairs[:limit]
    return pairs, notes


def read_translation(
    task: Task, translations: str | os.PathLike[str] | None, source: str, target: str, split: str
) -> list[Example]:
    """The translation of a split from one language into another.

    Raises:
        DataError: it is not there; the message says which command makes it.
    """
    name = f"{source}-{target}"
    if translations is None:
        raise UserError(f"translated text was asked for ({name}, {split}): name its folder with --translations")
    folder = Path(translations).expanduser()
    if find_file(folder, name, split) is None:
        unfinished = " (it has been begun and not finished)" if list((folder / name).glob(f"{split}.partial*")) else ""
        raise DataError(
            f"{folder / name} has no translated {split} split{unfinished}; make it with flare translate --task "
            f"{task.name} --source {source} --target {target} --splits {split} --direction to-target --output {folder}"
        )
    return read_split(replace(task, id_columns=("id",)), folder, name, split)
