"""Rows of one source pass on their way into the cache, and the clock of a pass that is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..source.states import StateKey
from .entries import Entry
from .row_keys import Batch, Row
from .store import Store, Tier


class Keeping:
    """Rows on their way into the cache: room is taken with the first state, and filled as the states come."""

    def __init__(self, cache: Store, batch: Batch, rows: list[Row], hold: bool) -> None:
        self.cache = cache
        self.batch = batch
        self.rows = rows
        self.hold = hold
        self.rooms: list[tuple[Row, Tier | None, Entry, dict[StateKey, Tensor]]] | None = None
        self.devices: set[torch.device] = set()  # where the states were made: a model may lie on several

    def take(self, key: StateKey, hidden: Tensor) -> None:
        """Copy the rows' parts of one state (B', m, d)."""
        by_name = {row.key: index for index, row in enumerate(self.rows)}
        self.devices.add(hidden.device)
        with torch.inference_mode(False), torch.no_grad():  # or training could not save what evaluation has kept
            if self.rooms is None:
                self.rooms = list(self._rooms(hidden))
            for row, _, _, views in self.rooms:
                target = views[key]
                if target.shape[-1] != hidden.shape[-1] or target.dtype != hidden.dtype:
                    raise RuntimeError(
                        f"source_cache: state {key} is {hidden.shape[-1]} wide in {hidden.dtype}, others of its row "
                        f"{target.shape[-1]} in {target.dtype}; such a model cannot be cached: leave source_cache out"
                    )
                where = row.positions[key.stack]
                part = hidden[by_name[row.key]][where if isinstance(where, slice) else where.to(hidden.device)]
                target.copy_(part, non_blocking=True)

    def _rooms(self, hidden: Tensor) -> Iterator[tuple[Row, Tier | None, Entry, dict[StateKey, Tensor]]]:
        dtype, width = hidden.dtype, hidden.shape[-1]
        for row in self.rows:
            nbytes = self.batch.size(row) * width * dtype.itemsize
            tier: Tier | None = None
            if self.hold:
                room = torch.empty(nbytes, dtype=torch.uint8)
            else:
                found = self.cache.reserve(nbytes)
                if found is None:
                    continue
                tier, room = found
            entry = Entry(room, dtype, width)
            yield row, tier, entry, entry.states(self.batch.counts(row))

    def keep(self) -> None:
        """Hand the filled rows to their tiers."""
        ready = None
        if self.cache.device.type == "cuda":
            stream = torch.cuda.current_stream(self.cache.device)
            for device in self.devices - {self.cache.device}:
                if device.type == "cuda":
                    stream.wait_stream(torch.cuda.current_stream(device))
            ready = torch.cuda.Event()
            ready.record(stream)
        with self.cache.lock:
            for row, tier, entry, _ in self.rooms or []:
                entry = Entry(entry.data, entry.dtype, entry.width, ready)
                if tier is None:
                    self.cache.held.append((row.key, entry))
                else:
                    tier.put(row.key, entry)
        self.rooms = None

    def give_back(self) -> None:
        """The pass has failed: the room is free again."""
        with self.cache.lock:
            for _, tier, entry, _ in self.rooms or []:
                if tier is not None:
                    tier.give_back(entry.data)
        self.rooms = None


class TrialClock:
    """Seconds since it was made, less those inside ``with``: what computing alone takes. Waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left_out = 0.0
        self.begin = self._now()
        self.paused = 0.0

    def __enter__(self) -> None:
        self.paused = self._now()

    def __exit__(self, *_: object) -> None:
        self.left_out += self._now() - self.paused

    def seconds(self) -> float:
        return self._now() - self.begin - self.left_out

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
