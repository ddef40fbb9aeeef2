"""Progress of long work: a bar on a terminal, and elsewhere, as in a log file, a line every half minute."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

#: Seconds between two lines where there is no terminal.
INTERVAL = 30.0


class Lines:
    """A tqdm-like counter that writes whole lines to stderr, the first one after INTERVAL seconds.

    Args:
        total: how many units there are.
        name: begins every line.
        unit: of what is counted, in the singular.
        initial: units that were done before.
    """

    def __init__(self, total: int, name: str, unit: str, initial: int = 0) -> None:
        self.total, self.name, self.unit = total, name, unit
        self.n = self._initial = initial
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count n units, and write a line where the last one was long ago."""
        self.n += n
        now = time.monotonic()
        if now - self._last >= INTERVAL and self.n > self._initial:
            self._last = now
            seconds = (now - self._begun) / (self.n - self._initial)
            left = duration(seconds * max(self.total - self.n, 0))
            print(f"{self.name}: {self.n} of {self.total} {self.unit}s, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: what was done is said by the command."""


def counter(name: str | None, total: int, unit: str, initial: int = 0) -> Any:
    """Return a counter with ``update(n)`` and ``close()``, also a context manager.

    Args:
        name: shown beside the bar; None: nothing is shown.
        total: how many units there are.
        unit: of what is counted, in the singular.
        initial: units that were done before.
    """
    if name is not None and not on_terminal():
        return Lines(total, name, unit, initial)
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit=unit, initial=initial, disable=name is None, leave=False)


def on_terminal() -> bool:
    """Return whether bars can be drawn: stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def quiet_libraries_in_log_files() -> None:
    """Switch off the bars of the hub, transformers and datasets where there is no terminal to draw them on."""
    if on_terminal():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported


def duration(seconds: float) -> str:
    """Return seconds for readers: "42 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
