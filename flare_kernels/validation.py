"""Checks of the public functions' arguments. Every message names the argument, its value, and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .fusion import EAGER_FUSIONS, FUSIONS


def check_fusion(fusion: str | None, backend: str) -> None:
    """Raise ValueError for a fusion that the backend does not have."""
    if fusion is None or fusion in FUSIONS:
        return
    if fusion in EAGER_FUSIONS:
        if backend in ("auto", "reference") and fusion != "cross_attention":
            return
        where = "flare_kernels.reference.fuse" if fusion == "cross_attention" else "backend='reference'"
        raise ValueError(f"fusion={fusion!r} mixes positions and has no fused kernel; use {where}")
    raise ValueError(f"fusion={fusion!r} is not one of {', '.join(FUSIONS)} (or None for plain LoRA)")


def check_dtypes(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise TypeError for a non-tensor, a non-floating tensor, or float64 mixed with another dtype."""
    dtypes = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: float16, bfloat16, float32, float64")
        dtypes[name] = tensor.dtype
    double = [name for name, dtype in dtypes.items() if dtype == torch.float64]
    if double and len(double) < len(dtypes):
        others = ", ".join(f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype != torch.float64)
        raise TypeError(f"{', '.join(double)} in float64 cannot be mixed with {others}; cast all of them to one dtype")


def check_streams(x: Tensor, x_source: Tensor | None, bottleneck: Tensor | None) -> None:
    """Raise ValueError if the shapes of x and of the source do not fit, or if x_source and S are both given."""
    if x.dim() < 2:
        raise ValueError(f"x must be (..., m, d), got shape {tuple(x.shape)}")
    if x_source is not None and bottleneck is not None:
        raise ValueError("x_source and source_bottleneck were both given: pass only one of them")
    if x_source is not None and x_source.shape != x.shape:
        raise ValueError(
            f"x_source has shape {tuple(x_source.shape)}, x has {tuple(x.shape)}: both streams need the same length "
            "and width; pad source and target to one length"
        )
    if bottleneck is not None and bottleneck.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"source_bottleneck has shape {tuple(bottleneck.shape)}, x has {tuple(x.shape)}: the leading dimensions "
            "must agree; pad source and target to one length"
        )


def check_adapter(
    x: Tensor, base_output: Tensor, A: Tensor, B: Tensor, bottleneck: Tensor | None, where: str = ""
) -> None:
    """Raise ValueError if base_output (..., n), A (r, d), B (n, r) or S (..., r) do not fit x (..., d)."""
    suffix = f" of {where!r}" if where else ""
    if base_output.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base_output{suffix} has shape {tuple(base_output.shape)}, expected {(*x.shape[:-1], 'n')} for this x"
        )
    if A.dim() != 2 or A.shape[1] != x.shape[-1]:
        raise ValueError(
            f"lora_A{suffix} has shape {tuple(A.shape)}, expected (r, {x.shape[-1]}): x is {x.shape[-1]} wide"
        )
    expected = (base_output.shape[-1], A.shape[0])
    if tuple(B.shape) != expected:
        raise ValueError(f"lora_B{suffix} has shape {tuple(B.shape)}, expected {expected}: (width of base_output, r)")
    if bottleneck is not None and bottleneck.shape[-1] != A.shape[0]:
        raise ValueError(
            f"source_bottleneck{suffix} is {bottleneck.shape[-1]} wide, expected the rank r={A.shape[0]} of lora_A"
        )


def check_weight(x: Tensor, base_output: Tensor, W: Tensor, where: str) -> None:
    """Raise TypeError or ValueError if a frozen weight is not (n, d) for base_output (..., n) and x (..., d)."""
    name = f"weights[{where!r}]"
    check_dtypes({name: W, "x": x})
    expected = (base_output.shape[-1], x.shape[-1])
    if tuple(W.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(W.shape)}, expected {expected}: (width of base_output, width of x)")


def check_numbers(scaling: float, dropout_p: float) -> None:
    """Raise TypeError for a scaling that is not a number, ValueError for a probability outside [0, 1]."""
    if not isinstance(scaling, int | float):
        raise TypeError(f"scaling must be a number (alpha / r), got {type(scaling).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1]")
