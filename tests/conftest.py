"""Shared fixtures. Without a GPU, the Triton kernels run in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when kernels are defined
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    """Return the device of the kernel tests: the GPU if there is one, otherwise the CPU."""
    return DEVICE


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of benchmarks/, which is not a package, importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folder_from_environment(variable: str, what: str) -> Path:
    """Return the folder that an environment variable names. Skip the test if the folder does not exist."""
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder, so {what} cannot be read")
    return Path(value)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Return a counter of the calls of adapter layers and of sites during a test.

    tests/site_models.py explains sites and the counter.
    """
    from site_models import counted_calls

    return counted_calls(monkeypatch)


@pytest.fixture
def goldens() -> Path:
    """Return the folder of the full set of golden numbers (tests/goldens/README.md), which is not in the repository."""
    return folder_from_environment("FLARE_GOLDENS", "the full set of golden numbers")


@pytest.fixture
def nusax() -> Path:
    """Return the folder of the NusaX parallel sentiment data, which is not part of the repository."""
    return folder_from_environment("FLARE_NUSAX", "the NusaX data")


@pytest.fixture
def minilm() -> Path:
    """Return the folder of a small pretrained BERT, which is not part of the repository."""
    return folder_from_environment("FLARE_MINILM", "the MiniLM model")
