"""Write the rows that a source pass computes into the cache, and measure the time of the pass for tiers="auto".

A row is one text of a batch, and an entry holds the states of a row as bytes.

Shapes: B' rows that a source pass computes, m positions, hidden states of width d.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..source.states import StateKey
from .entries import Entry
from .row_keys import Batch, Row
from .store import Store, Tier


class RowWriter:
    """Writes the rows that one source pass computes.

    At the first state, the writer reserves memory for the rows. Rows for which no tier has memory are not stored. The
    writer then copies one state after another.

    Args:
        cache: the cache.
        batch: the texts.
        rows: the rows that the pass computes.
        on_trial: whether tiers="auto" still has to choose the tiers. Rows are then stored in ``cache.trial_rows``.
    """

    def __init__(self, cache: Store, batch: Batch, rows: list[Row], on_trial: bool) -> None:
        self.cache = cache
        self.batch = batch
        self.rows = rows
        self.on_trial = on_trial
        #: For each row with reserved memory: the row, its tier (None in a trial), its entry, and views of the entry by
        #: state.
        self.slots: list[tuple[Row, Tier | None, Entry, dict[StateKey, Tensor]]] | None = None
        self.devices: set[torch.device] = set()  # devices that computed states

    def write(self, key: StateKey, hidden: Tensor) -> None:
        """Copy the stored positions of one state (B', m, d) of the computed rows into their entries."""
        index_of = {row.key: index for index, row in enumerate(self.rows)}
        self.devices.add(hidden.device)
        with torch.inference_mode(False), torch.no_grad():  # training cannot save inference tensors for backward
            if self.slots is None:
                self.slots = list(self._reserve_slots(hidden))
            for row, _, _, views in self.slots:
                target = views[key]
                if target.shape[-1] != hidden.shape[-1] or target.dtype != hidden.dtype:
                    raise RuntimeError(
                        f"source_cache: state {key} has width {hidden.shape[-1]} and dtype {hidden.dtype}, but the "
                        f"first state of this row has width {target.shape[-1]} and dtype {target.dtype}; states of "
                        "such a model cannot be cached, so leave source_cache out"
                    )
                where = row.positions[key.stack]
                part = hidden[index_of[row.key]][where if isinstance(where, slice) else where.to(hidden.device)]
                target.copy_(part, non_blocking=True)

    def _reserve_slots(self, hidden: Tensor) -> Iterator[tuple[Row, Tier | None, Entry, dict[StateKey, Tensor]]]:
        dtype, width = hidden.dtype, hidden.shape[-1]
        for row in self.rows:
            nbytes = self.batch.size(row) * width * dtype.itemsize
            tier: Tier | None = None
            if self.on_trial:
                buffer = torch.empty(nbytes, dtype=torch.uint8)
            else:
                reserved = self.cache.reserve(nbytes)
                if reserved is None:
                    continue
                tier, buffer = reserved
            entry = Entry(buffer, dtype, width)
            yield row, tier, entry, entry.states(self.batch.counts(row))

    def commit(self) -> None:
        """Put the written rows into their tiers, or into ``cache.trial_rows`` if the tiers are not chosen yet."""
        ready = None
        if self.cache.device.type == "cuda":
            stream = torch.cuda.current_stream(self.cache.device)
            for device in self.devices - {self.cache.device}:
                if device.type == "cuda":
                    stream.wait_stream(torch.cuda.current_stream(device))
            ready = torch.cuda.Event()
            ready.record(stream)
        with self.cache.lock:
            for row, tier, entry, _ in self.slots or []:
                entry = Entry(entry.data, entry.dtype, entry.width, ready)
                if tier is None:
                    self.cache.trial_rows.append((row.key, entry))
                else:
                    tier.put(row.key, entry)
        self.slots = None

    def release(self) -> None:
        """Release the reserved memory after a failed pass."""
        with self.cache.lock:
            for _, tier, entry, _ in self.slots or []:
                if tier is not None:
                    tier.release(entry.data)
        self.slots = None


class TrialClock:
    """Measures the time of a source pass without the time inside ``with clock`` blocks, which store and use states.

    The clock waits for the device before it reads the time, so a kernel's time counts where the kernel was launched.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.excluded = 0.0
        self.begin = self._now()
        self.paused_at = 0.0

    def __enter__(self) -> None:
        self.paused_at = self._now()

    def __exit__(self, *_: object) -> None:
        self.excluded += self._now() - self.paused_at

    def seconds(self) -> float:
        """Return the seconds since the clock was created, without the time inside its ``with`` blocks."""
        return self._now() - self.begin - self.excluded

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
