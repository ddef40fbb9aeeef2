"""SourceStates: the hidden states of one source pass, as ``encode_source`` returns them.

Shapes: B rows of a batch, m positions, hidden states of width d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StateKey(NamedTuple):
    """Key of a hidden state: where it lies in the depth of the model.

    Attributes:
        stack: dotted path of the ModuleList that holds the blocks.
        position: p means the input of block p, which is the output of block p - 1. In a stack of n blocks, n means the
            last block's output, before any final norm.
    """

    stack: str
    position: int


@dataclass(frozen=True)
class SourceStates:
    """Hidden states of the frozen model on the source text.

    Attributes:
        states: StateKey -> x_S (B, m, d), detached, in the dtype that the adapters compute in. They do not depend on
            the adapters' weights, unlike S = x_S A^T, which is never stored here.
        offset: the source_layer_offset of the adapters for which the states were read.
        attention_mask: (B, m) of the source, or None if every position is a token.
    """

    states: Mapping[StateKey, Tensor]
    offset: int
    attention_mask: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the states in order of depth."""
        return (self.states[key] for key in sorted(self.states))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (B, m) of the source text."""
        first = next(iter(self.states.values()))
        return int(first.shape[0]), int(first.shape[1])

    @property
    def nbytes(self) -> int:
        """Total bytes of all states."""
        return sum(state.nbytes for state in self.states.values())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SourceStates:
        """Return the states on another device, or in another dtype."""
        moved = {key: state.to(device=device, dtype=dtype) for key, state in self.states.items()}
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return SourceStates(moved, self.offset, mask)
