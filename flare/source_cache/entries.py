"""One row's states as bytes: the states in order of depth, each (positions, width), concatenated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..source.states import StateKey

#: Entries start at multiples of this many bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """The states of one row.

    Attributes:
        data: their bytes, uint8, one dimension.
        dtype: dtype of the states.
        width: their last dimension.
        ready: a CUDA event after which the bytes are complete, or None.
    """

    data: Tensor
    dtype: torch.dtype
    width: int
    ready: Any = None

    def states(self, counts: Mapping[StateKey, int]) -> dict[StateKey, Tensor]:
        """Return StateKey -> (positions, width), views of the bytes.

        Args:
            counts: number of positions of each state.
        """
        states, start = {}, 0
        for key in sorted(counts):
            end = start + counts[key] * self.width * self.dtype.itemsize
            states[key] = self.data[start:end].view(self.dtype).view(counts[key], self.width)
            start = end
        return states


def aligned(nbytes: int) -> int:
    """Return the bytes that an entry takes in its tier: rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
