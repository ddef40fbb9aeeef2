"""The rows of a cache: tiers with their budgets, what is found and kept in them, and what was counted."""

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
    """Rows by their names. Arguments and errors are SourceStateCache's."""

    def __init__(
        self,
        budget: int | Mapping[str, int],
        tiers: str | Sequence[str],
        directory: str | Path | None,
    ) -> None:
        self._arguments = (budget, tiers, directory)
        named, self._total = check_arguments(budget, tiers, directory)
        self.undecided = tiers == "auto"
        self._directory = None if directory is None else Path(directory).absolute()
        shared = not isinstance(budget, Mapping) and len(named) > 1
        self._tiers: list[Tier] = []
        for name in named:
            own = budget[name] if isinstance(budget, Mapping) else budget
            if name == "disk":
                assert self._directory is not None
                make_directory(self._directory)
                self._tiers.append(DiskTier(self._directory, own, self.warn_once))
            else:
                self._tiers.append(MemoryTier(name, own, shared))
        self.decisions: dict[str, str] = {}  # of tiers="auto": tier -> what was measured and decided
        self._base: str | None = None
        self._traits: dict[str, Any] = {}
        self.device = torch.device("cpu")  # where the model is; set by every pass
        self.meter = Meter()
        self._warned: set[str] = set()
        self.contents: dict[str, tuple[int, ...]] = {}  # rows by their tokens alone -> padded widths
        self._row_seconds: list[float] = []
        self.trial_rows: list[tuple[str, Entry]] = []
        self.lock = threading.RLock()  # on a GPU backward passes read in threads of their own
        self._process = os.getpid()
        if self._directory is not None:
            _on_disk.add(self)

    def claim(self, base: str, traits: Mapping[str, Any]) -> None:
        """Tie the rows to a base model, by its fingerprint, and within this process by its modules' attributes too.

        Raises:
            ValueError: they are of another one.
        """
        if self._base is None:
            self._base, self._traits = base, dict(traits)
            for tier in self._tiers:
                if isinstance(tier, DiskTier):
                    tier.open(base)
        elif self._base != base:
            raise ValueError(
                f"source_cache is bound to another base model (fingerprint {self._base[:12]}, this one's is "
                f"{base[:12]}: other weights or another config); make a SourceStateCache for each base model, with a "
                "directory of its own or a shared one"
            )
        changed = [name for name, value in traits.items() if name in self._traits and self._traits[name] != value]
        if changed:
            raise ValueError(
                f"source_cache holds states of this base model before its {changed[0].strip('.')} was changed "
                f"({len(changed)} such changes); make a new SourceStateCache for the model as it is now, with another "
                "directory"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    @_locked
    def find_all(self, batch: Batch) -> list[Entry] | None:
        """The entry of every row of a batch; None where a row has none, of which nothing is then read from disk."""
        if not all(self._contains(row.key) for row in batch.rows):
            return None
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
                self.warn_once(f"the {tier.name} tier holds a row of another size under the name {key}; it is not used")
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

    # --- writing -----------------------------------------------------------------------------------------------------

    @_locked
    def reserve(self, nbytes: int) -> tuple[Tier, Tensor] | None:
        """Room for a row in the first tier that has any, and that tier."""
        for tier in self._tiers:
            room = tier.reserve(nbytes, self.device, self._left)
            if room is not None:
                return tier, room
        for tier in self._tiers:
            if isinstance(tier, MemoryTier) and tier.full is not None:
                self.warn_once(f"no memory for the {tier.name} tier ({tier.full}); it stays as it is")
        if self._tiers and all(tier.full is None for tier in self._tiers):
            self.warn_once(
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
    def record_seconds(self, seconds: float) -> None:
        """What one row took to compute, in a pass before the tiers are decided; the first pass only warms up."""
        self._row_seconds.append(seconds)
        if len(self._row_seconds) == 2:
            self._decide(seconds)

    def _decide(self, computing: float) -> None:
        """Keep the tiers from which a row is read sooner than it is computed, given the seconds that takes."""
        nbytes = max((entry.data.numel() for _, entry in self.trial_rows), default=0)
        kept: list[Tier] = []
        for tier in self._tiers:
            try:
                reading = seconds_to_read(tier.name, nbytes, self.device, self._directory)
            except (OSError, RuntimeError) as error:
                self.decisions[tier.name] = f"not used: {error}"
                self.warn_once(f"tiers='auto' leaves the {tier.name} tier out, and what it holds: {error}")
                continue
            times = f"reading a row {reading * 1e3:.3g} ms, computing it {computing * 1e3:.3g} ms"
            self.decisions[tier.name] = f"{'used' if reading < computing else 'not used'}: {times}"
            if reading < computing:
                kept.append(tier)
        self._tiers, self.undecided = kept, False
        _log.info("source_cache: %s", self._decided)
        if not kept:
            self.warn_once(f"tiers='auto' keeps nothing, every epoch computes its source states: {self._decided}")
        held, self.trial_rows = self.trial_rows, []
        for key, entry in held:
            if self._tiers and self._contains(key):
                continue
            found = self.reserve(entry.data.numel())
            if found is not None:
                tier, room = found
                room.copy_(entry.data)
                tier.put(key, Entry(room, entry.dtype, entry.width))

    def _contains(self, key: str) -> bool:
        return any(tier.contains(key) for tier in self._tiers)

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

    def warn_once(self, what: str) -> None:
        """One warning for each thing, however often it happens."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"source_cache: {what}", UserWarning, stacklevel=2)


_on_disk: weakref.WeakSet[Store] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    for store in list(_on_disk):
        if store._process == os.getpid():  # what a fork holds is its parent's to publish
            store.flush()
