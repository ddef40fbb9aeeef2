"""The methods over Liger's kernels, as transformers' ``use_liger_kernel`` puts them in place.

They replace RMSNorm, the gated feed-forward, the rotary embedding, and the head with its loss, whose logits are never
held as a whole. Liger replaces the rotary embedding for all models of a family, so its rows bring it along in each
call and the others keep their own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

#: Row -> the row of models.METHODS that computes the same.
ROWS = {
    "peft-lora-liger": "peft-lora",
    "lora-liger": "lora",
    "input-fusion-liger": "input-fusion",
    "flare-liger": "flare",
}


def refusal(device: torch.device) -> str | None:
    """Why the rows cannot run here; None where they can."""
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

    def put_into(self, model: Any) -> Any:
        """Put the kernels into a transformers model, and leave the family's module as it was. Returns the model."""
        before = dict(vars(self._modeling))
        self._apply(model=model)
        after = dict(vars(self._modeling))
        self._replaced = {name: value for name, value in after.items() if before.get(name) is not value}
        for name in self._replaced:
            setattr(self._modeling, name, before[name])
        return model

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the family's module has Liger's functions."""
        with mock.patch.multiple(self._modeling, **self._replaced):
            yield
