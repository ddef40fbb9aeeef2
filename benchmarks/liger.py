"""Run methods of models.py on Liger's kernels, which ``use_liger_kernel`` of TrainingArguments applies too.

Liger replaces RMSNorm, the gated feed-forward layer, the rotary embedding, the head and the loss. Its head and loss
never hold the full logits in memory. It replaces the function of the rotary embedding for all models of a family. The
methods on Liger's kernels therefore install the replacement only during their calls, so that the other methods keep
transformers' function.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

#: Each row (method) on Liger's kernels -> the row of models.METHODS that computes the same without Liger's kernels.
ROWS = {
    "peft-lora-liger": "peft-lora",
    "lora-liger": "lora",
    "input-fusion-liger": "input-fusion",
    "flare-liger": "flare",
}


def refusal(device: torch.device) -> str | None:
    """Return why the rows of this file cannot run on this machine, or None if they can."""
    if device.type != "cuda":
        return "Liger's kernels need a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    return None


class Liger:
    """Liger's kernels for one family of models: "llama" or "gemma2"."""

    def __init__(self, family: str) -> None:
        self._modeling: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        self._apply = getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{family}")
        self._replaced: dict[str, Any] = {}

    def apply(self, model: Any) -> None:
        """Replace the modules of a transformers model, and restore the functions of the family's modeling module."""
        before = dict(vars(self._modeling))
        self._apply(model=model)
        after = dict(vars(self._modeling))
        self._replaced = {name: value for name, value in after.items() if before.get(name) is not value}
        for name in self._replaced:
            setattr(self._modeling, name, before[name])

    @contextlib.contextmanager
    def functions_replaced(self) -> Iterator[None]:
        """Install Liger's functions in the family's modeling module within the context."""
        with mock.patch.multiple(self._modeling, **self._replaced):
            yield
