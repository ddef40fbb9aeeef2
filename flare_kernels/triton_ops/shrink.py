"""Down-projection of both streams by one shared A, in one pass over each.

Shape legend: M tokens, K input width, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import dot, drop, load_keep_bytes, load_tile, round_to, store_tile
from .launch import TL_DTYPE, cdiv, config_for, launch, split_sum
from .partials import sum_partials


@triton.jit
def shrink_kernel(
    x,
    x_source,
    A,
    mask,
    mask_source,
    out,
    M,
    K,
    R,
    keep_scale,
    tiles_per_split,
    x_stride_m,
    x_stride_k,
    x_source_stride_m,
    x_source_stride_k,
    A_stride_r,
    A_stride_k,
    mask_stride_m,
    mask_source_stride_m,
    out_stride_split,
    out_stride_stream,
    DTYPE: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    SUM_STREAMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[i_split, 0] = drop(x) A^T and out[i_split, 1] = drop(x_source) A^T over the K tiles of one split.

    x, x_source (M, K); A (R, K); out (splits, streams, M, R), contiguous; SUM_STREAMS: one stream, the sum of both.
    """
    r_tiles = tl.cdiv(R, BLOCK_R)
    # blocks of R are neighbours, so that they find x in the cache
    i_m = tl.program_id(0) // r_tiles
    i_r = tl.program_id(0) % r_tiles
    i_split = tl.program_id(1)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R

    b_t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    i_start = i_split * tiles_per_split
    if HAS_MASK:
        # bytes cannot be copied ahead by the pipeline as x is: they are fetched one tile early, by hand
        i_column = i_start * BLOCK_K
        b_next = load_keep_bytes(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K)
        if HAS_SOURCE:
            b_next_source = load_keep_bytes(mask_source, mask_source_stride_m, o_m, m_m, i_column, K, BLOCK_K)
    for i_k in range(i_start, min(i_start + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_A = round_to(load_tile(A, o_r, m_r, A_stride_r, o_k, m_k, A_stride_k), DTYPE)
        b_x = load_tile(x, o_m, m_m, x_stride_m, o_k, m_k, x_stride_k)
        if HAS_MASK:
            b_x = drop(b_x, b_next, BLOCK_M, BLOCK_K)
            b_next = load_keep_bytes(mask, mask_stride_m, o_m, m_m, (i_k + 1) * BLOCK_K, K, BLOCK_K)
        b_t = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_t)
        if HAS_SOURCE:
            b_x = load_tile(x_source, o_m, m_m, x_source_stride_m, o_k, m_k, x_source_stride_k)
            if HAS_MASK:
                b_x = drop(b_x, b_next_source, BLOCK_M, BLOCK_K)
                i_column = (i_k + 1) * BLOCK_K
                b_next_source = load_keep_bytes(mask_source, mask_source_stride_m, o_m, m_m, i_column, K, BLOCK_K)
            if SUM_STREAMS:
                b_t = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_t)
            else:
                b_s = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_s)

    # the scale of the dropout is left to the float32 sums: nothing is rounded twice
    out += i_split.to(tl.int64) * out_stride_split
    if HAS_SOURCE and not SUM_STREAMS:
        store_tile(out + out_stride_stream, b_s * keep_scale, o_m, m_m, R, o_r, m_r, 1)
    store_tile(out, b_t * keep_scale, o_m, m_m, R, o_r, m_r, 1)


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
    """T = drop(x) A^T and S = drop(x_source) A^T.

    Args:
        x, x_source: (M, K), any strides, float16, bfloat16 or float32; a stream may be None, and so is then its result.
        A: (R, K), any float dtype; rounded to compute_dtype tile by tile, as x is.
        compute_dtype: dtype of the products' operands and of the results; sums are float32.
        mask, mask_source: packed keep bits of the streams (:mod:`flare_kernels.dropout`), both or neither per stream
            given; keep_scale is the factor of what is kept.
        sum_streams: both products in one accumulator (fusion "add"): returns (T + S, None).

    Returns:
        T, S: (M, R), contiguous, compute_dtype.
    """
    first, second = (x, x_source) if x is not None else (x_source, None)
    if first is None:
        return None, None
    first_mask, second_mask = (mask, mask_source) if x is not None else (mask_source, None)
    if second is not None and (first_mask is None) != (second_mask is None):
        # dropout on one stream only: two launches
        if not sum_streams:
            options = {"compute_dtype": compute_dtype, "keep_scale": keep_scale}
            T, _ = shrink(x, None, A, mask=mask, **options)  # type: ignore[arg-type]
            _, S = shrink(None, x_source, A, mask_source=mask_source, **options)  # type: ignore[arg-type]
            return T, S
        raise ValueError("sum_streams needs a mask for both streams or for neither")

    (M, K), R = first.shape, A.shape[0]
    streams = 2 if second is not None and not sum_streams else 1
    out = torch.empty((streams, M, R), dtype=compute_dtype, device=first.device)
    if M == 0 or K == 0:
        out.zero_()
    else:
        config = config_for("shrink", R, compute_dtype, wide=(first, second, A), thin=(), rows=M, width=K)
        programs = cdiv(M, config.BLOCK_M) * cdiv(R, config.BLOCK_R)
        splits, tiles_per_split = split_sum(K, config.BLOCK_K, programs, target=config.programs)
        partials = out if splits == 1 else torch.empty((splits, streams, M, R), dtype=torch.float32, device=out.device)
        launch(
            shrink_kernel,
            (programs, splits),
            config,
            first.device,
            x=first,
            x_source=second,
            A=A,
            mask=first_mask,
            mask_source=second_mask,
            out=partials,
            M=M,
            K=K,
            R=R,
            keep_scale=float(keep_scale) if first_mask is not None else 1.0,
            tiles_per_split=tiles_per_split,
            x_stride_m=first.stride(0),
            x_stride_k=first.stride(1),
            x_source_stride_m=second.stride(0) if second is not None else 0,
            x_source_stride_k=second.stride(1) if second is not None else 0,
            A_stride_r=A.stride(0),
            A_stride_k=A.stride(1),
            mask_stride_m=first_mask.stride(0) if first_mask is not None else 0,
            mask_source_stride_m=second_mask.stride(0) if second_mask is not None else 0,
            out_stride_split=streams * M * R,
            out_stride_stream=M * R,
            DTYPE=TL_DTYPE[compute_dtype],
            HAS_SOURCE=second is not None,
            SUM_STREAMS=sum_streams,
            HAS_MASK=first_mask is not None,
        )
        if splits > 1:
            sum_partials(partials, out)

    if streams == 2:
        return out[0], out[1]
    return (out[0], None) if x is not None or sum_streams else (None, out[0])
