"""Down-projection of the target and the source stream by one shared A, in one pass over each stream.

Shape legend: M tokens, K input width, R rank; drop is dropout. A form is an implementation of this
operation (:mod:`flare_kernels.forms`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode, torch_ops
from ..launch_mode import Mode
from .device import dot, drop, load_mask_bytes, load_tile, round_to, store_tile
from .launch import (
    ADDRESS,
    LAYOUT,
    LOW_BITS,
    STRIDE,
    TL_DTYPE,
    DescriptorLauncher,
    Launcher,
    cdiv,
    fits_descriptor,
    form_for,
    strides,
)
from .split_k import MAX_COUNTERS, choose_splits, counters, is_last_program, reduce_splits, reduction_launcher


@triton.jit
def shrink_kernel(
    x,
    x_source,
    A,
    mask,
    mask_source,
    out,
    total,
    counters,
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
    out_stride_stream,
    DTYPE: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    SUM_STREAMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute out[i_split, 0] = drop(x) A^T and out[i_split, 1] = drop(x_source) A^T over the K tiles of one split.

    x, x_source (M, K); A (R, K); out (splits, streams, M, R), contiguous. With SUM_STREAMS, out has one stream, the
    sum of both. With LAST_ADDS, the program that finishes a tile last writes the sum of the tile's splits to total
    (streams, M, R). counters has one entry per tile, which is zero before and after the launch.
    """
    r_tiles = tl.cdiv(R, BLOCK_R)
    # programs that read the same x for different blocks of R are neighbours, so that x is in the cache
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
        # the compiler's pipeline prefetches x but not mask bytes, so these are loaded one tile ahead here
        i_column = i_start * BLOCK_K
        b_next = load_mask_bytes(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K)
        if HAS_SOURCE:
            b_next_source = load_mask_bytes(mask_source, mask_source_stride_m, o_m, m_m, i_column, K, BLOCK_K)
    for i_k in range(i_start, min(i_start + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_A = round_to(load_tile(A, o_r, m_r, A_stride_r, o_k, m_k, A_stride_k), DTYPE)
        b_x = load_tile(x, o_m, m_m, x_stride_m, o_k, m_k, x_stride_k)
        if HAS_MASK:
            b_x = drop(b_x, b_next, BLOCK_M, BLOCK_K)
            b_next = load_mask_bytes(mask, mask_stride_m, o_m, m_m, (i_k + 1) * BLOCK_K, K, BLOCK_K)
        b_t = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_t)
        if HAS_SOURCE:
            b_x = load_tile(x_source, o_m, m_m, x_source_stride_m, o_k, m_k, x_source_stride_k)
            if HAS_MASK:
                b_x = drop(b_x, b_next_source, BLOCK_M, BLOCK_K)
                i_column = (i_k + 1) * BLOCK_K
                b_next_source = load_mask_bytes(mask_source, mask_source_stride_m, o_m, m_m, i_column, K, BLOCK_K)
            if SUM_STREAMS:
                b_t = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_t)
            else:
                b_s = dot(round_to(b_x, DTYPE), tl.trans(b_A), b_s)

    # the dropout scale is applied to the float32 sums, which are rounded once
    STREAMS: tl.constexpr = 2 if HAS_SOURCE and not SUM_STREAMS else 1
    p_out = out + i_split.to(tl.int64) * STREAMS * out_stride_stream
    store_tile(p_out, b_t * keep_scale, o_m, m_m, R, o_r, m_r, 1)
    if STREAMS == 2:
        store_tile(p_out + out_stride_stream, b_s * keep_scale, o_m, m_m, R, o_r, m_r, 1)
    if LAST_ADDS:
        splits = tl.num_programs(1)
        if is_last_program(counters + tl.program_id(0), splits):
            reduce_splits(out, total, splits, STREAMS * M, R, i_m * BLOCK_M, M, o_r, m_r, BLOCK_M, BLOCK_R)
            if STREAMS == 2:
                start = M + i_m * BLOCK_M
                reduce_splits(out, total, splits, STREAMS * M, R, start, STREAMS * M, o_r, m_r, BLOCK_M, BLOCK_R)


