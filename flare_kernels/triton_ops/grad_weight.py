"""Gradient of A from the target and the source stream, in one pass over each stream.

Shape legend: M tokens, K input width, R rank; drop is dropout. A form is an implementation of this operation
(:mod:`flare_kernels.forms`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode, torch_ops
from ..launch_mode import Mode
from .device import dot, drop_transposed, load_mask_bytes_transposed, load_tile, round_to, store_tile
from .launch import (
    ADDRESS,
    LAYOUT,
    LOW_BITS,
    STRIDE,
    DescriptorLauncher,
    Launcher,
    cdiv,
    fits_descriptor,
    form_for,
    strides,
)
from .split_k import MAX_COUNTERS, choose_splits, counters, is_last_program, reduce_splits, reduction_launcher


@triton.jit
def grad_weight_kernel(
    dT,
    x,
    dS,
    x_source,
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
    HAS_SOURCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute out[i_split] = dT^T drop(x) + dS^T drop(x_source) over the rows of one split.

    dT, dS (M, R); x, x_source (M, K); out (splits, R, K), contiguous. A program accumulates a (BLOCK_K, BLOCK_R) tile
    of dA^T and stores its transpose. The matrix products then have BLOCK_K rows: at least 64 at every rank, unless a
    tuned table has other tiles. A tile of dA would give the products BLOCK_R rows, which are only 16 at a small rank.
    With LAST_ADDS, the program that finishes a tile last writes the sum of the tile's splits to total (R, K). counters
    has one entry per tile, which is zero before and after the launch.
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
        # the compiler's pipeline prefetches x but not mask bytes, so these are loaded one tile ahead here
        i_column = i_k * BLOCK_K
        o_next = i_start * BLOCK_M + tl.arange(0, BLOCK_M)
        b_next = load_mask_bytes_transposed(mask, mask_stride_m, o_next, o_next < M, i_column, K, BLOCK_K)
        if HAS_SOURCE:
            b_next_source = load_mask_bytes_transposed(
                mask_source, mask_source_stride_m, o_next, o_next < M, i_column, K, BLOCK_K
            )
    for i_m in range(i_start, min(i_start + tiles_per_split, tl.cdiv(M, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_d = load_tile(dT, o_m, m_m, dT_stride_m, o_r, m_r, dT_stride_r)
        # loaded transposed: before Hopper, transposing a tile in registers disables prefetching
        b_x = load_tile(x, o_k, m_k, x_stride_k, o_m, m_m, x_stride_m)
        if HAS_MASK:
            o_next = o_m + BLOCK_M
            b_x = drop_transposed(b_x, b_next, BLOCK_M, BLOCK_K)
            b_next = load_mask_bytes_transposed(mask, mask_stride_m, o_next, o_next < M, i_column, K, BLOCK_K)
        b_dA = dot(round_to(b_x, DTYPE), b_d, b_dA)
        if HAS_SOURCE:
            b_d = load_tile(dS, o_m, m_m, dS_stride_m, o_r, m_r, dS_stride_r)
            b_x = load_tile(x_source, o_k, m_k, x_source_stride_k, o_m, m_m, x_source_stride_m)
            if HAS_MASK:
                b_x = drop_transposed(b_x, b_next_source, BLOCK_M, BLOCK_K)
                b_next_source = load_mask_bytes_transposed(
                    mask_source, mask_source_stride_m, o_next, o_next < M, i_column, K, BLOCK_K
                )
            b_dA = dot(round_to(b_x, DTYPE), b_d, b_dA)

    store_tile(out + i_split.to(tl.int64) * R * K, tl.trans(b_dA * keep_scale), o_r, m_r, K, o_k, m_k, 1)
    if LAST_ADDS:
        if is_last_program(counters + i_r * tl.num_programs(0) + i_k, tl.num_programs(2)):
            reduce_splits(out, total, tl.num_programs(2), R, K, i_r * BLOCK_R, R, o_k, m_k, BLOCK_R, BLOCK_K)


@triton.jit
def grad_weight_tma_kernel(
    dT,
    x,
    dS,
    x_source,
    out,
    M,
    K,
    R,
    tiles,
    tiles_per_split,
    dT_stride_m,
    x_stride_m,
    dS_stride_m,
    x_source_stride_m,
    HAS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the result of :func:`grad_weight_kernel` without dropout, by tensor descriptors and a persistent grid.

    All operands have one dtype and contiguous rows. Program i computes the tiles i, i + P, i + 2 P, ... of
    out (splits, R, K), for P programs. Neighbouring tiles along K read the same rows of dT and dS.
    """
    d_dT = tl.make_tensor_descriptor(dT, [M, R], [dT_stride_m, 1], [BLOCK_M, BLOCK_R])
    d_x = tl.make_tensor_descriptor(x, [M, K], [x_stride_m, 1], [BLOCK_M, BLOCK_K])
    if HAS_SOURCE:
        d_dS = tl.make_tensor_descriptor(dS, [M, R], [dS_stride_m, 1], [BLOCK_M, BLOCK_R])
        d_x_source = tl.make_tensor_descriptor(x_source, [M, K], [x_source_stride_m, 1], [BLOCK_M, BLOCK_K])
    k_tiles = tl.cdiv(K, BLOCK_K)
    r_tiles = tl.cdiv(R, BLOCK_R)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_k = i_tile % k_tiles
        i_r = i_tile // k_tiles % r_tiles
        i_split = i_tile // (k_tiles * r_tiles)
        b_dA = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
        i_start = i_split * tiles_per_split
        for i_m in range(i_start, min(i_start + tiles_per_split, tl.cdiv(M, BLOCK_M))):
            b_x = d_x.load([i_m * BLOCK_M, i_k * BLOCK_K])
            b_dA = dot(tl.trans(b_x), d_dT.load([i_m * BLOCK_M, i_r * BLOCK_R]), b_dA)
            if HAS_SOURCE:
                b_x = d_x_source.load([i_m * BLOCK_M, i_k * BLOCK_K])
                b_dA = dot(tl.trans(b_x), d_dS.load([i_m * BLOCK_M, i_r * BLOCK_R]), b_dA)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        p_out = out + i_split.to(tl.int64) * R * K
        store_tile(p_out, tl.trans(b_dA), o_r, o_r < R, K, o_k, o_k < K, 1)


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
    follow_table: bool = False,
) -> Tensor:
    """Return dA = dT^T drop(x) + dS^T drop(x_source), (R, K), contiguous.

    Args:
        dT, dS: (M, R) in the compute dtype, any strides.
        x, x_source: (M, K), any strides and float dtype; rounded to the compute dtype tile by tile. One of the pairs
            (dT, x) and (dS, x_source) may be (None, None).
        mask, mask_source: packed dropout masks of the streams, as in the forward pass.
        keep_scale: factor of the kept elements.
        grad_dtype: dtype of dA, which is summed in float32.
        follow_table: take the plain PyTorch form if the launch table prefers it (never with dropout).

    Raises:
        ValueError: both pairs are None.
    """
    if dT is None or x is None:
        dT, x, mask, dS, x_source, mask_source = dS, x_source, mask_source, None, None, None
        if dT is None or x is None:
            raise ValueError("grad_weight needs (dT, x) or (dS, x_source)")
    tensors: tuple[Tensor, ...]
    if dS is None or x_source is None:
        dS = x_source = mask_source = None
        tensors = (dT, x)
    else:
        tensors = (dT, x, dS, x_source)
    if mask is not None:
        tensors = (*tensors, mask)
    if mask_source is not None:
        tensors = (*tensors, mask_source)
    mode, device = launch_mode.current, dT.device
    flags = (dS is None, mask is None, mask_source is None, follow_table)
    key = (
        "grad_weight",
        *(device, grad_dtype, keep_scale, flags),
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        form, size, workspace_size, launcher, reduction = mode.plans[key]
    except KeyError:
        plan = _plan(mode, dT, x, dS, x_source, mask, mask_source, keep_scale, follow_table)
        form, size, workspace_size, launcher, reduction = mode.plans.add(key, plan)

    if launcher is not None:
        dA = torch.empty(size, dtype=grad_dtype, device=device)
        out = dA if workspace_size is None else torch.empty(workspace_size, dtype=torch.float32, device=device)
        if form == "tma":
            launcher.run(dT, x, dS, x_source, out, *launcher.constants)
        elif form == "last_adds":
            launcher.run(dT, x, dS, x_source, mask, mask_source, out, dA, counters(device), *launcher.constants)
        else:
            launcher.run(dT, x, dS, x_source, mask, mask_source, out, None, None, *launcher.constants)
        if reduction is not None:
            reduction.run(out, dA, *reduction.constants)
        return dA
    if form == "torch":
        return torch_ops.grad_weight(dT, x, dS, x_source, grad_dtype=grad_dtype)
    if form == "separate":  # dropout on one of two streams: two launches, added in float32
        dA = grad_weight(dT, x, None, None, mask=mask, keep_scale=keep_scale, grad_dtype=torch.float32)
        dA += grad_weight(dS, x_source, None, None, mask=mask_source, keep_scale=keep_scale, grad_dtype=torch.float32)
        return dA.to(grad_dtype)
    return torch.zeros(size, dtype=grad_dtype, device=device)


def _plan(
    mode: Mode,
    dT: Tensor,
    x: Tensor,
    dS: Tensor | None,
    x_source: Tensor | None,
    mask: Tensor | None,
    mask_source: Tensor | None,
    keep_scale: float,
    follow_table: bool,
) -> tuple[str, tuple[int, ...], tuple[int, ...] | None, Launcher | None, Launcher | None]:
    """Return the form, the size of dA, the workspace's size, the launch, and the launch of the split-K reduction.

    The last three are None if this call does not need them.
    """
    (M, K), R = x.shape, dT.shape[1]
    if x_source is not None and (mask is None) != (mask_source is None):
        return "separate", (R, K), None, None, None
    if M == 0 or K == 0:
        return "empty", (R, K), None, None, None
    excluded = [] if follow_table and mask is None else ["torch"]
    if mask is not None or not fits_descriptor(dT.dtype, dT, x, dS, x_source):
        excluded.append("tma")
    options: dict[str, Any] = {"wide": (x, x_source), "thin": (dT, dS), "rows": M, "width": K}
    form, tiles = form_for(mode, "grad_weight", R, dT.dtype, excluded=excluded, **options)
    if form == "torch":
        return form, (R, K), None, None, None
    (config,) = tiles.values()
    k_tiles, r_tiles = cdiv(K, config.BLOCK_K), cdiv(R, config.BLOCK_R)
    splits, tiles_per_split = choose_splits(M, config.BLOCK_M, k_tiles * r_tiles, target=config.programs)
    if form == "last_adds" and (splits == 1 or k_tiles * r_tiles > MAX_COUNTERS):
        form = "triton"
    constants: dict[str, Any] = {"M": M, "K": K, "R": R, "tiles_per_split": tiles_per_split}
    constants["HAS_SOURCE"] = x_source is not None
    if form == "tma":
        kernel, axes, constants["tiles"] = grad_weight_tma_kernel, ("m", "m"), k_tiles * r_tiles * splits
        grid: tuple[int, ...] = (min(k_tiles * r_tiles * splits, config.programs),)
    else:
        kernel, axes, grid = grad_weight_kernel, ("mr", "mk"), (k_tiles, r_tiles, splits)
        constants["keep_scale"] = float(keep_scale) if mask is not None else 1.0
        constants |= {"HAS_MASK": mask is not None, "LAST_ADDS": form == "last_adds"}
        constants |= strides("mask", mask, "m") | strides("mask_source", mask_source, "m")
    constants |= strides("dT", dT, axes[0]) | strides("x", x, axes[1])
    constants |= strides("dS", dS, axes[0]) | strides("x_source", x_source, axes[1])
    launcher = (DescriptorLauncher if form == "tma" else Launcher)(mode, kernel, grid, config, dT.device, **constants)
    workspace_size = None if splits == 1 else (splits, R, K)
    reduction = None
    if workspace_size is not None and form != "last_adds":
        reduction = reduction_launcher(mode, workspace_size, dT.device)
    return form, (R, K), workspace_size, launcher, reduction
