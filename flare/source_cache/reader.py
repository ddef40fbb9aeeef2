"""One source pass through a cache: rows that are kept are read, the others computed in a smaller pass and kept."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import copy_each
from ..source.source_pass import Preparation, Visitor, read_from_model
from ..source.states import StateKey
from .entries import Entry
from .row_keys import Batch, device_of
from .row_writer import RowWriter, TrialClock
from .store import Store

#: Rows among which one that comes back in another width is noticed.
_LOOKED_AT = 100_000
_OTHER_WIDTH = (
    "source texts come back padded to another width, and with source_padding='keep' the padded width is "
    "part of what a row is, so they are computed anew. Pad every batch to one length (FlareDataCollator(padding="
    "'max_length', max_length=...)), or use fast_lora(..., source_padding='zero'), under which the width does not count"
)


# --- all states of a batch at once ------------------------------------------------------------------------------------


def read(store: Store, batch: Batch) -> dict[StateKey, Tensor] | None:
    """Return all states of a batch where every row of it is kept; see :meth:`CachedReader.warm`."""
    device = batch.plan.device
    if device is None or store.undecided:
        return None
    store.device = device
    entries = store.find_all(batch)
    if entries is None or any((one.dtype, one.width) != (entries[0].dtype, entries[0].width) for one in entries):
        return None
    with store.meter.of_pass(len(batch.rows), 0, device):
        return gather(batch, entries, device)


def gather(batch: Batch, entries: Sequence[Entry], device: torch.device) -> dict[StateKey, Tensor]:
    """Return all states of a batch, each (B, m, d) and contiguous, zero at positions that are not stored.

    On CUDA, rows in host memory are copied on a stream of their own, and the current stream waits for them on the
    device.

    Args:
        batch: the texts.
        entries: one for each row.
        device: where the states are wanted.
    """
    with torch.inference_mode(False), torch.no_grad():  # or training could not save what evaluation has read
        fill = _fill_on_cpu if device.type == "cpu" else _fill_on_cuda
        buffers = fill(batch, entries, device)
        stacks = (*batch.plan.of_text, *batch.plan.of_decoder)
        states = [state for stack in stacks for state in buffers[stack].unbind(0)]
        return dict(zip(batch.plan.visited, states, strict=True))


def _fill_on_cpu(batch: Batch, entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    for ready in {entry.ready for entry in entries if entry.ready is not None}:
        ready.synchronize()  # rows that were computed on a GPU
    buffers = _buffers(batch, entries[0], device)
    _fill(buffers, batch, list(enumerate(entries)))
    return buffers


def _fill_on_cuda(batch: Batch, entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    computing = torch.cuda.current_stream(device)
    on_device = [pair for pair in enumerate(entries) if pair[1].data.is_cuda]
    on_host = [pair for pair in enumerate(entries) if not pair[1].data.is_cuda]
    copying = _copy_stream(device).enter(computing) if on_host else computing
    for stream, part in ((copying, on_host), (computing, on_device)):
        for ready in {entry.ready for _, entry in part if entry.ready is not None}:
            stream.wait_event(ready)
    with torch.cuda.stream(copying):
        buffers = _buffers(batch, entries[0], device)
        _fill(buffers, batch, on_host)
    if on_host:
        computing.wait_stream(copying)
        for buffer in buffers.values():
            buffer.record_stream(computing)
    _fill(buffers, batch, on_device)
    return buffers


def _buffers(batch: Batch, sample: Entry, device: torch.device) -> dict[str, Tensor]:
    """Stack -> (states, B, m, d)."""
    found = {}
    for stack, count in batch.plan.stacks.items():
        width = batch.widths[stack]
        whole = all(row.lengths[stack] == width for row in batch.rows)
        make = torch.empty if whole else torch.zeros
        found[stack] = make(count, len(batch.rows), width, sample.width, dtype=sample.dtype, device=device)
    return found


def _fill(buffers: dict[str, Tensor], batch: Batch, entries: list[tuple[int, Entry]]) -> None:
    """Copy rows into their places, all with one call; a row has all states of a stack side by side."""
    targets, sources = [], []
    for index, entry in entries:
        row, start, values = batch.rows[index], 0, entry.data.view(entry.dtype)
        for stack, count in batch.plan.stacks.items():
            buffer, length, where = buffers[stack], row.lengths[stack], row.positions[stack]
            end = start + count * length * entry.width
            source = values[start:end].view(count, length, entry.width)
            start = end
            if buffer.is_cuda and not (source.is_cuda or source.is_pinned()):
                source = source.pin_memory()  # from other memory the copy would wait for the stream
            if isinstance(where, slice):
                targets.append(buffer[:, index, where])
                sources.append(source)
                continue
            # a mask with holes
            where = where.pin_memory().to(buffer.device, non_blocking=True) if buffer.is_cuda else where
            buffer[:, index].index_copy_(1, where, source.to(buffer.device, non_blocking=buffer.is_cuda))
    if targets:
        copy_each(targets, sources, targets[0].is_cuda)


class _CopyStream:
    """The stream on which a device receives rows from the host, ahead of the stream that computes.

    Buffers are allocated on it, so that a copy does not wait for what still computes with older memory; record_stream
    tells the allocator of the second stream. The allocator then frees a buffer only where the host sees that the device
    is done with it, so a host that runs far ahead would fill the memory: it stays at most two readings ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._begun: deque[torch.cuda.Event] = deque()

    def enter(self, computing: torch.cuda.Stream) -> torch.cuda.Stream:
        """Return the stream to copy on."""
        self._begun.append(computing.record_event())
        if len(self._begun) > 2:
            self._begun.popleft().synchronize()
        return self.stream


