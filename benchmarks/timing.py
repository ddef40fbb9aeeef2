"""Time calls on the device and on the host, with inputs that are not in the device's cache.

The module also measures the ceilings of the device: its copy bandwidth and its matrix-product rate.

*Device* seconds are measured between two events around the call. With ``queue_ahead`` (the default), the launches are
queued before the device reaches the first event, so that launch gaps are excluded. *Wall* seconds are measured on the
host, with the device idle before and after the call. *Host* seconds end when the call returns, while the device may
still be busy. On a CPU, the wall seconds are also recorded as device seconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

#: Device cycles to sleep before the first event, while the host queues the call's launches (about 4 ms).
_QUEUE_CYCLES = 8_000_000
#: Largest number of copies of the inputs. More copies make no difference and take long to generate.
_MOST_COPIES = 2048
#: Number of copies on a CPU. The size of its cache is ignored, because CPU times are reported but never asserted.
_CPU_COPIES = 2


# --- rotating inputs --------------------------------------------------------------------------------------------------


def l2_bytes(device: torch.device) -> int:
    """Return the bytes of the device's L2 cache; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 * 2**20


def bytes_of(values: Any) -> int:
    """Return the bytes of the distinct storages in nested containers."""
    tensors = [value for value in tree_iter(values) if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def copies_for(set_bytes: int, cache_bytes: int) -> int:
    """Return how many sets of inputs fill the cache at least twice between two uses of the same set."""
    if cache_bytes <= 0:
        return _CPU_COPIES
    return max(2, min(_MOST_COPIES, -(-2 * cache_bytes // max(set_bytes, 1)) + 1))


class Rotation:
    """Sets of inputs that are used in turn, so many that a set is no longer cached when it is used again."""

    def __init__(self, make: Callable[[], Any], device: torch.device) -> None:
        first = make()
        copies = copies_for(bytes_of(first), l2_bytes(device))
        self.sets = [first, *(make() for _ in range(copies - 1))]
        self._turn = 0

    def next(self) -> Any:
        """Return the least recently used set."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Device, wall and host seconds of every round of one variant. ``clock`` tells what measured the device seconds."""

    device_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    clock: str
    host_s: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Return the median device seconds."""
        return statistics.median(self.device_s)

    def over(self, other: Samples) -> float:
        """Return the median ratio of device seconds to another variant's device seconds in the same round."""
        return statistics.median(a / b for a, b in zip(self.device_s, other.device_s, strict=True))

    def row(self) -> dict[str, Any]:
        """Return the entries of the variant's row: medians, quartiles and the number of rounds."""
        q25, _, q75 = statistics.quantiles(self.device_s, n=4) if len(self.device_s) > 1 else [self.median] * 3
        return {
            "median_s": self.median,
            "q25_s": q25,
            "q75_s": q75,
            "rounds": len(self.device_s),
            "clock": self.clock,
            "wall_median_s": statistics.median(self.wall_s),
            **({"host_median_s": statistics.median(self.host_s)} if self.host_s else {}),
        }


@dataclass
class _Series:
    device_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)

    def run(self, call: Callable[[], object], device: torch.device, queue_ahead: bool) -> None:
        """Time one round: one call, and on a GPU with ``queue_ahead`` a second call for the device seconds."""
        on_gpu = device.type == "cuda"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        _synchronize(device)
        start_s = time.perf_counter()
        for event in events[:1]:
            event.record()
        call()
        for event in events[1:]:
            event.record()
        self.host_s.append(time.perf_counter() - start_s)
        _synchronize(device)
        self.wall_s.append(time.perf_counter() - start_s)
        if on_gpu and queue_ahead:
            self.device_s.append(_queued_seconds(call, device))
        else:
            self.device_s.append(events[0].elapsed_time(events[1]) / 1e3 if on_gpu else self.wall_s[-1])


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the wall seconds of a call, with the device idle before and after."""
    _synchronize(device)
    start_s = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start_s


def _queued_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the device seconds of a call without launch gaps: its launches are queued before the first event."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        budget_s: seconds for all variants together.
        least, most: bounds on the number of rounds.
        warmup: number of rounds before the timed rounds.
    """

    budget_s: float
    least: int
    most: int
    warmup: int


def effort(device: torch.device) -> Effort:
    """Return the default: about half a second for all variants together."""
    return Effort(0.5, 10, 100, 3) if device.type == "cuda" else Effort(0.6, 5, 30, 1)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    queue_ahead: bool = True,
    how: Effort | None = None,
) -> dict[str, Samples]:
    """Time several variants in turn, so that drift (clocks, heat, other processes) affects all of them.

    Each round runs every variant, and each round begins with another variant. Existing objects are excluded from
    garbage collection, because a benchmark holds many more models than a user's process.

    Args:
        calls: the call of each variant, by name.
        queue_ahead: on a GPU, measure device seconds in a second call, and queue its launches before the device
            starts to run them.
        how: how long to measure. None: `effort`.
    """
    # a dry run only shows that every call works
    how = Effort(0.0, 2, 2, 1) if os.environ.get("FLARE_BENCH_DRY") else how or effort(device)
    for _ in range(how.warmup):
        start_s = time.perf_counter()
        for call in calls.values():
            call()
        _synchronize(device)
        once = time.perf_counter() - start_s
    calls_per_round = 2 if queue_ahead else 1
    rounds = max(how.least, min(how.most, int(how.budget_s / max(calls_per_round * once, 1e-9))))
    series = {name: _Series() for name in calls}
    names = list(calls)
    with _frozen_heap():
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                series[name].run(calls[name], device, queue_ahead)
    clock = "device events" if device.type == "cuda" else "host clock"
    return {name: Samples(tuple(s.device_s), tuple(s.wall_s), clock, tuple(s.host_s)) for name, s in series.items()}


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exclude the objects that exist now from garbage collection."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Replay:
    """A timer for pytest-benchmark that replays measured durations.

    The readings before and after a round differ by the next duration. If none is left, the timer is a normal clock.
    """

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, durations: Sequence[float]) -> None:
        """Set the durations of the next rounds."""
        self._durations, self._running = list(durations), False

    def __call__(self) -> float:
        if not self._durations:
            return time.perf_counter()
        if self._running:
            self._now += self._durations.pop(0)
        self._running = not self._running
        return self._now


# --- ceilings of the device -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured copy bandwidth (bytes read + written per second) and matrix-product rate (FLOP per second)."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    conditions: str

    def floor_s(self, moved: int, flops: int = 0) -> float:
        """Return the least seconds in which the bytes can be moved and the FLOPs computed."""
        return max(moved / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


def ceilings(device: torch.device) -> Ceilings:
    """Measure the ceilings of a device on random data in bfloat16."""
    on_gpu = device.type == "cuda"
    numbers, size = (2**30, 8192) if on_gpu else (2**23, 512)
    how = Effort(1.0, 10, 30, 3)
    moved, copied = _copy_seconds(numbers, device, how)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = interleave({"matmul": lambda: a @ b}, device, how=how)["matmul"].median
    conditions = f"device-to-device copy of {moved // 2:,} bytes; {size}^3 bf16 product; random data; medians"
    return Ceilings(moved / copied, 2 * size**3 / multiplied, conditions)


def _copy_seconds(numbers: int, device: torch.device, how: Effort) -> tuple[int, float]:
    """Return the bytes that a copy of ``numbers`` bf16 values reads and writes, and the seconds that the copy takes."""
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * bytes_of(source), interleave({"copy": lambda: target.copy_(source)}, device, how=how)["copy"].median


@dataclass(frozen=True)
class DeviceWork:
    """Number of kernels and copies of one call, and the seconds in which at least one of them runs."""

    launches: int
    busy_s: float


def device_work(call: Callable[[], object], device: torch.device, warmed: bool = False) -> DeviceWork | None:
    """Return the device's work in one call, from the profiler; None on a CPU.

    Args:
        warmed: whether the call has run before. If not, it first runs without the profiler.
    """
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not warmed:
        call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    ranges = [event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return DeviceWork(len(ranges), covered([(each.start, each.end) for each in ranges]) / 1e6)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: overlaps count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the number of kernels and copies of one call, from the profiler, or None on a CPU (use `count_ops`)."""
    work = device_work(call, device)
    return None if work is None else work.launches
