"""Clocks that see the device's work, inputs that do not sit in its cache, and the ceilings it is measured against.

Two clocks run beside each other. *Device* seconds lie between two events around the call, with the launches queued
before the device gets to the first event, so that they hold no launch gaps. *Wall* seconds are the host's, from an idle
device to an idle device: what a user waits. On a CPU there is only the latter. *Host* seconds are those until the call
returns, while the device may still be at work.
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
#: More copies than this make no difference and take long to draw.
_MOST_COPIES = 2048
#: A CPU's cache is not asked for: its seconds are reported and never asserted.
_CPU_COPIES = 2


# --- inputs that rotate -----------------------------------------------------------------------------------------------


def l2_bytes(device: torch.device) -> int:
    """Bytes of the device's L2 cache; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 * 2**20


def bytes_of(values: Any) -> int:
    """Bytes of the distinct storages in nested containers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_iter(values) if _is(t)}
    return sum(storages.values())


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def copies_for(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs hold at least twice the cache between two uses of the same one."""
    if cache_bytes <= 0:
        return _CPU_COPIES
    return max(2, min(_MOST_COPIES, -(-2 * cache_bytes // max(set_bytes, 1)) + 1))


class Rotation:
    """Sets of inputs handed out in turn; enough of them that none is still cached when its turn comes again."""

    def __init__(self, make: Callable[[], Any], device: torch.device) -> None:
        first = make()
        copies = copies_for(bytes_of(first), l2_bytes(device))
        self.sets = [first, *(make() for _ in range(copies - 1))]
        self._turn = 0

    def next(self) -> Any:
        """The set whose last use lies furthest back."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Seconds of every round of one variant: on the device, of the wall, and until the host was done with the call."""

    device_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    clock: str
    host_s: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median seconds by the device's clock."""
        return statistics.median(self.device_s)

    def over(self, other: Samples) -> float:
        """Median, over the rounds, of these seconds over another variant's in the same round."""
        return statistics.median(own / its for own, its in zip(self.device_s, other.device_s, strict=True))

    def row(self) -> dict[str, Any]:
        """What is kept of them: medians, quartiles, rounds."""
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
        """Time one round: in one call, or where the launches are queued ahead in one for each clock."""
        on_gpu = device.type == "cuda"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        _finish(device)
        began = time.perf_counter()
        for event in events[:1]:
            event.record()
        call()
        for event in events[1:]:
            event.record()
        self.host_s.append(time.perf_counter() - began)
        _finish(device)
        self.wall_s.append(time.perf_counter() - began)
        if on_gpu and queue_ahead:
            self.device_s.append(_queued_seconds(call, device))
        else:
            self.device_s.append(events[0].elapsed_time(events[1]) / 1e3 if on_gpu else self.wall_s[-1])


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from an idle device to an idle device."""
    _finish(device)
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began


def _queued_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds between two device events around the call, its launches queued before the first: free of launch gaps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for the whole group, and bounds on the rounds."""

    budget_s: float
    least: int
    most: int
    warmup: int


def effort(device: torch.device) -> Effort:
    """Half a second for a group on a GPU, little more on a CPU; bounded in rounds."""
    return Effort(0.5, 10, 100, 3) if device.type == "cuda" else Effort(0.6, 5, 30, 1)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    queue_ahead: bool = True,
    how: Effort | None = None,
) -> dict[str, Samples]:
    """Time several variants in turn, so that what drifts (clocks, heat, neighbours) drifts for all of them.

    Each round runs every variant, beginning with another than the round before. Python's collector passes over what was
    built before: a benchmark holds many models, which a user's process does not.
    """
    # a dry run shows that everything runs, and times nothing that anybody reads
    how = Effort(0.0, 2, 2, 1) if os.environ.get("FLARE_BENCH_DRY") else how or effort(device)
    for _ in range(how.warmup):
        began = time.perf_counter()
        for call in calls.values():
            call()
        _finish(device)
        once = time.perf_counter() - began
    calls_a_round = 2 if queue_ahead else 1
    rounds = max(how.least, min(how.most, int(how.budget_s / max(calls_a_round * once, 1e-9))))
    series = {name: _Series() for name in calls}
    names = list(calls)
    with _frozen_heap():
        for turn in range(rounds):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                series[name].run(calls[name], device, queue_ahead)
    clock = "device events" if device.type == "cuda" else "host clock"
    return {name: Samples(tuple(s.device_s), tuple(s.wall_s), clock, tuple(s.host_s)) for name, s in series.items()}


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """The objects that exist now are not looked at by Python's collector."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Replay:
    """pytest-benchmark's timer: hands it the durations that were measured, one for each pair of readings."""

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, durations: Sequence[float]) -> None:
        """What the next rounds took."""
        self._durations, self._running = list(durations), False

    def __call__(self) -> float:
        if not self._durations:
            return time.perf_counter()
        if self._running:
            self._now += self._durations.pop(0)
        self._running = not self._running
        return self._now


# --- what the device can do at most -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Copy bandwidth (bytes read + written per second) and matrix-product rate (FLOP per second), as measured."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    conditions: str

    def floor_s(self, moved: int, flops: int = 0) -> float:
        """The least seconds in which so many bytes can be moved and FLOPs done."""
        return max(moved / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


def ceilings(device: torch.device) -> Ceilings:
    """Measure both on this device, now, on random data in bfloat16."""
    on_gpu = device.type == "cuda"
    numbers, size = (2**30, 8192) if on_gpu else (2**23, 512)
    how = Effort(1.0, 10, 30, 3)
    moved, copied = _copy_seconds(numbers, device, how)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = interleave({"matmul": lambda: a @ b}, device, how=how)["matmul"].median
    conditions = f"device-to-device copy of {moved // 2:,} bytes; {size}^3 bf16 product; random data; medians"
    return Ceilings(moved / copied, 2 * size**3 / multiplied, conditions)


def _copy_seconds(numbers: int, device: torch.device, how: Effort) -> tuple[int, float]:
    """Bytes that a copy of so many bf16 numbers reads and writes, and its seconds."""
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * bytes_of(source), interleave({"copy": lambda: target.copy_(source)}, device, how=how)["copy"].median


@dataclass(frozen=True)
class DeviceWork:
    """Kernels and copies of one call, and the seconds in which at least one of them ran."""

    launches: int
    busy_s: float


def device_work(call: Callable[[], object], device: torch.device, warmed: bool = False) -> DeviceWork | None:
    """What the device does in one call, as its profiler sees it; None on a CPU. Unless ``warmed`` it runs twice."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not warmed:
        call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(device)
    ran = [event.time_range for event in seen.events() if event.device_type == DeviceType.CUDA]
    return DeviceWork(len(ran), covered([(each.start, each.end) for each in ran]) / 1e6)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: what ran beside each other counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that the device runs in one call, as its profiler sees them; None on a CPU (see `count_ops`)."""
    work = device_work(call, device)
    return None if work is None else work.launches
