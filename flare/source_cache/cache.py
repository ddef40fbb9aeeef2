"""SourceStateCache: the frozen model reads each source text once; later passes read what it gave."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..source.source_pass import Preparation
from ..source.states import SourceStates, StateKey
from .arguments import TIERS, checked, make_directory
from .entries import Entry
from .fingerprint import fingerprint
from .keeping import Tier
from .memory import MemoryTier
from .meter import CacheStats, Meter, readable
from .reader import CachedReader, gather
from .request import SourceRequest
from .rows import Batch, Plan, accepts_types, counts_relatively, needs_width
from .shards import DiskTier
from .trial import seconds_to_read
from .watch import Watch

#: Columns of a batch that the frozen model reads.
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _locked(method: Callable[_P, _T]) -> Callable[_P, _T]:
    @functools.wraps(method)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with args[0].lock:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return locked


@dataclass
class _Bound:
    """What the cache knows of one model that it is bound to. ``plans``: by the states that are wanted."""

    watch: Watch
    relative: bool
    width_counts: bool
    accepts_types: bool
    plans: dict[frozenset[StateKey], Plan] = field(default_factory=dict)

    def plan(self, model: nn.Module, wanted: Collection[StateKey], decoders: Collection[str]) -> Plan:
        """The plan of the wanted states, made once."""
        kind = frozenset(wanted)
        plan = self.plans.get(kind)
        if plan is None:
            plan = self.plans[kind] = Plan.of(kind, decoders, model)
        return plan

    def batch(self, plan: Plan, columns: Mapping[str, Tensor], zero_pads: bool, dtype: torch.dtype | None) -> Batch:
        """The rows of a batch by their names."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "source_cache: rows cannot be looked up while a CUDA graph is captured, as its replays would read the "
                "same rows; call SourceStateCache.lookup before, and copy its states into the graph's buffers"
            )
        return Batch.of(
            plan, columns, relative=self.relative, zero_pads=zero_pads, dtype=dtype, width_counts=self.width_counts
        )


