"""An entry holds the states of one row (one text of a batch) as bytes.

The states are concatenated in order of depth. Each state has the shape (positions, width).
"""

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
        data: the bytes of the states, a one-dimensional uint8 tensor.
        dtype: dtype of the states.
        width: size of the states' last dimension.
        ready: a CUDA event after which the bytes are complete; None if they are complete already.
    """

    data: Tensor
    dtype: torch.dtype
    width: int
    ready: Any = None

    def states(self, counts: Mapping[StateKey, int]) -> dict[StateKey, Tensor]:
        """Return StateKey -> state (positions, width). The states are views of the bytes.

        Args:
            counts: StateKey -> number of positions of the state.
        """
        states, start = {}, 0
        for key in sorted(counts):
            end = start + counts[key] * self.width * self.dtype.itemsize
            states[key] = self.data[start:end].view(self.dtype).view(counts[key], self.width)
            start = end
        return states


def aligned(nbytes: int) -> int:
    """Return the size of an entry of ``nbytes`` bytes, rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
