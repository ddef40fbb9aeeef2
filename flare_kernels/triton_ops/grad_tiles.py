"""Device functions of :mod:`flare_kernels.triton_ops.grad_bottleneck`: a tile of dT and dS, and a tile of dB.

G is dL/dy of one projection, and H = phi(S, T). Shape legend: M tokens, N output width, R rank.
"""

import triton
import triton.language as tl

from .device import dot, fuse, fuse_grad, load_tile, round_to, store_tile


@triton.jit
def grad_hidden_tile(
    G,
    T,
    S,
    B,
    dT,
    dS,
    i_m,
    i_r,
    M,
    N,
    R,
    scaling,
    G_stride_m,
    G_stride_n,
    T_stride_m,
    T_stride_r,
    S_stride_m,
    S_stride_r,
    B_stride_n,
    B_stride_r,
    dT_stride_m,
    dT_stride_r,
    dS_stride_m,
    dS_stride_r,
    DTYPE: tl.constexpr,
    FUSION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute dH = scaling * G B, dT = dH * dphi/dT and dS = dH * dphi/dS for BLOCK_M rows.

    The derivatives are taken at T and S as stored by the forward pass. If FUSION is 0, only dT = dH is computed.
    """
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    b_dh = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(0, N, STEP):
        o_n = n + tl.arange(0, STEP)
        m_n = o_n < N
        b_G = round_to(load_tile(G, o_m, m_m, G_stride_m, o_n, m_n, G_stride_n), DTYPE)
        b_B = round_to(load_tile(B, o_n, m_n, B_stride_n, o_r, m_r, B_stride_r), DTYPE)
        b_dh = dot(b_G, b_B, b_dh)
    b_dh *= scaling
    if FUSION == 0:
        store_tile(dT, b_dh, o_m, m_m, dT_stride_m, o_r, m_r, dT_stride_r)
    else:
        b_t = load_tile(T, o_m, m_m, T_stride_m, o_r, m_r, T_stride_r)
        b_s = load_tile(S, o_m, m_m, S_stride_m, o_r, m_r, S_stride_r)
        b_dt, b_ds = fuse_grad(b_dh, b_t, b_s, FUSION)
        store_tile(dT, b_dt, o_m, m_m, dT_stride_m, o_r, m_r, dT_stride_r)
        store_tile(dS, b_ds, o_m, m_m, dS_stride_m, o_r, m_r, dS_stride_r)


@triton.jit
def grad_up_tile(
    G,
    T,
    S,
    out,
    i_n,
    i_r,
    m_start,
    m_end,
    M,
    N,
    R,
    scaling,
    G_stride_m,
    G_stride_n,
    T_stride_m,
    T_stride_r,
    S_stride_m,
    S_stride_r,
    DTYPE: tl.constexpr,
    FUSION: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute out = scaling * G^T phi(S, T) for BLOCK_N columns of G over rows m_start .. m_end.

    out (N, R), contiguous.
    """
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < N
    m_r = o_r < R
    b_dB = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for m in range(m_start, min(m_end, M), STEP):
        o_m = m + tl.arange(0, STEP)
        m_m = o_m < M
        b_t = load_tile(T, o_r, m_r, T_stride_r, o_m, m_m, T_stride_m)
        b_s = b_t
        if FUSION != 0:
            b_s = load_tile(S, o_r, m_r, S_stride_r, o_m, m_m, S_stride_m)
        b_h = round_to(fuse(b_t, b_s, FUSION), DTYPE)
        b_G = round_to(load_tile(G, o_m, m_m, G_stride_m, o_n, m_n, G_stride_n), DTYPE)
        b_dB = dot(b_h, b_G, b_dB)
    store_tile(out, b_dB * scaling, o_r, m_r, 1, o_n, m_n, R)
