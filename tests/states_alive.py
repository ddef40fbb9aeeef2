"""How many of the states that pass through a source pass are in memory at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from flare.source.source_pass import FrozenPass, Preparation
from flare.source_cache import CachedReader


class StatesAlive:
    """Follows the memory of states. counts: how many were there whenever another one came."""

    def __init__(self) -> None:
        self._storages: list[weakref.ref[Any]] = []
        self.counts: list[int] = []

    def follow(self, state: torch.Tensor) -> None:
        self._storages.append(weakref.ref(state.untyped_storage()))

    def count(self) -> None:
        self.counts.append(self.now)

    @property
    def now(self) -> int:
        return sum(one() is not None for one in self._storages)

    def clear(self) -> None:
        self._storages.clear()
        self.counts.clear()

    def noting(self) -> Any:
        """``FrozenPass.record`` that follows the states it is given."""
        plain = FrozenPass.record

        def note(frozen_pass: FrozenPass, key: Any, hidden: torch.Tensor) -> None:
            if key in frozen_pass.missing:
                self.follow(hidden)
                self.count()
            plain(frozen_pass, key, hidden)

        return note

    def warming(self) -> Any:
        """``CachedReader.warm`` that follows the states it returns."""
        plain = CachedReader.warm

        def warm(reader: CachedReader) -> Any:
            states = plain(reader)
            for state in (states or {}).values():
                self.follow(state)
                self.count()
            return states

        return warm

    def preparing(self) -> Any:
        """``Preparation.__call__`` that follows what it returns."""
        plain = Preparation.__call__

        def prepared(prepare: Preparation, key: Any, hidden: torch.Tensor) -> torch.Tensor:
            x = plain(prepare, key, hidden)
            self.follow(x)
            self.count()
            return x

        return prepared
