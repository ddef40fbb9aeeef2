"""The primitives (operations) of the adapter in plain PyTorch, on any device and in any dtype.

Their BLAS calls accumulate in place where possible. These primitives are the fallback if Triton cannot run, the only
primitives that compute in float64, and the baseline that the kernels must beat.
:mod:`flare_kernels.triton_ops.primitives` exports the same functions and ``decode``, so the autograd node in
:mod:`flare_kernels.node` works with either module.

Shape legend: M tokens, K input width, N output width, R rank. Tensors are 2-D, except biases and seeds. A suffix such
as ``_MK`` in a name gives the tensor's axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dropout as _dropout
from .fusion import get_fusion

dropout_mask = _dropout.dropout_mask_torch


def _dropped(x_MK: Tensor, mask: Tensor | None, keep_scale: float, dtype: torch.dtype) -> Tensor:
    """Return x in the compute dtype, with dropout if there is a mask (a temporary copy; the kernels make none)."""
    x_MK = x_MK.to(dtype)
    if mask is None:
        return x_MK
    return x_MK * _dropout.unpack(mask, x_MK.shape[1], dtype).mul_(keep_scale)


def _scaled_mm(a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """Return scaling * a @ b with one rounding: the scaling is applied to the accumulator."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling, out=out)


def stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices (R_i, K) concatenated along the rows in dtype, (sum of R_i, K).

    A single matrix that already has this dtype is returned without a copy.
    """
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
    """Return T = drop(x) A^T and S = drop(x_source) A^T, (M, R) in compute_dtype; with sum_streams (T + S, None)."""
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
    """Add scaling_i * phi(S_i, T_i) B_i^T to y_i (M, N_i), in place or into outs, for projections of one rank.

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
        # cast to y's dtype: this does nothing if y has the compute dtype, and is an upcast if y is wider
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
    """Compute dT and dS in place, and return dB_i, from G_i = dL/dy_i (M, N_i).

    dH_i = scaling_i * G_i B_i goes through phi to dT and dS. dB_i = scaling_i * G_i^T H_i. dT or dS is None if this
    gradient is not needed. B_grad_dtype is None if dB is not needed. T may be None if only dT is needed and no phi
    is applied (``fusion`` or S is None).
    """
    compute = T if T is not None else dT
    assert compute is not None, "grad_bottleneck needs T to compute dB, and dT if dB is not needed"
    dtype, R = compute.dtype, Bs[0].shape[1]
    phi = None if fusion is None or S is None else get_fusion(fusion)
    Gs = [G.to(dtype) for G in Gs]
    slices = [slice(i * R, (i + 1) * R) for i in range(len(Gs))]
    if dT is not None:
        for G, B, scaling, columns in zip(Gs, Bs, scalings, slices, strict=True):
            _scaled_mm(G, B.to(dtype), scaling, out=dT[:, columns])
        if phi is not None:
            assert T is not None and S is not None
            grad_T, grad_S = phi.backward(dT, S, T)  # the buffer dT holds dH until here
            dT.copy_(grad_T)
            if dS is not None:
                dS.copy_(grad_S)
    if B_grad_dtype is None:
        return None
    assert T is not None
    H = T if phi is None or S is None else phi(S, T)
    return [
        _scaled_mm(G.T, H[:, columns], scaling).to(B_grad_dtype)
        for G, scaling, columns in zip(Gs, scalings, slices, strict=True)
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
    """Return dA (R, K) = dT^T drop(x) + dS^T drop(x_source); either pair may be (None, None)."""
    dA = None
    for grad, stream, stream_mask in ((dT, x, mask), (dS, x_source, mask_source)):
        if grad is None or stream is None:
            continue
        stream = _dropped(stream, stream_mask, keep_scale, grad.dtype)
        # each product is cast to grad_dtype before the sum, because autograd would do so for two separate products
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
    """Return dx (M, K) = dT A in dtype, masked and scaled as in the forward pass; with ``out``, add it to out."""
    if out is not None and mask is None and out.dtype == dT.dtype:
        return out.addmm_(dT, A.to(dT.dtype))
    dx = dT @ A.to(dT.dtype)
    if mask is not None:
        dx.mul_(_dropout.unpack(mask, dx.shape[1], dx.dtype).mul_(keep_scale))
    return dx.to(dtype) if out is None else out.add_(dx)
