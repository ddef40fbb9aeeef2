"""SourceStates: what one source pass yields to the user, one hidden state per place where a block fuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StateKey(NamedTuple):
    """A place in a stack where a hidden state can be read: ``position`` p is the input of block p, equally the raw
    output of block p - 1; p = number of blocks is the last block's output, before any final norm.
    """

    stack: str
    position: int


@dataclass(frozen=True)
class SourceStates:
    """Hidden states of the frozen model on the source text.

    states: StateKey -> x_S (B, m, d) in the dtype the adapters compute in, detached. Never S: that is an adapter's.
    offset: the source_layer_offset they were read for.
    attention_mask: (B, m) of the source, or None where every position is a token.
    """

    states: Mapping[StateKey, Tensor]
    offset: int
    attention_mask: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tensor]:
        """The states in order of depth."""
        return (self.states[key] for key in sorted(self.states))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, m) of the source text."""
        first = next(iter(self.states.values()))
        return int(first.shape[0]), int(first.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states.values())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SourceStates:
        """The same states on another device or in another dtype."""
        moved = {key: state.to(device=device, dtype=dtype) for key, state in self.states.items()}
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return SourceStates(moved, self.offset, mask)
