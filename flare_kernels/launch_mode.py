"""The current launch mode: cached plans, forced tiles, and whether launches are recorded. Does not import Triton.

A *plan* is what a primitive computes once per distinct call: configuration, grid, constant arguments and the launch
itself. Each mode has its own cache of plans, so a plan made under other settings is never run. The mode belongs to the
process, not to a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .launch_table import LaunchTable

#: Size at which the cache of plans is cleared, so that batches of many different lengths do not fill the memory.
MAX_PLANS = 8192


class Plans(dict[tuple[Any, ...], Any]):
    """Cache of plans by key."""

    def add(self, key: tuple[Any, ...], plan: Any) -> Any:
        """Store a plan and return it."""
        if len(self) >= MAX_PLANS:
            self.clear()
        self[key] = plan
        return plan


@dataclass(frozen=True, eq=False)
class Mode:
    """Everything that decides a launch in addition to its arguments.

    Attributes:
        plans: the cached plans.
        forced: kernel name -> configuration.
        forced_form: the form of every step that has it.
        table: a launch table to use instead of the device's.
        shared_bytes: shared memory per block to assume instead of the device's.
        recorded: list that collects launches instead of running them.
        left_out: list that collects kernel names instead of running the kernels.
        counters: lists that collect kernel names while the kernels run.
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
    """Run under an earlier mode, with its cached plans."""
    global current
    before, current = current, mode
    try:
        yield
    finally:
        current = before


@contextlib.contextmanager
def recording(shared_bytes: int) -> Iterator[list[Any]]:
    """Collect launches instead of running them, configured for a device with this much shared memory per block."""
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
    """Force a form, a launch table, and configurations by kernel name. For the tuner and tests.

    A step uses the form if it supports it and the call allows it. Whether the device can run it is not checked. Steps
    without that form follow ``table`` on any device.
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
