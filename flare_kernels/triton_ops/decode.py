"""The forward pass of the adapters for a few tokens (decoding), in two launches for all projections.

Shape legend: M tokens, K input width, N output width, R rank. Projection i has columns i R .. (i + 1) R of T and S.

The first launch splits the sum over K, so that enough programs read A, and stores float32 partial sums in a workspace.
The second adds them up in a fixed order, computes phi(S, T), and projects it up. Tiles and
splits are the same for all M up to MAX_ROWS, so a row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode
from ..launch_mode import Mode
from .device import FUSION_ID, dot, fuse, load_tile, pick, round_to, store_tile
from .launch import (
    ADDRESS,
    LAYOUT,
    LOW_BITS,
    MAX_PROJECTIONS,
    STRIDE,
    TL_DTYPE,
    Launcher,
    cdiv,
    form_for,
    numbered,
    numbered_strides,
    strides,
)

#: Largest number of tokens that these kernels take.
MAX_ROWS = 64
#: Largest rank: it must fit in one block of R.
MAX_RANK = 128
#: Largest number of splits of a sum over K.
_MAX_SPLITS = 16
_NO_S = (None,) * MAX_PROJECTIONS


@triton.jit
def shrink_decode_kernel(
    x,
    x_source,
    A_0,
    A_1,
    A_2,
    workspace,
    M,
    K,
    R,
    tiles_per_split,
    x_stride_m,
    x_stride_k,
    x_source_stride_m,
    x_source_stride_k,
    A_0_stride_r,
    A_0_stride_k,
    A_1_stride_r,
    A_1_stride_k,
    A_2_stride_r,
    A_2_stride_k,
    COUNT: tl.constexpr,
    STREAMS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write x A^T and x_source A^T over the K tiles of one split to workspace[i_split, 0] and workspace[i_split, 1].

    x, x_source (M, K); A_i (R, K); workspace (splits, STREAMS, M, COUNT R), float32, contiguous. With one stream
    (STREAMS 1), x_source is not read.
    """
    i_m = tl.program_id(0)
    i_split = tl.program_id(1)
    i_p = tl.program_id(2)
    A = pick(i_p, A_0, A_1, A_2, COUNT)
    A_stride_r = pick(i_p, A_0_stride_r, A_1_stride_r, A_2_stride_r, COUNT)
    A_stride_k = pick(i_p, A_0_stride_k, A_1_stride_k, A_2_stride_k, COUNT)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    b_t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    i_start = i_split * tiles_per_split
    for i_k in range(i_start, min(i_start + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_A = round_to(load_tile(A, o_r, m_r, A_stride_r, o_k, m_k, A_stride_k), DTYPE)
        b_x = round_to(load_tile(x, o_m, m_m, x_stride_m, o_k, m_k, x_stride_k), DTYPE)
        b_t = dot(b_x, tl.trans(b_A), b_t)
        if STREAMS == 2:
            b_x = round_to(load_tile(x_source, o_m, m_m, x_source_stride_m, o_k, m_k, x_source_stride_k), DTYPE)
            b_s = dot(b_x, tl.trans(b_A), b_s)
    workspace += i_split * STREAMS * M * COUNT * R + i_p * R
    store_tile(workspace, b_t, o_m, m_m, COUNT * R, o_r, m_r, 1)
    if STREAMS == 2:
        store_tile(workspace + M * COUNT * R, b_s, o_m, m_m, COUNT * R, o_r, m_r, 1)


@triton.jit
def sum_splits(
    workspace, stride_split, stride_m, splits, o_m, m_m, o_r, m_r, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return the (BLOCK_M, BLOCK_R) tile of workspace.sum(0), added in a fixed order; splits is a multiple of 4."""
    b_sum = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    p_tile = workspace + o_m[:, None] * stride_m + o_r[None, :]
    m_tile = m_m[:, None] & m_r[None, :]
    for _ in range(0, splits, 4):
        # four loads in flight at a time
        b_0 = tl.load(p_tile, mask=m_tile, other=0.0)
        b_1 = tl.load(p_tile + stride_split, mask=m_tile, other=0.0)
        b_2 = tl.load(p_tile + 2 * stride_split, mask=m_tile, other=0.0)
        b_3 = tl.load(p_tile + 3 * stride_split, mask=m_tile, other=0.0)
        b_sum += (b_0 + b_1) + (b_2 + b_3)
        p_tile += 4 * stride_split
    return b_sum


@triton.jit
def expand_decode_kernel(
    y_0,
    y_1,
    y_2,
    out_0,
    out_1,
    out_2,
    workspace,
    S_0,
    S_1,
    S_2,
    B_0,
    B_1,
    B_2,
    T_out,
    S_out,
    M,
    N_0,
    N_1,
    N_2,
    R,
    splits,
    scaling_0,
    scaling_1,
    scaling_2,
    y_0_stride_m,
    y_0_stride_n,
    y_1_stride_m,
    y_1_stride_n,
    y_2_stride_m,
    y_2_stride_n,
    S_0_stride_m,
    S_0_stride_r,
    S_1_stride_m,
    S_1_stride_r,
    S_2_stride_m,
    S_2_stride_r,
    B_0_stride_n,
    B_0_stride_r,
    B_1_stride_n,
    B_1_stride_r,
    B_2_stride_n,
    B_2_stride_r,
    COUNT: tl.constexpr,
    STREAMS: tl.constexpr,
    FUSION: tl.constexpr,
    SAVE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute out_i = y_i + scaling_i * phi(S_i, T_i) B_i^T for BLOCK_M rows and BLOCK_N columns of one projection.

    T is the sum of its splits in the workspace. S is the sum of its splits in the workspace if STREAMS is 2, and the
    argument S_i (M, R) otherwise. y_i, out_i (M, N_i); B_i (N_i, R). If SAVE, the first tile of each projection also
    stores T and S (M, COUNT R) for a backward pass. For plain LoRA, only T is stored; for "add", only T + S, in T_out.
    """
    i_m = tl.program_id(0)
    i_n = tl.program_id(1)
    tiles_0 = tl.cdiv(N_0, BLOCK_N)
    tiles_01 = tiles_0
    i_p = 0
    if COUNT > 1:
        tiles_01 += tl.cdiv(N_1, BLOCK_N)
        i_p = (i_n >= tiles_0).to(tl.int32)
    if COUNT > 2:
        i_p += (i_n >= tiles_01).to(tl.int32)
    y = pick(i_p, y_0, y_1, y_2, COUNT)
    out = pick(i_p, out_0, out_1, out_2, COUNT)
    B = pick(i_p, B_0, B_1, B_2, COUNT)
    N = pick(i_p, N_0, N_1, N_2, COUNT)
    scaling = pick(i_p, scaling_0, scaling_1, scaling_2, COUNT)
    y_stride_m = pick(i_p, y_0_stride_m, y_1_stride_m, y_2_stride_m, COUNT)
    y_stride_n = pick(i_p, y_0_stride_n, y_1_stride_n, y_2_stride_n, COUNT)
    B_stride_n = pick(i_p, B_0_stride_n, B_1_stride_n, B_2_stride_n, COUNT)
    B_stride_r = pick(i_p, B_0_stride_r, B_1_stride_r, B_2_stride_r, COUNT)
    if COUNT > 1:
        i_n -= pick(i_p, 0, tiles_0, tiles_01, COUNT)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_n = o_n < N
    m_r = o_r < R
    # loaded before the reduction, to overlap with it
    b_y = load_tile(y, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)
    b_B = round_to(load_tile(B, o_n, m_n, B_stride_n, o_r, m_r, B_stride_r), DTYPE)

    workspace += i_p * R
    stride_split = STREAMS * M * COUNT * R
    stride_m = COUNT * R
    b_t = sum_splits(workspace, stride_split, stride_m, splits, o_m, m_m, o_r, m_r, BLOCK_M, BLOCK_R)
    b_t = round_to(b_t, DTYPE)
    b_s = b_t
    if STREAMS == 2:
        sources = workspace + M * stride_m
        b_s = sum_splits(sources, stride_split, stride_m, splits, o_m, m_m, o_r, m_r, BLOCK_M, BLOCK_R)
        b_s = round_to(b_s, DTYPE)
    elif FUSION != 0:
        S = pick(i_p, S_0, S_1, S_2, COUNT)
        S_stride_m = pick(i_p, S_0_stride_m, S_1_stride_m, S_2_stride_m, COUNT)
        S_stride_r = pick(i_p, S_0_stride_r, S_1_stride_r, S_2_stride_r, COUNT)
        b_s = round_to(load_tile(S, o_m, m_m, S_stride_m, o_r, m_r, S_stride_r), DTYPE)
    b_h = round_to(fuse(b_t, b_s, FUSION), DTYPE)
    b_acc = dot(b_h, tl.trans(b_B), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32))
    store_tile(out, b_y.to(tl.float32) + scaling * b_acc, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)

    if SAVE:
        if i_n == 0:
            if FUSION == 1:  # add: backward needs only the sum
                b_t = b_h
            store_tile(T_out + i_p * R, b_t, o_m, m_m, COUNT * R, o_r, m_r, 1)
            if FUSION > 1:
                store_tile(S_out + i_p * R, b_s, o_m, m_m, COUNT * R, o_r, m_r, 1)


def can_decode(rows: int, ranks: Sequence[int]) -> bool:
    """Return whether :func:`decode` takes a call with this number of tokens and adapters of these ranks."""
    return 0 < rows <= MAX_ROWS and len(ranks) <= MAX_PROJECTIONS and len(set(ranks)) == 1 and ranks[0] <= MAX_RANK


def decode(
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    compute_dtype: torch.dtype,
    scalings: Sequence[float],
    fusion: str | None,
    save_for_backward: bool,
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Add scaling_i * phi(x_source A_i^T, x A_i^T) B_i^T to y_i, in place, for a few tokens, in two launches.

    Args:
        x, x_source: (M, K), any strides and float dtype, M at most MAX_ROWS.
        Ss: S (M, R) of each projection instead of x_source; otherwise empty.
        ys: (M, N_i) each, of one dtype, any strides.
        As: (R, K) each, of one dtype, any strides.
        Bs: (N_i, R) each, of one dtype, any strides.
        compute_dtype: dtype of the products' operands; sums are float32.
        scalings: one number per projection.
        fusion: None, "add", "mul", "add_relu" or "mul_relu", the same for all projections.
        save_for_backward: whether to return T and S.
        outs: destinations instead of ys, with the dtypes, shapes and strides of ys.

    Returns:
        T, S: (M, len(ys) R) in compute_dtype, or None if they are not needed. For "add": (T + S, None).
    """
    mode, device = launch_mode.current, x.device
    tensors = (x, *ys, *As, *Bs, *Ss) if x_source is None else (x, *ys, *As, *Bs, *Ss, x_source)
    if outs is not None:
        tensors = (*tensors, *outs)
    key = (
        "decode",
        *(device, compute_dtype, fusion, save_for_backward, x_source is None, not Ss, outs is None),
        *scalings,
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        missing, size, saves_S, workspace_size, project, expand = mode.plans[key]
    except KeyError:
        plan = _plan(mode, x, x_source, Ss, ys, As, Bs, compute_dtype, scalings, fusion, save_for_backward)
        missing, size, saves_S, workspace_size, project, expand = mode.plans.add(key, plan)
    workspace = torch.empty(workspace_size, dtype=torch.float32, device=device)
    project.run(x, x_source, *As, *missing, workspace, *project.constants)
    T = torch.empty(size, dtype=compute_dtype, device=device) if save_for_backward else None
    S = torch.empty(size, dtype=compute_dtype, device=device) if saves_S else None
    results, S_args = ys if outs is None else outs, (*Ss, *missing) if Ss else _NO_S
    expand.run(*ys, *missing, *results, *missing, workspace, *S_args, *Bs, *missing, T, S, *expand.constants)
    return T, S


def _plan(
    mode: Mode,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    compute_dtype: torch.dtype,
    scalings: Sequence[float],
    fusion: str | None,
    save_for_backward: bool,
) -> tuple[tuple[None, ...], tuple[int, int], bool, tuple[int, ...], Launcher, Launcher]:
    """Return what :func:`decode` caches.

    This is: a tuple of Nones, the size of T and S, whether to save S, the size of the workspace, and the two launches.
    The kernels take MAX_PROJECTIONS projections. The Nones fill the arguments of the projections that a call does not
    have.
    """
    fusion = None if x_source is None and not Ss else fusion
    (M, K), R, count = x.shape, As[0].shape[0], len(ys)
    streams = 1 if x_source is None else 2
    options: dict[str, Any] = {"rows": M, "width": K}
    _, tiles = form_for(mode, "decode", R, compute_dtype, wide=(x, x_source, *As), thin=(), **options)
    config = tiles["shrink_decode"]
    assert config.BLOCK_R >= R, "a decode kernel holds one block of R"
    k_tiles = cdiv(K, config.BLOCK_K)
    tiles_per_split = cdiv(k_tiles, _MAX_SPLITS)
    # a multiple of 4, as sum_splits requires; a split without tiles writes zeros
    splits = 4 * cdiv(k_tiles, 4 * tiles_per_split)
    project = Launcher(
        mode,
        shrink_decode_kernel,
        (cdiv(M, config.BLOCK_M), splits, count),
        config,
        x.device,
        M=M,
        K=K,
        R=R,
        tiles_per_split=tiles_per_split,
        **strides("x", x, "mk"),
        **strides("x_source", x_source, "mk"),
        **numbered_strides("A", As, "rk"),
        COUNT=count,
        STREAMS=streams,
        DTYPE=TL_DTYPE[compute_dtype],
    )
    widths = [y.shape[1] for y in ys]
    _, tiles = form_for(mode, "decode", R, compute_dtype, wide=ys, thin=(*Ss, *Bs), **options)
    config = tiles["expand_decode"]
    expand = Launcher(
        mode,
        expand_decode_kernel,
        (cdiv(M, config.BLOCK_M), sum(cdiv(N, config.BLOCK_N) for N in widths)),
        config,
        x.device,
        M=M,
        **numbered("N", widths, 0),
        R=R,
        splits=splits,
        **numbered("scaling", [float(scaling) for scaling in scalings], 0.0),
        **numbered_strides("y", ys, "mn"),
        **numbered_strides("S", Ss, "mr"),
        **numbered_strides("B", Bs, "nr"),
        COUNT=count,
        STREAMS=streams,
        FUSION=FUSION_ID[fusion],
        SAVE=save_for_backward,
        DTYPE=TL_DTYPE[compute_dtype],
    )
    missing, saves_S = (None,) * (MAX_PROJECTIONS - count), save_for_backward and fusion not in (None, "add")
    return missing, (M, count * R), saves_S, (splits, streams, M, count * R), project, expand
