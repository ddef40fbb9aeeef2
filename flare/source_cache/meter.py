"""Count the rows that a cache reads, and measure the seconds of source passes.

On a GPU the seconds come from CUDA events. They are read later, so that a source pass does not wait for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class CacheStats:
    """Statistics of a cache.

    Attributes:
        rows: number of rows (texts) that were requested.
        hits: number of rows that the frozen model did not compute, because they were cached or equal another row of the
            batch.
        entries: tier -> number of stored rows.
        nbytes: tier -> bytes that the tier takes.
        seconds_saved: estimated seconds that the hits saved. None if no source pass has computed all its rows, because
            the time to compute a row is then unknown.
    """

    rows: int
    hits: int
    entries: dict[str, int]
    nbytes: dict[str, int]
    seconds_saved: float | None

    @property
    def hit_rate(self) -> float:
        """hits / rows: the share of rows that the frozen model did not compute; 0 before the first row."""
        return self.hits / self.rows if self.rows else 0.0

    def facts(self) -> dict[str, Any]:
        """Return the statistics for a JSON file, without ``entries``. "bytes" is the sum over all tiers."""
        saved = None if self.seconds_saved is None else round(self.seconds_saved, 3) + 0.0  # no -0.0
        return {
            "bytes": sum(self.nbytes.values()),
            "rows": self.rows,
            "hits": self.hits,
            "hit_rate": round(self.hit_rate, 4),
            "seconds_saved": saved,
        }


@dataclass
class _Span:
    rows: int
    computed: int
    begin: Any
    end: Any


@dataclass
class Meter:
    """Counts rows, and measures the seconds of source passes."""

    rows: int = 0
    hits: int = 0
    #: Seconds and rows, summed over all passes.
    _all: list[float] = field(default_factory=lambda: [0.0, 0.0])
    #: Seconds and rows, summed over the passes that computed all their rows.
    _computed: list[float] = field(default_factory=lambda: [0.0, 0.0])
    #: Seconds of work that only filled the cache.
    _storing: float = 0.0
    _open: list[_Span] = field(default_factory=list)

    @contextlib.contextmanager
    def of_pass(self, rows: int, computed: int, device: torch.device) -> Iterator[None]:
        """Measure a source pass of ``rows`` rows, of which the model computes ``computed``."""
        self.rows += rows
        self.hits += rows - computed
        span = _Span(rows, computed, _now(device), None)
        yield
        span.end = _now(device)
        self._open.append(span)
        if len(self._open) >= 256:
            self._settle(wait=False)

    @contextlib.contextmanager
    def storing(self, device: torch.device) -> Iterator[None]:
        """Measure work that only fills the cache, except on a GPU, where the copies overlap with the pass."""
        begin = time.perf_counter()
        yield
        if device.type != "cuda":
            self._storing += time.perf_counter() - begin

    def seconds_saved(self) -> float | None:
        """Return the estimated time to compute all rows minus the measured time.

        Return None if no pass computed all its rows, because the time to compute a row is then unknown.
        """
        self._settle(wait=True)
        seconds, rows = self._computed
        if not rows:
            return None
        return max(seconds - self._storing, 0.0) / rows * self._all[1] - self._all[0]

    def _settle(self, wait: bool) -> None:
        """Add the passes that have ended to the sums; with ``wait``, first wait for the device to end all passes."""
        unfinished = []
        for span in self._open:
            seconds = _between(span.begin, span.end, wait)
            if seconds is None:
                unfinished.append(span)
                continue
            for sums in [self._all] + ([self._computed] if span.computed == span.rows else []):
                sums[0] += seconds
                sums[1] += span.rows
        self._open = unfinished


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: Any, end: Any, wait: bool) -> float | None:
    """Return the seconds between two times; None if the device has not reached ``end`` and ``wait`` is False."""
    if isinstance(begin, float):
        return float(end - begin)
    if not wait and not end.query():
        return None
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def readable(nbytes: int) -> str:
    """Format a number of bytes for display, such as "1.5 MiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
