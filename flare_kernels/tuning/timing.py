"""The tuner's timer: the device time of a call, on inputs that are not in the device's L2 cache."""

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

#: Largest number of rotating sets of inputs.
_MAX_SETS = 128
#: Largest number of attempts to measure a round in which the host stays ahead of the device.
_ATTEMPTS = 6
#: Approximate clock rate of a GPU, and the shortest sleep in clock cycles (about 1 ms).
_CYCLES_PER_SECOND = 2_000_000_000
_MIN_CYCLES = 2_000_000


class Timer(Protocol):
    """Function that calls ``run`` on the sets of inputs in turn, and returns the time of a call in microseconds.

    A round is a fixed number of calls. The result is the median over ``rounds`` rounds.
    """

    def __call__(self, run: Callable[[Inputs], object], inputs: list[Inputs], *, rounds: int) -> float: ...


class DeviceTimer:
    """A :class:`Timer` with CUDA events. The host queues all launches of a round before the device starts them.

    A round has ``calls`` calls, which are timed together. Many kernels take less time than their launch takes on the
    host. The device therefore sleeps while the host queues the round. The round is valid if the host has queued all of
    its calls before the device reaches the first event.
    """

    def __init__(self, calls: int = 10) -> None:
        self.calls = calls
        #: length of the next sleep in clock cycles: at least _MIN_CYCLES and twice the time that the host took to queue
        #: the previous round. After a round that is not valid, also at least twice the previous sleep.
        self.cycles = _MIN_CYCLES

    def __call__(self, run: Callable[[Inputs], object], inputs: list[Inputs], *, rounds: int) -> float:
        turn = itertools.cycle(inputs)
        for _ in range(2):  # warm-up: the first call compiles and plans
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
            stayed_ahead, slept = not start.query(), self.cycles
            queued_s = perf_counter() - began
            cuda.synchronize()
            self.cycles = max(_MIN_CYCLES, int(2 * queued_s * _CYCLES_PER_SECOND))
            if stayed_ahead:
                return float(start.elapsed_time(end)) * 1000 / self.calls
            self.cycles = max(self.cycles, 2 * slept)
        raise RuntimeError(f"the host could not queue {self.calls} calls while the device slept {slept:,} cycles")


def rotation(problem: Problem, device: torch.device) -> list[Inputs]:
    """Return sets of inputs, enough to exceed twice the L2 cache (at most _MAX_SETS); a single set without CUDA."""
    first = problem.make(device)
    if device.type != "cuda":
        return [first]
    cache = cuda.get_device_properties(device).L2_cache_size
    sets = min(_MAX_SETS, 2 * cache // nbytes(first.values()) + 2)
    return [first, *(problem.make(device) for _ in range(sets - 1))]


def nbytes(values: Any) -> int:
    """Return the total bytes of tensors and lists of tensors."""
    return sum(value.nbytes if isinstance(value, Tensor) else nbytes(value) for value in values)


def copy_bandwidth(device: torch.device, timer: Timer, *, numbers: int = 2**29) -> float:
    """Return the bytes per microsecond that a copy on the device reads and writes.

    ``numbers``: how many bfloat16 numbers a CUDA device copies; without CUDA, 65,536 are copied.
    """
    source = torch.randn(numbers if device.type == "cuda" else 2**16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    us = timer(lambda t: target.copy_(source), [{}], rounds=5)
    return 2 * source.nbytes / us
