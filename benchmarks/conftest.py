"""Shared by all benchmarks: the device, seeds, synchronised timing, and what a result file says of its origin."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flare.environment import environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    """Where the benchmarks run."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Callable[[], object]], None]:
    """Time a call with pytest-benchmark: warmed up, and finished on the device before the clock is read."""

    def run(call: Callable[[], object]) -> None:
        def synchronised() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        rounds, warmup = (30, 5) if DEVICE.type == "cuda" else (8, 2)
        benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=warmup, iterations=1)

    return run


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Device, versions, commit and date beside every result; what names the machine itself is left out."""
    machine_info.pop("node", None)
    machine_info.update(environment(), date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
