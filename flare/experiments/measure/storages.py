"""Count the bytes of tensor storages. A storage counts once, however many views it has."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter


def iter_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested containers and iterators, such as ``[model.parameters(), batch]``.

    Values that are not tensors are skipped.
    """
    for value in tree_iter(list(values)):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Iterator):
            yield from iter_tensors(value)


class Storages:
    """The live storages of the tensors that were added, with their sizes in bytes.

    A storage is identified by the ``id`` of its Python object, which is held by a weak reference. The memory address
    cannot identify a storage, because it is reused after the storage is freed. PyTorch keeps one Python object per
    storage for as long as the storage lives, so the weak reference reports when the storage is freed.

    Args:
        on_free: called with the counted bytes of a storage when it is freed.
    """

    def __init__(self, on_free: Callable[[int], None] | None = None) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._on_free = on_free

    def add(self, tensor: Tensor, count_as: int | None = None) -> int:
        """Add the storage of a tensor, and return by how many bytes the count grew.

        Args:
            tensor: any view of the storage.
            count_as: bytes to count instead of the size of the storage. None: the size.

        Returns:
            For a new storage, its counted bytes. For a storage that was resized since it was last added, its growth,
            negative if it shrank. Otherwise 0. The result for a known storage is always 0 if ``count_as`` is given,
            or if the storage counts as 0 bytes.
        """
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._entries.get(key)
        if known is not None:
            reference, size = known
            if count_as is not None or size == 0:
                return 0
            growth = storage.nbytes() - size
            if growth:
                self._entries[key] = (reference, storage.nbytes())
            return growth
        size = storage.nbytes() if count_as is None else count_as
        self._entries[key] = (weakref.ref(storage, functools.partial(self._freed, key)), size)
        return size

    def _freed(self, key: int, _: Any) -> None:
        _, size = self._entries.pop(key)
        if self._on_free is not None:
            self._on_free(size)

    def clear(self) -> None:
        """Forget all storages, so that ``on_free`` is no longer called for them."""
        self._entries.clear()
