"""Match the rows of two languages, and report the rows that have no counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse

from .data_error import DataError, some_ids
from .examples import Example, Pair, position_id

_NO_TRANSLATIONS = (
    ". Languages that are not translations of each other need machine-translated text (flare translate, then "
    "flare train --source-text mt or --target-text mt)"
)


@dataclass(frozen=True)
class Drop:
    """Rows that were dropped for one reason.

    Attributes:
        text: the reason, with the count.
        ids: ids of the dropped rows.
    """

    text: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text} {some_ids(self.ids)}"


def align(
    targets: Sequence[Example],
    sources: Sequence[Example],
    *,
    target_name: str = "target",
    source_name: str = "source",
    split: str = "rows",
    translated: bool = False,
) -> tuple[list[Pair], list[str]]:
    """Pair the rows of two languages by id, in the order of the target rows.

    A row is dropped if no row of the other language has its id, if its id occurs more than once in its language (it is
    then ambiguous which texts belong together), if the labels of the pair differ (the tags of words are not compared),
    or if a text of the pair is empty. Dropped rows are reported with their count and some of their ids.

    If one of the languages has no ids and `translated` is False, rows are paired by position, and both languages must
    have equally many rows.

    Args:
        targets: rows in the target language.
        sources: rows in the source language.
        target_name: name of the target language in messages.
        source_name: name of the source language in messages.
        split: name of the split in messages.
        translated: whether the rows of one language were machine-translated from the rows of the other. Translation
            keeps the ids, so rows are then matched by id even if the ids are only positions.

    Returns:
        The pairs, and notes: one line for each reason for which rows were dropped, and one line if rows were paired by
        position.

    Raises:
        DataError: no rows match, or a language has no ids and the two languages have different numbers of rows.
    """
    notes = []
    if not translated and (without_ids(targets) or without_ids(sources)):
        if len(targets) != len(sources):
            raise DataError(
                f"{split}: rows of {target_name} ({len(targets)}) and {source_name} ({len(sources)}) cannot be "
                "aligned: without an id column in both languages, both must have equally many rows in the same order. "
                "Add an id column"
            )
        notes.append(
            f"{split}: {target_name} and {source_name} are aligned by position: they have no id column in common"
        )
        sources = [replace(s, id=t.id) for t, s in zip(targets, sources, strict=True)]
    pairs, drops = match(targets, sources, target_name, source_name, split)
    if not pairs:
        details = ("" if translated else _NO_TRANSLATIONS) + "".join(f"\n  {drop}" for drop in drops)
        raise DataError(
            f"{split}: no row of {target_name} ({len(targets)} rows) matches a row of {source_name} "
            f"({len(sources)} rows); rows are matched by their id column{details}"
        )
    return pairs, [*notes, *map(str, drops)]


def without_ids(rows: Sequence[Example]) -> bool:
    """Return whether the rows have no ids of their own: every id is made from the row's position (`position_id`).

    All rows are compared, because one real id may happen to look like a position.
    """
    return bool(rows) and all(row.id == position_id(index) for index, row in enumerate(rows))


def match(
    targets: Sequence[Example], sources: Sequence[Example], target_name: str, source_name: str, split: str
) -> tuple[list[Pair], list[Drop]]:
    """Pair rows by id and return the pairs and the dropped rows; `align` says which rows are dropped.

    Unlike `align`, this function returns an empty list if no rows match.
    """
    drops: list[Drop] = []

    def drop(text: str, ids: Sequence[str]) -> None:
        if ids:
            drops.append(Drop(f"{split}: {len(ids)} {text}", tuple(ids)))

    def unique(rows: Sequence[Example], language: str) -> dict[str, Example]:
        count: dict[str, int] = {}
        for row in rows:
            count[row.id] = count.get(row.id, 0) + 1
        drop(
            f"rows of {language} dropped because their ids occur more than once",
            [r.id for r in rows if count[r.id] > 1],
        )
        return {row.id: row for row in rows if count[row.id] == 1}

    sources_by_id, targets_by_id = unique(sources, source_name), unique(targets, target_name)
    for rows, others, language, other in (
        (targets_by_id, sources_by_id, target_name, source_name),
        (sources_by_id, targets_by_id, source_name, target_name),
    ):
        drop(
            f"rows of {language} dropped because no remaining row of {other} has their id",
            list(filterfalse(others.get, rows)),
        )
    matched = [Pair(row, sources_by_id[key]) for key, row in targets_by_id.items() if key in sources_by_id]
    same_label = [pair for pair in matched if _same_label(pair)]
    drop("pairs dropped because their labels differ", _removed_ids(matched, same_label))
    pairs = [pair for pair in same_label if all(text.strip() for text in _texts(pair))]
    drop("pairs dropped because a text is empty", _removed_ids(same_label, pairs))
    return pairs, drops


def _same_label(pair: Pair) -> bool:
    """Return whether both rows have the same label, or the target has words, whose tags are not compared."""
    return pair.source is not None and (bool(pair.target.words) or pair.target.label == pair.source.label)


def _texts(pair: Pair) -> list[str]:
    source = pair.source.texts if pair.source else {}
    return [*pair.target.texts.values(), *source.values()]


def _removed_ids(before: Sequence[Pair], after: Sequence[Pair]) -> list[str]:
    remaining = {pair.target.id for pair in after}
    return [pair.target.id for pair in before if pair.target.id not in remaining]
