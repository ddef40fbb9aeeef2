"""Fusion and up-projection of up to three projections in one launch, added to the frozen linears' outputs.

Shape legend: M tokens, N output width, R rank. Projection i has columns i R .. (i + 1) R of T and S. A form
is an implementation of this operation (:mod:`flare_kernels.forms`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode, torch_ops
from ..launch_mode import Mode
from .device import FUSION_ID, dot, fuse, load_tile, pick, round_to, store_tile
from .launch import (
    ADDRESS,
    LAYOUT,
    LOW_BITS,
    MAX_PROJECTIONS,
    STRIDE,
    Launcher,
    batches,
    cdiv,
    columns_of,
    form_for,
    numbered,
    numbered_strides,
    strides,
)

# Predicate for `filter`, which then loops in C.
_IS_NOT_NONE = functools.partial(operator.is_not, None)


@triton.jit
def expand_kernel(
    y_0,
    y_1,
    y_2,
    out_0,
    out_1,
    out_2,
    T,
    S,
    B_0,
    B_1,
    B_2,
    bias_0,
    bias_1,
    bias_2,
    M,
    N_0,
    N_1,
    N_2,
    R,
    scaling_0,
    scaling_1,
    scaling_2,
    groups_0,
    groups_01,
    tiles_per_group,
    y_0_stride_m,
    y_0_stride_n,
    y_1_stride_m,
    y_1_stride_n,
    y_2_stride_m,
    y_2_stride_n,
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
    bias_0_stride_n,
    bias_1_stride_n,
    bias_2_stride_n,
    COUNT: tl.constexpr,
    FUSION: tl.constexpr,
    READS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_R_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute out_i = y_i + scaling_i * phi(S_i, T_i) B_i^T for BLOCK_M rows and one group of N tiles of a projection.

    y_i, out_i (M, N_i) with the same strides, and the same memory if the sum is in place; T, S (M, COUNT R);
    B_i (N_i, R). A group is up to tiles_per_group neighbouring tiles of N. Groups below groups_0 belong to projection
    0, further groups below groups_01 to projection 1, the rest to projection 2. phi is rounded to the compute dtype;
    the sum is rounded once, to y's dtype. If READS_Y is false, y_i is not read; bias_i (N_i,) is added instead if
    HAS_BIAS.
    """
    i_m = tl.program_id(0)
    i_group = tl.program_id(1)
    DTYPE: tl.constexpr = T.dtype.element_ty
    i_p = 0
    if COUNT > 1:
        i_p = (i_group >= groups_0).to(tl.int32)
    if COUNT > 2:
        i_p += (i_group >= groups_01).to(tl.int32)
    y = pick(i_p, y_0, y_1, y_2, COUNT)
    out = pick(i_p, out_0, out_1, out_2, COUNT)
    B = pick(i_p, B_0, B_1, B_2, COUNT)
    N = pick(i_p, N_0, N_1, N_2, COUNT)
    scaling = pick(i_p, scaling_0, scaling_1, scaling_2, COUNT)
    if HAS_BIAS:
        bias = pick(i_p, bias_0, bias_1, bias_2, COUNT)
        bias_stride_n = pick(i_p, bias_0_stride_n, bias_1_stride_n, bias_2_stride_n, COUNT)
    y_stride_m = pick(i_p, y_0_stride_m, y_1_stride_m, y_2_stride_m, COUNT)
    y_stride_n = pick(i_p, y_0_stride_n, y_1_stride_n, y_2_stride_n, COUNT)
    B_stride_n = pick(i_p, B_0_stride_n, B_1_stride_n, B_2_stride_n, COUNT)
    B_stride_r = pick(i_p, B_0_stride_r, B_1_stride_r, B_2_stride_r, COUNT)
    if COUNT > 1:
        i_group -= pick(i_p, 0, groups_0, groups_01, COUNT)
        T += i_p * R * T_stride_r
        if FUSION != 0:
            S += i_p * R * S_stride_r

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
        # loaded before the product, to overlap with it
        if READS_Y:
            b_y = load_tile(y, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)
        if HAS_BIAS:
            b_y = tl.load(bias + o_n.to(tl.int64) * bias_stride_n, mask=m_n, other=0.0)[None, :]
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
        b_acc *= scaling
        if READS_Y or HAS_BIAS:
            b_acc += b_y.to(tl.float32)
        store_tile(out, b_acc, o_m, m_m, y_stride_m, o_n, m_n, y_stride_n)


