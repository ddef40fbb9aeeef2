"""Measure the time to read a row from a tier. tiers="auto" compares it with the time to compute the row."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import uuid
from pathlib import Path

import torch
from torch import Tensor

from .checksum import checksum
from .shards import PREFIX, UNFINISHED

_REPEATS = 3
_LARGEST = 64 << 20


def seconds_to_read(tier: str, nbytes: int, device: torch.device, directory: Path | None) -> float:
    """Return the seconds to read an entry of ``nbytes`` bytes from a tier to the device: the median of three trials.

    For the disk tier, a temporary file in ``directory`` is read. Before each trial it is dropped from the page cache,
    if the system allows it, and the time includes computing the checksum. For an entry above 64 MiB, only 64 MiB are
    read, and the time is scaled up.
    """
    size = max(8, min(nbytes, _LARGEST))
    target = torch.empty(size, dtype=torch.uint8, device=device)
    pinned = device.type == "cuda"
    seconds = []
    with contextlib.ExitStack() as stack:
        if tier == "disk":
            assert directory is not None
            path = directory / f"{PREFIX}{uuid.uuid4().hex}{UNFINISHED}"
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(os.urandom(size))
        else:
            memory = torch.empty(size, dtype=torch.uint8, device=device if tier == "device" else "cpu")
            memory = memory.pin_memory() if pinned and tier == "host" else memory
            memory.fill_(1)
        for _ in range(_REPEATS):
            _wait(device)
            begin = time.perf_counter()
            if tier == "disk":
                begin = _read_file(path, target)
            else:
                target.copy_(memory, non_blocking=True)
            _wait(device)
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[_REPEATS // 2] * nbytes / size


def _read_file(path: Path, target: Tensor) -> float:
    """Read a mapped file into a tensor; return the time at which reading began."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        checksum(data)
        target.copy_(data)
    return begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
