"""How launches run at present, without importing Triton: kept plans, forced tiles, and who listens.

A *plan* is what a primitive works out once per distinct call: configuration, grid, constant arguments and the launch
itself. Each mode keeps plans of its own, so entering and leaving one of the contexts below can never run a plan that
was made under other settings. The mode is one per process, not per thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .launch_table import LaunchTable

#: Plans kept before all are dropped: batches of ever new lengths must not fill the memory.
MAX_PLANS = 8192


class Plans(dict[tuple[Any, ...], Any]):
    """Plans by key."""

    def add(self, key: tuple[Any, ...], plan: Any) -> Any:
        """Keep a plan and return it."""
        if len(self) >= MAX_PLANS:
            self.clear()
        self[key] = plan
        return plan


@dataclass(frozen=True, eq=False)
class Mode:
    """What decides a launch besides its arguments.

    plans: what is kept. forced: kernel -> configuration. forced_form: the form of every step that has it. table: the
    launch table in force instead of the device's. shared_bytes: shared memory of a block, instead of the device's.
    recorded, left_out: where launches are noted instead of running. counters: where names are noted as well.
    """

    plans: Plans = field(default_factory=Plans)
    forced: Mapping[str, Any] = field(default_factory=dict)
    forced_form: str | None = None
    table: LaunchTable | None = None
    shared_bytes: int | None = None
    recorded: list[Any] | None = None
    left_out: list[str] | None = None
    counters: tuple[list[str], ...] = ()


current = Mode()


@contextlib.contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    global current
    before, current = current, replace(current, plans=Plans(), **changes)
    try:
        yield
    finally:
        current = before


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Run under a mode that was current before, with the plans that it has kept."""
    global current
    before, current = current, mode
    try:
        yield
    finally:
        current = before


@contextlib.contextmanager
def recording(shared_bytes: int) -> Iterator[list[Any]]:
    """Collect launches instead of running them, with configurations for a device of that shared-memory limit."""
    launches: list[Any] = []
    with _changed(recorded=launches, shared_bytes=shared_bytes):
        yield launches


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched."""
    names: list[str] = []
    with _changed(counters=(*current.counters, names)):
        yield names


@contextlib.contextmanager
def forcing(*, form: str | None = None, table: LaunchTable | None = None, **configs: Any) -> Iterator[None]:
    """Take a form wherever a step has it and the call allows it, and run the kernels named with these configurations.

    For the tuner and tests: whether the device can run the form is not asked. Steps without that form follow
    ``table``, whatever the device is.
    """
    changes = {"forced_form": form or current.forced_form, "table": table or current.table}
    with _changed(forced={**current.forced, **configs}, **changes):
        yield


@contextlib.contextmanager
def leaving_out() -> Iterator[list[str]]:
    """Collect the names of the kernels instead of running them; see :mod:`flare_kernels.testing`."""
    names: list[str] = []
    with _changed(left_out=names, recorded=None, shared_bytes=None):
        yield names
