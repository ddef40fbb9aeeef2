"""The five primitives of the adapter in plain PyTorch: BLAS calls that accumulate in place, any device, any dtype.

This is the fallback where Triton cannot run, the only backend for float64, and the bar that the kernels in
:mod:`flare_kernels.triton_ops` must beat. Both modules export the same five functions, so the autograd nodes in
:mod:`flare_kernels.function` are written once.

Shape legend: M tokens, K input width, N output width, R rank; every tensor is 2-D. Suffixes of names follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dropout as _dropout
from .fusion import get_fusion


def _dropped(x_MK: Tensor, mask: Tensor | None, keep_scale: float, dtype: torch.dtype) -> Tensor:
    """x in the compute dtype, dropped where a packed mask is given (a transient copy; the kernels make none)."""
    x_MK = x_MK.to(dtype)
    if mask is None:
        return x_MK
    return x_MK * _dropout.unpack(mask, x_MK.shape[1], dtype).mul_(keep_scale)


def _scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b with one rounding: the scale is applied to the accumulator."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def shrink(
    x: Tensor | None,
    x_source: Tensor | None,
    A: Tensor,
    *,
    compute_dtype: torch.dtype,
    mask: Tensor | None = None,
    mask_source: Tensor | None = None,
    keep_scale: float = 1.0,
    sum_streams: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """T = drop(x) A^T and S = drop(x_source) A^T, (M, R) in compute_dtype; with sum_streams (T + S, None)."""
    A_KR = A.to(compute_dtype).T
    T = S = None
    if x is not None:
        T = _dropped(x, mask, keep_scale, compute_dtype) @ A_KR
    if x_source is not None:
        x_source = _dropped(x_source, mask_source, keep_scale, compute_dtype)
        if sum_streams and T is not None:
            return T.addmm_(x_source, A_KR), None
        S = x_source @ A_KR
    return (S, None) if sum_streams and T is None else (T, S)


def expand_(y: Tensor, T: Tensor, S: Tensor | None, B: Tensor, *, scaling: float, fusion: str | None) -> None:
    """y (M, N) += scaling * phi(S, T) B^T, in place."""
    H = T if fusion is None or S is None else get_fusion(fusion)(S, T)
    # in y's dtype: a no-op where it is the compute dtype, an upcast of the narrow H where y is wider
    y.addmm_(H.to(y.dtype), B.to(T.dtype).to(y.dtype).T, alpha=scaling)


def grad_bottleneck(
    G: Tensor,
    T: Tensor | None,
    S: Tensor | None,
    B: Tensor,
    *,
    scaling: float,
    fusion: str | None,
    need_hidden: bool = True,
    need_B: bool = True,
    B_grad_dtype: torch.dtype,
    out_dT: Tensor | None = None,
    out_dS: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From G = dL/dy (M, N): dH = scaling * G B, dT and dS through phi, dB = scaling * G^T H.

    T may be None where nothing asks for it (plain LoRA with a frozen B); G then has the compute dtype.
    """
    dtype = (T if T is not None else G).dtype
    G = G.to(dtype)
    phi = None if fusion is None or S is None else get_fusion(fusion)
    dT = dS = dB = None
    if need_hidden:
        dH = _scaled_mm(G, B.to(dtype), scaling)
        if phi is None:
            dT = dH
        else:
            assert T is not None and S is not None
            dT, dS = phi.backward(dH, S, T)
        if out_dT is not None:
            dT = out_dT.copy_(dT)
        if out_dS is not None and dS is not None:
            dS = out_dS.copy_(dS)
    if need_B:
        assert T is not None
        H = T if phi is None or S is None else phi(S, T)
        dB = _scaled_mm(G.T, H, scaling).to(B_grad_dtype)
    return dT, dS, dB


def grad_weight(
    dT: Tensor | None,
    x: Tensor | None,
    dS: Tensor | None,
    x_source: Tensor | None,
    *,
    mask: Tensor | None = None,
    mask_source: Tensor | None = None,
    keep_scale: float = 1.0,
    grad_dtype: torch.dtype,
) -> Tensor:
    """dA (R, K) = dT^T drop(x) + dS^T drop(x_source); either pair may be (None, None)."""
    dA = None
    for grad, stream, bits in ((dT, x, mask), (dS, x_source, mask_source)):
        if grad is None or stream is None:
            continue
        stream = _dropped(stream, bits, keep_scale, grad.dtype)
        dA = grad.T @ stream if dA is None else dA.addmm_(grad.T, stream)
    assert dA is not None, "grad_weight needs at least one stream"
    return dA.to(grad_dtype)


def grad_input(
    dT: Tensor, A: Tensor, *, mask: Tensor | None = None, keep_scale: float = 1.0, dtype: torch.dtype
) -> Tensor:
    """dx (M, K) = dT A, masked and scaled as the forward's dropout was, in dtype."""
    dx = dT @ A.to(dT.dtype)
    if mask is not None:
        dx.mul_(_dropout.unpack(mask, dx.shape[1], dx.dtype).mul_(keep_scale))
    return dx.to(dtype)
