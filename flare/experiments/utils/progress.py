"""Show the progress of long work: a bar on a terminal, or one line every half minute in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

#: Seconds between two lines if stderr is not a terminal.
INTERVAL = 30.0


class LineCounter:
    """A tqdm-like counter that writes whole lines to stderr, the first one after INTERVAL seconds.

    Args:
        total: number of units.
        name: start of every line.
        unit: name of a unit, in the singular.
        initial: number of units that were done before the counter starts.
    """

    def __init__(self, total: int, name: str, unit: str, initial: int = 0) -> None:
        self.total, self.name, self.unit = total, name, unit
        self.n = self._initial = initial
        self._started = self._last = time.monotonic()

    def __enter__(self) -> LineCounter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count n units, and write a line if the last line is at least INTERVAL seconds old."""
        self.n += n
        now = time.monotonic()
        if now - self._last >= INTERVAL and self.n > self._initial:
            self._last = now
            seconds = (now - self._started) / (self.n - self._initial)
            remaining = duration(seconds * max(self.total - self.n, 0))
            print(f"{self.name}: {self.n} of {self.total} {self.unit}s, {remaining} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing, because the command itself prints what was done."""


def counter(name: str | None, total: int, unit: str, initial: int = 0) -> Any:
    """Return a counter with ``update(n)`` and ``close()``, which is also a context manager.

    Args:
        name: label of the bar or of the lines; None: no progress is shown.
        total: number of units.
        unit: name of a unit, in the singular.
        initial: number of units that were done before the counter starts.
    """
    if name is not None and not on_terminal():
        return LineCounter(total, name, unit, initial)
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit=unit, initial=initial, disable=name is None, leave=False)


def print_line(line: str, file: TextIO | None = None) -> None:
    """Print a line to a stream (default: standard output) without breaking progress bars."""
    from tqdm.auto import tqdm

    stream = sys.stdout if file is None else file
    tqdm.write(line, file=stream)
    stream.flush()


def on_terminal() -> bool:
    """Return whether stderr is a terminal, on which bars can be drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def quiet_libraries_in_log_files() -> None:
    """Disable the progress bars of huggingface_hub, transformers and datasets if stderr is not a terminal."""
    if on_terminal():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported


def duration(seconds: float) -> str:
    """Return seconds as text: "4.2 s", "42 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
