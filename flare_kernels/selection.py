"""Choice of the backend: which implementation of the adapter's operations runs on a device, and why others cannot.

The *primitives* are these operations, such as shrink and expand (:mod:`flare_kernels.triton_ops.primitives`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import launch_mode, torch_ops
from .fusion import EAGER_FUSIONS

BACKENDS: tuple[str, ...] = ("triton", "torch", "reference")

#: tl.dot on bfloat16 and the kernels' tile sizes need Ampere or newer.
MINIMUM_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and the reason if it cannot (otherwise empty)."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else f"not available: {self.reason}"


def interpreting() -> bool:
    """Return whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def backends() -> dict[str, BackendStatus]:
    """Return the status of every backend by name. ``str()`` of a status includes the reason.

    "triton" runs on CUDA devices of capability 8.0 or newer, or on the CPU under TRITON_INTERPRET=1; "torch" and
    "reference" run anywhere.
    """
    return {"triton": _triton_status(), "torch": BackendStatus(True), "reference": BackendStatus(True)}


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed (it exists for Linux only)")
    if interpreting():
        return BackendStatus(True)
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device is visible, and TRITON_INTERPRET=1 is not set")
    reasons = [_unsupported_reason(index) for index in range(torch.cuda.device_count())]
    if all(reasons):
        return BackendStatus(False, "; ".join(reasons))
    return BackendStatus(True)


@functools.cache
def _unsupported_reason(index: int) -> str:
    """Return why the kernels cannot run on this CUDA device, or an empty string if they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= MINIMUM_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(index)
    return (
        f"{name} (cuda:{index}) has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    )


def select_backend(device: torch.device | str, dtype: torch.dtype, fusion: str | None = None) -> str:
    """Return the backend that ``backend="auto"`` chooses for tensors on this device in this compute dtype.

    * "triton" for 16-bit calls on CUDA devices that can run the kernels. An operation runs in plain PyTorch even then
      if the launch table (:mod:`flare_kernels.launch_table`) or, without an entry of the table, the general rule
      (``triton_ops/config.py``) prefers this at its size; :func:`launch_plan` shows the choice.
    * "torch" on CPUs (also under the interpreter, which is for tests), on CUDA devices that cannot run the kernels, and
      for float64 and float32. The kernels have not been timed against cuBLAS in IEEE float32.
    * "reference" for the fusions that combine different token positions.

    Inside :func:`flare_kernels.testing.launches_left_out`, all other fusions get "torch" for float64 and "triton" for
    every other dtype, on every device.
    """
    if fusion in EAGER_FUSIONS:
        return "reference"
    if launch_mode.current.left_out is not None:
        return "torch" if dtype == torch.float64 else "triton"
    device = torch.device(device)
    if (
        device.type != "cuda"
        or dtype not in (torch.float16, torch.bfloat16)
        or importlib.util.find_spec("triton") is None
    ):
        return "torch"
    return "torch" if _unsupported_reason(_index(device)) else "triton"


def launch_plan(
    M: int,
    d: int,
    widths: Sequence[int],
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> dict[str, str]:
    """Describe what ``backend="auto"`` does in each step (operation) of a call.

    A description names the form (implementation), the kernels' tiles, and whether the general rule or the tuned launch
    table decided them.

    Args:
        M: number of tokens.
        d: width of the input.
        widths: width of each adapted projection's output.
        r: rank of each adapter.
        dtype: dtype of all tensors, which are assumed to be aligned.
        device: device of all tensors.

    Returns:
        step -> description, such as "triton, TileConfig(...) (tuned table)".
    """
    device = torch.device(device)
    if select_backend(device, dtype) != "triton":
        choice = f"torch (the backend for {device} in {dtype})"
        return dict.fromkeys(("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input"), choice)
    from .triton_ops.plan_text import launch_plan as plan_of_kernels

    return plan_of_kernels(M, d, widths, r, dtype=dtype, device=device)


def primitives(backend: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the namespace of a backend's primitives. With "auto" on a GPU, the primitives follow the launch table.

    Raises:
        ValueError: the backend is unknown, or cannot run on this device and in this dtype; the message has the reason.
    """
    if backend == "auto":
        return _tuned() if select_backend(device, dtype) == "triton" else _plain(device)
    if backend == "torch":
        return _plain(device)
    if backend == "triton":
        if dtype == torch.float64:
            raise ValueError("backend='triton' has no float64 form; use backend='torch' or 'reference'")
        if launch_mode.current.left_out is None:
            _check_triton(device)
        from .triton_ops import primitives

        return primitives
    raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")


def _check_triton(device: torch.device) -> None:
    status = _triton_status()
    if not status:
        raise ValueError(f"backend='triton' is {status}; use backend='auto' or 'torch'")
    if device.type != "cuda":
        if not interpreting():
            raise ValueError(
                f"backend='triton' runs on CUDA, the tensors are on {device}; use backend='auto' or 'torch'"
            )
    elif reason := _unsupported_reason(_index(device)):
        raise ValueError(f"backend='triton' cannot run here: {reason}; use backend='torch'")


def _tuned() -> Any:
    from .triton_ops.primitives import tuned

    return tuned


def _plain(device: torch.device) -> Any:
    """Return the plain PyTorch primitives; on a device that can run the kernels, with the Triton dropout masks."""
    if (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and not _unsupported_reason(_index(device))
    ):
        return _plain_with_triton_masks()
    return torch_ops


@functools.cache
def _plain_with_triton_masks() -> Any:
    from .triton_ops.primitives import dropout_mask

    # any compute dtype can use the kernel's mask, and plain PyTorch needs about a hundred launches to make one
    return types.SimpleNamespace(**vars(torch_ops) | {"dropout_mask": dropout_mask})


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
