"""Fusion and up-projection, added to the frozen linear's output where that stands.

Shape legend: M tokens, N output width, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import FUSION_ID, dot, fuse, load_tile, round_to, store_tile
from .launch import cdiv, config_for, launch

#: Programs wanted: beyond them, one program goes on to the next tile of N and keeps its H.
_TARGET_PROGRAMS = 512


@triton.jit
def expand_kernel(
    y,
    T,
    S,
    B,
    M,
    N,
    R,
    scaling,
    tiles_per_group,
    y_stride_m,
    y_stride_n,
    T_stride_m,
    T_stride_r,
    S_stride_m,
    S_stride_r,
    B_stride_n,
    B_stride_r,
    FUSION: tl.constexpr,
    ONE_R_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += scaling * phi(S, T) B^T for BLOCK_M rows and one group of N tiles.

    y (M, N); T, S (M, R); B (N, R). phi is rounded to the compute dtype, the sum once, to y's dtype.
    """
    i_m = tl.program_id(0)
    i_group = tl.program_id(1)
    DTYPE: tl.constexpr = T.dtype.element_ty
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R

    if ONE_R_BLOCK:
        b_t = load_tile(T, o_m, m_m, T_stride_m, o_r, m_r, T_stride_r)
        b_s = b_t
        if FUSION != 0:
            b_s = load_tile(S, o_m, m_m, S_stride_m, o_r, m_r, S_stride_r)
        b_h = round_to(fuse(b_t, b_s, FUSION), DTYPE)

    i_start = i_group * tiles_per_group
    for i_n in range(i_start, min(i_start + tiles_per_group, tl.cdiv(N, BLOCK_N))):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        # asked for before the product, so that it arrives meanwhile
        b_y = load_tile(y, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if ONE_R_BLOCK:
            b_B = round_to(load_tile(B, o_n, m_n, B_stride_n, o_r, m_r, B_stride_r), DTYPE)
            b_acc = dot(b_h, tl.trans(b_B), b_acc)
        else:
            for i_r in range(tl.cdiv(R, BLOCK_R)):
                o_rr = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
                m_rr = o_rr < R
                b_t = load_tile(T, o_m, m_m, T_stride_m, o_rr, m_rr, T_stride_r)
                b_s = b_t
                if FUSION != 0:
                    b_s = load_tile(S, o_m, m_m, S_stride_m, o_rr, m_rr, S_stride_r)
                b_h = round_to(fuse(b_t, b_s, FUSION), DTYPE)
                b_B = round_to(load_tile(B, o_n, m_n, B_stride_n, o_rr, m_rr, B_stride_r), DTYPE)
                b_acc = dot(b_h, tl.trans(b_B), b_acc)
        store_tile(y, b_y.to(tl.float32) + scaling * b_acc, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)


def expand_(y: Tensor, T: Tensor, S: Tensor | None, B: Tensor, *, scaling: float, fusion: str | None) -> None:
    """y += scaling * phi(S, T) B^T, in place.

    Args:
        y: (M, N), any strides, float16, bfloat16 or float32; the sum is float32 and rounded once.
        T, S: (M, R) in the compute dtype, any strides; without S (or with fusion None) H = T.
        B: (N, R), any float dtype; rounded to the compute dtype tile by tile.
        fusion: None, "add", "mul", "add_relu" or "mul_relu".
    """
    fusion = None if S is None else fusion
    S = None if fusion is None else S
    (M, N), R = y.shape, T.shape[1]
    if M == 0 or N == 0:
        return
    config = config_for("expand", R, T.dtype, wide=(y,), thin=(T, S, B))
    m_tiles, n_tiles = cdiv(M, config.BLOCK_M), cdiv(N, config.BLOCK_N)
    tiles_per_group = cdiv(n_tiles, min(n_tiles, cdiv(_TARGET_PROGRAMS, m_tiles)))
    launch(
        expand_kernel,
        (m_tiles, cdiv(n_tiles, tiles_per_group)),
        config,
        y.device,
        y=y,
        T=T,
        S=S,
        B=B,
        M=M,
        N=N,
        R=R,
        scaling=float(scaling),
        tiles_per_group=tiles_per_group,
        y_stride_m=y.stride(0),
        y_stride_n=y.stride(1),
        T_stride_m=T.stride(0),
        T_stride_r=T.stride(1),
        S_stride_m=S.stride(0) if S is not None else 0,
        S_stride_r=S.stride(1) if S is not None else 0,
        B_stride_n=B.stride(0),
        B_stride_r=B.stride(1),
        FUSION=FUSION_ID[fusion],
        ONE_R_BLOCK=config.BLOCK_R >= R,
    )
