"""The tiers in memory. Nothing is ever thrown out, so rows are laid one after the other into large slabs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..source.memory import memory_of
from .entries import Entry, aligned

_SLAB = 64 << 20
#: Rows that a pinned slab has room for where one of _SLAB bytes has not: the fewer, the more of it is left over.
_ROWS_OF_A_PINNED_SLAB = 4
#: The share of all memory that a tier without a budget of its own leaves free.
_LEFT_FREE = 1 / 16


class MemoryTier:
    """Rows on the model's device, or in host memory (pinned where the model is on a GPU).

    Args:
        name: "device" or "host".
        budget: bytes.
        modest: the budget is shared by several tiers: take at most half of what is free when the first row comes, and
            nothing once little is free, as a training's own needs grow after that.
    """

    def __init__(self, name: str, budget: int, modest: bool) -> None:
        self.name = name
        self.budget = budget
        self.modest = modest
        self.used = 0
        self.entries: dict[str, Entry] = {}
        #: The entry of a key, or None, and whether there is one: the dictionary's own methods, as they are called for
        #: every row of every batch.
        self.find: Callable[[str], Entry | None] = self.entries.get
        self.holds: Callable[[str], bool] = self.entries.__contains__
        self.full: str | None = None  # why nothing more is taken, where that is not the budget
        self._slab: Tensor | None = None
        self._at = 0
        self._spare: list[Tensor] = []

    def reserve(self, nbytes: int, device: torch.device, left: int) -> Tensor | None:
        """Room for an entry: uint8, flat; None where there is none.

        Args:
            nbytes: of the entry.
            device: the model's.
            left: bytes of a budget over all tiers.
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
        room = self._slab[self._at : self._at + nbytes]
        self._at += size
        self.used += size
        return room

    def give_back(self, room: Tensor) -> None:
        """Room that was reserved and not used."""
        self._spare.append(room)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry whose bytes stand in reserved room."""
        self.entries[key] = entry

    @property
    def count(self) -> int:
        """Rows kept."""
        return len(self.entries)

    def _place(self, device: torch.device) -> torch.device:
        return device if self.name == "device" else torch.device("cpu")

    def _pins(self, device: torch.device) -> bool:
        return self.name == "host" and device.type == "cuda"

    def _allocate(self, nbytes: int, device: torch.device) -> Tensor | None:
        place = self._place(device)
        if self.modest and free_bytes(place) - nbytes < _LEFT_FREE * memory_of(place):
            self.full = "little is free; a budget of its own, as in {'device': bytes}, overrules this"
            return None
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=place, pin_memory=self._pins(device))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self.full = str(error).splitlines()[0]
            return None


def pinned_slab(size: int, left: int) -> int:
    """Bytes of a slab of pinned memory for rows of ``size``; 0 where none fits into ``left``.

    A power of two, which is what PyTorch's allocator of pinned memory makes of any size: what is not asked for would
    be taken from the machine all the same, beside the budget.
    """
    wanted = _SLAB if size <= _SLAB else 1 << (_ROWS_OF_A_PINNED_SLAB * size - 1).bit_length()
    fits = min(wanted, 1 << (left.bit_length() - 1)) if left > 0 else 0
    return fits if fits >= size else 0


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU also within the limits of the process's control groups (containers)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_machine_bytes(), *_group_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _machine_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_bytes(root: Path, own: Path) -> list[int]:
    """Bytes that each control group (version 2) above the process leaves free; reclaimable file pages count as free.

    Args:
        root: where the groups are mounted.
        own: the file that names the process's group.
    """
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    found = []
    group = root / name.strip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": no limit
            limit = int((folder / "memory.max").read_text())
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(pages.get("inactive_file", 0))
            found.append(max(limit - used, 0))
        if folder == root:
            break
    return found
