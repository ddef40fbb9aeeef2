"""One source pass through a cache: rows that are kept are read, the others computed in a smaller pass and kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..source.source_pass import Preparation, Visitor, read_from_model
from ..source.states import StateKey
from .entries import Entry, size_of
from .memory import MemoryTier
from .rows import Row, Stream, context_of, name_rows
from .shards import DiskTier

if TYPE_CHECKING:
    from .cache import SourceStateCache

Tier = MemoryTier | DiskTier

#: Rows among which one that comes back in another width is noticed.
_LOOKED_AT = 100_000
_OTHER_WIDTH = (
    "source texts come back padded to another width, and with source_padding='keep' the padded width is "
    "part of what a row is, so they are computed anew. Pad every batch to one length (FlareDataCollator(padding="
    "'max_length', max_length=...)), or use fast_lora(..., source_padding='zero'), under which the width does not count"
)


class CachedReader:
    """One source pass through the cache. Called again (in a backward pass), it counts and keeps nothing.

    The second time it reads what is kept by then. Where a row has found no room, the frozen model runs on the very rows
    of the first time, as a batch of another size could round them otherwise.
    """

    def __init__(
        self,
        cache: SourceStateCache,
        model: nn.Module,
        inputs: dict[str, Any],
        wanted: set[StateKey],
        prepare: Preparation,
        masks: Mapping[str, Tensor],
        decoders: Collection[str],
    ) -> None:
        self.cache = cache
        self.model = model
        self.inputs = inputs
        # in the model's order, in which dropout masks are drawn
        self.wanted = sorted(wanted, key=lambda key: (key.stack in decoders, key))
        self.prepare = prepare
        self.zero_pads = bool(masks)
        self.device: torch.device = inputs["input_ids"].device
        width = inputs["input_ids"].shape[1] if cache.widths_count[id(model)] else None
        self.rows = name_rows(
            _streams(inputs, wanted, masks, decoders, cache.relative[id(model)]),
            context_of(wanted, self.zero_pads, prepare.dtype, width),
            self.zero_pads,
        )
        self.width = {key: _width(inputs, key, decoders) for key in self.wanted}
        self.computed: dict[str, int] | None = None  # row -> index, of those that the first reading computed

    def __call__(self, visit: Visitor) -> None:
        cache = self.cache
        cache.device = self.device
        trial = cache.undecided
        found, missing = self._look_up(trial)
        if self.computed is not None:
            if missing:
                missing = {**self.computed, **missing}
            self._read(visit, {key: entry for key, entry in found.items() if key not in missing}, missing, None)
            return
        self.computed = missing
        cache.meter.rows += len(self.rows)
        cache.meter.hits += len(self.rows) - len(missing)
        self._note_widths(missing.values())
        keeping = _Keeping(cache, [self.rows[index] for index in missing.values()], self._counts, trial)
        with cache.meter.of_pass(len(self.rows), len(missing), self.device):
            self._read(visit, found, missing, keeping)

    def _look_up(self, trial: bool) -> tuple[dict[str, Entry], dict[str, int]]:
        """Rows that are kept, and the indices of those that are not (during a trial: of all)."""
        found: dict[str, Entry] = {}
        missing: dict[str, int] = {}
        for index, row in enumerate(self.rows):
            if row.key in found or row.key in missing:
                continue
            entry = None if trial else self.cache.find(row.key, self._counts(row))
            if entry is None:
                missing[row.key] = index
            else:
                found[row.key] = entry
        return found, missing

    def _read(self, visit: Visitor, found: dict[str, Entry], missing: dict[str, int], keeping: _Keeping | None) -> None:
        for ready in {entry.ready for entry in found.values() if entry.ready is not None}:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_event(ready)
            else:
                ready.synchronize()
        counts = {row.key: self._counts(row) for row in self.rows}
        stored = {key: entry.states(counts[key]) for key, entry in found.items()}
        if not missing:
            for key in self.wanted:
                visit(key, self._assembled(key, stored, None, missing))
            return
        indices = list(missing.values())
        whole = len(indices) == len(self.rows)
        inputs = self.inputs if whole else self._rows_of(self.inputs, indices)
        clock = _TrialClock(self.device) if keeping is not None and keeping.hold else None

        def note(key: StateKey, hidden: Tensor) -> None:
            hidden = self.prepare(key, hidden)
            if keeping is not None:
                with self.cache.meter.storing(self.device), clock or contextlib.nullcontext():
                    keeping.take(key, hidden)
            full = hidden if whole else self._assembled(key, stored, hidden, missing)
            with clock or contextlib.nullcontext():
                visit(key, full)

        try:
            read_from_model(self.model, inputs, set(self.wanted), dropout=False)(note)
        except BaseException:
            if keeping is not None:
                keeping.give_back()
            raise
        seconds = clock.seconds() if clock is not None else 0.0
        if keeping is not None:
            with self.cache.meter.storing(self.device):
                keeping.keep()
        if clock is not None:
            self.cache.timed(seconds / len(indices))

    def _assembled(
        self, key: StateKey, stored: dict[str, dict[StateKey, Tensor]], computed: Tensor | None, missing: dict[str, int]
    ) -> Tensor:
        """The whole batch's state (B, m, d): rows that were found, and rows computed now in the order of missing."""
        sample = computed if computed is not None else next(iter(stored.values()))[key]
        device = computed.device if computed is not None else _device_of(self.model, key)
        # pads that are not stored are not read either
        full = torch.empty(len(self.rows), self.width[key], sample.shape[-1], dtype=sample.dtype, device=device)
        at = {name: place for place, name in enumerate(missing)}
        for index, row in enumerate(self.rows):
            where = row.positions[key.stack]
            if row.key in stored:
                own = stored[row.key][key]
            else:
                assert computed is not None
                first = self.rows[missing[row.key]]
                own = computed[at[row.key], first.positions[key.stack]]
            if isinstance(where, slice):
                full[index, where].copy_(own, non_blocking=True)
            else:
                full[index, where.to(device)] = own.to(device)
        return full

    def _counts(self, row: Row) -> dict[StateKey, int]:
        return {key: row.lengths[key.stack] for key in self.wanted}

    def _rows_of(self, inputs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        count = len(self.rows)
        return {
            name: _take(value, indices) if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in inputs.items()
        }

    def _note_widths(self, missing: Collection[int]) -> None:
        """Say once why rows that were seen before are not found: they came in another width."""
        if self.zero_pads:
            return
        widths = tuple(self.width.values())
        for index in missing:
            if len(self.cache.contents) >= _LOOKED_AT:
                return
            before = self.cache.contents.setdefault(self.rows[index].content, widths)
            if before != widths:
                self.cache.say(_OTHER_WIDTH)


class _Keeping:
    """Rows on their way into the cache: room is taken with the first state, and filled as the states come."""

    def __init__(self, cache: SourceStateCache, rows: list[Row], counts: Any, hold: bool) -> None:
        self.cache = cache
        self.rows = rows
        self.counts = counts
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
            counts = self.counts(row)
            nbytes = size_of(counts, dtype, width)
            tier: Tier | None = None
            if self.hold:
                room = torch.empty(nbytes, dtype=torch.uint8)
            else:
                found = self.cache.reserve(nbytes)
                if found is None:
                    continue
                tier, room = found
            entry = Entry(room, dtype, width)
            yield row, tier, entry, entry.states(counts)

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
                    self.cache.held.append((row.key, entry, self.counts(row)))
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


class _TrialClock:
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


def _streams(
    inputs: dict[str, Any],
    wanted: set[StateKey],
    masks: Mapping[str, Tensor],
    decoders: Collection[str],
    relative: bool,
) -> list[Stream]:
    """The texts that the wanted states depend on."""
    stacks = {key.stack for key in wanted}
    ids = inputs["input_ids"].detach().cpu()
    types = [inputs["token_type_ids"].detach().cpu()] if "token_type_ids" in inputs else []
    of_text = tuple(sorted(stacks - set(decoders)))
    streams = [Stream((ids, *types), inputs["attention_mask"].detach().cpu(), of_text, relative)]
    of_decoder = tuple(sorted(stacks & set(decoders)))
    if of_decoder:
        ids = inputs["decoder_input_ids"].detach().cpu()
        mask = masks.get(of_decoder[0])
        streams.append(Stream((ids,), torch.ones_like(ids) if mask is None else mask.cpu(), of_decoder, False))
    return streams


def _width(inputs: dict[str, Any], key: StateKey, decoders: Collection[str]) -> int:
    return int(inputs["decoder_input_ids" if key.stack in decoders else "input_ids"].shape[1])


def _take(tensor: Tensor, indices: list[int]) -> Tensor:
    return tensor[torch.tensor(indices, device=tensor.device)]


def _device_of(model: nn.Module, key: StateKey) -> torch.device:
    """Where the model makes a state."""
    blocks = model.get_submodule(key.stack)
    return next(blocks[max(key.position - 1, 0)].parameters()).device  # type: ignore[index]
