"""Run one source pass with a cache. A row is one text of a batch.

Rows that are cached are read. The frozen model runs on the other rows only, and their states are stored. A stack is the
list of blocks of a decoder-only model, of an encoder, or of a decoder.

Shapes: B rows of a batch, m positions, hidden states of width d.
"""

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

#: Largest number of rows whose padded width is remembered, to detect texts that come again with another width.
_REMEMBERED_ROWS = 100_000
_OTHER_WIDTH = (
    "some source texts are padded to another width than in an earlier batch. With source_padding='keep' the padded "
    "width is part of a row's key, so these texts are computed again. Pad every batch to one length "
    "(FlareDataCollator(padding='max_length', max_length=...)), or use fast_lora(..., source_padding='zero'), for "
    "which the keys do not include the width"
)


# --- all states of a batch in one call --------------------------------------------------------------------------------


def read(store: Store, batch: Batch) -> dict[StateKey, Tensor] | None:
    """Return all states of a batch; None in the cases that :meth:`CachedReader.warm` lists."""
    device = batch.plan.device
    if device is None or store.undecided:
        return None
    store.device = device
    entries = store.find_all(batch)
    if entries is None or any((e.dtype, e.width) != (entries[0].dtype, entries[0].width) for e in entries):
        return None
    with store.meter.of_pass(len(batch.rows), 0, device):
        return gather(batch, entries, device)


def gather(batch: Batch, entries: Sequence[Entry], device: torch.device) -> dict[StateKey, Tensor]:
    """Return all states of a batch, each (B, m, d) and contiguous, zero at positions that are not stored.

    On CUDA, rows in host memory are copied on a separate stream, and the current stream waits for them on the device.

    Args:
        batch: the texts.
        entries: the entry of each row, in the order of the batch.
        device: device of the returned states.
    """
    with torch.inference_mode(False), torch.no_grad():  # training cannot save inference tensors for backward
        fill = _fill_on_cpu if device.type == "cpu" else _fill_on_cuda
        buffers = fill(batch, entries, device)
        stacks = (*batch.plan.of_text, *batch.plan.of_decoder)
        states = [state for stack in stacks for state in buffers[stack].unbind(0)]
        return dict(zip(batch.plan.visited, states, strict=True))


