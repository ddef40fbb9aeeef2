"""Which implementation of the primitives runs where, and why another one does not."""

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
    """Whether a backend can run on this machine, and the reason where it cannot (empty where it can)."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else f"not available: {self.reason}"


def interpreting() -> bool:
    """True where Triton runs kernels on the CPU (TRITON_INTERPRET=1, read by Triton when kernels are defined)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def backends() -> dict[str, BackendStatus]:
    """Name -> status of every backend; ``str()`` of a status names the reason.

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
    refusals = [_device_refusal(index) for index in range(torch.cuda.device_count())]
    if all(refusals):
        return BackendStatus(False, "; ".join(refusals))
    return BackendStatus(True)


@functools.cache
def _device_refusal(index: int) -> str:
    """Why the kernels cannot run on this CUDA device; empty where they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= MINIMUM_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(index)
    return f"{name} (cuda:{index}) has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"


def select_backend(device: torch.device | str, dtype: torch.dtype, fusion: str | None = None) -> str:
    """The backend that ``backend="auto"`` takes for tensors on this device in this compute dtype.

    Where that is "triton", each step of a call still takes the form that the launch table prefers at its size:
    :func:`launch_plan` returns the choice.

    CPUs (also under the interpreter, which is for tests), float64 and float32 take "torch": cuBLAS is the safe choice
    for IEEE float32 until the kernels have been timed against it. 16-bit calls on CUDA devices that can run the kernels
    take "triton"; the fusions that mix positions take "reference".
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
    return "torch" if _device_refusal(_index(device)) else "triton"


def launch_plan(
    M: int,
    d: int,
    widths: Sequence[int],
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> dict[str, str]:
    """What "auto" does with each step of a call, in words: which form, which tiles, and what decided.

    Args:
        M: tokens. d: width of the input. widths: width of each adapted projection's output. r: rank of each adapter.
        dtype: compute dtype, of all (aligned) tensors. device: where they are.

    Returns:
        step -> its form, such as "triton, TileConfig(...) (tuned table)" or "torch (no Triton form for cpu)".
    """
    device = torch.device(device)
    if select_backend(device, dtype) != "triton":
        why = f"torch (what {device} takes in {dtype})"
        return dict.fromkeys(("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input"), why)
    from .triton_ops.plan_text import launch_plan as plan_of_kernels

    return plan_of_kernels(M, d, widths, r, dtype=dtype, device=device)


def primitives(backend: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The namespace of the primitives for a backend name; for "auto" the one that follows the tuned launch table.

    Raises:
        ValueError: an unknown backend, or one that cannot run for this device and dtype; the message gives the reason.
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
    elif refusal := _device_refusal(_index(device)):
        raise ValueError(f"backend='triton' cannot run here: {refusal}; use backend='torch'")


def _tuned() -> Any:
    from .triton_ops.primitives import tuned

    return tuned


def _plain(device: torch.device) -> Any:
    """The plain PyTorch forms, but on a device that runs the kernels their generator of dropout bits."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None and not _device_refusal(_index(device)):
        return _plain_with_kernel_bits()
    return torch_ops


@functools.cache
def _plain_with_kernel_bits() -> Any:
    from .triton_ops.primitives import keep_bits

    # the generator has no dtype, and its plain form is some hundred launches
    return types.SimpleNamespace(**vars(torch_ops) | {"keep_bits": keep_bits})


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
