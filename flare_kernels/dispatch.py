"""The primitives that ``backend="auto"`` runs where Triton can: for each call the Triton or the plain PyTorch form.

A tuned launch table (:mod:`flare_kernels.launch_table`) decides per step and size; where it has no entry, the kernels
run, except that dx without dropout is added to a dx buffer by one cuBLAS call, which moves no more bytes than a kernel
could. This module has the same functions as :mod:`flare_kernels.triton_ops`; :func:`launch_plan` says what it would
choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_ops, triton_ops
from .triton_ops.config import operand_class
from .triton_ops.decode import MAX_RANK, MAX_ROWS
from .triton_ops.launch import choose_config, class_of, tuned_entries, tuned_entry

stack = triton_ops.stack


def _form(
    step: str,
    dtype: torch.dtype,
    rank: int,
    rows: int,
    width: int,
    wide: Sequence[Tensor | None],
    thin: Sequence[Tensor | None] = (),
) -> ModuleType:
    """The module whose form of a step the table prefers; the kernels' where it has no entry."""
    device = next(tensor.device for tensor in wide if tensor is not None)
    if not tuned_entries(device):
        return triton_ops
    entry = tuned_entry(step, class_of(rank, dtype, wide, thin), rank, rows, width, device)
    return torch_ops if entry is not None and entry.form == "torch" else triton_ops


def shrink(x: Tensor | None, x_source: Tensor | None, A: Tensor, **options: Any) -> tuple[Tensor | None, Tensor | None]:
    """T and S; see :func:`flare_kernels.triton_ops.shrink`. With dropout always the kernel, which copies no stream."""
    first = x if x is not None else x_source
    if first is None or options.get("mask") is not None or options.get("mask_source") is not None:
        return triton_ops.shrink(x, x_source, A, **options)
    M, K = first.shape
    form = _form("shrink", options["compute_dtype"], A.shape[0], M, K, (x, x_source, A))
    return form.shrink(x, x_source, A, **options)  # type: ignore[no-any-return]


def expand_(ys: Sequence[Tensor], T: Tensor, S: Tensor | None, Bs: Sequence[Tensor], **options: Any) -> None:
    """y_i += scaling_i * phi(S_i, T_i) B_i^T; see :func:`flare_kernels.triton_ops.expand_`."""
    width = max(y.shape[1] for y in ys)
    form = _form("expand", T.dtype, Bs[0].shape[1], ys[0].shape[0], width, ys, (T, S, *Bs))
    form.expand_(ys, T, S, Bs, **options)


def grad_bottleneck(
    Gs: Sequence[Tensor], T: Tensor | None, S: Tensor | None, Bs: Sequence[Tensor], **options: Any
) -> list[Tensor] | None:
    """dT, dS and dB_i; see :func:`flare_kernels.triton_ops.grad_bottleneck`."""
    given = T if T is not None else options["dT"]
    width = max(G.shape[1] for G in Gs)
    form = _form("grad_bottleneck", given.dtype, Bs[0].shape[1], Gs[0].shape[0], width, Gs, (T, S, *Bs))
    return form.grad_bottleneck(Gs, T, S, Bs, **options)  # type: ignore[no-any-return]


def grad_weight(
    dT: Tensor | None, x: Tensor | None, dS: Tensor | None, x_source: Tensor | None, **options: Any
) -> Tensor:
    """dA; see :func:`flare_kernels.triton_ops.grad_weight`. With dropout always the kernel, which copies no stream."""
    grad, stream = (dT, x) if dT is not None else (dS, x_source)
    if grad is None or stream is None or options.get("mask") is not None or options.get("mask_source") is not None:
        return triton_ops.grad_weight(dT, x, dS, x_source, **options)
    M, K = stream.shape
    form = _form("grad_weight", grad.dtype, grad.shape[1], M, K, (x, x_source), (dT, dS))
    return form.grad_weight(dT, x, dS, x_source, **options)  # type: ignore[no-any-return]


def grad_input(dT: Tensor, A: Tensor, **options: Any) -> Tensor:
    """dx; see :func:`flare_kernels.triton_ops.grad_input`."""
    out, masked = options.get("out"), options.get("mask") is not None
    if masked:
        return triton_ops.grad_input(dT, A, **options)
    if out is not None and out.dtype == A.dtype == dT.dtype:
        return torch_ops.grad_input(dT, A, **options)
    form = _form("grad_input", dT.dtype, dT.shape[1], dT.shape[0], A.shape[1], (A,), (dT,))
    return form.grad_input(dT, A, **options)  # type: ignore[no-any-return]


def can_decode(rows: int, ranks: Sequence[int]) -> bool:
    """Whether a call of so many tokens with adapters of these ranks takes the two-launch form."""
    return triton_ops.can_decode(rows, ranks)


decode = triton_ops.decode


def launch_plan(
    M: int,
    d: int,
    widths: Sequence[int],
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> dict[str, str]:
    """What "auto" does with each step of a call on aligned tensors of one dtype, in words.

    Args:
        M: tokens.
        d: width of the input.
        widths: width of each adapted projection's output (query and value, say).
        r: rank of each adapter.
        dtype: compute dtype. device: a CUDA device.

    Returns:
        step -> its form, its tiles, and whether a tuned table or the general rule decided.
    """
    device, R = torch.device(device), len(widths) * r
    decodes = 0 < M <= MAX_ROWS and r <= MAX_RANK
    forward = {"decode": (r, d)} if decodes else {"shrink": (R, d), "expand": (r, max(widths))}
    backward = {"grad_bottleneck": (r, max(widths)), "grad_weight": (R, d), "grad_input": (R, d)}
    plan = {}
    for step, (rank, width) in (forward | backward).items():
        operands = operand_class(dtype.itemsize, dtype.itemsize, True)
        entry = tuned_entry(step, operands, rank, M, width, device)
        origin = "general rule" if entry is None else "tuned table"
        if entry is not None and entry.form == "torch" and step != "decode":
            plan[step] = f"torch ({origin})"
            continue
        kernels = ("shrink_decode", "expand_decode") if step == "decode" else (step,)
        tiles = "; ".join(str(choose_config(kernel, operands, rank, M, width, device)) for kernel in kernels)
        plan[step] = f"triton, {tiles} ({origin})"
    return plan
