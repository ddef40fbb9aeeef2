"""Collate rows of multiple-choice tasks. A row has n texts, one for each choice.

The texts of all rows are collated like rows of one text, and the resulting tensors are grouped by row again.

Shapes: B rows, n choices per row, m the common width of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding

_PER_TEXT = ("input_ids", "attention_mask", "token_type_ids")
_COLUMNS = tuple(f"{prefix}{name}" for prefix in ("", "source_") for name in _PER_TEXT)


def choices_of(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of choices per row, or None if rows have one text each.

    Raises:
        ValueError: rows have different numbers of choices.
    """
    counts = {_choices(row) for row in rows}
    if len(counts) > 1:
        raise ValueError(
            f"rows of one batch have different numbers of choices ({', '.join(sorted(map(str, counts)))}; None is a "
            "row of one text without choices); give every row the same number of choices"
        )
    return next(iter(counts), None)


def split_choices(rows: Sequence[Mapping[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return one row per choice, without labels.

    Raises:
        ValueError: the number of texts in a column is not ``n``.
    """
    choices: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        columns = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
        for name, texts in columns.items():
            if len(texts) != n:
                raise ValueError(
                    f"row {index}: {name} has {len(texts)} texts, but input_ids has {n}; give one text per choice"
                )
        choices += [{name: texts[choice] for name, texts in columns.items()} for choice in range(n)]
    return choices


def batch_of_choices(
    rows: Sequence[Mapping[str, Any]], n: int, collate: Callable[[list[dict[str, Any]]], BatchEncoding]
) -> BatchEncoding:
    """Return a batch of (B, n, m) tensors and, if the rows have labels, ``labels`` (B).

    Args:
        rows: ``input_ids``, ``source_input_ids``, their masks and token types are lists of n texts; ``labels`` is the
            index of the correct text.
        n: the number of choices, from :func:`choices_of`.
        collate: makes a batch of tensors (B * n, m) from B * n rows of one text each.
    """
    flat = collate(split_choices(rows, n))
    batch = {name: value.unflatten(0, (len(rows), n)) for name, value in flat.items()}
    name = next((name for name in ("labels", "label") if name in rows[0]), None)
    if name is not None:
        batch["labels"] = torch.tensor([int(row[name]) for row in rows])
    return BatchEncoding(batch)


def _choices(row: Mapping[str, Any]) -> int | None:
    ids = row.get("input_ids")
    if ids is None or not len(ids):
        return None
    nested = isinstance(ids[0], list | tuple) or getattr(ids[0], "ndim", 0) > 0
    return len(ids) if nested else None
