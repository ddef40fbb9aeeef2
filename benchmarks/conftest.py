"""Shared by all benchmarks: the device, seeds, synchronised timing, and what a result file says of its origin."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

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
    """Device, versions and date beside every result."""
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    machine_info["threads"] = torch.get_num_threads()
    machine_info["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine_info["versions"] = {}
    for name in ("flare-kernels", "torch", "triton", "transformers", "peft"):
        try:
            machine_info["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info["versions"][name] = "not installed"


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    """The commit, also where pytest-benchmark finds no repository of its own."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit_info["id"] = commit_info.get("id") or found.stdout.strip() or "unknown"
