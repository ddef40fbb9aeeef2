"""Tools to test and measure code that calls the kernels on machines without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from . import launch_mode

__all__ = ["launches_left_out"]


@contextlib.contextmanager
def launches_left_out() -> Iterator[list[str]]:
    """Take the code path of the kernels on CPU tensors, without launching them.

    In this context, ``backend="auto"`` and ``"triton"`` take the kernels' path for every dtype except float64.
    Tile sizes, grids and arguments are computed as for a GPU with 227 KB of shared memory per block. Only the launch is
    left out, so **results are uninitialised memory**. Works with and without TRITON_INTERPRET. The
    context applies to the whole process, can be nested, and restores the previous state on exit.

    Yields:
        The names of the kernels that were not launched, in order.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("launches_left_out() needs the package triton, which is not installed (Linux only)")
    with launch_mode.leaving_out() as names:
        yield names
