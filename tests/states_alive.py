"""Counts the source states that are in memory at the same time."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from flare.source.source_pass import FrozenPass, Preparation
from flare.source_cache import CachedReader


class StatesAlive:
    """Tracks the memory of source states.

    Attributes:
        counts: for each call of ``count``, the number of tracked states in memory.
    """

    def __init__(self) -> None:
        self._storages: list[weakref.ref[Any]] = []
        self.counts: list[int] = []

    def follow(self, state: torch.Tensor) -> None:
        self._storages.append(weakref.ref(state.untyped_storage()))

    def count(self) -> None:
        self.counts.append(self.now)

    @property
    def now(self) -> int:
        return sum(storage() is not None for storage in self._storages)

    def clear(self) -> None:
        self._storages.clear()
        self.counts.clear()

    def recording(self) -> Any:
        """Return a replacement for ``FrozenPass.record`` that tracks the states that it records."""
        plain = FrozenPass.record

        def record(frozen_pass: FrozenPass, key: Any, hidden: torch.Tensor) -> None:
            if key in frozen_pass.missing:
                self.follow(hidden)
                self.count()
            plain(frozen_pass, key, hidden)

        return record

    def warming(self) -> Any:
        """Return a replacement for ``CachedReader.warm`` that tracks the states that it returns."""
        plain = CachedReader.warm

        def warm(reader: CachedReader) -> Any:
            states = plain(reader)
            for state in (states or {}).values():
                self.follow(state)
                self.count()
            return states

        return warm

    def preparing(self) -> Any:
        """Return a replacement for ``Preparation.__call__`` that tracks its results."""
        plain = Preparation.__call__

        def prepared(prepare: Preparation, key: Any, hidden: torch.Tensor) -> torch.Tensor:
            x = plain(prepare, key, hidden)
            self.follow(x)
            self.count()
            return x

        return prepared
