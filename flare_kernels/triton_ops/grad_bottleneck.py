"""From dL/dy to the bottleneck: dH = scaling * G B, through phi to dT and dS, and dB = scaling * G^T phi(S, T).

Shape legend: M tokens, N output width, R rank. Two kernels: rows of dH own all of N, strips of dB own a share of M;
neither needs an atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FUSION_ID, dot, fuse, fuse_grad, load_tile, round_to, store_tile
from .launch import TL_DTYPE, cdiv, config_for, launch, split_sum
from .partials import sum_partials

#: Programs wanted where the rows are cut: about two per multiprocessor of a large card.
_TARGET_PROGRAMS = 256


@triton.jit
def grad_hidden_kernel(
    G,
    T,
    S,
    B,
    dT,
    dS,
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
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dH = scaling * G B; dT = dH * dphi/dT, dS = dH * dphi/dS (FUSION 0: dT = dH alone).

    G (M, N); T, S, dT, dS (M, R); B (N, R). The derivatives use T and S as stored, so both passes see the same phi.
    """
    r_tiles = tl.cdiv(R, BLOCK_R)
    i_m = tl.program_id(0) // r_tiles
    i_r = tl.program_id(0) % r_tiles
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R

    b_dh = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for i_n in range(tl.cdiv(N, BLOCK_N)):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
