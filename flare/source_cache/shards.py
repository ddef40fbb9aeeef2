"""The disk tier of a cache: rows in safetensors files, called shards.

A row is one text of a batch, and an entry holds the states of a row as bytes. A shard is published atomically: it is
written to a temporary ("unfinished") file, synced to disk and renamed.

A shard is an ordinary safetensors file. Its metadata contain the format, the fingerprint of the base model and, for
each entry, the dtype, the width, the number of bytes, and a digest of the key, of these values and of the bytes. Every
process writes its own shards and reads the shards of all processes. A published file is never changed or removed. A
process removes its own unfinished file if writing fails, and the unfinished files of processes that have ended.

Opening a shard checks the header against the file's size (``safetensors.safe_open``). Every read checks the file's
size and the entry's digest. Two operations do not use the safetensors package:

- Reading a row. ``get_tensor`` takes about ten times as long per row as a view of a memory map. It also does not detect
  that a mapped file was truncated, and reading beyond the file's new end would kill the process.
- Writing. ``save_file`` may write to a new file and rename it, so the lock of an unfinished file would be lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checksum import checksum
from .entries import Entry, aligned

_FORMATS = "flare-source-states-"
#: The number at the end changes when the layout, the checksum or the fingerprint changes. Rows of another format are
#: never read.
FORMAT = f"{_FORMATS}2"
PREFIX, SUFFIX, UNFINISHED = "source-states-", ".safetensors", ".unfinished"
#: Estimated bytes that an entry takes in a shard's header.
HEADER = 384
#: Bytes of waiting rows at which a shard is written. (An eighth of the tier's budget, if this is less.)
_SHARD = 256 << 20
#: Largest number of files that stay mapped (and open).
_MAPPED = 64
#: Seconds after which an unfinished file without a lock is considered abandoned.
_ABANDONED = 60


class Unreadable(Exception):
    """A file is not an intact shard of this cache; the message has the reason."""


@dataclass(frozen=True)
class Record:
    """An entry in a shard: start (in bytes from the file's start), size in bytes, dtype, width and digest."""

    start: int
    nbytes: int
    dtype: torch.dtype
    width: int
    digest: str


class Shard:
    """A published file, which is memory-mapped from its first read until :meth:`unmap`.

    Raises:
        Unreadable: the file is not an intact shard of this base model.
    """

    def __init__(self, path: Path, base: str) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.reported = False
        self._map: mmap.mmap | None = None
        self.nbytes = path.stat().st_size
        try:
            with safe_open(path, "numpy") as file:
                self._read_header(file.metadata() or {}, file.offset_keys(), base)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise Unreadable(f"damaged, or not a safetensors file ({type(error).__name__}: {error})") from error

    def _read_header(self, about: Mapping[str, str], keys: Sequence[str], base: str) -> None:
        """Fill ``records`` from the file's metadata (``about``) and its keys, which are in the order of the data."""
        written = about.get("format")
        if written != FORMAT:
            if not str(written).startswith(_FORMATS):
                raise Unreadable("not written by a SourceStateCache")
            raise Unreadable(
                f"written in format {written} by another version of this package, which checks rows differently (this "
                f"version reads {FORMAT}); the file's rows are computed again, and this version does not need the file"
            )
        if about.get("base") != base:
            raise Unreadable("holds states of another base model")
        start = self.nbytes - sum(aligned(int(about[key].split()[2])) for key in keys)
        for key in keys:
            dtype, width, nbytes, digest = about[key].split()
            if start < 0 or int(nbytes) < 0:
                raise Unreadable("damaged header")
            self.records[key] = Record(start, int(nbytes), _dtype(dtype), int(width), digest)
            start += aligned(int(nbytes))

    def entry(self, key: str) -> Entry:
        """Read an entry and check it; raise Unreadable if its bytes differ from the bytes that were written."""
        record = self.records[key]
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if self._map.size() < self.nbytes:  # reading a mapped page past the file's end kills the process
            raise Unreadable("truncated")
        data = torch.empty(0, dtype=torch.uint8)
        if record.nbytes:
            data = torch.frombuffer(self._map, dtype=torch.uint8, offset=record.start, count=record.nbytes)
        if digest_of(key, data, record.dtype, record.width) != record.digest:
            raise Unreadable("the checksum of an entry does not match")
        return Entry(data, record.dtype, record.width)

    def unmap(self) -> None:
        """Drop the memory map. It is closed when the last tensor that uses it is freed."""
        self._map = None


class DiskTier:
    """Tier that stores rows in the shards of a directory. Rows wait in memory until their shard is published.

    Args:
        directory: folder of the shards.
        budget: largest total size in bytes of this base model's shards in the directory, including the shards of other
            processes.
        warn_once: warns the user, once per message.
    """

    name = "disk"

    def __init__(self, directory: Path, budget: int, warn_once: Callable[[str], None]) -> None:
        self.directory = directory
        self.budget = budget
        self.full: str | None = None  # why no more rows are stored, if the budget is not the reason
        self._failed = False  # whether writing has failed
        self._warn_once = warn_once
        self._base = ""
        self._looked_at: set[str] = set()
        self._holders: dict[str, list[Shard]] = {}
        self._mapped: dict[Shard, None] = {}
        self._waiting: dict[str, Entry] = {}
        self._waiting_bytes = 0
        self._published_bytes = 0
        self._reserved_bytes = 0

    @property
    def used(self) -> int:
        """Bytes of the published shards, of the rows that wait in memory, and of the memory reserved for rows."""
        return self._published_bytes + self._waiting_bytes + self._reserved_bytes

    def open(self, base: str) -> None:
        """Remove abandoned unfinished files, and open the published shards of a base model."""
        self._base = base
        self._looked_at.clear()
        self._holders.clear()
        self._mapped.clear()
        self._published_bytes = 0
        self._remove_unfinished()
        self.refresh()

    def refresh(self) -> None:
        """Open shards that other processes have published since the last call; report each unusable file once."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.directory) if entry.is_file())
        except OSError as error:
            self._warn_once(f"{self.directory} cannot be read ({error}); its source states are not used")
            return
        refused: dict[str, list[str]] = {}
        for name in names:
            if name in self._looked_at or name.startswith(".") or name.endswith(UNFINISHED):
                continue
            self._looked_at.add(name)
            try:
                self._take(Shard(self.directory / name, self._base))
            except (Unreadable, OSError) as error:
                refused.setdefault(str(error), []).append(name)
        for why, files in refused.items():
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            self._warn_once(
                f"files in {self.directory} are not used and not changed: {', '.join(files[:3])}{more}: {why}"
            )

    def contains(self, key: str) -> bool:
        """Return whether a key has an entry, without reading or checking the entry."""
        return key in self._waiting or key in self._holders

    def find(self, key: str) -> Entry | None:
        """Return the intact entry of a key, or None. Damaged entries are dropped, and their file is reported once."""
        if key in self._waiting:
            return self._waiting[key]
        holders = self._holders.get(key, [])
        while holders:
            shard = holders[0]
            try:
                entry = shard.entry(key)
            except (Unreadable, OSError, ValueError) as error:
                holders.pop(0)
                if not shard.reported:
                    shard.reported = True
                    self._warn_once(f"{shard.path}: {error}; its rows that cannot be read are computed again")
                continue
            self._mapped.pop(shard, None)
            self._mapped[shard] = None
            if len(self._mapped) > _MAPPED:
                oldest = next(iter(self._mapped))
                del self._mapped[oldest]
                oldest.unmap()
            return entry
        self._holders.pop(key, None)
        return None

    def reserve(self, nbytes: int, device: torch.device, left: int) -> Tensor | None:
        """Reserve host memory in which an entry waits to be written.

        Return a one-dimensional uint8 tensor, or None if the budget is spent, writing has failed before, or no memory
        can be allocated.
        """
        size = aligned(nbytes) + HEADER
        if self.full is not None or size > min(left, self.budget - self.used):
            return None
        try:
            buffer = _host_buffer(nbytes, device)
        except RuntimeError:  # pinned memory is scarce: writing the waiting rows releases their memory
            self.flush()
            try:
                buffer = _host_buffer(nbytes, device)
            except RuntimeError as error:
                self.full = self.full or str(error).splitlines()[0]
                self._warn_once(
                    f"no memory to write to {self.directory}: rows need host memory until they are written "
                    f"({self.full}); stored rows are read, and all other rows are computed in every epoch"
                )
                return None
        self._reserved_bytes += size
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Release reserved memory that was not used."""
        self._reserved_bytes -= aligned(buffer.numel()) + HEADER

    def put(self, key: str, entry: Entry) -> None:
        """Store an entry in memory; publish the waiting entries when there are enough of them."""
        self.release(entry.data)
        self._waiting[key] = entry
        self._waiting_bytes += aligned(entry.data.numel()) + HEADER
        if self._waiting_bytes >= min(_SHARD, max(self.budget // 8, 1)):
            self.flush()

    @property
    def count(self) -> int:
        """Number of rows, published or waiting."""
        return len(self._holders) + len(self._waiting)

    def flush(self) -> None:
        """Publish the waiting rows. After a failure, which is reported once, the tier only reads."""
        if self._failed:  # drop rows whose memory was reserved before the failure
            self._waiting, self._waiting_bytes = {}, 0
        if not self._waiting:
            return
        path = self.directory / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        unfinished = path.with_suffix(UNFINISHED)
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        try:
            _write(path, unfinished, waiting, self._base)
            self._looked_at.add(path.name)
            self._take(Shard(path, self._base))
        except (OSError, Unreadable) as error:
            self.full, self._failed = str(error), True
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self._warn_once(
                f"{self.directory} takes no more source states ({error}); stored rows are read, and all other rows "
                "are computed in every epoch"
            )
            return
        self.refresh()

    def _take(self, shard: Shard) -> None:
        self._published_bytes += shard.nbytes
        for key in shard.records:
            self._holders.setdefault(key, []).append(shard)

    def _remove_unfinished(self) -> None:
        """Remove unfinished files that are a minute old and not locked: the processes that wrote them have ended."""
        for path in self.directory.glob(f"{PREFIX}*{UNFINISHED}"):
            if not path.is_file():  # opening a FIFO would wait for its writer
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Allocate host memory for an entry, pinned if the device is a GPU."""
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def digest_of(key: str, data: Tensor, dtype: torch.dtype, width: int) -> str:
    """Return the digest (32 hexadecimal digits) of an entry's key, dtype, width and bytes."""
    digest = hashlib.blake2b(f"{key} {_name(dtype)} {width} {data.numel()} ".encode(), digest_size=16)
    digest.update(checksum(data))
    return digest.hexdigest()


def _write(path: Path, unfinished: Path, entries: dict[str, Entry], base: str) -> None:
    """Write a safetensors file to ``unfinished``, sync it to disk, and rename it to ``path``."""
    about: dict[str, Any] = {"format": FORMAT, "base": base}
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for key, entry in entries.items():
        if entry.ready is not None:
            entry.ready.synchronize()
        size, digest = entry.data.numel(), digest_of(key, entry.data, entry.dtype, entry.width)
        about[key] = f"{_name(entry.dtype)} {entry.width} {size} {digest}"
        padded = aligned(size)  # safetensors allows no gaps, so the padding is part of the tensor
        header[key] = {"dtype": "U8", "shape": [padded], "data_offsets": [at, at + padded]}
        at += padded
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with unfinished.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            file.write(entry.data.numpy().data)
            file.write(bytes(aligned(entry.data.numel()) - entry.data.numel()))
        file.flush()
        os.fsync(file.fileno())
        unfinished.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name}")
    return dtype
