"""From dL/dy to the bottleneck, for up to three projections in one launch and in about one pass over dL/dy.

    dH_i = scaling_i G_i B_i, through phi to dT_i and dS_i        dB_i = scaling_i G_i^T phi(S_i, T_i)

Shape legend: M tokens, N output width, R rank. Projection i owns columns i R .. (i + 1) R of T, S, dT and dS.

Two kinds of programs share the launch, and no atomic is needed: *row programs* own BLOCK_M rows of one dH_i and walk
all of N_i; *strip programs* own BLOCK_N columns of one G_i and walk a chunk of the rows, for dB_i. They are numbered
chunk by chunk, rows before strips, so that a chunk of G is still in the L2 cache when the second kind reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FUSION_ID, dot, fuse, fuse_grad, load_tile, pick, round_to, store_tile
from .launch import TL_DTYPE, batches, cdiv, columns_of, config_for, launch, numbered, numbered_strides, split_sum
from .partials import sum_partials


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
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dH = scaling * G B; dT = dH * dphi/dT, dS = dH * dphi/dS (FUSION 0: dT = dH alone) for BLOCK_M rows.

    The derivatives use T and S as stored, so both passes see the same phi.
    """
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
def grad_up_tile(
    G,
    T,
    S,
    out,
    i_n,
    i_r,
    i_start,
    i_end,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = scaling * G^T phi(S, T) for BLOCK_N columns of G, over row tiles i_start .. i_end; out (N, R) dense."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < N
    m_r = o_r < R
    b_dB = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for i_m in range(i_start, min(i_end, tl.cdiv(M, BLOCK_M))):
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
    store_tile(out, b_dB * scaling, o_n, m_n, R, o_r, m_r, 1)


@triton.jit
def grad_bottleneck_kernel(
    G_0,
    G_1,
    G_2,
    T,
    S,
    B_0,
    B_1,
    B_2,
    dT,
    dS,
    out,
    M,
    N_0,
    N_1,
    N_2,
    R,
    scaling_0,
    scaling_1,
    scaling_2,
    tiles_per_chunk,
    out_stride_chunk,
    G_0_stride_m,
    G_0_stride_n,
    G_1_stride_m,
    G_1_stride_n,
    G_2_stride_m,
    G_2_stride_n,
    T_stride_m,
    T_stride_r,
    S_stride_m,
    S_stride_r,
    B_0_stride_n,
    B_0_stride_r,
    B_1_stride_n,
    B_1_stride_r,
    B_2_stride_n,
    B_2_stride_r,
    dT_stride_m,
    dT_stride_r,
    dS_stride_m,
    dS_stride_r,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    DTYPE: tl.constexpr,
    FUSION: tl.constexpr,
    FUSION_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Row programs (ROWS) write dT_i and dS_i, strip programs (STRIPS) out[i_chunk] = the chunk's dB_0, dB_1, dB_2.

    G_i (M, N_i); T, S, dT, dS (M, COUNT R); B_i (N_i, R); out (chunks, N_0 + N_1 + N_2, R), contiguous. FUSION is what
    stands in H, FUSION_GRAD what dH goes through: 0 where dT = dH is all that is asked for.
    """
    r_tiles = tl.cdiv(R, BLOCK_R)
    n_tiles_0 = tl.cdiv(N_0, BLOCK_N)
    n_tiles_01 = n_tiles_0
    n_tiles = n_tiles_0
    if COUNT > 1:
        n_tiles_01 += tl.cdiv(N_1, BLOCK_N)
        n_tiles = n_tiles_01
    if COUNT > 2:
        n_tiles += tl.cdiv(N_2, BLOCK_N)
    row_programs = tiles_per_chunk * COUNT * r_tiles if ROWS else 0
    strip_programs = n_tiles * r_tiles if STRIPS else 0
    i_chunk = tl.program_id(0) // (row_programs + strip_programs)
    i_program = tl.program_id(0) % (row_programs + strip_programs)
    i_r = i_program % r_tiles

    if ROWS:
        if i_program < row_programs:
            i_p = (i_program // r_tiles) % COUNT
            i_m = i_chunk * tiles_per_chunk + i_program // (r_tiles * COUNT)
            if i_m * BLOCK_M < M:
                grad_hidden_tile(
                    pick(i_p, G_0, G_1, G_2, COUNT),
                    T + i_p * R * T_stride_r if FUSION_GRAD != 0 else T,
                    S + i_p * R * S_stride_r if FUSION_GRAD != 0 else S,
                    pick(i_p, B_0, B_1, B_2, COUNT),
                    dT + i_p * R * dT_stride_r,
                    dS + i_p * R * dS_stride_r if FUSION_GRAD != 0 else dS,
                    i_m,
                    i_r,
                    M,
                    pick(i_p, N_0, N_1, N_2, COUNT),
                    R,
                    pick(i_p, scaling_0, scaling_1, scaling_2, COUNT),
                    pick(i_p, G_0_stride_m, G_1_stride_m, G_2_stride_m, COUNT),
                    pick(i_p, G_0_stride_n, G_1_stride_n, G_2_stride_n, COUNT),
                    T_stride_m,
                    T_stride_r,
                    S_stride_m,
                    S_stride_r,
                    pick(i_p, B_0_stride_n, B_1_stride_n, B_2_stride_n, COUNT),
                    pick(i_p, B_0_stride_r, B_1_stride_r, B_2_stride_r, COUNT),
                    dT_stride_m,
                    dT_stride_r,
                    dS_stride_m,
                    dS_stride_r,
                    DTYPE,
                    FUSION_GRAD,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                )
    if STRIPS:
        if i_program >= row_programs:
            i_n = (i_program - row_programs) // r_tiles
            i_p = 0
            if COUNT > 1:
                i_p = (i_n >= n_tiles_0).to(tl.int32)
            if COUNT > 2:
                i_p += (i_n >= n_tiles_01).to(tl.int32)
            o_out = pick(i_p, 0, N_0, N_0 + N_1, COUNT).to(tl.int64) * R if COUNT > 1 else 0
            grad_up_tile(
                pick(i_p, G_0, G_1, G_2, COUNT),
                T + i_p * R * T_stride_r,
                S + i_p * R * S_stride_r if FUSION != 0 else S,
                out + i_chunk.to(tl.int64) * out_stride_chunk + o_out,
                i_n - (pick(i_p, 0, n_tiles_0, n_tiles_01, COUNT) if COUNT > 1 else 0),
                i_r,
                i_chunk * tiles_per_chunk,
                (i_chunk + 1) * tiles_per_chunk,
                M,
                pick(i_p, N_0, N_1, N_2, COUNT),
                R,
                pick(i_p, scaling_0, scaling_1, scaling_2, COUNT),
                pick(i_p, G_0_stride_m, G_1_stride_m, G_2_stride_m, COUNT),
                pick(i_p, G_0_stride_n, G_1_stride_n, G_2_stride_n, COUNT),
                T_stride_m,
                T_stride_r,
                S_stride_m,
                S_stride_r,
                DTYPE,
                FUSION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )


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
    """dT, dS and dB_i from G_i = dL/dy_i, for projections of one rank that share phi.

    Args:
        Gs: (M, N_i) each, any strides and float dtype; rounded to the compute dtype (T's or dT's) tile by tile.
        T, S: (M, len(Gs) R), any strides, as stored by the forward pass, projection i's columns at i R; None where
            nothing asks for them (without S, H = T).
        Bs: (N_i, R) each, any float dtype; rounded to the compute dtype tile by tile.
        scalings: one number per projection.
        fusion: None, "add", "mul", "add_relu" or "mul_relu".
        dT, dS: destinations like T, any strides; None where it is not wanted. dS is for a phi of two.
        B_grad_dtype: dtype of dB, which is summed in float32; None where dB is not wanted.

    Returns:
        dB_i (N_i, R), parts of one buffer; None where B_grad_dtype is.

    Raises:
        ValueError: dB is wanted without T, or nothing is.
    """
    fusion = None if S is None else fusion
    given = T if T is not None else dT
    if given is None or (B_grad_dtype is not None and T is None):
        raise ValueError("grad_bottleneck needs T where dB is wanted, and dT or B_grad_dtype to know what is")
    R = Bs[0].shape[1]
    dBs: list[Tensor] = []
    for at in batches(Gs, Bs):
        T_MR, S_MR, dT_MR, dS_MR = (columns_of(t, at, R, len(Gs)) for t in (T, S, dT, dS))
        dBs += _one_launch(Gs[at], T_MR, S_MR, Bs[at], scalings[at], fusion, dT_MR, dS_MR, B_grad_dtype, given.dtype)
    return None if B_grad_dtype is None else dBs


def _one_launch(
    Gs: Sequence[Tensor],
    T: Tensor | None,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    fusion: str | None,
    dT: Tensor | None,
    dS: Tensor | None,
    B_grad_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    M, R = Gs[0].shape[0], Bs[0].shape[1]
    widths = [G.shape[1] for G in Gs]
    device = Gs[0].device
    dB = None if B_grad_dtype is None else torch.empty((sum(widths), R), dtype=B_grad_dtype, device=device)
    is_linear = fusion in (None, "add")  # then dT = dS = dH, whatever T and S are
    if M == 0 or sum(widths) == 0:
        for out in (dT, dS, dB):
            if out is not None:
                out.zero_()
    else:
        config = config_for("grad_bottleneck", R, dtype, wide=Gs, thin=(T, S, *Bs), rows=M, width=max(widths))
        r_tiles = cdiv(R, config.BLOCK_R)
        strips = sum(cdiv(N, config.BLOCK_N) for N in widths) * r_tiles if dB is not None else 0
        if dB is None:  # no sum over the rows is cut: one chunk
            chunks, tiles_per_chunk = 1, cdiv(M, config.BLOCK_M)
        else:
            chunks, tiles_per_chunk = split_sum(M, config.BLOCK_M, strips, target=config.programs)
        rows = tiles_per_chunk * len(Gs) * r_tiles if dT is not None else 0
        partials = dB if chunks == 1 else torch.empty((chunks, sum(widths), R), dtype=torch.float32, device=device)
        launch(
            grad_bottleneck_kernel,
            (chunks * (rows + strips),),
            config,
            device,
            **numbered("G", Gs),
            T=T,
            S=S if fusion is not None else None,
            **numbered("B", Bs),
            dT=dT,
            dS=None if is_linear else dS,
            out=partials,
            M=M,
            **numbered("N", widths, 0),
            R=R,
            **numbered("scaling", [float(one) for one in scalings], 0.0),
            tiles_per_chunk=tiles_per_chunk,
            out_stride_chunk=sum(widths) * R,
            **numbered_strides("G", Gs, "mn"),
            T_stride_m=T.stride(0) if T is not None else 0,
            T_stride_r=T.stride(1) if T is not None else 0,
            S_stride_m=S.stride(0) if S is not None and fusion is not None else 0,
            S_stride_r=S.stride(1) if S is not None and fusion is not None else 0,
            **numbered_strides("B", Bs, "nr"),
            dT_stride_m=dT.stride(0) if dT is not None else 0,
            dT_stride_r=dT.stride(1) if dT is not None else 0,
            dS_stride_m=dS.stride(0) if dS is not None and not is_linear else 0,
            dS_stride_r=dS.stride(1) if dS is not None and not is_linear else 0,
            COUNT=len(Gs),
            ROWS=dT is not None,
            STRIPS=dB is not None,
            DTYPE=TL_DTYPE[dtype],
            FUSION=FUSION_ID[fusion],
            FUSION_GRAD=FUSION_ID[None if is_linear else fusion],
        )
        if chunks > 1 and dB is not None and partials is not None:
            sum_partials(partials, dB)
    if fusion == "add" and dS is not None and dT is not None:
        dS.copy_(dT)
    if dB is None:
        return []
    return [dB] if len(widths) == 1 else list(dB.split(widths))
