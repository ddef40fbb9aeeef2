"""Labels that nobody named: taken from the training rows, looked at, and shown."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from .errors import DataError
from .examples import Example

_ENOUGH = 10  # rows from which on a label of one row is taken for a mistake


def inferred_labels(rows: Sequence[Example], where: str) -> dict[str, int]:
    """Return the labels of training rows with their counts; integers by value, names by the alphabet.

    A row may have several labels.

    Raises:
        DataError: labels that are numbers with fractions, that differ in upper and lower case only, or that one row of
            ten or more has; the message names the row and what to do.
    """
    labels = [row.label if isinstance(row.label, tuple) else (row.label or "",) for row in rows]
    counts = Counter(label for names in labels for label in names)
    row_of = {label: index for index, names in reversed(list(enumerate(labels))) for label in names}

    def place(label: str) -> str:
        return f"{where}, row {row_of[label]} (counted from 0, id {rows[row_of[label]].id}): the label {label!r}"

    fractions = [label for label in counts if _fraction(label)]
    if fractions and all(_number(label) for label in counts):
        raise DataError(
            f"{place(fractions[0])} is a number with a fraction: this looks like a regression. Use --task regression, "
            "name another --label-column, or list the classes with --labels"
        )
    lower: dict[str, str] = {}
    for label in sorted(counts, key=lambda one: -counts[one]):
        other = lower.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            raise DataError(
                f"{place(label)} ({_rows(counts[label])}) differs from {other!r} ({_rows(counts[other])}) in letters' "
                "case or spaces only; write them alike, or list the labels with --labels"
            )
    alone = [label for label in counts if counts[label] == 1]
    if alone and len(rows) >= _ENOUGH:
        near = difflib.get_close_matches(alone[0], [label for label in counts if counts[label] > 1], 1)
        many = f"; so have {len(alone) - 1} more labels" if len(alone) > 1 else ""
        raise DataError(
            f"{place(alone[0])} has one row only{many}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'} Correct it, or list the labels with --labels if they "
            "are meant"
        )
    return {label: counts[label] for label in sorted(counts, key=_order)}


def inferred_tags(rows: Sequence[Example]) -> dict[str, int]:
    """Return the tags of training rows with their counts: O, then B- and I- of each type, both where one is there."""
    counts = Counter(tag for row in rows for tag in row.label or ())
    types = sorted({tag[2:] for tag in counts if tag != "O"})
    return {tag: counts[tag] for tag in ("O", *(f"{mark}-{one}" for one in types for mark in "BI"))}


def label_table(counts: dict[str, int]) -> list[str]:
    """Lines of a table: index, label, rows."""
    width = max(map(len, (*counts, "label")))
    head = f"{'index':>5}  {'label':<{width}}  {'rows':>7}"
    return [head, *(f"{index:>5}  {label:<{width}}  {n:>7}" for index, (label, n) in enumerate(counts.items()))]


def _order(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (-1, label)


def _number(label: str) -> bool:
    try:
        return float(label) == float(label)
    except ValueError:
        return False


def _fraction(label: str) -> bool:
    return _number(label) and not float(label).is_integer()


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