def _fill_on_cpu(batch: Batch, entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    for ready in {entry.ready for entry in entries if entry.ready is not None}:
        ready.synchronize()  # an entry has an event if it was computed on a GPU
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
    """Return stack -> new buffer (number of states, B, m, d), filled with zeros if some positions are not stored."""
    buffers = {}
    for stack, count in batch.plan.stacks.items():
        width = batch.widths[stack]
        is_full = all(row.lengths[stack] == width for row in batch.rows)
        make = torch.empty if is_full else torch.zeros
        buffers[stack] = make(count, len(batch.rows), width, sample.width, dtype=sample.dtype, device=device)
    return buffers


def _fill(buffers: dict[str, Tensor], batch: Batch, entries: list[tuple[int, Entry]]) -> None:
    """Copy entries into the buffers. One call copies all rows whose mask has no gaps.

    Args:
        buffers: stack -> buffer (number of states, B, m, d).
        batch: the texts.
        entries: (index in the batch, entry) pairs. An entry holds all states of a stack next to each other.
    """
    targets, sources = [], []
    for index, entry in entries:
        row, start, values = batch.rows[index], 0, entry.data.view(entry.dtype)
        for stack, count in batch.plan.stacks.items():
            buffer, length, where = buffers[stack], row.lengths[stack], row.positions[stack]
            end = start + count * length * entry.width
            source = values[start:end].view(count, length, entry.width)
            start = end
            if buffer.is_cuda and not (source.is_cuda or source.is_pinned()):
                source = source.pin_memory()  # a copy from pageable memory would wait for the stream
            if isinstance(where, slice):
                targets.append(buffer[:, index, where])
                sources.append(source)
                continue
            # the mask has gaps between tokens, so ``where`` is a tensor of positions
            where = where.pin_memory().to(buffer.device, non_blocking=True) if buffer.is_cuda else where
            buffer[:, index].index_copy_(1, where, source.to(buffer.device, non_blocking=buffer.is_cuda))
    if targets:
        copy_each(targets, sources, targets[0].is_cuda)


class _CopyStream:
    """Stream that copies rows from the host to a device, while another stream computes.

    Buffers are allocated on this stream, so a copy never waits until the computing stream has finished with older
    memory. A buffer is freed only when the device has finished the computations that read it (``record_stream``). If
    the host queued many reads before the device ran them, their buffers would fill the memory. The host therefore
    waits when it is more than two reads ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._events: deque[torch.cuda.Event] = deque()

    def enter(self, computing: torch.cuda.Stream) -> torch.cuda.Stream:
        """Return the stream to copy on, after waiting until the host is at most two reads ahead."""
        self._events.append(computing.record_event())
        if len(self._events) > 2:
            self._events.popleft().synchronize()
        return self.stream


@functools.cache
def _copy_stream(device: torch.device) -> _CopyStream:
    return _CopyStream(device)


# --- one source pass --------------------------------------------------------------------------------------------------


class CachedReader:
    """One source pass through the cache.

    The reader may be called again in a backward pass. The second call reads the rows that are cached by then, and
    neither counts nor stores rows. If a row could not be stored, the frozen model runs again on exactly the rows that
    the first call computed, because a batch of another size could round differently.
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
        self.computed: dict[str, int] | None = None  # rows that the first call computed: key -> index

    def warm(self) -> dict[StateKey, Tensor] | None:
        """Return all states if every row is cached. If the result is None, call the reader instead.

        Returns:
            StateKey -> state (B, m, d), contiguous, zero at positions that are not stored, in the order in which the
            model computes them. None if a row is not cached, if rows differ in their states' dtype or width, if the
            model's blocks are on several devices, or while tiers="auto" has not chosen the tiers yet.
        """
        states = read(self.cache, self.batch)
        if states is not None:
            self.computed = {}
        return states

    def __call__(self, visit: Visitor) -> None:
        cache, rows = self.cache, self.batch.rows
        cache.device = self.device
        trial = cache.undecided
        entries, missing = self._look_up(trial)
        if self.computed is not None:
            if missing:
                missing = {**self.computed, **missing}
            self._read(visit, {key: entry for key, entry in entries.items() if key not in missing}, missing, None)
            return
        self.computed = missing
        self._check_widths(missing.values())
        writer = RowWriter(cache, self.batch, [rows[index] for index in missing.values()], trial)
        with cache.meter.of_pass(len(rows), len(missing), self.device):
            self._read(visit, entries, missing, writer)

    def _look_up(self, trial: bool) -> tuple[dict[str, Entry], dict[str, int]]:
        """Return key -> entry for the cached rows, and key -> index in the batch for all other rows.

        In a trial pass of tiers="auto" (``trial``) no row counts as cached.
        """
        entries: dict[str, Entry] = {}
        missing: dict[str, int] = {}
        for index, row in enumerate(self.batch.rows):
            if row.key in entries or row.key in missing:
                continue
            entry = None if trial else self.cache.find(row.key, self.batch.size(row))
            if entry is None:
                missing[row.key] = index
            else:
                entries[row.key] = entry
        return entries, missing

    def _read(
        self, visit: Visitor, entries: dict[str, Entry], missing: dict[str, int], writer: RowWriter | None
    ) -> None:
        for ready in {entry.ready for entry in entries.values() if entry.ready is not None}:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_event(ready)
            else:
                ready.synchronize()
        counts = {row.key: self.batch.counts(row) for row in self.batch.rows}
        stored = {key: entry.states(counts[key]) for key, entry in entries.items()}
        keys = self.batch.plan.visited
        if not missing:
            for key in keys:
                visit(key, self._assembled(key, stored, None, missing))
            return
        indices = list(missing.values())
        computes_all = len(indices) == len(self.batch.rows)
        inputs = self.inputs if computes_all else self._rows_of(self.inputs, indices)
        clock = TrialClock(self.device) if writer is not None and writer.on_trial else None

        def collect(key: StateKey, hidden: Tensor) -> None:
            hidden = self.prepare(key, hidden)
            if writer is not None:
                with self.cache.meter.storing(self.device), clock or contextlib.nullcontext():
                    writer.write(key, hidden)
            full = hidden if computes_all else self._assembled(key, stored, hidden, missing)
            with clock or contextlib.nullcontext():
                visit(key, full)

        try:
            read_from_model(self.model, inputs, set(keys), dropout=False)(collect)
        except BaseException:
            if writer is not None:
                writer.release()
            raise
        seconds = clock.seconds() if clock is not None else 0.0
        if writer is not None:
            with self.cache.meter.storing(self.device):
                writer.commit()
        if clock is not None:
            self.cache.record_seconds(seconds / len(indices))

    def _assembled(
        self, key: StateKey, stored: dict[str, dict[StateKey, Tensor]], computed: Tensor | None, missing: dict[str, int]
    ) -> Tensor:
        """Return one state (B, m, d) of the whole batch.

        Args:
            key: the state.
            stored: row key -> the states of a cached row.
            computed: the state of the computed rows (B', m, d), in the order of ``missing``; None if there are none.
            missing: row key of a computed row -> the index of this row in the batch.
        """
        rows = self.batch.rows
        sample = computed if computed is not None else next(iter(stored.values()))[key]
        device = computed.device if computed is not None else device_of(self.model, key)
        # no adapter reads the positions that are not stored, so they may stay uninitialised
        shape = (len(rows), self.batch.widths[key.stack], sample.shape[-1])
        full = torch.empty(shape, dtype=sample.dtype, device=device)
        computed_index = {key: index for index, key in enumerate(missing)}
        for index, row in enumerate(rows):
            where = row.positions[key.stack]
            if row.key in stored:
                state = stored[row.key][key]
            else:
                assert computed is not None
                first = rows[missing[row.key]]
                state = computed[computed_index[row.key], first.positions[key.stack]]
            if isinstance(where, slice):
                full[index, where].copy_(state, non_blocking=True)
            else:
                full[index, where.to(device)] = state.to(device)
        return full

    def _rows_of(self, inputs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        count = len(self.batch.rows)
        return {
            name: _take(value, indices) if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in inputs.items()
        }

    def _check_widths(self, missing: Collection[int]) -> None:
        """Warn once if a row is not cached because its text was padded to another width before."""
        if self.zero_pads:
            return
        widths = tuple(self.batch.widths[key.stack] for key in self.batch.plan.visited)
        for index in missing:
            if len(self.cache.contents) >= _REMEMBERED_ROWS:
                return
            first_widths = self.cache.contents.setdefault(self.batch.content(index), widths)
            if first_widths != widths:
                self.cache.warn_once(_OTHER_WIDTH)


def _take(tensor: Tensor, indices: list[int]) -> Tensor:
    return tensor[torch.tensor(indices, device=tensor.device)]
