"""Measure the seconds per training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class StepTimer:
    """Measure the seconds of each step, and their median without the warm-up.

        timer = StepTimer(warmup=3)
        for batch in batches:
            with timer.step():
                train(batch)
        print(timer.median)

    Attributes:
        warmup: number of first steps that the median leaves out. If all steps belong to the warm-up, the median is over
            all steps.
        device: a CUDA device to synchronise before the clock is read.
        seconds: duration of each step, including the warm-up.

    Raises:
        ValueError: ``warmup`` is negative.
    """

    warmup: int = 3
    device: torch.device | str | None = None
    seconds: list[float] = field(default_factory=list)
    _started: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps, 0 or more; got {self.warmup}")

    def start(self) -> None:
        """Start the clock of a step."""
        self._started = self._now()

    def stop(self) -> None:
        """End the step that :meth:`start` began.

        Raises:
            RuntimeError: no step was started.
        """
        if self._started is None:
            raise RuntimeError("stop() without start(): call start() first, or use `with timer.step():`")
        self.seconds.append(self._now() - self._started)
        self._started = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step. A step that raises is not counted."""
        self.start()
        try:
            yield
        except BaseException:
            self._started = None
            raise
        self.stop()

    @property
    def median(self) -> float | None:
        """Median seconds per step after the warm-up, or None before the first step."""
        if not self.seconds:
            return None
        return statistics.median(self.seconds[self.warmup :] or self.seconds)

    def _now(self) -> float:
        if self.device is not None and torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
