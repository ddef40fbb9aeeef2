"""Compilation of the tuner's kernels in several processes, ahead of the timing.

A problem is one step (operation) at one size (:mod:`.problem`). Its variants are the combinations of a form
(implementation) and tiles that the tuner compares (:mod:`.variants`).
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch

from .. import aot
from ..forms import capability
from ..launch_mode import recording
from ..triton_ops import primitives as triton_ops
from ..triton_ops.launch import shared_memory_bytes
from .problem import Problem
from .variants import variants


class Compiler:
    """Pool of processes that compile the variants of problems into Triton's cache, in the order of the problems.

    A launch compiles its own kernel if the cache does not have it, so this pool only saves time. Leaving the context
    cancels compilations that have not started.
    """

    def __init__(self, device: torch.device, jobs: int) -> None:
        self._device, self._pool = device, aot.compiler_pool(jobs)
        self._futures: dict[aot.Unit, Future[dict[str, Any]]] = {}
        self._of_problem: dict[Problem, list[Future[dict[str, Any]]]] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, problems: Iterable[Problem]) -> int:
        """Queue the compilation of the problems' kernels, and return how many kernels have been queued in total."""
        for problem in problems:
            units = dict.fromkeys(units_of(problem, self._device))
            for unit in units:
                if unit not in self._futures:
                    self._futures[unit] = self._pool.submit(aot.compile_unit, unit)
            self._of_problem[problem] = [self._futures[unit] for unit in units]
        return len(self._futures)

    def wait(self, problem: Problem, seconds: float) -> bool:
        """Wait for the kernels of a problem for at most this many seconds, and return whether all are done.

        A kernel whose compilation failed is done too.
        """
        timeout = None if seconds == float("inf") else max(0.0, seconds)
        return not concurrent.futures.wait(self._of_problem[problem], timeout).not_done


def units_of(problem: Problem, device: torch.device) -> list[aot.Unit]:
    """Return the compilation units of the kernels that the variants of a problem launch."""
    inputs = problem.make(torch.device("cpu"), real=False)
    shared_bytes, target = shared_memory_bytes(device), capability(device)
    launches: list[Any] = []
    for variant in variants(problem, shared_bytes, target):
        if variant.tiles:
            with variant.forced(), recording(shared_bytes) as recorded:
                problem.run(triton_ops, inputs)
            launches += recorded
    return [aot.specialise(launch, target) for launch in launches]
