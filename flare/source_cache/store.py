"""Store finds and stores the rows of a cache in its tiers, within their budgets, and keeps statistics.

A row is one source text of a batch, and an entry holds the states of a row as bytes. The tiers are the device, host
memory and a folder on disk.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .arguments import check_arguments, make_directory
from .entries import Entry
from .memory import MemoryTier
from .meter import CacheStats, Meter, readable
from .row_keys import Batch
from .shards import DiskTier
from .trial import seconds_to_read

Tier = MemoryTier | DiskTier

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _locked(method: Callable[_P, _T]) -> Callable[_P, _T]:
    @functools.wraps(method)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with args[0].lock:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return locked


class Store:
    """Stores rows under their keys in tiers. SourceStateCache documents the arguments and the errors."""

    def __init__(
        self,
        budget: int | Mapping[str, int],
        tiers: str | Sequence[str],
        directory: str | Path | None,
    ) -> None:
        self._arguments = (budget, tiers, directory)
        names, self._total = check_arguments(budget, tiers, directory)
        self.undecided = tiers == "auto"
        self._directory = None if directory is None else Path(directory).absolute()
        shared = not isinstance(budget, Mapping) and len(names) > 1
        self._tiers: list[Tier] = []
        for name in names:
            tier_budget = budget[name] if isinstance(budget, Mapping) else budget
            if name == "disk":
                assert self._directory is not None
                make_directory(self._directory)
                self._tiers.append(DiskTier(self._directory, tier_budget, self.warn_once))
            else:
                self._tiers.append(MemoryTier(name, tier_budget, shared))
        self.decisions: dict[str, str] = {}  # tier -> what tiers="auto" measured and decided
        self._base: str | None = None
        self._traits: dict[str, Any] = {}
        self.device = torch.device("cpu")  # where the model is; set by every pass
        self.meter = Meter()
        self._warned: set[str] = set()
        #: Hash of a row's tokens -> the padded width of each state when the row was first computed.
        self.contents: dict[str, tuple[int, ...]] = {}
        self._row_seconds: list[float] = []  # seconds to compute a row, for tiers="auto"
        self.trial_rows: list[tuple[str, Entry]] = []  # rows computed before tiers="auto" has decided
        self.lock = threading.RLock()  # on a GPU, backward passes read from other threads
        self._process = os.getpid()
        if self._directory is not None:
            _on_disk.add(self)

    def claim(self, base: str, traits: Mapping[str, Any]) -> None:
        """Bind the rows to a base model.

        Args:
            base: fingerprint of the base model.
            traits: plain attributes and unsaved buffers of its modules (see Watch). They are compared only between
                models of this process.

        Raises:
            ValueError: the stored rows belong to another base model, or the base model has changed.
        """
        if self._base is None:
            self._base, self._traits = base, dict(traits)
            for tier in self._tiers:
                if isinstance(tier, DiskTier):
                    tier.open(base)
        elif self._base != base:
            raise ValueError(
                f"source_cache is bound to another base model: the fingerprint of its weights and config is "
                f"{self._base[:12]}, and the fingerprint of this model is {base[:12]}; make one SourceStateCache for "
                "each base model (the caches may share a directory)"
            )
        changed = [name for name, value in traits.items() if name in self._traits and self._traits[name] != value]
        if changed:
            raise ValueError(
                f"source_cache holds states computed before this base model's {changed[0].strip('.')} was changed "
                f"(number of changed attributes: {len(changed)}); make a new SourceStateCache for the changed model, "
                "with another directory"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    @_locked
    def find_all(self, batch: Batch) -> list[Entry] | None:
        """Return the entry of every row of a batch, or None if a row has none. Keys are checked before disk is read."""
        if not all(self._contains(row.key) for row in batch.rows):
            return None
        entries = []
        for row in batch.rows:
            entry = self.find(row.key, batch.size(row))
            if entry is None:
                return None
            entries.append(entry)
        return entries

    @_locked
    def find(self, key: str, positions: int) -> Entry | None:
        """Return a row's entry from the fastest tier that has it, or None.

        An entry on disk is also copied into a memory tier that has room.

        Args:
            key: the row's key.
            positions: number of positions, summed over all states, that the entry must have.
        """
        for tier in self._tiers:
            entry = tier.find(key)
            if entry is None:
                continue
            if entry.data.numel() != positions * entry.width * entry.dtype.itemsize:
                self.warn_once(f"the {tier.name} tier has an entry of a wrong size under the key {key}; it is not used")
                continue
            return self._promoted(key, entry, tier)
        return None

    def _promoted(self, key: str, entry: Entry, holder: Tier) -> Entry:
        """Return the entry. If it is on disk and a memory tier has room, copy it into that tier and return the copy."""
        if isinstance(holder, DiskTier) and entry.data.numel() and entry.ready is None:
            for tier in self._tiers[: self._tiers.index(holder)]:
                buffer = tier.reserve(entry.data.numel(), self.device, self._left)
                if buffer is not None:
                    with torch.inference_mode(False), torch.no_grad():
                        buffer.copy_(entry.data)
                    entry = Entry(buffer, entry.dtype, entry.width)
                    tier.put(key, entry)
                    break
        return entry

    # --- writing -----------------------------------------------------------------------------------------------------

    @_locked
    def reserve(self, nbytes: int) -> tuple[Tier, Tensor] | None:
        """Reserve memory for a row in the first tier with free memory; return the tier and the memory, or None."""
        for tier in self._tiers:
            buffer = tier.reserve(nbytes, self.device, self._left)
            if buffer is not None:
                return tier, buffer
        for tier in self._tiers:
            if isinstance(tier, MemoryTier) and tier.full is not None:
                self.warn_once(f"no memory for the {tier.name} tier ({tier.full}); this tier stores no more rows")
        if self._tiers and all(tier.full is None for tier in self._tiers):
            self.warn_once(
                f"the budget is spent (tiers: {', '.join(self.tiers)}); the rows that are stored are kept, and all "
                "other rows are computed in every epoch"
            )
        return None

    @property
    def _left(self) -> int:
        """Bytes that are left of the budget that all tiers share; 2^62 if each tier has its own budget."""
        if self._total is None:
            return 1 << 62
        return self._total - sum(tier.used for tier in self._tiers)

    @_locked
    def refresh(self) -> None:
        """Open the files that other processes have published in the directory since the last call."""
        for tier in self._tiers:
            if isinstance(tier, DiskTier) and self._base is not None:
                tier.refresh()

    @_locked
    def flush(self) -> None:
        """Write the rows that wait for the disk tier to disk. FlareTrainer calls this after every epoch."""
        for tier in self._tiers:
            if isinstance(tier, DiskTier):
                tier.flush()

    # --- tiers="auto" -------------------------------------------------------------------------------------------------

    @_locked
    def record_seconds(self, seconds: float) -> None:
        """Record the time to compute one row in a trial pass, and choose the tiers after the second pass.

        The first pass is a warm-up.
        """
        self._row_seconds.append(seconds)
        if len(self._row_seconds) == 2:
            self._choose_tiers(seconds)

    def _choose_tiers(self, computing: float) -> None:
        """Use the tiers from which reading a row takes less than ``computing``, the seconds to compute the row."""
        nbytes = max((entry.data.numel() for _, entry in self.trial_rows), default=0)
        chosen: list[Tier] = []
        for tier in self._tiers:
            try:
                reading = seconds_to_read(tier.name, nbytes, self.device, self._directory)
            except (OSError, RuntimeError) as error:
                self.decisions[tier.name] = f"not used: {error}"
                self.warn_once(f"tiers='auto' does not use the {tier.name} tier and its rows (reading failed: {error})")
                continue
            times = f"reading a row {reading * 1e3:.3g} ms, computing it {computing * 1e3:.3g} ms"
            self.decisions[tier.name] = f"{'used' if reading < computing else 'not used'}: {times}"
            if reading < computing:
                chosen.append(tier)
        self._tiers, self.undecided = chosen, False
        _log.info("source_cache: %s", self._decided)
        if not chosen:
            self.warn_once(f"tiers='auto' uses no tier, so every epoch computes its source states: {self._decided}")
        rows, self.trial_rows = self.trial_rows, []
        for key, entry in rows:
            if self._tiers and self._contains(key):
                continue
            reserved = self.reserve(entry.data.numel())
            if reserved is not None:
                tier, buffer = reserved
                buffer.copy_(entry.data)
                tier.put(key, Entry(buffer, entry.dtype, entry.width))

    def _contains(self, key: str) -> bool:
        return any(tier.contains(key) for tier in self._tiers)

    @property
    def _decided(self) -> str:
        return "; ".join(f"{tier} {why}" for tier, why in self.decisions.items())

    # --- statistics ---------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | Mapping[str, int]:
        """The ``budget`` argument."""
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
        """Return the numbers of rows, hits and bytes, and the seconds saved. On a GPU this waits for running passes."""
        entries = {tier.name: tier.count for tier in self._tiers}
        nbytes = {tier.name: tier.used for tier in self._tiers}
        return CacheStats(self.meter.rows, self.meter.hits, entries, nbytes, self.meter.seconds_saved())

    def summary(self) -> str:
        """Return the statistics as one line of text."""
        stats = self.stats()
        per_tier = ", ".join(f"{name} {stats.entries[name]} rows {readable(stats.nbytes[name])}" for name in self.tiers)
        saved = "time saved not known (no pass computed all its rows)"
        if stats.seconds_saved is not None:
            saved = f"{round(stats.seconds_saved, 1) + 0.0} s saved"  # no -0.0
        hits = f"{stats.hits} of {stats.rows} rows not computed ({stats.hit_rate:.1%})"
        text = f"source_cache: {hits}, {saved}; {per_tier or 'no tier'}"
        return f"{text}; {self._decided}" if self.decisions else text

    def warn_once(self, message: str) -> None:
        """Warn if the same message was not given before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"source_cache: {message}", UserWarning, stacklevel=2)


_on_disk: weakref.WeakSet[Store] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    for store in list(_on_disk):
        if store._process == os.getpid():  # a forked process leaves waiting rows to its parent
            store.flush()
