"""The adapter's share of dL/dx: dx = dT A, masked and scaled under dropout.

Shape legend: M tokens, K input width, R rank. A form is an implementation of this operation
(:mod:`flare_kernels.forms`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode
from ..launch_mode import Mode
from .device import dot, drop, load_mask_bytes, load_tile, round_to, store_tile
from .launch import ADDRESS, LAYOUT, LOW_BITS, STRIDE, Launcher, cdiv, form_for, strides


@triton.jit
def grad_input_kernel(
    dT,
    A,
    mask,
    dx,
    M,
    K,
    R,
    keep_scale,
    tiles_per_group,
    dT_stride_m,
    dT_stride_r,
    A_stride_r,
    A_stride_k,
    mask_stride_m,
    dx_stride_m,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ONE_R_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write mask * keep_scale * (dT A) to dx, or add it to dx (ACCUMULATE), for BLOCK_M rows and one group of K tiles.

    dT (M, R); A (R, K); dx (M, K), contiguous rows. A group is up to tiles_per_group neighbouring tiles of K. The sum
    is rounded once.
    """
    i_m = tl.program_id(0)
    i_group = tl.program_id(1)
    DTYPE: tl.constexpr = dT.dtype.element_ty
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < M
    m_r = o_r < R
    if ONE_R_BLOCK:
        b_dt = load_tile(dT, o_m, m_m, dT_stride_m, o_r, m_r, dT_stride_r)

    i_start = i_group * tiles_per_group
    for i_k in range(i_start, min(i_start + tiles_per_group, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_dx = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        if HAS_MASK:
            # loaded before the product, to overlap with it
            b_byte = load_mask_bytes(mask, mask_stride_m, o_m, m_m, i_k * BLOCK_K, K, BLOCK_K)
        if ACCUMULATE:
            b_before = load_tile(dx, o_m, m_m, dx_stride_m, o_k, m_k, 1)
        if ONE_R_BLOCK:
            b_A = round_to(load_tile(A, o_r, m_r, A_stride_r, o_k, m_k, A_stride_k), DTYPE)
            b_dx = dot(b_dt, b_A, b_dx)
        else:
            for i_r in range(tl.cdiv(R, BLOCK_R)):
                o_rr = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
                m_rr = o_rr < R
                b_dt = load_tile(dT, o_m, m_m, dT_stride_m, o_rr, m_rr, dT_stride_r)
                b_A = round_to(load_tile(A, o_rr, m_rr, A_stride_r, o_k, m_k, A_stride_k), DTYPE)
                b_dx = dot(b_dt, b_A, b_dx)
        if HAS_MASK:
            b_dx = drop(b_dx * keep_scale, b_byte, BLOCK_M, BLOCK_K)
        if ACCUMULATE:
            b_dx += b_before.to(tl.float32)
        store_tile(dx, b_dx, o_m, m_m, dx_stride_m, o_k, m_k, 1)


def grad_input(
    dT: Tensor,
    A: Tensor,
    *,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    dtype: torch.dtype,
    out: Tensor | None = None,
    follow_table: bool = False,
) -> Tensor:
    """Return dx = mask * keep_scale * (dT A), (M, K), contiguous, in dtype; with ``out``, add it to out and return out.

    Args:
        dT: (M, R) in the compute dtype, any strides.
        A: (R, K), any float dtype; rounded to the compute dtype tile by tile.
        mask: packed dropout mask of the forward pass, (M, ceil(K / 8)).
        keep_scale: factor of the kept elements.
        dtype: dtype of dx; not used with ``out``.
        out: (M, K) to add to, contiguous rows, any float dtype; the sum is float32 and rounded once.
        follow_table: run one BLAS call instead of the kernel if all dtypes are equal and there is no mask. Without
            ``out``, the kernel still runs if the launch table prefers it.
    """
    if follow_table and mask is None and out is not None and out.dtype == A.dtype == dT.dtype:
        return out.addmm_(dT, A)  # moves as few bytes as a kernel would
    mode, device = launch_mode.current, dT.device
    tensors = (dT, A) if mask is None else (dT, A, mask)
    if out is not None:
        tensors = (*tensors, out)
    key = (
        "grad_input",
        *(device, dtype, keep_scale, mask is None, out is None, follow_table),
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        form, launcher = mode.plans[key]
    except KeyError:
        form, launcher = mode.plans.add(key, _plan(mode, dT, A, mask, keep_scale, dtype, out, follow_table))
    if form == "torch":
        return dT @ A
    dx = torch.empty((dT.shape[0], A.shape[1]), dtype=dtype, device=device) if out is None else out
    if launcher is not None:
        launcher.run(dT, A, mask, dx, *launcher.constants)
    return dx


def _plan(
    mode: Mode,
    dT: Tensor,
    A: Tensor,
    mask: Tensor | None,
    keep_scale: float,
    dtype: torch.dtype,
    out: Tensor | None,
    follow_table: bool,
) -> tuple[str, Launcher | None]:
    """Return the form, and the launch (None if no kernel runs)."""
    (M, R), K = dT.shape, A.shape[1]
    if M == 0 or K == 0:
        return "empty", None
    dx = torch.empty((M, K), dtype=dtype, device=dT.device) if out is None else out
    one_product = follow_table and mask is None and out is None and dtype == A.dtype == dT.dtype
    excluded = () if one_product else ("torch",)
    options: dict[str, Any] = {"wide": (A, dx), "thin": (dT,), "rows": M, "width": K}
    form, tiles = form_for(mode, "grad_input", R, dT.dtype, excluded=excluded, **options)
    if form == "torch":
        return form, None
    config = tiles["grad_input"]
    m_tiles, k_tiles = cdiv(M, config.BLOCK_M), cdiv(K, config.BLOCK_K)
    # if there are more tiles than the target number of programs, a program computes several tiles along K
    tiles_per_group = cdiv(k_tiles, min(k_tiles, cdiv(config.programs, m_tiles)))
    return form, Launcher(
        mode,
        grad_input_kernel,
        (m_tiles, cdiv(k_tiles, tiles_per_group)),
        config,
        dT.device,
        M=M,
        K=K,
        R=R,
        keep_scale=float(keep_scale),
        tiles_per_group=tiles_per_group,
        **strides("dT", dT, "mr"),
        **strides("A", A, "rk"),
        **strides("mask", mask, "m"),
        **strides("dx", dx, "m"),
        HAS_MASK=mask is not None,
        ACCUMULATE=out is not None,
        ONE_R_BLOCK=config.BLOCK_R >= R,
    )
