"""One row's states as bytes: the states in order of depth, each (positions, width), one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..source.states import StateKey

#: Entries begin at multiples of this many bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """Bytes of one row (uint8, flat) and how to read them. ``ready``: a CUDA event after which they are complete."""

    data: Tensor
    dtype: torch.dtype
    width: int
    ready: Any = None

    def states(self, counts: Mapping[StateKey, int]) -> dict[StateKey, Tensor]:
        """StateKey -> (positions, width), views of the bytes.

        Args:
            counts: how many positions each state has.
        """
        found, start = {}, 0
        for key in sorted(counts):
            end = start + counts[key] * self.width * self.dtype.itemsize
            found[key] = self.data[start:end].view(self.dtype).view(counts[key], self.width)
            start = end
        return found


def aligned(nbytes: int) -> int:
    """Bytes that an entry takes in its tier."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
