"""The primitives of the adapter in plain PyTorch: BLAS calls that accumulate in place, any device, any dtype.

This is the fallback where Triton cannot run, the only backend for float64, and the bar that the kernels in
:mod:`flare_kernels.triton_ops` must beat. Both modules export the same functions, so the autograd node in
:mod:`flare_kernels.node` is written once.

Shape legend: M tokens, K input width, N output width, R rank; every tensor is 2-D. Suffixes of names follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dropout as _dropout
from .fusion import get_fusion

keep_bits = _dropout.keep_bits_torch


def _dropped(x_MK: Tensor, mask: Tensor | None, keep_scale: float, dtype: torch.dtype) -> Tensor:
    """x in the compute dtype, dropped where a packed mask is given (a transient copy; the kernels make none)."""
    x_MK = x_MK.to(dtype)
    if mask is None:
        return x_MK
    return x_MK * _dropout.unpack(mask, x_MK.shape[1], dtype).mul_(keep_scale)


def _scaled_mm(a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * a @ b with one rounding: the scale is applied to the accumulator."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling, out=out)


def stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices (R_i, K) below each other in dtype, (sum of R_i, K); a single one of dtype is itself."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    return torch.cat([weight.to(dtype) for weight in weights])


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


def expand_(
    ys: Sequence[Tensor],
    T: Tensor,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    fusion: str | None,
    outs: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> None:
    """y_i (M, N_i) += scaling_i * phi(S_i, T_i) B_i^T, in place (or into outs), for projections of one rank.

    With ``biases``, (N_i,) or None each, y_i is not read: y_i = bias_i + scaling_i * phi(S_i, T_i) B_i^T.
    """
    if outs is not None:
        for out, y in zip(outs, ys, strict=True):
            if biases is None:
                out.copy_(y)
        ys = outs
    H = T if fusion is None or S is None else get_fusion(fusion)(S, T)
    R = Bs[0].shape[1]
    for i, (y, B, scaling) in enumerate(zip(ys, Bs, scalings, strict=True)):
        # in y's dtype: a no-op where it is the compute dtype, an upcast of the narrow H where y is wider
        H_i, B_i = H[:, i * R : (i + 1) * R].to(y.dtype), B.to(T.dtype).to(y.dtype).T
        if biases is None:
            y.addmm_(H_i, B_i, alpha=scaling)
        elif (bias := biases[i]) is None:
            _scaled_mm(H_i, B_i, scaling, out=y)
        else:
            torch.addmm(bias.to(y.dtype), H_i, B_i, alpha=scaling, out=y)


def grad_bottleneck(
    Gs: Sequence[Tensor],
    T: Tensor | None,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    fusion: str | None,
    dT: Tensor | None = None,
    dS: Tensor | None = None,
    B_grad_dtype: torch.dtype | None = None,
) -> list[Tensor] | None:
    """From G_i = dL/dy_i (M, N_i): dH_i = scaling_i * G_i B_i, through phi to dT and dS; dB_i = scaling_i * G_i^T H_i.

    dT, dS and B_grad_dtype are None where nothing asks for that part, T where nothing needs it.
    """
    given = T if T is not None else dT
    assert given is not None, "grad_bottleneck needs T where dB is wanted, and dT where it is not"
    dtype, R = given.dtype, Bs[0].shape[1]
    phi = None if fusion is None or S is None else get_fusion(fusion)
    Gs = [G.to(dtype) for G in Gs]
    each = [slice(i * R, (i + 1) * R) for i in range(len(Gs))]
    if dT is not None:
        for G, B, scaling, columns in zip(Gs, Bs, scalings, each, strict=True):
            _scaled_mm(G, B.to(dtype), scaling, out=dT[:, columns])
        if phi is not None:
            assert T is not None and S is not None
            dH_T, dH_S = phi.backward(dT, S, T)  # dT holds dH up to here
            dT.copy_(dH_T)
            if dS is not None:
                dS.copy_(dH_S)
    if B_grad_dtype is None:
        return None
    assert T is not None
    H = T if phi is None or S is None else phi(S, T)
    return [
        _scaled_mm(G.T, H[:, columns], scaling).to(B_grad_dtype)
        for G, scaling, columns in zip(Gs, scalings, each, strict=True)
    ]


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
        # added after the products and in grad_dtype, as autograd does where the streams come apart: the same bits
        share = (grad.T @ stream).to(grad_dtype)
        dA = share if dA is None else dA.add_(share)
    assert dA is not None, "grad_weight needs at least one stream"
    return dA


def grad_input(
    dT: Tensor,
    A: Tensor,
    *,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """dx (M, K) = dT A, masked and scaled as the forward's dropout was, in dtype; with ``out``, out += that."""
    if out is not None and mask is None and out.dtype == dT.dtype:
        return out.addmm_(dT, A.to(dT.dtype))
    dx = dT @ A.to(dT.dtype)
    if mask is not None:
        dx.mul_(_dropout.unpack(mask, dx.shape[1], dx.dtype).mul_(keep_scale))
    return dx.to(dtype) if out is None else out.add_(dx)