@triton.jit
def shrink_tma_kernel(
    x,
    x_source,
    A,
    out,
    M,
    K,
    R,
    tiles,
    tiles_per_split,
    x_stride_m,
    x_source_stride_m,
    A_stride_r,
    out_stride_stream,
    HAS_SOURCE: tl.constexpr,
    SUM_STREAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the result of :func:`shrink_kernel` without dropout, by tensor descriptors and a persistent grid.

    All operands have one dtype and contiguous rows. Program i of P computes the tiles i, i + P,
    i + 2 P, ... of the grid over splits, M and R, for all streams.
    """
    d_x = tl.make_tensor_descriptor(x, [M, K], [x_stride_m, 1], [BLOCK_M, BLOCK_K])
    d_A = tl.make_tensor_descriptor(A, [R, K], [A_stride_r, 1], [BLOCK_R, BLOCK_K])
    if HAS_SOURCE:
        d_x_source = tl.make_tensor_descriptor(x_source, [M, K], [x_source_stride_m, 1], [BLOCK_M, BLOCK_K])
    STREAMS: tl.constexpr = 2 if HAS_SOURCE and not SUM_STREAMS else 1
    r_tiles = tl.cdiv(R, BLOCK_R)
    m_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_r = i_tile % r_tiles
        i_m = i_tile // r_tiles % m_tiles
        i_split = i_tile // (r_tiles * m_tiles)
        b_t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        i_start = i_split * tiles_per_split
        for i_k in range(i_start, min(i_start + tiles_per_split, tl.cdiv(K, BLOCK_K))):
            b_A = tl.trans(d_A.load([i_r * BLOCK_R, i_k * BLOCK_K]))
            b_t = dot(d_x.load([i_m * BLOCK_M, i_k * BLOCK_K]), b_A, b_t)
            if HAS_SOURCE:
                b_x = d_x_source.load([i_m * BLOCK_M, i_k * BLOCK_K])
                if SUM_STREAMS:
                    b_t = dot(b_x, b_A, b_t)
                else:
                    b_s = dot(b_x, b_A, b_s)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        p_out = out + i_split.to(tl.int64) * STREAMS * out_stride_stream
        store_tile(p_out, b_t, o_m, o_m < M, R, o_r, o_r < R, 1)
        if STREAMS == 2:
            store_tile(p_out + out_stride_stream, b_s, o_m, o_m < M, R, o_r, o_r < R, 1)


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
    follow_table: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return T = drop(x) A^T and S = drop(x_source) A^T.

    Args:
        x, x_source: (M, K), any strides, float16, bfloat16 or float32. A stream may be None; its result is then None.
        A: (R, K), any float dtype; rounded to compute_dtype tile by tile, as x is.
        compute_dtype: dtype of the products' operands and of the results; sums are float32.
        mask, mask_source: packed dropout masks of the streams (:mod:`flare_kernels.dropout`), or None.
        keep_scale: factor of the kept elements.
        sum_streams: add both products in one accumulator (fusion "add") and return (T + S, None).
        follow_table: take the plain PyTorch form if the launch table prefers it (never with dropout).

    Returns:
        T, S: (M, R), contiguous, compute_dtype.

    Raises:
        ValueError: sum_streams with a mask for only one of two streams.
    """
    source_alone = x is None
    tensors: tuple[Tensor, ...]
    if x is None:
        x, mask, x_source, mask_source = x_source, mask_source, None, None
        if x is None:
            return None, None
    if x_source is None:
        mask_source, tensors = None, (x, A)
    else:
        tensors = (x, A, x_source)
    if mask is not None:
        tensors = (*tensors, mask)
    if mask_source is not None:
        tensors = (*tensors, mask_source)
    mode, device = launch_mode.current, x.device
    flags = (x_source is None, mask is None, mask_source is None, sum_streams, follow_table)
    key = (
        "shrink",
        *(device, compute_dtype, keep_scale, flags),
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        form, size, workspace_size, launcher, reduction = mode.plans[key]
    except KeyError:
        options: dict[str, Any] = {"sum_streams": sum_streams, "follow_table": follow_table}
        plan = _plan(mode, x, x_source, A, compute_dtype, mask, mask_source, keep_scale, **options)
        form, size, workspace_size, launcher, reduction = mode.plans.add(key, plan)

    if launcher is not None:
        out = torch.empty(size, dtype=compute_dtype, device=device)
        sums = out if workspace_size is None else torch.empty(workspace_size, dtype=torch.float32, device=device)
        if form == "tma":
            launcher.run(x, x_source, A, sums, *launcher.constants)
        elif form == "last_adds":
            launcher.run(x, x_source, A, mask, mask_source, sums, out, counters(device), *launcher.constants)
        else:
            launcher.run(x, x_source, A, mask, mask_source, sums, None, None, *launcher.constants)
        if reduction is not None:
            reduction.run(sums, out, *reduction.constants)
    elif form == "torch":
        T, S = torch_ops.shrink(x, x_source, A, compute_dtype=compute_dtype, sum_streams=sum_streams)
        return (None, T) if source_alone and not sum_streams else (T, S)
    elif form == "separate":  # dropout on one of two streams
        T, _ = shrink(x, None, A, compute_dtype=compute_dtype, mask=mask, keep_scale=keep_scale)
        S, _ = shrink(x_source, None, A, compute_dtype=compute_dtype, mask=mask_source, keep_scale=keep_scale)
        return T, S
    else:
        out = torch.zeros(size, dtype=compute_dtype, device=device)
    if x_source is not None and not sum_streams:
        return out.unbind()  # type: ignore[return-value]
    return (None, out) if source_alone and not sum_streams else (out, None)


def _plan(
    mode: Mode,
    x: Tensor,
    x_source: Tensor | None,
    A: Tensor,
    compute_dtype: torch.dtype,
    mask: Tensor | None,
    mask_source: Tensor | None,
    keep_scale: float,
    *,
    sum_streams: bool,
    follow_table: bool,
) -> tuple[str, tuple[int, ...], tuple[int, ...] | None, Launcher | None, Launcher | None]:
    """Return the form, the result's size, the workspace's size, the launch, and the launch of the split-K reduction.

    The last three are None if this call does not need them.
    """
    (M, K), R = x.shape, A.shape[0]
    if x_source is not None and (mask is None) != (mask_source is None):
        if sum_streams:
            raise ValueError("sum_streams needs a mask for both streams or for neither")
        return "separate", (), None, None, None
    streams = 2 if x_source is not None and not sum_streams else 1
    size = (2, M, R) if streams == 2 else (M, R)
    if M == 0 or K == 0:
        return "empty", size, None, None, None
    excluded = [] if follow_table and mask is None else ["torch"]
    if mask is not None or not fits_descriptor(compute_dtype, x, x_source, A):
        excluded.append("tma")
    options: dict[str, Any] = {"wide": (x, x_source, A), "thin": (), "rows": M, "width": K}
    form, tiles = form_for(mode, "shrink", R, compute_dtype, excluded=excluded, **options)
    if form == "torch":
        return form, size, None, None, None
    (config,) = tiles.values()
    out_tiles = cdiv(M, config.BLOCK_M) * cdiv(R, config.BLOCK_R)
    splits, tiles_per_split = choose_splits(K, config.BLOCK_K, out_tiles, target=config.programs)
    if form == "last_adds" and (splits == 1 or out_tiles > MAX_COUNTERS):
        form = "triton"
    constants: dict[str, Any] = {"M": M, "K": K, "R": R, "tiles_per_split": tiles_per_split, "out_stride_stream": M * R}
    constants |= {"HAS_SOURCE": x_source is not None, "SUM_STREAMS": sum_streams}
    if form == "tma":
        kernel, axes, constants["tiles"] = shrink_tma_kernel, ("m", "r"), out_tiles * splits
        grid: tuple[int, ...] = (min(out_tiles * splits, config.programs),)
    else:
        kernel, axes, grid = shrink_kernel, ("mk", "rk"), (out_tiles, splits)
        constants["keep_scale"] = float(keep_scale) if mask is not None else 1.0
        constants |= {"HAS_MASK": mask is not None, "LAST_ADDS": form == "last_adds", "DTYPE": TL_DTYPE[compute_dtype]}
        constants |= strides("mask", mask, "m") | strides("mask_source", mask_source, "m")
    constants |= strides("x", x, axes[0]) | strides("x_source", x_source, axes[0]) | strides("A", A, axes[1])
    launcher = (DescriptorLauncher if form == "tma" else Launcher)(mode, kernel, grid, config, x.device, **constants)
    workspace_size = None if splits == 1 else (splits, streams, M, R)
    reduction = None
    if workspace_size is not None and form != "last_adds":
        reduction = reduction_launcher(mode, workspace_size, x.device)
    return form, size, workspace_size, launcher, reduction
