"""Progress of long work: a bar on a terminal, otherwise a line every some seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

SECONDS = 15.0


class Reporter:
    """Shows how far something is.

    Args:
        name: in front of the numbers.
        unit: of what is counted, in the plural.
        total: of it; done: what was done before.
        say: is told the lines.
        enabled: False shows nothing.
    """

    def __init__(
        self, name: str, unit: str, total: int, done: int, say: Callable[[str], None], enabled: bool = True
    ) -> None:
        self.name, self.unit, self.total, self.done, self.say = name, unit, total, done, say
        self._begun = self._last = time.monotonic()
        self._first, self._bar = done, None
        self._lines = enabled and not sys.stderr.isatty()
        if enabled and not self._lines:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {unit}", leave=False)

    def to(self, done: int) -> None:
        """Show that so many are done."""
        if self._bar is not None:
            self._bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self._lines and now - self._last >= SECONDS and done < self.total:
            self._last = now
            rate = (done - self._first) / (now - self._begun)
            left = f", {(self.total - done) / rate:.0f} s left" if rate else ""
            self.say(f"{self.name}: {done} of {self.total} {self.unit}, {rate:.1f} a second{left}")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if self._bar is not None:
            self._bar.close()
