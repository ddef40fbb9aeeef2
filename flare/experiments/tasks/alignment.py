"""Which row of one language belongs to which row of another, and what is left out because none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse

from .errors import DataError, some_ids
from .examples import Example, Pair

#: Ids of rows that came without any: their position, so marked.
POSITION = "#"
_NO_TRANSLATIONS = (
    ". Languages that are not translations of each other need machine-translated text (flare translate, then "
    "flare train --source-text mt or --target-text mt)"
)


def position_id(index: int) -> str:
    """The id of a row that has none."""
    return f"{POSITION}{index}"


@dataclass(frozen=True)
class Drop:
    """Rows of one kind that were left out: why, and their ids."""

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
    """Pair rows by id, in the target's order.

    Left out and noted, with counts and ids: ids without a counterpart, ids that occur twice in a language (which text
    belongs to which is unknown), pairs whose labels differ (tags of words may), and pairs with an empty text. Where a
    language came without ids, rows are paired by position, if there are equally many.

    Args:
        targets, sources: rows of the two languages.
        target_name, source_name, split: for the messages.
        translated: one of the two is a translation of the other, so that position ids are ids like others.

    Returns:
        The pairs, and a line for every kind of row that was left out.

    Raises:
        DataError: nothing aligns, or there are no ids and not equally many rows.
    """
    notes = []
    if not translated and (_without_ids(targets) or _without_ids(sources)):
        if len(targets) != len(sources):
            raise DataError(
                f"{split}: rows of {target_name} ({len(targets)}) and {source_name} ({len(sources)}) cannot be "
                "aligned: without an id column in both there must be equally many rows, in one order. Add an id column"
            )
        notes.append(
            f"{split}: {target_name} and {source_name} are aligned by position, they have no id column in common"
        )
        sources = [replace(s, id=t.id) for t, s in zip(targets, sources, strict=True)]
    pairs, drops = match(targets, sources, target_name, source_name, split)
    if not pairs:
        told = ("" if translated else _NO_TRANSLATIONS) + "".join(f"\n  {drop}" for drop in drops)
        raise DataError(
            f"{split}: no row of {target_name} ({len(targets)} rows) belongs to a row of {source_name} "
            f"({len(sources)} rows); rows belong together by their id column{told}"
        )
    return pairs, [*notes, *map(str, drops)]


def _without_ids(rows: Sequence[Example]) -> bool:
    """Whether all ids are positions; a row's own id may begin as one of them does."""
    return bool(rows) and all(row.id == position_id(index) for index, row in enumerate(rows))


def match(
    targets: Sequence[Example], sources: Sequence[Example], target_name: str, source_name: str, split: str
) -> tuple[list[Pair], list[Drop]]:
    """The pairs of `align`, by id, and what was left out; no pair at all is no error."""
    drops: list[Drop] = []

    def drop(text: str, ids: Sequence[str]) -> None:
        if ids:
            drops.append(Drop(f"{split}: {len(ids)} {text}", tuple(ids)))

    def unique(rows: Sequence[Example], language: str) -> dict[str, Example]:
        count: dict[str, int] = {}
        for row in rows:
            count[row.id] = count.get(row.id, 0) + 1
        drop(f"rows of {language} dropped, their ids occur more than once", [r.id for r in rows if count[r.id] > 1])
        return {row.id: row for row in rows if count[row.id] == 1}

    theirs, ours = unique(sources, source_name), unique(targets, target_name)
    for these, others, language, other in (
        (ours, theirs, target_name, source_name),
        (theirs, ours, source_name, target_name),
    ):
        drop(f"rows of {language} dropped, no row of {other} has their id", list(filterfalse(others.get, these)))
    both = [Pair(row, theirs[key]) for key, row in ours.items() if key in theirs]
    same = [pair for pair in both if _same_label(pair)]
    drop("pairs dropped, their labels differ", _missing(both, same))
    full = [pair for pair in same if all(text.strip() for text in _texts(pair))]
    drop("pairs dropped, a text is empty", _missing(same, full))
    return full, drops


def _same_label(pair: Pair) -> bool:
    """Whether both rows have one label; the tags of words are each language's own."""
    return pair.source is not None and (bool(pair.target.words) or pair.target.label == pair.source.label)


def _texts(pair: Pair) -> list[str]:
    source = pair.source.texts if pair.source else {}
    return [*pair.target.texts.values(), *source.values()]


def _missing(before: Sequence[Pair], after: Sequence[Pair]) -> list[str]:
    kept = {pair.target.id for pair in after}
    return [pair.target.id for pair in before if pair.target.id not in kept]
