"""Describe what a result depends on in addition to its settings: versions, commit, device, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from flare_kernels import __version__

from .errors import UserError

_MOST_THREADS = 1024

# Packages that can affect a result: kernels, models, optimizers, tokenizers, data.
_PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes", "safetensors", "numpy"),
    *("datasets", "sentencepiece", "protobuf"),
)


def environment(use_cpu: bool = False) -> dict[str, Any]:
    """Return what a result file records: versions, commit, device, processor, number of threads and platform.

    Args:
        use_cpu: whether the work runs on the CPU even if there is a GPU.
    """
    versions = {"python": platform.python_version(), "flare-kernels": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["cuda"] = torch.version.cuda or "none"
    return {
        "versions": versions,
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and not use_cpu else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def use_threads(number: int) -> None:
    """Set the number of CPU threads.

    Raises:
        UserError: the number is less than 1 or more than 1024. torch crashes with very many threads.
    """
    if not 1 <= number <= _MOST_THREADS:
        raise UserError(f"--threads must be from 1 to {_MOST_THREADS}; got {number}")
    torch.set_num_threads(number)


def now() -> str:
    """Return the time in UTC, in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of the git checkout that contains this package, with "-dirty" if its files were changed.

    Return None if this package is not in a checkout, or if git fails.

    The environment variable FLARE_COMMIT takes precedence: it names the commit of files that were copied without git.
    """
    if named := os.environ.get("FLARE_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def cpu_name() -> str:
    """Return the name of the processor, or "unknown"."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
