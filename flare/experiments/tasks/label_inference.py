"""Infer the labels of a task from its training rows, and check the labels for likely mistakes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from .data_error import DataError
from .examples import Example

_MIN_ROWS = 10  # among at least this many rows, a label that occurs only once is reported as a mistake


def inferred_labels(rows: Sequence[Example], where: str) -> dict[str, int]:
    """Return {label: number of rows with this label}. Names come first, alphabetically, then integers by value.

    A row may have several labels.

    Raises:
        DataError: all labels are numbers and some have a fraction, two labels differ only in case or spaces, or a label
            occurs in only one of ten or more rows. The message names the row and says what to do.
    """
    labels = [row.label if isinstance(row.label, tuple) else (row.label or "",) for row in rows]
    counts = Counter(label for names in labels for label in names)
    first_row = {label: index for index, names in reversed(list(enumerate(labels))) for label in names}

    def place(label: str) -> str:
        index = first_row[label]
        return f"{where}, row {index} (counted from 0, id {rows[index].id}): the label {label!r}"

    fractions = [label for label in counts if _is_fraction(label)]
    if fractions and all(_is_number(label) for label in counts):
        raise DataError(
            f"{place(fractions[0])} is a number with a fraction: this looks like a regression. Use --task regression, "
            "name another --label-column, or list the classes with --labels"
        )
    spellings: dict[str, str] = {}
    for label in sorted(counts, key=lambda name: -counts[name]):
        other = spellings.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            raise DataError(
                f"{place(label)} ({_row_count(counts[label])}) differs from {other!r} ({_row_count(counts[other])}) "
                "only in upper and lower case or spaces; use one spelling, or list the labels with --labels"
            )
    single = [label for label in counts if counts[label] == 1]
    if single and len(rows) >= _MIN_ROWS:
        similar = difflib.get_close_matches(single[0], [label for label in counts if counts[label] > 1], 1)
        others = f"; so do {len(single) - 1} more labels" if len(single) > 1 else ""
        raise DataError(
            f"{place(single[0])} occurs in one row only{others}"
            f"{f'; did you mean {similar[0]!r}?' if similar else '.'} Correct it, or, if it is intended, list the "
            "labels with --labels"
        )
    return {label: counts[label] for label in sorted(counts, key=_sort_key)}


def inferred_tags(rows: Sequence[Example]) -> dict[str, int]:
    """Return {IOB2 tag: number of words with this tag}: first O, then B- and I- of every type in the training rows."""
    counts = Counter(tag for row in rows for tag in row.label or ())
    types = sorted({tag[2:] for tag in counts if tag != "O"})
    return {tag: counts[tag] for tag in ("O", *(f"{mark}-{name}" for name in types for mark in "BI"))}


def label_table(counts: dict[str, int], counted: str = "rows") -> list[str]:
    """Return the lines of a table of labels, with the columns index, label and what the counts are of."""
    width = max(map(len, (*counts, "label")))
    head = f"{'index':>5}  {'label':<{width}}  {counted:>7}"
    return [head, *(f"{index:>5}  {label:<{width}}  {n:>7}" for index, (label, n) in enumerate(counts.items()))]


def _sort_key(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (-1, label)


def _is_number(label: str) -> bool:
    try:
        return float(label) == float(label)
    except ValueError:
        return False


def _is_fraction(label: str) -> bool:
    return _is_number(label) and not float(label).is_integer()


def _row_count(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
