"""Measure the memory of a training step: its peak, and the bytes that autograd saves for the backward pass.

The memory of the process says little about a step, because allocators keep memory that was freed. On the CPU, this
module therefore adds up the sizes of tensor storages. The sums are exact for tensors that PyTorch operators return.
Scratch memory inside one operator is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from .storages import Storages, iter_tensors


@dataclass
class PeakBytes:
    """Result of :func:`peak_bytes`.

    Attributes:
        at_start: bytes of the tensors passed as ``live`` (CUDA: bytes that are allocated when the block starts).
        current: bytes that are alive, counted until the block ends (CUDA: updated only when the block ends).
        peak: the highest value of ``current`` inside the block.
    """

    at_start: int = 0
    current: int = 0
    peak: int = 0

    @property
    def above_start(self) -> int:
        """Bytes of the peak above ``at_start``."""
        return self.peak - self.at_start

    @property
    def transient(self) -> int:
        """Bytes of the peak above ``current``, which were freed again after the peak."""
        return self.peak - self.current

    def _change(self, by: int) -> None:
        self.current += by
        self.peak = max(self.peak, self.current)


class _AllocationMode(TorchDispatchMode):
    """Count the bytes of the storages that operators return, and subtract them when a storage is freed."""

    def __init__(self, result: PeakBytes, live: Iterable[Any]) -> None:
        super().__init__()
        self._result = result
        self._storages = Storages(on_free=lambda size: result._change(-size))
        for tensor in iter_tensors(live):
            result._change(self._storages.add(tensor))
        result.at_start = result.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # If an input's storage is not known yet, it is older than the block and not in `live`, so it counts as 0 bytes.
        for tensor in iter_tensors([args, kwargs]):
            self._storages.add(tensor, count_as=0)
        result = func(*args, **kwargs)
        for tensor in iter_tensors([result]):
            self._result._change(self._storages.add(tensor))
        return result

    def stop(self) -> None:
        """Stop counting, so that tensors that are freed after the block do not change the result."""
        self._storages.clear()


@contextmanager
def peak_bytes(live: Iterable[Any] = (), device: torch.device | str | None = None) -> Iterator[PeakBytes]:
    """Measure the largest number of tensor bytes that are alive at one time inside the ``with`` block.

    Args:
        live: existing tensors to count (or nested containers of them), such as parameters and optimizer state. Other
            tensors from before the block count as 0 bytes, so freeing them changes nothing.
        device: a CUDA device, to read its allocator (``torch.cuda.max_memory_allocated``) instead of counting storages.
            The allocator counts all tensors of this process on that device, and ``live`` is not used.

    Yields:
        A :class:`PeakBytes`, which is complete when the block ends.
    """
    result = PeakBytes()
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.at_start = result.current = result.peak = torch.cuda.memory_allocated(device)
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            result.current = torch.cuda.memory_allocated(device)
            result.peak = torch.cuda.max_memory_allocated(device)
        return
    mode = _AllocationMode(result, live)
    del live  # a reference held here would keep these tensors alive when the block frees them
    try:
        with mode:
            yield result
    finally:
        mode.stop()


@dataclass
class SavedBytes:
    """Result of :func:`saved_bytes`.

    Attributes:
        total: bytes that autograd saved for the backward pass.
        storages: number of storages that hold these bytes.
    """

    total: int = 0
    storages: int = 0


@contextmanager
def saved_bytes(ignore: Iterable[Any] = ()) -> Iterator[SavedBytes]:
    """Count the bytes that autograd saves for the backward pass inside the ``with`` block.

    A storage counts once and in full, even if only a view of it was saved, because all of it stays alive. Tensors that
    an autograd function keeps without ``save_for_backward`` are not counted.

    Args:
        ignore: tensors whose storages do not count (or nested containers of them), such as parameters and inputs.

    Yields:
        A :class:`SavedBytes`, which grows while the block runs.
    """
    result = SavedBytes()
    storages = Storages()
    # This list keeps the tensors alive, so that their storages stay ignored until the block ends.
    ignored = list(iter_tensors(ignore))
    for tensor in ignored:
        storages.add(tensor, count_as=0)

    def pack(tensor: Tensor) -> Tensor:
        new = storages.add(tensor)
        result.total += new
        result.storages += new > 0
        # Without detach, a node that saves its own output would hold its graph, and neither would ever be freed.
        return tensor.detach()

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield result
    finally:
        storages.clear()


def transient_bytes(call: Callable[[], object], *, device: torch.device | str | None = None) -> int:
    """Return the bytes that a call needs only temporarily.

    This is the peak during the call minus the bytes that are still alive when it returns: its result, and the tensors
    saved for the backward pass.

    Args:
        call: must create the tensors that it frees, because freeing tensors from before the call is not counted.
        device: a CUDA device, to read its allocator instead of counting storages (see :func:`peak_bytes`).
    """
    with peak_bytes(device=device) as peak:
        result = call()
    transient = peak.transient
    del result
    return transient