def grad_up_kernel(
    G,
    T,
    S,
    out,
    M,
    N,
    R,
    scaling,
    tiles_per_split,
    G_stride_m,
    G_stride_n,
    T_stride_m,
    T_stride_r,
    S_stride_m,
    S_stride_r,
    out_stride_split,
    FUSION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[i_split] = scaling * G^T phi(S, T) over the rows of one split.

    G (M, N); T, S (M, R); out (splits, N, R), contiguous. A program owns BLOCK_N columns of G.
    """
    i_n = tl.program_id(0)
    i_r = tl.program_id(1)
    i_split = tl.program_id(2)
    DTYPE: tl.constexpr = T.dtype.element_ty
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < N
    m_r = o_r < R

    b_dB = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    i_start = i_split * tiles_per_split
    for i_m in range(i_start, min(i_start + tiles_per_split, tl.cdiv(M, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_t = load_tile(T, o_m, m_m, T_stride_m, o_r, m_r, T_stride_r)
        b_s = b_t
        if FUSION != 0:
            b_s = load_tile(S, o_m, m_m, S_stride_m, o_r, m_r, S_stride_r)
        b_h = round_to(fuse(b_t, b_s, FUSION), DTYPE)
        # loaded as its transpose: a tile turned round in registers is not copied ahead before Hopper
        b_G = round_to(load_tile(G, o_n, m_n, G_stride_n, o_m, m_m, G_stride_m), DTYPE)
        b_dB = dot(b_G, b_h, b_dB)

    out += i_split.to(tl.int64) * out_stride_split
    store_tile(out, b_dB * scaling, o_n, m_n, R, o_r, m_r, 1)


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
    """dT, dS and dB from G = dL/dy.

    Args:
        G: (M, N), any strides and float dtype; rounded to the compute dtype (T's, or its own without T) tile by tile.
        T, S: (M, R), any strides, as stored by the forward pass; None where nothing asks for them (without S, H = T).
        B: (N, R), any float dtype; rounded to the compute dtype tile by tile.
        need_hidden, need_B: what to compute; the rest is None.
        B_grad_dtype: dtype of dB, which is summed in float32.
        out_dT, out_dS: (M, R) destinations, any strides.

    Returns:
        dT, dS (M, R): dS is None without fusion and dT itself for "add"; dB (N, R), contiguous.
    """
    dtype = (T if T is not None else G).dtype
    fusion = None if S is None else fusion
    (M, N), R = G.shape, B.shape[1]
    dT = dS = dB = None
    if need_hidden:
        dT, dS = _grad_hidden(G, T, S, B, scaling, fusion, dtype, out_dT, out_dS)
    if need_B:
        if T is None:
            raise ValueError("T is None, but dB = scaling * G^T phi(S, T) needs it")
        dB = torch.empty((N, R), dtype=B_grad_dtype, device=G.device)
        if M == 0 or N == 0:
            dB.zero_()
        else:
            _grad_up(G, T, None if fusion is None else S, scaling, fusion, dB)
    return dT, dS, dB


def _grad_hidden(
    G: Tensor,
    T: Tensor | None,
    S: Tensor | None,
    B: Tensor,
    scaling: float,
    fusion: str | None,
    dtype: torch.dtype,
    out_dT: Tensor | None,
    out_dS: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    (M, N), R = G.shape, B.shape[1]
    dT = torch.empty((M, R), dtype=dtype, device=G.device) if out_dT is None else out_dT
    is_linear = fusion in (None, "add")  # then dT = dS = dH, whatever T and S are
    dS: Tensor | None = None
    if not is_linear:
        dS = torch.empty((M, R), dtype=dtype, device=G.device) if out_dS is None else out_dS
    if is_linear:
        T = S = None
    if M == 0 or N == 0:
        dT.zero_()
        if dS is not None:
            dS.zero_()
    else:
        config = config_for("grad_hidden", R, dtype, wide=(G,), thin=(B,))
        launch(
            grad_hidden_kernel,
            (cdiv(M, config.BLOCK_M) * cdiv(R, config.BLOCK_R),),
            config,
            G.device,
            G=G,
            T=T,
            S=S,
            B=B,
            dT=dT,
            dS=dS,
            M=M,
            N=N,
            R=R,
            scaling=float(scaling),
            G_stride_m=G.stride(0),
            G_stride_n=G.stride(1),
            T_stride_m=T.stride(0) if T is not None else 0,
            T_stride_r=T.stride(1) if T is not None else 0,
            S_stride_m=S.stride(0) if S is not None else 0,
            S_stride_r=S.stride(1) if S is not None else 0,
            B_stride_n=B.stride(0),
            B_stride_r=B.stride(1),
            dT_stride_m=dT.stride(0),
            dT_stride_r=dT.stride(1),
            dS_stride_m=dS.stride(0) if dS is not None else 0,
            dS_stride_r=dS.stride(1) if dS is not None else 0,
            DTYPE=TL_DTYPE[dtype],
            FUSION=FUSION_ID[None if is_linear else fusion],
        )
    if fusion == "add":
        dS = dT if out_dS is None else out_dS.copy_(dT)
    return dT, dS


def _grad_up(G: Tensor, T: Tensor, S: Tensor | None, scaling: float, fusion: str | None, dB: Tensor) -> None:
    (M, N), R = G.shape, T.shape[1]
    config = config_for("grad_up", R, T.dtype, wide=(G,), thin=(T, S))
    n_tiles, r_tiles = cdiv(N, config.BLOCK_N), cdiv(R, config.BLOCK_R)
    splits, tiles_per_split = split_sum(M, config.BLOCK_M, n_tiles * r_tiles, target=_TARGET_PROGRAMS)
    partials = dB if splits == 1 else torch.empty((splits, N, R), dtype=torch.float32, device=G.device)
    launch(
        grad_up_kernel,
        (n_tiles, r_tiles, splits),
        config,
        G.device,
        G=G,
        T=T,
        S=S,
        out=partials,
        M=M,
        N=N,
        R=R,
        scaling=float(scaling),
        tiles_per_split=tiles_per_split,
        G_stride_m=G.stride(0),
        G_stride_n=G.stride(1),
        T_stride_m=T.stride(0),
        T_stride_r=T.stride(1),
        S_stride_m=S.stride(0) if S is not None else 0,
        S_stride_r=S.stride(1) if S is not None else 0,
        out_stride_split=N * R,
        FUSION=FUSION_ID[fusion],
    )
    if splits > 1:
        sum_partials(partials, dB)
