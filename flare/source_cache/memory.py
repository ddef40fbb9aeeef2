"""The device tier and the host tier of a cache.

A tier allocates large blocks of memory (slabs) and fills them row after row, because no row is evicted.

A row is one text of a batch. Its entry holds the states of the row as bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..source.memory import memory_of
from .entries import Entry, aligned

#: Bytes of a slab.
_SLAB = 64 << 20
#: If a row is larger than _SLAB, a pinned slab has room for at least this many rows, if the budget allows it. With
#: fewer rows, a larger part of the slab would be wasted.
_ROWS_OF_A_PINNED_SLAB = 4
#: Share of the device's (or host's) memory that a tier with a shared budget leaves free.
_LEFT_FREE = 1 / 16
#: Mount point of the control groups, and the file that names the process's control group.
_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class MemoryTier:
    """Tier that stores rows on the model's device, or in host memory (pinned if the model is on a GPU).

    Args:
        name: "device" or "host".
        budget: largest number of bytes that the tier takes.
        modest: whether several tiers share the budget. The tier then takes at most half of the memory that is free when
            it stores its first row, and allocates no slab that would leave less than 1/16 of all memory free, because
            training may need more memory later.
    """

    def __init__(self, name: str, budget: int, modest: bool) -> None:
        self.name = name
        self.budget = budget
        self.modest = modest
        self.used = 0
        self.entries: dict[str, Entry] = {}
        #: ``find`` returns the entry of a key, or None. ``contains`` returns whether a key has an entry. Both are
        #: called for every row of every batch, so they are the dictionary's own methods.
        self.find: Callable[[str], Entry | None] = self.entries.get
        self.contains: Callable[[str], bool] = self.entries.__contains__
        self.full: str | None = None  # why no more rows are stored, if the budget is not the reason
        self._slab: Tensor | None = None
        self._at = 0
        self._spare: list[Tensor] = []

    def reserve(self, nbytes: int, device: torch.device, left: int) -> Tensor | None:
        """Reserve memory for an entry. Return a one-dimensional uint8 tensor, or None if the tier is full.

        Args:
            nbytes: bytes of the entry.
            device: the model's device.
            left: bytes that are left of the budget that all tiers share.
        """
        for index, spare in enumerate(self._spare):
            if spare.numel() == nbytes:
                return self._spare.pop(index)
        if self.full is not None:
            return None
        if self.modest and self._slab is None:
            self.budget = min(self.budget, free_bytes(self._place(device)) // 2)
        size, unfilled = aligned(nbytes), 0 if self._slab is None else self._slab.numel() - self._at
        if self._slab is None or size > unfilled:
            left = min(left, self.budget - self.used) - unfilled
            length = pinned_slab(size, left) if self._pins(device) else max(size, min(_SLAB, left))
            slab = self._allocate(length, device) if size <= length <= left else None
            if slab is None:
                return None
            self._slab, self._at = slab, 0
            self.used += unfilled
        elif size > min(left, self.budget - self.used):
            return None
        buffer = self._slab[self._at : self._at + nbytes]
        self._at += size
        self.used += size
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Release reserved memory that was not used, for a later entry of the same size."""
        self._spare.append(buffer)

    def put(self, key: str, entry: Entry) -> None:
        """Store an entry whose bytes are in reserved memory."""
        self.entries[key] = entry

    @property
    def count(self) -> int:
        """Number of stored rows."""
        return len(self.entries)

    def _place(self, device: torch.device) -> torch.device:
        return device if self.name == "device" else torch.device("cpu")

    def _pins(self, device: torch.device) -> bool:
        return self.name == "host" and device.type == "cuda"

    def _allocate(self, nbytes: int, device: torch.device) -> Tensor | None:
        place = self._place(device)
        if self.modest and free_bytes(place) - nbytes < _LEFT_FREE * total_bytes(place):
            self.full = f"little is free; to use the tier anyway, give it its own budget: {{{self.name!r}: bytes}}"
            return None
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=place, pin_memory=self._pins(device))
        except RuntimeError as error:  # torch.OutOfMemoryError is a RuntimeError
            self.full = str(error).splitlines()[0]
            return None


def pinned_slab(size: int, left: int) -> int:
    """Return the size in bytes of a pinned slab for rows of ``size`` bytes; 0 if no slab fits into ``left`` bytes.

    The size of a slab is a power of two, because PyTorch's pinned allocator rounds every size up to a power of two.
    For other sizes the allocator would take more bytes than the budget counts.
    """
    preferred = _SLAB if size <= _SLAB else 1 << (_ROWS_OF_A_PINNED_SLAB * size - 1).bit_length()
    fits = min(preferred, 1 << (left.bit_length() - 1)) if left > 0 else 0
    return fits if fits >= size else 0


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device. On a CPU, the limits of the process's control groups count too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_machine_bytes(), *(free for free, _ in _group_bytes(*_GROUPS))])


def total_bytes(device: torch.device) -> int:
    """Return the size of a device's memory in bytes; on a CPU, at most the limits of the process's control groups."""
    limits = () if device.type == "cuda" else (limit for _, limit in _group_bytes(*_GROUPS))
    return min([memory_of(device), *limits])


def _machine_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_bytes(root: Path, group_file: Path) -> list[tuple[int, int]]:
    """Return the free bytes and the limit of each control group (version 2) that limits the process's memory.

    Inactive file pages count as free, because the kernel can reclaim them.

    Args:
        root: mount point of the control groups.
        group_file: the file that names the process's control group.
    """
    try:
        name = next(line[3:] for line in group_file.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    groups = []
    group = root / name.strip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # the group is not mounted here, or its limit is "max" (none)
            limit = int((folder / "memory.max").read_text())
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(pages.get("inactive_file", 0))
            groups.append((max(limit - used, 0), limit))
        if folder == root:
            break
    return groups
