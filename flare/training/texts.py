"""Parts of the collator: texts that are split into two parts at an index, and tensors made from their columns.

Shapes: B rows, m the common width of both texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Id of a position without a state. In FLARE MT (source states from a translation model), state i has id -2 - i.
NO_STATE = -1


@dataclass
class Text:
    """One text of one row: columns of equal length, and the index ``split`` that divides them into two parts.

    The part before ``split`` is padded on its left and the part from ``split`` on is padded on its right, so that
    ``split`` is at the same index in every text of a batch. With ``split = 0`` all padding is on the right, with
    ``split = len(text)`` on the left.

    Attributes:
        columns: ``input_ids``, ``attention_mask`` and, if the row has them, ``token_type_ids`` and ``labels``.
        split: the index that is aligned over the batch.
        target_offset: index at which the target's tokens start; not 0 if input-level fusion puts the source first.
    """

    columns: dict[str, list[Any]]
    split: int
    target_offset: int = 0

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def keep(self, indices: Iterable[int]) -> None:
        """Keep only these positions of every column."""
        indices = list(indices)
        self.columns = {name: [column[i] for i in indices] for name, column in self.columns.items()}

    def strip_padding(self) -> None:
        """Remove padding at both ends. In a causal row, padding could otherwise separate the prompt from the answer."""
        real = [i for i, m in enumerate(self.columns["attention_mask"]) if m]
        if real and real[-1] - real[0] + 1 < len(self):
            self.keep(range(real[0], real[-1] + 1))

    def padded(self, name: str, fill: int, left: int, right: int) -> list[Any]:
        """Return a column padded with ``fill`` to ``left`` entries before ``split`` and ``right`` from it on."""
        column = self.columns[name]
        return [fill] * (left - self.split) + column + [fill] * (right - (len(column) - self.split))


def layout_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the layout that fits the labels of rows; see ``layout="auto"`` of FlareDataCollator."""
    labelled = [row for row in rows if isinstance(row.get("labels"), list)]
    if not labelled or any(isinstance(value, float) for value in labelled[0]["labels"]):
        return "encoder"
    if any(len(row["labels"]) != len(row["input_ids"]) for row in labelled):
        return "seq2seq"
    repeated = all(
        label in (-100, token) for row in labelled for label, token in zip(row["labels"], row["input_ids"], strict=True)
    )
    return "causal" if repeated else "encoder"


def column_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the columns that any row has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def is_list_column(rows: Iterable[Mapping[str, Any]], name: str) -> bool:
    """Return whether a column holds a list in every row."""
    return all(isinstance(row.get(name), list) for row in rows)


def has_token_labels(labels: list[Any], ids: list[int]) -> bool:
    """Return whether there is one label per token. Floats are targets of a regression or of a multi-label task."""
    return len(labels) == len(ids) and not any(isinstance(label, float) for label in labels)


def stack_states(rows: Sequence[Mapping[str, Any]], ids: Tensor) -> Tensor:
    """Return FLARE MT's states (B, m, latent_dim) for their ids (B, m), zero at the id ``NO_STATE``.

    Raises:
        ValueError: the rows' states have different widths.
    """
    widths = {row["source_states"].shape[-1] for row in rows}
    if len(widths) > 1:
        raise ValueError(f"source_states have different widths: {sorted(widths)}; they must come from one MT encoder")
    # A zero vector is appended to the states of each row. The id NO_STATE gives the index -2 - NO_STATE = -1, which
    # selects this zero vector.
    extended = [F.pad(row["source_states"], (0, 0, 0, 1)) for row in rows]
    return torch.stack([states[-2 - row_ids] for states, row_ids in zip(extended, ids, strict=True)])


def stack_column(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """Return a numeric column as one tensor.

    Raises:
        ValueError: the values have different shapes or are not numbers.
    """
    try:
        return torch.tensor([row[name] for row in rows])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"column {name!r} cannot be stacked into one tensor ({error!r}): its rows must be numbers of one shape. "
            "Drop the column or pad it first"
        ) from error
