"""Shared fixtures. Where no GPU is present the Triton kernels run under Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined, so before their first import
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU through the interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folder_from_environment(variable: str, what: str) -> Path:
    """The folder an environment variable names; skips the test, saying why, where it is not set."""
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder: {what} is not here")
    return Path(value)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """The calls of sites and layers during a test (tests/site_models.py)."""
    from site_models import counted_calls

    return counted_calls(monkeypatch)


@pytest.fixture
def goldens() -> Path:
    """The authors' golden numbers (not part of the package)."""
    return folder_from_environment("FLARE_GOLDENS", "the full set of golden numbers")


@pytest.fixture
def nusax() -> Path:
    """The NusaX parallel sentiment data (not part of the package)."""
    return folder_from_environment("FLARE_NUSAX", "the NusaX data")


@pytest.fixture
def minilm() -> Path:
    """A real small BERT (not part of the package)."""
    return folder_from_environment("FLARE_MINILM", "the MiniLM model")
