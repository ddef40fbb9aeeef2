"""dA from both streams, in one pass over each.

Shape legend: M tokens, K input width, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import dot, drop_transposed, load_keep_bytes_transposed, load_tile, round_to, store_tile
from .launch import cdiv, config_for, launch, split_sum
from .partials import sum_partials


@triton.jit
def grad_weight_kernel(
    dT,
    x,
    dS,
    x_source,
    mask,
    mask_source,
    out,
    M,
    K,
    R,
    keep_scale,
    tiles_per_split,
    dT_stride_m,
    dT_stride_r,
    x_stride_m,
    x_stride_k,
    dS_stride_m,
    dS_stride_r,
    x_source_stride_m,
    x_source_stride_k,
    mask_stride_m,
    mask_source_stride_m,
    out_stride_split,
    HAS_SOURCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[i_split] = dT^T drop(x) + dS^T drop(x_source) over the rows of one split.

    dT, dS (M, R); x, x_source (M, K); out (splits, R, K), contiguous. A program owns BLOCK_K columns of x and sums
    (BLOCK_K, BLOCK_R), so that the long side of the product is the same for every rank.
    """
    i_k = tl.program_id(0)
    i_r = tl.program_id(1)
    i_split = tl.program_id(2)
    DTYPE: tl.constexpr = dT.dtype.element_ty
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k = o_k < K
    m_r = o_r < R

    b_dA = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    i_start = i_split * tiles_per_split
    if HAS_MASK:
        # bytes cannot be copied ahead by the pipeline as x is: they are fetched one tile early, by hand
        i_column = i_k * BLOCK_K
        o_next = i_start * BLOCK_M + tl.arange(0, BLOCK_M)
        b_next = load_keep_bytes_transposed(mask, mask_stride_m, o_next, o_next < M, i_column, K, BLOCK_K)
        if HAS_SOURCE:
            b_next_source = load_keep_bytes_transposed(
                mask_source, mask_source_stride_m, o_next, o_next < M, i_column, K, BLOCK_K
            )
    for i_m in range(i_start, min(i_start + tiles_per_split, tl.cdiv(M, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_d = load_tile(dT, o_m, m_m, dT_stride_m, o_r, m_r, dT_stride_r)
        # loaded as its transpose: a tile turned round in registers is not copied ahead before Hopper
        b_x = load_tile(x, o_k, m_k, x_stride_k, o_m, m_m, x_stride_m)
        if HAS_MASK:
            o_next = o_m + BLOCK_M
            b_x = drop_transposed(b_x, b_next, BLOCK_M, BLOCK_K)
            b_next = load_keep_bytes_transposed(mask, mask_stride_m, o_next, o_next < M, i_column, K, BLOCK_K)
        b_dA = dot(round_to(b_x, DTYPE), b_d, b_dA)
        if HAS_SOURCE:
            b_d = load_tile(dS, o_m, m_m, dS_stride_m, o_r, m_r, dS_stride_r)
            b_x = load_tile(x_source, o_k, m_k, x_source_stride_k, o_m, m_m, x_source_stride_m)
            if HAS_MASK:
                b_x = drop_transposed(b_x, b_next_source, BLOCK_M, BLOCK_K)
                b_next_source = load_keep_bytes_transposed(
                    mask_source, mask_source_stride_m, o_next, o_next < M, i_column, K, BLOCK_K
                )
            b_dA = dot(round_to(b_x, DTYPE), b_d, b_dA)

    out += i_split.to(tl.int64) * out_stride_split
    store_tile(out, tl.trans(b_dA * keep_scale), o_r, m_r, K, o_k, m_k, 1)


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
    """dA = dT^T drop(x) + dS^T drop(x_source), (R, K), contiguous.

    Args:
        dT, dS: (M, R) in the compute dtype, any strides.
        x, x_source: (M, K), any strides and float dtype; rounded to the compute dtype tile by tile. Either pair may be
            (None, None).
        mask, mask_source: packed keep bits of the streams, as in the forward pass; keep_scale the factor of the kept.
        grad_dtype: dtype of dA, which is summed in float32.
    """
    pairs = [(dT, x, mask), (dS, x_source, mask_source)]
    pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
    if not pairs:
        raise ValueError("grad_weight needs (dT, x) or (dS, x_source)")
    if len(pairs) == 2 and (mask is None) != (mask_source is None):
        # dropout on one stream only: two launches, summed in float32
        options = {"keep_scale": keep_scale, "grad_dtype": torch.float32}
        dA = grad_weight(dT, x, None, None, mask=mask, **options)  # type: ignore[arg-type]
        dA += grad_weight(None, None, dS, x_source, mask_source=mask_source, **options)  # type: ignore[arg-type]
        return dA.to(grad_dtype)

    grad, stream, bits = pairs[0]
    grad_source, stream_source, bits_source = pairs[1] if len(pairs) == 2 else (None, None, None)
    assert grad is not None and stream is not None
    (M, K), R = stream.shape, grad.shape[1]
    dA = torch.empty((R, K), dtype=grad_dtype, device=grad.device)
    if M == 0 or K == 0:
        return dA.zero_()
    wide, thin = (stream, stream_source), (grad, grad_source)
    config = config_for("grad_weight", R, grad.dtype, wide=wide, thin=thin, rows=M, width=K)
    k_tiles, r_tiles = cdiv(K, config.BLOCK_K), cdiv(R, config.BLOCK_R)
    splits, tiles_per_split = split_sum(M, config.BLOCK_M, k_tiles * r_tiles, target=config.programs)
    partials = dA if splits == 1 else torch.empty((splits, R, K), dtype=torch.float32, device=grad.device)
    launch(
        grad_weight_kernel,
        (k_tiles, r_tiles, splits),
        config,
        grad.device,
        dT=grad,
        x=stream,
        dS=grad_source,
        x_source=stream_source,
        mask=bits,
        mask_source=bits_source,
        out=partials,
        M=M,
        K=K,
        R=R,
        keep_scale=float(keep_scale) if bits is not None else 1.0,
        tiles_per_split=tiles_per_split,
        dT_stride_m=grad.stride(0),
        dT_stride_r=grad.stride(1),
        x_stride_m=stream.stride(0),
        x_stride_k=stream.stride(1),
        dS_stride_m=grad_source.stride(0) if grad_source is not None else 0,
        dS_stride_r=grad_source.stride(1) if grad_source is not None else 0,
        x_source_stride_m=stream_source.stride(0) if stream_source is not None else 0,
        x_source_stride_k=stream_source.stride(1) if stream_source is not None else 0,
        mask_stride_m=bits.stride(0) if bits is not None else 0,
        mask_source_stride_m=bits_source.stride(0) if bits_source is not None else 0,
        out_stride_split=R * K,
        HAS_SOURCE=stream_source is not None,
        HAS_MASK=bits is not None,
    )
    if splits > 1:
        sum_partials(partials, dA)
    return dA
