"""The current launch mode: which plans are cached, what is forced, and whether kernels run. Does not import Triton.

A *plan* is what a primitive (one operation of the adapter, such as shrink) computes once per distinct call:
configuration, grid, constant arguments and the function that launches the kernel. Each mode has its own cache of plans,
so a plan that was computed in another mode is never run. The mode applies to the whole process, not to one thread.
Steps, forms and launch tables are explained in :mod:`flare_kernels.forms` and :mod:`flare_kernels.launch_table`.
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
        forced: kernel name -> the TileConfig that its launches use.
        forced_form: name of a form; every step that has a form of this name uses it. None: no form is forced.
        table: a launch table to use instead of the device's; None: the device's.
        shared_bytes: bytes of shared memory per block to assume; None: the device's.
        recorded: list to which each launch is appended instead of being run; None: launches run.
        left_out: list to which the name of each kernel is appended instead of running it; None: kernels run.
        counters: lists to which the name of each kernel is appended before it runs.
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
    """Make an earlier mode, with its cached plans, the current mode inside this context."""
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
    """Force a form, a launch table, and configurations by kernel name inside this context (for the tuner and tests).

    A step takes ``form`` if it has a form of this name and the call does not exclude it. Whether the device can run the
    form is not checked. Other steps follow ``table``, if it is given, on any device.
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
