"""The tuner's clock: the device's time of a call, on inputs that its L2 cache no longer holds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, cuda

from .._compat import sleep_on_device
from .problem import Inputs, Problem

#: The most sets of inputs that rotate.
_MOST_SETS = 128
#: How often the host may fall behind the device in a round before the clock gives up.
_ATTEMPTS = 6
#: About those of a GPU; a sleep lasts 1 ms at least.
_CYCLES_PER_SECOND = 2_000_000_000
_LEAST_CYCLES = 2_000_000


class Timer(Protocol):
    """Return the median time of a call in microseconds, over ``rounds`` of several calls on rotating inputs."""

    def __call__(self, run: Callable[[Inputs], object], inputs: list[Inputs], *, rounds: int) -> float: ...


class DeviceTimer:
    """A :class:`Timer` by events of the current CUDA stream, with all launches queued before the device begins.

    A launch takes the host longer than many kernels take the device, so the device first sleeps while the host queues
    the whole round. A round counts only if the device had not reached its first event by then.
    """

    def __init__(self, calls: int = 10) -> None:
        self.calls = calls
        #: to sleep in the next round: twice what the host took to queue the round before
        self.cycles = _LEAST_CYCLES

    def __call__(self, run: Callable[[Inputs], object], inputs: list[Inputs], *, rounds: int) -> float:
        turn = itertools.cycle(inputs)
        for _ in range(2):  # the first call compiles and plans
            run(next(turn))
        return statistics.median(self._round(run, turn) for _ in range(rounds))

    def _round(self, run: Callable[[Inputs], object], turn: Iterator[Inputs]) -> float:
        for _ in range(_ATTEMPTS):
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            cuda.synchronize()
            sleep_on_device(self.cycles)
            start.record()
            began = perf_counter()
            for _ in range(self.calls):
                run(next(turn))
            end.record()
            kept_ahead, slept = not start.query(), self.cycles
            queued_s = perf_counter() - began
            cuda.synchronize()
            self.cycles = max(_LEAST_CYCLES, int(2 * queued_s * _CYCLES_PER_SECOND))
            if kept_ahead:
                return float(start.elapsed_time(end)) * 1000 / self.calls
            self.cycles = max(self.cycles, 2 * slept)
        raise RuntimeError(f"the host could not queue {self.calls} calls while the device slept {slept:,} cycles")


def rotation(problem: Problem, device: torch.device) -> list[Inputs]:
    """Return enough sets of inputs that together they are twice the L2 cache (one, away from CUDA)."""
    first = problem.make(device)
    if device.type != "cuda":
        return [first]
    cache = cuda.get_device_properties(device).L2_cache_size
    sets = min(_MOST_SETS, 2 * cache // nbytes(first.values()) + 2)
    return [first, *(problem.make(device) for _ in range(sets - 1))]


def nbytes(values: Any) -> int:
    """Return the bytes of tensors, and lists of tensors."""
    return sum(value.nbytes if isinstance(value, Tensor) else nbytes(value) for value in values)


def copy_bandwidth(device: torch.device, timer: Timer, *, numbers: int = 2**29) -> float:
    """Return the bytes per microsecond that a copy on the device reads and writes."""
    source = torch.randn(numbers if device.type == "cuda" else 2**16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    us = timer(lambda t: target.copy_(source), [{}], rounds=5)
    return 2 * source.nbytes / us