@functools.cache
def _copy_stream(device: torch.device) -> _CopyStream:
    return _CopyStream(device)


# --- one source pass --------------------------------------------------------------------------------------------------


class CachedReader:
    """One source pass through the cache. Called again (in a backward pass), it counts and keeps nothing.

    The second time it reads what is kept by then. Where a row has found no room, the frozen model runs on the very rows
    of the first time, as a batch of another size could round them otherwise.
    """

    def __init__(
        self,
        cache: Store,
        model: nn.Module,
        inputs: dict[str, Any],
        batch: Batch,
        prepare: Preparation,
        zero_pads: bool,
    ) -> None:
        self.cache, self.model, self.inputs, self.batch = cache, model, inputs, batch
        self.prepare, self.zero_pads = prepare, zero_pads
        self.device: torch.device = inputs["input_ids"].device
        self.computed: dict[str, int] | None = None  # row -> index, of those that the first reading computed

    def warm(self) -> dict[StateKey, Tensor] | None:
        """Return all states at once where every row is kept, else None: then call the reader.

        Returns:
            StateKey -> (B, m, d), contiguous, zero at positions that are not stored, in the order in which a visitor
            would see them. None also for a model whose blocks lie on several devices.
        """
        states = read(self.cache, self.batch)
        if states is not None:
            self.computed = {}
        return states

    def __call__(self, visit: Visitor) -> None:
        cache, rows = self.cache, self.batch.rows
        cache.device = self.device
        trial = cache.undecided
        found, missing = self._look_up(trial)
        if self.computed is not None:
            if missing:
                missing = {**self.computed, **missing}
            self._read(visit, {key: entry for key, entry in found.items() if key not in missing}, missing, None)
            return
        self.computed = missing
        self._note_widths(missing.values())
        writer = RowWriter(cache, self.batch, [rows[index] for index in missing.values()], trial)
        with cache.meter.of_pass(len(rows), len(missing), self.device):
            self._read(visit, found, missing, writer)

    def _look_up(self, trial: bool) -> tuple[dict[str, Entry], dict[str, int]]:
        """Rows that are kept, and the indices of those that are not (during a trial: of all)."""
        found: dict[str, Entry] = {}
        missing: dict[str, int] = {}
        for index, row in enumerate(self.batch.rows):
            if row.key in found or row.key in missing:
                continue
            entry = None if trial else self.cache.find(row.key, self.batch.size(row))
            if entry is None:
                missing[row.key] = index
            else:
                found[row.key] = entry
        return found, missing

    def _read(self, visit: Visitor, found: dict[str, Entry], missing: dict[str, int], writer: RowWriter | None) -> None:
        for ready in {entry.ready for entry in found.values() if entry.ready is not None}:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_event(ready)
            else:
                ready.synchronize()
        counts = {row.key: self.batch.counts(row) for row in self.batch.rows}
        stored = {key: entry.states(counts[key]) for key, entry in found.items()}
        wanted = self.batch.plan.visited
        if not missing:
            for key in wanted:
                visit(key, self._assembled(key, stored, None, missing))
            return
        indices = list(missing.values())
        whole = len(indices) == len(self.batch.rows)
        inputs = self.inputs if whole else self._rows_of(self.inputs, indices)
        clock = TrialClock(self.device) if writer is not None and writer.hold else None

        def note(key: StateKey, hidden: Tensor) -> None:
            hidden = self.prepare(key, hidden)
            if writer is not None:
                with self.cache.meter.storing(self.device), clock or contextlib.nullcontext():
                    writer.take(key, hidden)
            full = hidden if whole else self._assembled(key, stored, hidden, missing)
            with clock or contextlib.nullcontext():
                visit(key, full)

        try:
            read_from_model(self.model, inputs, set(wanted), dropout=False)(note)
        except BaseException:
            if writer is not None:
                writer.release()
            raise
        seconds = clock.seconds() if clock is not None else 0.0
        if writer is not None:
            with self.cache.meter.storing(self.device):
                writer.keep()
        if clock is not None:
            self.cache.record_seconds(seconds / len(indices))

    def _assembled(
        self, key: StateKey, stored: dict[str, dict[StateKey, Tensor]], computed: Tensor | None, missing: dict[str, int]
    ) -> Tensor:
        """The whole batch's state (B, m, d): rows that were found, and rows computed now in the order of missing."""
        rows = self.batch.rows
        sample = computed if computed is not None else next(iter(stored.values()))[key]
        device = computed.device if computed is not None else device_of(self.model, key)
        # pads that are not stored are not read either
        shape = (len(rows), self.batch.widths[key.stack], sample.shape[-1])
        full = torch.empty(shape, dtype=sample.dtype, device=device)
        at = {name: place for place, name in enumerate(missing)}
        for index, row in enumerate(rows):
            where = row.positions[key.stack]
            if row.key in stored:
                own = stored[row.key][key]
            else:
                assert computed is not None
                first = rows[missing[row.key]]
                own = computed[at[row.key], first.positions[key.stack]]
            if isinstance(where, slice):
                full[index, where].copy_(own, non_blocking=True)
            else:
                full[index, where.to(device)] = own.to(device)
        return full

    def _rows_of(self, inputs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        count = len(self.batch.rows)
        return {
            name: _take(value, indices) if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in inputs.items()
        }

    def _note_widths(self, missing: Collection[int]) -> None:
        """Say once why rows that were seen before are not found: they came in another width."""
        if self.zero_pads:
            return
        widths = tuple(self.batch.widths[key.stack] for key in self.batch.plan.visited)
        for index in missing:
            if len(self.cache.contents) >= _LOOKED_AT:
                return
            before = self.cache.contents.setdefault(self.batch.content(index), widths)
            if before != widths:
                self.cache.warn_once(_OTHER_WIDTH)


def _take(tensor: Tensor, indices: list[int]) -> Tensor:
    return tensor[torch.tensor(indices, device=tensor.device)]
