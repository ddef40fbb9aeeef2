"""The tier on disk: safetensors files that are published whole (written aside, synced, renamed) or not at all.

A shard is an ordinary safetensors file: a JSON header, then the entries' bytes. Its metadata name the base model and
hold, per entry, dtype, width and a digest of its name and bytes. Every process writes shards of its own and reads
those of all; nothing is ever changed or removed that this module did not write and no process is still writing.
Opening checks the header against the file's size; each reading checks the file's size and the entry's digest.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .checksum import checksum
from .entries import Entry, aligned

_FORMATS = "flare-source-states-"
#: The number changes with the layout, the checksum and the fingerprint: rows of another format are never read.
FORMAT = f"{_FORMATS}2"
PREFIX, SUFFIX, UNFINISHED = "source-states-", ".safetensors", ".unfinished"
#: Bytes of header that an entry is reckoned to take.
HEADER = 384
_LONGEST_HEADER = 1 << 28
_SHARD = 256 << 20
#: Files kept mapped (and open) at a time.
_MAPPED = 64
#: Seconds after which an unfinished file that nobody has locked is taken for abandoned.
_ABANDONED = 60


class Unreadable(Exception):
    """A file that is no intact shard of this cache; the text says why."""


@dataclass(frozen=True)
class Record:
    """Where an entry stands in a shard (bytes from its beginning), and what it must be."""

    start: int
    nbytes: int
    dtype: torch.dtype
    width: int
    digest: str


class Shard:
    """A published file; mapped into memory while it is read.

    Raises:
        Unreadable: anything but an intact shard of this base model.
    """

    def __init__(self, path: Path, base: str) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.reported = False
        self._map: mmap.mmap | None = None
        with path.open("rb") as file:
            self.nbytes = os.fstat(file.fileno()).st_size
            try:
                self._read(*self._header(file), base)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Unreadable(f"damaged header ({type(error).__name__}: {error})") from error

    def _header(self, file: BinaryIO) -> tuple[dict[str, Any], int]:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > _LONGEST_HEADER or 8 + length > self.nbytes:
            raise Unreadable("truncated, or no safetensors file")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise Unreadable("no safetensors file")
        return header, 8 + length

    def _read(self, header: dict[str, Any], start: int, base: str) -> None:
        about = header.pop("__metadata__", None) or {}
        written = about.get("format")
        if written != FORMAT:
            if not str(written).startswith(_FORMATS):
                raise Unreadable("not written by a SourceStateCache")
            raise Unreadable(
                f"written in format {written} by another version, which checks rows differently (this version reads "
                f"{FORMAT}); its rows are computed again, and nothing here needs the file any more"
            )
        if about.get("base") != base:
            raise Unreadable("of another base model")
        for key, place in header.items():
            dtype, width, nbytes, digest = about[key].split()
            begin, end = (start + int(offset) for offset in place["data_offsets"])
            if end > self.nbytes:
                raise Unreadable("truncated")
            if not start <= begin <= begin + int(nbytes) <= end:
                raise Unreadable("damaged header")
            self.records[key] = Record(begin, int(nbytes), _dtype(dtype), int(width), digest)

    def entry(self, key: str) -> Entry:
        """An entry, checked now. Raises Unreadable where its bytes are not those that were written."""
        record = self.records[key]
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if self._map.size() < self.nbytes:  # to read a mapped page that is gone would end the process
            raise Unreadable("truncated")
        data = torch.empty(0, dtype=torch.uint8)
        if record.nbytes:
            data = torch.frombuffer(self._map, dtype=torch.uint8, offset=record.start, count=record.nbytes)
        if digest_of(key, data, record.dtype, record.width) != record.digest:
            raise Unreadable("the checksum of an entry does not match")
        return Entry(data, record.dtype, record.width)

    def unmap(self) -> None:
        """Let go of the mapping; it ends with the last tensor that looks into it."""
        self._map = None


class DiskTier:
    """Rows in the shards of a directory; what is not published yet waits in memory.

    Args:
        directory: made where it is missing.
        budget: bytes of all shards of this base model in the directory, other processes' included.
        say: tells the user one thing.
    """

    name = "disk"

    def __init__(self, directory: Path, budget: int, warn_once: Callable[[str], None]) -> None:
        self.directory = directory
        self.budget = budget
        self.full: str | None = None  # why nothing more is taken, where that is not the budget
        self._failed = False  # whether writing has
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
        """Bytes of the published shards and of what waits."""
        return self._published_bytes + self._waiting_bytes + self._reserved_bytes

    def open(self, base: str) -> None:
        """Read what is published for a base model."""
        self._base = base
        self._looked_at.clear()
        self._holders.clear()
        self._mapped.clear()
        self._published_bytes = 0
        self._remove_unfinished()
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have published since; report every file that is not usable, once."""
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
            self._warn_once(f"not used, and left alone in {self.directory}: {', '.join(files[:3])}{more}: {why}")

    def contains(self, key: str) -> bool:
        """Whether there is an entry of a key, intact or not: nothing is read."""
        return key in self._waiting or key in self._holders

    def find(self, key: str) -> Entry | None:
        """The entry of a key, intact; one that is not is forgotten, its file reported once."""
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
                    self._warn_once(f"{shard.path}: {error}; rows of it that cannot be read are computed anew")
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
        """Room in memory for an entry that is to be written: uint8, flat; None where the budget is spent."""
        size = aligned(nbytes) + HEADER
        if self.full is not None or size > min(left, self.budget - self.used):
            return None
        try:
            room = _host_buffer(nbytes, device)
        except RuntimeError:  # of pinned memory there is little; what waits is written, and gives its own back
            self.flush()
            try:
                room = _host_buffer(nbytes, device)
            except RuntimeError as error:
                self.full = self.full or str(error).splitlines()[0]
                self._warn_once(
                    f"no memory to write to {self.directory} from ({self.full}); what is there is read, the rest is "
                    "computed in every epoch"
                )
                return None
        self._reserved_bytes += size
        return room

    def release(self, room: Tensor) -> None:
        """Room that was reserved and not used."""
        self._reserved_bytes -= aligned(room.numel()) + HEADER

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry until enough wait to be published."""
        self.release(entry.data)
        self._waiting[key] = entry
        self._waiting_bytes += aligned(entry.data.numel()) + HEADER
        if self._waiting_bytes >= min(_SHARD, max(self.budget // 8, 1)):
            self.flush()

    @property
    def count(self) -> int:
        """Rows published or waiting."""
        return len(self._holders) + len(self._waiting)

    def flush(self) -> None:
        """Publish what waits. A failure is told once; from then on the tier only reads."""
        if self._failed:  # rows whose room was taken before
            self._waiting, self._waiting_bytes = {}, 0
        if not self._waiting:
            return
        path = self.directory / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        aside = path.with_suffix(UNFINISHED)
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        try:
            _write(path, aside, waiting, self._base)
            self._looked_at.add(path.name)
            self._take(Shard(path, self._base))
        except (OSError, Unreadable) as error:
            self.full, self._failed = str(error), True
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self._warn_once(
                f"{self.directory} takes no more source states ({error}); what is there is read, the rest is computed "
                "in every epoch"
            )
            return
        self.refresh()

    def _take(self, shard: Shard) -> None:
        self._published_bytes += shard.nbytes
        for key in shard.records:
            self._holders.setdefault(key, []).append(shard)

    def _remove_unfinished(self) -> None:
        """What processes that are gone have left half written: their lock is gone with them."""
        for path in self.directory.glob(f"{PREFIX}*{UNFINISHED}"):
            if not path.is_file():  # to open a FIFO would wait for its writer
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Host memory that states on the device can be copied into."""
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def digest_of(key: str, data: Tensor, dtype: torch.dtype, width: int) -> str:
    """32 hexadecimal digits for an entry: its name, how it is read, and its bytes."""
    found = hashlib.blake2b(f"{key} {_name(dtype)} {width} {data.numel()} ".encode(), digest_size=16)
    found.update(checksum(data))
    return found.hexdigest()


def _write(path: Path, aside: Path, entries: dict[str, Entry], base: str) -> None:
    """A safetensors file, complete on the disk before it has its name."""
    about: dict[str, Any] = {"format": FORMAT, "base": base}
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for key, entry in entries.items():
        if entry.ready is not None:
            entry.ready.synchronize()
        size, digest = entry.data.numel(), digest_of(key, entry.data, entry.dtype, entry.width)
        about[key] = f"{_name(entry.dtype)} {entry.width} {size} {digest}"
        whole = aligned(size)  # with the zeros that fill it up: safetensors allows no gaps
        header[key] = {"dtype": "U8", "shape": [whole], "data_offsets": [at, at + whole]}
        at += whole
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with aside.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            file.write(entry.data.numpy().data)
            file.write(bytes(aligned(entry.data.numel()) - entry.data.numel()))
        file.flush()
        os.fsync(file.fileno())
        aside.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name}")
    return found
