"""Load the rows of one experiment: texts in the target language and the same texts in the source language.

Each language's texts are either written by people ("gold") or machine-translated ("mt"). `flare translate` writes
translations to TRANSLATIONS/<from>-<to>/<split>.jsonl and keeps the ids. Machine-translated text in the target language
is therefore in the folder <source>-<target>. Machine-translated source text is in the folder <target>-<source>.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..utils.errors import UserError
from ..utils.json_files import read_object
from .alignment import align, without_ids
from .data_error import DataError
from .digest import digest_of_texts
from .examples import Example, Pair
from .files import find_file
from .reading import Data, data_notes, read_split
from .registry import Task

#: Kinds of text: written by people, or machine-translated.
TEXTS = ("gold", "mt")
#: File in a folder of translations, in which `flare translate` records how they were made.
PROVENANCE = "provenance.json"


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
    """Read one split in the target language and optionally in the source language, and pair the rows.

    Args:
        task: the task. If its labels are known, rows with other labels are an error.
        data: a folder, a hub id, `ParallelColumns`, or None for the task's data set on the hub.
        source_language: name of a folder, or a language of the hub's data set.
        target_language: name of a folder, or a language of the hub's data set.
        split: "train", "valid" or "test".
        translations: folder written by `flare translate`; needed for "mt".
        target_text: "gold": human text in the target language; "mt": translated from the source language.
        source_text: "gold": human text in the source language; "mt": translated from the target language; None: no
            source.
        limit: maximum number of pairs; the first pairs are kept.

    Returns:
        The pairs in the order of the target rows, and notes for the user: where rows on the hub come from, whether rows
        were paired by position, how many were dropped and why, and whether `limit` left rows out.

    Raises:
        DataError: a file, column or row is missing or wrong, no rows match, or rows without ids have changed since they
            were translated.
        UserError: an invalid option.
    """
    if target_text not in TEXTS or source_text not in (*TEXTS, None):
        raise UserError(
            f"target_text must be {' or '.join(TEXTS)}, and source_text {', '.join(TEXTS)} or None; got "
            f"target_text={target_text!r} and source_text={source_text!r}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more; got {limit}")
    texts = ((source_language, source_text), (target_language, target_text))
    gold = [language for language, text in texts if text == "gold"]
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
        if translations is not None and {target_text, source_text} == set(TEXTS):
            language, other, originals = (
                (target_language, source_language, targets)
                if target_text == "gold"
                else (source_language, target_language, sources)
            )
            _check_positions(task, Path(translations).expanduser() / f"{language}-{other}", split, originals)
        suffix = {"gold": "", "mt": " (mt)"}
        pairs, alignment_notes = align(
            targets,
            sources,
            target_name=target_language + suffix[target_text],
            source_name=source_language + suffix[source_text],
            split=split,
            translated="mt" in (target_text, source_text),
        )
        notes += alignment_notes
    if limit is not None and len(pairs) > limit:
        notes.append(f"{split}: the first {limit} of {len(pairs)} rows are used")
        pairs = pairs[:limit]
    return pairs, notes


def read_translation(
    task: Task, translations: str | os.PathLike[str] | None, source: str, target: str, split: str
) -> list[Example]:
    """Return the translation of a split from one language into another.

    Raises:
        DataError: the translation does not exist; the message gives the command that creates the translation.
        UserError: `translations` is None.
    """
    name = f"{source}-{target}"
    if translations is None:
        raise UserError(f"translated text is needed ({name}, {split}): give its folder with --translations")
    folder = Path(translations).expanduser()
    if find_file(folder, name, split) is None:
        unfinished = " (it was started but not finished)" if list((folder / name).glob(f"{split}.partial*")) else ""
        raise DataError(
            f"{folder / name} has no translated {split} split{unfinished}; create it with flare translate --task "
            f"{task.name} --source {source} --target {target} --splits {split} --direction to-target --output {folder}"
        )
    return read_split(replace(task, id_columns=("id",)), folder, name, split)


def _check_positions(task: Task, folder: Path, split: str, originals: Sequence[Example]) -> None:
    """Check that the translation of rows without ids was made from these rows, because it is paired by position.

    The first rows may have been translated alone (`flare translate --limit`). The texts are compared if the provenance
    has their digest (earlier versions did not write it) and the text columns are the same.

    Raises:
        DataError: the rows have changed since they were translated, or the provenance cannot be read.
    """
    path = folder / PROVENANCE
    if not without_ids(originals) or not path.is_file():
        return
    try:
        provenance = read_object(path)
        entry = provenance["splits"].get(split)
        if entry is None:
            return  # a translation that flare translate did not write
        count = entry["counts"]["rows"]
        digest = entry.get("texts_sha256") if provenance["text_columns"] == list(task.text_columns) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} does not say which rows the {split} split was translated from ({type(error).__name__}: {error}), "
            "and the rows have no ids; restore the file, or translate the split again into another folder"
        ) from error
    if len(originals) >= count and digest in (None, digest_of_texts(originals[:count])):
        return
    found = f"only {len(originals)} rows" if len(originals) < count else f"other texts in its first {count} rows"
    raise DataError(
        f"{folder}: the {split} split was translated from {count} rows without ids, and the data now has {found}, so "
        "rows and translations cannot be paired by position. Restore the rows, or translate them again (flare "
        "translate with another --output); with an id column, rows may be removed and moved"
    )
