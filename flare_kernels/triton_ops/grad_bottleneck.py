"""Gradients of the bottleneck and of B from dL/dy, for up to three projections in one launch.

    dH_i = scaling_i G_i B_i        dT_i = dH_i * dphi/dT_i        dS_i = dH_i * dphi/dS_i
    dB_i = scaling_i G_i^T H_i

H_i = phi(S_i, T_i) and G_i = dL/dy_i. Shapes: M tokens, N output width, R rank. Projection i has columns i R .. (i + 1)
R of T, S, dT and dS.

There are two kinds of programs. A *row program* computes BLOCK_M rows of one dH_i in a loop over N_i. A *strip program*
computes dB_i for BLOCK_N columns of one G_i in a loop over a chunk (consecutive rows). Both kinds loop in steps of
BLOCK_K and run in the same launch. Two forms (implementations) use this kernel. They differ in the order of the
programs:

triton        Programs run chunk by chunk. In a chunk, row programs come before strip programs, which then read the
              chunk of G from the L2 cache.
rows_first    All row programs come before all strip programs. Row programs take longest, so if they start first, fewer
              multiprocessors are idle at the end of the launch.

A form that reads G only once would move more bytes in partial sums than it saves (benchmarks/bytes_moved.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode, torch_ops
from ..launch_mode import Mode
from .device import FUSION_ID, pick
from .grad_tiles import grad_hidden_tile, grad_up_tile
from .launch import (
    ADDRESS,
    LAYOUT,
    LOW_BITS,
    MAX_PROJECTIONS,
    STRIDE,
    TL_DTYPE,
    Launcher,
    batches,
    cdiv,
    columns_of,
    form_for,
    numbered,
    numbered_strides,
    strides,
)
from .split_k import choose_splits, reduction_launcher


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
    chunk_rows,
    group_chunks,
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
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute dT_i and dS_i in row programs (ROWS), and dB_i of each chunk in strip programs (STRIPS).

    Strip programs write dB_0, dB_1, dB_2 of their chunk to out[i_chunk]. A group has group_chunks chunks of chunk_rows
    rows each. Within a group, row programs are numbered before strip programs.

    G_i (M, N_i); T, S, dT, dS (M, COUNT R); B_i (N_i, R); out (chunks, N_0 + N_1 + N_2, R), contiguous. FUSION is the
    phi with which H is computed for dB. FUSION_GRAD is the phi whose derivatives are applied to dH, or 0
    for plain LoRA and "add", for which only dT = dH is written.
    """
    r_tiles = tl.cdiv(R, BLOCK_R)
    n_tiles_0 = tl.cdiv(N_0, BLOCK_N) if STRIPS else 0
    n_tiles_01 = n_tiles_0
    n_tiles = n_tiles_0
    if STRIPS:
        if COUNT > 1:
            n_tiles_01 += tl.cdiv(N_1, BLOCK_N)
            n_tiles = n_tiles_01
        if COUNT > 2:
            n_tiles += tl.cdiv(N_2, BLOCK_N)
    row_tiles = group_chunks * (chunk_rows // BLOCK_M) if ROWS else 0
    row_programs = COUNT * row_tiles * r_tiles
    strip_programs = group_chunks * n_tiles * r_tiles
    i_group = tl.program_id(0) // (row_programs + strip_programs)
    i_program = tl.program_id(0) % (row_programs + strip_programs)
    i_r = i_program % r_tiles

    if ROWS:
        if i_program < row_programs:
            # projection 0 comes first, because it is usually the widest, so its programs take the longest
            i_p = i_program // (row_tiles * r_tiles)
            i_m = i_group * row_tiles + i_program // r_tiles % row_tiles
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
                    BLOCK_K,
                    BLOCK_R,
                )
    if STRIPS:
        if i_program >= row_programs:
            i_strip = (i_program - row_programs) // r_tiles
            i_chunk = i_group * group_chunks + i_strip // n_tiles
            i_n = i_strip % n_tiles
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
                out + i_chunk.to(tl.int64) * (N_0 + N_1 + N_2) * R + o_out,
                i_n - (pick(i_p, 0, n_tiles_0, n_tiles_01, COUNT) if COUNT > 1 else 0),
                i_r,
                i_chunk * chunk_rows,
                (i_chunk + 1) * chunk_rows,
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
                BLOCK_K,
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
    follow_table: bool = False,
) -> list[Tensor] | None:
    """Compute dT and dS in place, and return dB_i, from G_i = dL/dy_i, for projections of one rank that share phi.

    Args:
        Gs: (M, N_i) each, any strides and float dtype; rounded to the compute dtype (T's or dT's) tile by tile.
        T, S: (M, len(Gs) R), any strides, as stored by the forward pass; projection i's columns start at i R. None if
            no required gradient depends on them. Without S, H = T.
        Bs: (N_i, R) each, any float dtype; rounded to the compute dtype tile by tile.
        scalings: one number per projection.
        fusion: None, "add", "mul", "add_relu" or "mul_relu".
        dT, dS: destinations with the shape and dtype of T, any strides; None if not required.
        B_grad_dtype: dtype of dB, which is summed in float32; None if dB is not required.
        follow_table: take the plain PyTorch form if the launch table prefers it.

    Returns:
        dB_i (N_i, R), slices of one buffer; None if B_grad_dtype is None.

    Raises:
        ValueError: dB is required without T, or neither T nor dT is given.
    """
    if fusion is None:
        S = None
    mode, device = launch_mode.current, Gs[0].device
    tensors = (*Gs, *Bs)
    if T is not None:
        tensors = (*tensors, T)
    if S is not None:
        tensors = (*tensors, S)
    if dT is not None:
        tensors = (*tensors, dT)
    if dS is not None:
        tensors = (*tensors, dS)
    flags = (T is None, S is None, dT is None, dS is None, follow_table)
    key = (
        "grad_bottleneck",
        *(device, fusion, B_grad_dtype, flags),
        *scalings,
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        form, missing, widths, size, workspace_size, launcher, reduction = mode.plans[key]
    except KeyError:
        call = (Gs, T, S, Bs, scalings, fusion, dT, dS, B_grad_dtype, follow_table)
        form, missing, widths, size, workspace_size, launcher, reduction = mode.plans.add(key, _plan(mode, call))

    if launcher is None:
        if form == "torch":
            options: dict[str, Any] = {"dT": dT, "dS": dS, "B_grad_dtype": B_grad_dtype}
            return torch_ops.grad_bottleneck(Gs, T, S, Bs, scalings=scalings, fusion=fusion, **options)
        if form == "separate":
            return _separate_launches((Gs, T, S, Bs, scalings, fusion, dT, dS, B_grad_dtype, follow_table))
        for out in (dT, dS):
            if out is not None:
                out.zero_()
        if B_grad_dtype is None:
            return None
        return [torch.zeros((N, size[1]), dtype=B_grad_dtype, device=device) for N in widths]
    dB = None if B_grad_dtype is None else torch.empty(size, dtype=B_grad_dtype, device=device)
    workspace = dB if reduction is None else torch.empty(workspace_size, dtype=torch.float32, device=device)
    is_linear = fusion == "add" or S is None  # then dT = dS = dH
    out_dS = None if is_linear else dS
    launcher.run(*Gs, *missing, T, S, *Bs, *missing, dT, out_dS, workspace, *launcher.constants)
    if reduction is not None:
        reduction.run(workspace, dB, *reduction.constants)
    if is_linear and dS is not None and dT is not None and S is not None:
        dS.copy_(dT)
    if dB is None:
        return None
    return list(dB.split_with_sizes(widths)) if Gs[1:] else [dB]


#: The arguments of :func:`grad_bottleneck`, in the order of its signature.
_Call = tuple[
    Sequence[Tensor],
    Tensor | None,
    Tensor | None,
    Sequence[Tensor],
    Sequence[float],
    str | None,
    Tensor | None,
    Tensor | None,
    torch.dtype | None,
    bool,
]


def _separate_launches(call: _Call) -> list[Tensor] | None:
    """Run :func:`grad_bottleneck` in several launches, for projections that do not fit in one."""
    Gs, T, S, Bs, scalings, fusion, dT, dS, B_grad_dtype, follow_table = call
    R = Bs[0].shape[1]
    dBs: list[Tensor] = []
    for at in batches(Gs, Bs):
        T_at, S_at, dT_at, dS_at = (columns_of(t, at, R) for t in (T, S, dT, dS))
        options: dict[str, Any] = {"dT": dT_at, "dS": dS_at, "B_grad_dtype": B_grad_dtype, "follow_table": follow_table}
        dBs += grad_bottleneck(Gs[at], T_at, S_at, Bs[at], scalings=scalings[at], fusion=fusion, **options) or []
    return None if B_grad_dtype is None else dBs


#: What :func:`grad_bottleneck` caches: the form, a tuple of Nones, the widths N_i, the size of dB, the size of the
#: workspace, the launch, and the launch of the split-K reduction. A launch that the call does not need is None. The
#: kernel takes MAX_PROJECTIONS projections; the Nones fill the arguments of the projections that a call does not have.
_Plan = tuple[
    str,
    tuple[None, ...],
    list[int],
    tuple[int, ...],
    tuple[int, ...],
    Launcher | None,
    Launcher | None,
]


def _plan(mode: Mode, call: _Call) -> _Plan:
    Gs, T, S, Bs, scalings, fusion, dT, dS, B_grad_dtype, follow_table = call
    compute = T if T is not None else dT
    strips = B_grad_dtype is not None
    if compute is None or (strips and T is None):
        raise ValueError("grad_bottleneck needs T to compute dB (B_grad_dtype), or dT as a destination")
    M, R, dtype, device = Gs[0].shape[0], Bs[0].shape[1], compute.dtype, Gs[0].device
    widths = [G.shape[1] for G in Gs]
    N = sum(widths)
    if M == 0 or N == 0:
        return "empty", (), widths, (N, R), (), None, None
    if len(batches(Gs, Bs)) > 1:
        return "separate", (), widths, (N, R), (), None, None
    excluded = () if follow_table else ("torch",)
    options: dict[str, Any] = {"wide": Gs, "thin": (T, S, *Bs), "rows": M, "width": max(widths)}
    form, tiles = form_for(mode, "grad_bottleneck", R, dtype, excluded=excluded, **options)
    if form == "torch":
        return form, (), widths, (N, R), (), None, None
    fusion = None if S is None else fusion
    fusion_grad = None if fusion == "add" else fusion
    (config,) = tiles.values()
    rows = dT is not None
    r_tiles = cdiv(R, config.BLOCK_R)
    strip_programs = sum(cdiv(width, config.BLOCK_N) for width in widths) * r_tiles if strips else 0
    tile = max(config.BLOCK_M, config.BLOCK_K)  # a chunk is a multiple of both
    chunks, tiles_per_chunk = 1, cdiv(M, tile)
    if strips:  # dB is a sum over the rows, which are split into chunks; dT and dS need no split
        chunks, tiles_per_chunk = choose_splits(M, tile, strip_programs, target=config.programs)
    chunk_rows = tiles_per_chunk * tile
    row_programs = chunk_rows // config.BLOCK_M * len(Gs) * r_tiles if rows else 0
    launcher = Launcher(
        mode,
        grad_bottleneck_kernel,
        (chunks * (row_programs + strip_programs),),
        config,
        device,
        M=M,
        **numbered("N", widths, 0),
        R=R,
        **numbered("scaling", [float(scaling) for scaling in scalings], 0.0),
        chunk_rows=chunk_rows,
        group_chunks=chunks if form == "rows_first" else 1,
        **numbered_strides("G", Gs, "mn"),
        **strides("T", T, "mr"),
        **strides("S", S, "mr"),
        **numbered_strides("B", Bs, "nr"),
        **strides("dT", dT, "mr"),
        **strides("dS", None if fusion_grad is None else dS, "mr"),
        COUNT=len(Gs),
        ROWS=rows,
        STRIPS=strips,
        DTYPE=TL_DTYPE[dtype],
        FUSION=FUSION_ID[fusion],
        FUSION_GRAD=FUSION_ID[fusion_grad],
    )
    missing = (None,) * (MAX_PROJECTIONS - len(Gs))
    workspace_size = (chunks, N, R)
    return form, missing, widths, (N, R), workspace_size, launcher, reduction_launcher(mode, workspace_size, device)