def expand_(
    ys: Sequence[Tensor],
    T: Tensor,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    fusion: str | None,
    outs: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    follow_table: bool = False,
) -> None:
    """Add scaling_i * phi(S_i, T_i) B_i^T to y_i, in place, for projections of one rank that share phi.

    Args:
        ys: (M, N_i) each, any strides, float16, bfloat16 or float32; the sum is float32 and rounded once.
        T, S: (M, len(ys) R) in the compute dtype, any strides; projection i's columns start at i R. Without S, or with
            fusion None, phi(S, T) = T.
        Bs: (N_i, R) each, any float dtype; rounded to the compute dtype tile by tile.
        scalings: one number per projection.
        fusion: None, "add", "mul", "add_relu" or "mul_relu".
        outs: destinations instead of ys, with the dtypes, shapes and strides of ys.
        biases: (N_i,) or None each, any float dtype. If passed, y_i is not read:
            y_i = bias_i + scaling_i * phi(S_i, T_i) B_i^T.
        follow_table: take the plain PyTorch form if the launch table prefers it.
    """
    if fusion is None:
        S = None
    mode, device = launch_mode.current, T.device
    tensors: tuple[Any, ...] = (*ys, T, *Bs) if S is None else (*ys, T, *Bs, S)
    if outs is not None:
        tensors = (*tensors, *outs)
    reads_y = biases is None
    biases = (None,) * len(ys) if biases is None else biases
    tensors = (*tensors, *filter(_IS_NOT_NONE, biases))
    key = (
        "expand",
        *(device, fusion, S is None, outs is None, reads_y, follow_table),
        *scalings,
        *map(type, biases),
        *map(LAYOUT, tensors),
        *map(STRIDE, tensors),
        *map(LOW_BITS, map(ADDRESS, tensors)),
    )
    try:
        form, missing, launcher = mode.plans[key]
    except KeyError:
        plan = _plan(mode, ys, T, S, Bs, biases, reads_y, scalings, fusion, follow_table)
        form, missing, launcher = mode.plans.add(key, plan)

    if launcher is not None:
        results = ys if outs is None else outs
        launcher.run(*ys, *missing, *results, *missing, T, S, *Bs, *missing, *biases, *missing, *launcher.constants)
    elif form == "torch":
        torch_ops.expand_(ys, T, S, Bs, scalings=scalings, fusion=fusion, outs=outs, biases=None if reads_y else biases)
    elif form == "separate":
        for at in batches(ys, Bs, biases):
            T_at, S_at = (columns_of(t, at, Bs[0].shape[1]) for t in (T, S))
            assert T_at is not None
            options: dict[str, Any] = {"fusion": fusion, "follow_table": follow_table}
            options |= {"outs": None if outs is None else outs[at], "biases": None if reads_y else biases[at]}
            expand_(ys[at], T_at, S_at, Bs[at], scalings=scalings[at], **options)


def _plan(
    mode: Mode,
    ys: Sequence[Tensor],
    T: Tensor,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    reads_y: bool,
    scalings: Sequence[float],
    fusion: str | None,
    follow_table: bool,
) -> tuple[str, tuple[None, ...], Launcher | None]:
    """Return the form, a tuple of Nones, and the launch (None if this call launches no kernel itself).

    The kernel takes MAX_PROJECTIONS projections. The Nones fill the arguments of the projections that a call does not
    have.
    """
    M, R, widths = ys[0].shape[0], Bs[0].shape[1], [y.shape[1] for y in ys]
    if M == 0 or not any(widths):
        return "empty", (), None
    if len(batches(ys, Bs, biases)) > 1:
        return "separate", (), None
    excluded = () if follow_table else ("torch",)
    options: dict[str, Any] = {"wide": ys, "thin": (T, S, *Bs), "rows": M, "width": max(widths)}
    form, tiles = form_for(mode, "expand", R, T.dtype, excluded=excluded, **options)
    if form == "torch":
        return form, (), None
    config = tiles["expand"]
    m_tiles = cdiv(M, config.BLOCK_M)
    n_tiles = [cdiv(N, config.BLOCK_N) for N in widths]
    # if there are more tiles than the target number of programs, a program uses one tile of phi for several tiles of N
    tiles_per_group = cdiv(sum(n_tiles), min(sum(n_tiles), cdiv(config.programs, m_tiles)))
    groups = [cdiv(tiles, tiles_per_group) for tiles in n_tiles]
    launcher = Launcher(
        mode,
        expand_kernel,
        (m_tiles, sum(groups)),
        config,
        T.device,
        M=M,
        **numbered("N", widths, 0),
        R=R,
        **numbered("scaling", [float(scaling) for scaling in scalings], 0.0),
        groups_0=groups[0],
        groups_01=sum(groups[:2]),
        tiles_per_group=tiles_per_group,
        **numbered_strides("y", ys, "mn"),
        **strides("T", T, "mr"),
        **strides("S", S, "mr"),
        **numbered_strides("B", Bs, "nr"),
        **numbered_strides("bias", biases, "n"),
        COUNT=len(ys),
        FUSION=FUSION_ID[None if S is None else fusion],
        READS_Y=reads_y,
        HAS_BIAS=biases[0] is not None,
        ONE_R_BLOCK=config.BLOCK_R >= R,
    )
    return form, (None,) * (MAX_PROJECTIONS - len(ys)), launcher
