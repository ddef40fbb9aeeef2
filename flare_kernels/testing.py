"""Tools for tests and measurements of code that calls the kernels, on machines without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from . import launch_mode

__all__ = ["launches_left_out"]


@contextlib.contextmanager
def launches_left_out() -> Iterator[list[str]]:
    """Take the kernels' path on CPU tensors, but leave out the launches.

    Within it ``backend="auto"`` and ``"triton"`` use the kernels for every dtype but float64. Configurations (those of
    a card with 227 KB of shared memory per block), plans and arguments are worked out as on a GPU. Only the innermost
    call does not happen, so **results are uninitialised memory**. Works with and without TRITON_INTERPRET. The state
    belongs to the process, is restored on exit, and may be nested.

    Yields:
        The names of the kernels left out, in order.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("launches_left_out() needs the package triton, which is not installed (Linux only)")
    with launch_mode.leaving_out() as names:
        yield names