class SourceStateCache:
    """Keeps source states over epochs, row by row, in memory on the device, in host memory and on disk.

    A row is found by its content: token ids, mask and token types, which states are wanted (so the source layer
    offset), the dtype they are kept in, and the base model. It fills until the budget is spent and then stays as it is:
    no row is ever thrown out, so a second epoch finds every row that the first had room for. Rows of a batch that are
    not found are computed in one source pass of those rows alone. A row computed in a smaller batch is the same up to
    the rounding of the kernels (their reduction may depend on the number of rows), a stored one to the last bit.

    Hand it to ``FlareTrainer(source_cache=...)``, or to ``model.set_source_cache(cache)`` in a loop of your own.

    Args:
        budget: bytes over all tiers, or {tier: bytes}. Of one number over several tiers the memory tiers take at most
            half of what is free there.
        tiers: which are used, fastest first: "device", "host" (pinned where there is a GPU), "disk" (only with a
            directory). "auto" measures reading and computing in the first two source passes and uses those tiers that
            are faster than computing.
        directory: where the disk tier keeps its files (made if missing); processes may share it. Files there that are
            foreign or damaged are reported, left alone and not used.

    Raises:
        TypeError, ValueError: a value that is not accepted; the message names the argument.
    """

    def __init__(
        self,
        budget: int | Mapping[str, int],
        tiers: str | Sequence[str] = TIERS,
        directory: str | Path | None = None,
    ) -> None:
        self._arguments = (budget, tiers, directory)
        named, self._total = checked(budget, tiers, directory)
        self.undecided = tiers == "auto"
        self._directory = None if directory is None else Path(directory).absolute()
        shared = not isinstance(budget, Mapping) and len(named) > 1
        self._tiers: list[Tier] = []
        for name in named:
            own = budget[name] if isinstance(budget, Mapping) else budget
            if name == "disk":
                assert self._directory is not None
                make_directory(self._directory)
                self._tiers.append(DiskTier(self._directory, own, self.say))
            else:
                self._tiers.append(MemoryTier(name, own, shared))
        self.decisions: dict[str, str] = {}  # of tiers="auto": tier -> what was measured and decided
        self._base: str | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, _Bound] = weakref.WeakKeyDictionary()
        self.device = torch.device("cpu")  # where the model is; set by every pass
        self.meter = Meter()
        self._said: set[str] = set()
        self.contents: dict[str, tuple[int, ...]] = {}  # rows by their tokens alone -> padded widths
        self._timed: list[float] = []
        self.held: list[tuple[str, Entry]] = []
        self.lock = threading.RLock()  # on a GPU backward passes read in threads of their own
        atexit.register(_flush_at_exit, weakref.ref(self), os.getpid())

    # --- the base model -----------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> None:
        """Tie the cache to the frozen weights of a transformers model, all of whose bytes are read for that.

        Raises:
            ValueError: the cache holds states of another base model, or the weights are not frozen.
        """
        watch, found = Watch(model), fingerprint(model)
        if self._base is None:
            self._base = found
            for tier in self._tiers:
                if isinstance(tier, DiskTier):
                    tier.open(found)
        elif self._base != found:
            raise ValueError(
                f"source_cache is bound to another base model (fingerprint {self._base[:12]}, this one's is "
                f"{found[:12]}: other weights or another config); make a SourceStateCache for each base model, with a "
                "directory of its own or a shared one"
            )
        self._models[model] = _Bound(watch, counts_relatively(model), needs_width(model), accepts_types(model))

    def _bound(self, model: nn.Module) -> _Bound:
        """Before every pass: the weights are those the cache was bound to; read again only where something moved."""
        bound = self._models.get(model)
        if bound is not None and bound.watch.holds():
            return bound
        if bound is not None:
            watch = Watch(model)
            if watch.stamp == bound.watch.stamp:  # the same weights in other wrappers
                bound.watch = watch
                return bound
        self.bind(model)
        return self._models[model]

    # --- reading ------------------------------------------------------------------------------------------------------

    def reader(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        wanted: Collection[StateKey],
        prepare: Preparation,
        masks: Mapping[str, Tensor] | None = None,
        decoders: Collection[str] = (),
        *,
        zero_pads: bool | None = None,
        host: Mapping[str, Tensor] | None = None,
    ) -> CachedReader:
        """A reader (see flare.source.source_pass) of cached rows; runs the frozen model on the others and keeps them.

        Args:
            model: the transformers model.
            inputs: keyword arguments of its backbone for the whole batch.
            wanted: the states to read.
            prepare: what a state goes through before it is kept (its dtype; rows of pads are dropped by their mask).
            masks: stack -> (B, m), where pads are neither read nor kept (source_padding="zero"); else empty.
            decoders: those stacks among the wanted that read ``decoder_input_ids``.
            zero_pads: whether pads are neither read nor kept; by default where there are masks.
            host: those of ``input_ids``, ``attention_mask``, ``token_type_ids``, ``decoder_input_ids`` and
                ``decoder_attention_mask`` that the caller has on the CPU. Of the others the host waits for a copy.
        """
        masks = masks or {}
        zero_pads = bool(masks) if zero_pads is None else zero_pads
        columns = {name: inputs[name] for name in _COLUMNS if inputs.get(name) is not None}
        mask = next((masks[stack] for stack in decoders if stack in masks), None)
        if mask is not None:
            columns["decoder_attention_mask"] = mask
        if host is not None:
            columns |= {name: host[name] for name in columns if name in host}
        bound = self._bound(model)
        batch = bound.batch(bound.plan(model, wanted, decoders), columns, zero_pads, prepare.dtype)
        return CachedReader(self, model, inputs, batch, prepare, zero_pads)

    def lookup(self, model: Any, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> SourceStates | None:
        """Return the source states of a batch where every row of it is kept, else None.

        Called with the batch on the host, before it moves to the device, this does not wait for the device: the states
        are copied while the device works on, and the current stream waits for them. Pass them on in place of the source
        (``model(**target, source_states=states)``), or copy them into the buffers of a captured CUDA graph before each
        replay. Without them (None), run the model on the whole batch, which computes and keeps what is missing.

        Args:
            model: a model with FLARE adapters.
            batch: as the model takes it; what does not begin with ``source_`` is not read.
                ``source_input_ids`` (B, m) integers, ``source_attention_mask`` and ``source_token_type_ids`` of the
                same shape; of an encoder-decoder also ``source_labels`` or ``source_decoder_input_ids`` (B, u).
            dtype: autocast's where the forward runs under autocast and this call does not; by default the one that is
                in force.

        Returns:
            States (B, m, d), contiguous and detached, on the model's device; zero at pads under
            source_padding="zero". Under ``source_labels`` or ``source_decoder_input_ids`` the decoder's (B, u, d) too.
            None also where no active adapter reads a source, and for a model whose blocks lie on several devices.

        Raises:
            TypeError, ValueError: a model without FLARE adapters, or a source that is missing or does not fit.
            RuntimeError: the call is part of a CUDA graph that is being captured.
        """
        if not hasattr(model, "source_request"):
            raise TypeError(
                f"model must have FLARE adapters (flare.fast_lora adds them), got {type(model).__name__} without any"
            )
        request: SourceRequest = model.source_request()
        bound = self._bound(request.model)
        columns, wanted = request.columns(batch, bound.accepts_types)
        if not wanted:
            return None
        plan = bound.plan(request.model, wanted, request.decoders)
        kind = "cpu" if plan.device is None else plan.device.type
        if dtype is None and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        named = bound.batch(plan, columns, request.zero_pads, dtype)
        states = self.read(named)
        if states is None:
            return None
        padded = not named.streams[0].mask.all()
        return SourceStates(states, request.offset, columns["attention_mask"] if padded else None)

    def read(self, batch: Batch) -> dict[StateKey, Tensor] | None:
        """Return all states of a batch, see :meth:`CachedReader.warm`."""
        device = batch.plan.device
        if device is None or self.undecided:
            return None
        self.device = device
        entries = self._find_all(batch)
        if entries is None or any((one.dtype, one.width) != (entries[0].dtype, entries[0].width) for one in entries):
            return None
        with self.meter.of_pass(len(batch.rows), 0, device):
            return gather(batch, entries, device)

    @_locked
    def _find_all(self, batch: Batch) -> list[Entry] | None:
        found = []
        for row in batch.rows:
            entry = self.find(row.key, batch.size(row))
            if entry is None:
                return None
            found.append(entry)
        return found

    @_locked
    def find(self, key: str, positions: int) -> Entry | None:
        """A row's entry in the fastest tier that has it, of so many positions; copied into a faster one with room."""
        for tier in self._tiers:
            entry = tier.find(key)
            if entry is None:
                continue
            if entry.data.numel() != positions * entry.width * entry.dtype.itemsize:
                self.say(f"the {tier.name} tier holds a row of another size under the name {key}; it is not used")
                continue
            return self._promoted(key, entry, tier)
        return None

    def _promoted(self, key: str, entry: Entry, holder: Tier) -> Entry:
        if isinstance(holder, DiskTier) and entry.data.numel() and entry.ready is None:
            for tier in self._tiers[: self._tiers.index(holder)]:
                room = tier.reserve(entry.data.numel(), self.device, self._left)
                if room is not None:
                    with torch.inference_mode(False), torch.no_grad():
                        room.copy_(entry.data)
                    entry = Entry(room, entry.dtype, entry.width)
                    tier.put(key, entry)
                    break
        return entry

    # --- keeping ------------------------------------------------------------------------------------------------------

    @_locked
    def reserve(self, nbytes: int) -> tuple[Tier, Tensor] | None:
        """Room for a row in the first tier that has any, and that tier."""
        for tier in self._tiers:
            room = tier.reserve(nbytes, self.device, self._left)
            if room is not None:
                return tier, room
        for tier in self._tiers:
            if isinstance(tier, MemoryTier) and tier.full is not None:
                self.say(f"no memory for the {tier.name} tier ({tier.full}); it stays as it is")
        if self._tiers and all(tier.full is None for tier in self._tiers):
            self.say(
                f"the budget is spent ({', '.join(self.tiers)}): the rows kept so far stay, others are computed in "
                "every epoch"
            )
        return None

    @property
    def _left(self) -> int:
        """Bytes left of a budget over all tiers."""
        if self._total is None:
            return 1 << 62
        return self._total - sum(tier.used for tier in self._tiers)

    @_locked
    def refresh(self) -> None:
        """Take in what other processes have put into the directory since."""
        for tier in self._tiers:
            if isinstance(tier, DiskTier) and self._base is not None:
                tier.refresh()

    @_locked
    def flush(self) -> None:
        """Publish the rows that wait to be written to disk; FlareTrainer does it after every epoch."""
        for tier in self._tiers:
            if isinstance(tier, DiskTier):
                tier.flush()

    # --- tiers="auto" -------------------------------------------------------------------------------------------------

    @_locked
    def timed(self, seconds: float) -> None:
        """What one row took to compute, in a pass before the tiers are decided; the first pass only warms up."""
        self._timed.append(seconds)
        if len(self._timed) == 2:
            self._decide(seconds)

    def _decide(self, computing: float) -> None:
        """Keep the tiers from which a row is read sooner than it is computed, given the seconds that takes."""
        nbytes = max((entry.data.numel() for _, entry in self.held), default=0)
        kept: list[Tier] = []
        for tier in self._tiers:
            try:
                reading = seconds_to_read(tier.name, nbytes, self.device, self._directory)
            except (OSError, RuntimeError) as error:
                self.decisions[tier.name] = f"not used: {error}"
                self.say(f"tiers='auto' leaves the {tier.name} tier out, and what it holds: {error}")
                continue
            times = f"reading a row {reading * 1e3:.3g} ms, computing it {computing * 1e3:.3g} ms"
            self.decisions[tier.name] = f"{'used' if reading < computing else 'not used'}: {times}"
            if reading < computing:
                kept.append(tier)
        self._tiers, self.undecided = kept, False
        _log.info("source_cache: %s", self._decided)
        if not kept:
            self.say(f"tiers='auto' keeps nothing, every epoch computes its source states: {self._decided}")
        held, self.held = self.held, []
        for key, entry in held:
            if self._tiers and self._kept(key):
                continue
            found = self.reserve(entry.data.numel())
            if found is not None:
                tier, room = found
                room.copy_(entry.data)
                tier.put(key, Entry(room, entry.dtype, entry.width))

    def _kept(self, key: str) -> bool:
        return any(tier.find(key) is not None for tier in self._tiers)

    @property
    def _decided(self) -> str:
        return "; ".join(f"{tier} {why}" for tier, why in self.decisions.items())

    # --- what it did --------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | Mapping[str, int]:
        """As it was given."""
        return self._arguments[0]

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers in use, fastest first."""
        return tuple(tier.name for tier in self._tiers)

    @property
    def nbytes(self) -> int:
        """Bytes in all tiers."""
        return sum(tier.used for tier in self._tiers)

    def stats(self) -> CacheStats:
        """Rows, hits, bytes and seconds so far. On a GPU this waits for the passes that are under way."""
        entries = {tier.name: tier.count for tier in self._tiers}
        nbytes = {tier.name: tier.used for tier in self._tiers}
        return CacheStats(self.meter.rows, self.meter.hits, entries, nbytes, self.meter.seconds_saved())

    def summary(self) -> str:
        """One line for people."""
        now = self.stats()
        held = ", ".join(f"{name} {now.entries[name]} rows {readable(now.nbytes[name])}" for name in self.tiers)
        saved = "time saved not known (no pass computed all its rows)"
        if now.seconds_saved is not None:
            saved = f"{round(now.seconds_saved, 1) + 0.0} s saved"  # no -0.0
        text = f"source_cache: {now.hits} of {now.rows} rows read ({now.hit_rate:.1%}), {saved}; {held or 'no tier'}"
        return f"{text}; {self._decided}" if self.decisions else text

    def __repr__(self) -> str:
        budget, tiers, directory = self._arguments
        return f"SourceStateCache({budget!r}, tiers={tiers!r}, directory={str(directory) if directory else None!r})"

    # A copy of a model shares the cache; one that is pickled takes the arguments along and not the states.
    def __deepcopy__(self, memo: dict[int, Any]) -> SourceStateCache:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceStateCache, self._arguments

    def say(self, what: str) -> None:
        """One warning for each thing, however often it happens."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"source_cache: {what}", UserWarning, stacklevel=2)


def _flush_at_exit(cache: weakref.ref[SourceStateCache], process: int) -> None:
    found = cache()
    if found is not None and process == os.getpid():  # what a fork holds is its parent's to publish
        found.flush()
