"""Concatenation of the A (or B) matrices of up to three adapters in the compute dtype, in one launch.

The kernels that multiply by A or B could cast it tile by tile. However, each row of tiles reads all of A or B, and
reading these in float32 takes twice the bytes. Shape legend: R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode
from ..launch_mode import Mode
from .config import TileConfig
from .device import load_tile, pick, store_tile
from .launch import ADDRESS, LAYOUT, LOW_BITS, MAX_PROJECTIONS, STRIDE, Launcher, cdiv, numbered, numbered_strides

#: Elements per program, and the largest number of columns per program.
_ELEMENTS, _MAX_COLUMNS = 4096, 512


@triton.jit
def stack_kernel(
    A_0,
    A_1,
    A_2,
    out,
    K,
    R_0,
    R_1,
    R_2,
    A_0_stride_r,
    A_0_stride_k,
    A_1_stride_r,
    A_1_stride_k,
    A_2_stride_r,
    A_2_stride_k,
    COUNT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy the rows of A_0, A_1 and A_2 to out (R_0 + R_1 + R_2, K), rounded to out's dtype."""
    i_tile = tl.program_id(0)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    tiles_0 = tl.cdiv(R_0, BLOCK_R)
    tiles_01 = tiles_0
    i_p = 0
    if COUNT > 1:
        tiles_01 += tl.cdiv(R_1, BLOCK_R)
        i_p = (i_tile >= tiles_0).to(tl.int32)
    if COUNT > 2:
        i_p += (i_tile >= tiles_01).to(tl.int32)
    A = pick(i_p, A_0, A_1, A_2, COUNT)
    R = pick(i_p, R_0, R_1, R_2, COUNT)
    stride_r = pick(i_p, A_0_stride_r, A_1_stride_r, A_2_stride_r, COUNT)
    stride_k = pick(i_p, A_0_stride_k, A_1_stride_k, A_2_stride_k, COUNT)
    if COUNT > 1:
        i_tile -= pick(i_p, 0, tiles_0, tiles_01, COUNT)
        out += pick(i_p, 0, R_0, R_0 + R_1, COUNT).to(tl.int64) * K
    o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    b_A = load_tile(A, o_r, o_r < R, stride_r, o_k, o_k < K, stride_k)
    store_tile(out, b_A, o_r, o_r < R, K, o_k, o_k < K, 1)


def _config(columns: int) -> TileConfig:
    block_k = min(_MAX_COLUMNS, max(16, triton.next_power_of_2(columns)))
    return TileConfig(0, block_k, 0, _ELEMENTS // block_k, num_warps=4, num_stages=1)


def stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices (R_i, K) concatenated along the rows in dtype, (sum of R_i, K), contiguous.

    A single matrix that already has this dtype is returned without a copy.
    """
    first = weights[0]
    if first.dtype == dtype and not weights[1:]:
        return first
    mode, device = launch_mode.current, first.device
    key = (
        "stack",
        *(device, dtype),
        *map(LAYOUT, weights),
        *map(STRIDE, weights),
        *map(LOW_BITS, map(ADDRESS, weights)),
    )
    try:
        size, missing, launcher = mode.plans[key]
    except KeyError:
        size, missing, launcher = mode.plans.add(key, _plan(mode, weights))
    if launcher is None:
        return torch.cat([weight.to(dtype) for weight in weights])
    out = torch.empty(size, dtype=dtype, device=device)
    launcher.run(*weights, *missing, out, *launcher.constants)
    return out


def _plan(mode: Mode, weights: Sequence[Tensor]) -> tuple[tuple[int, int], tuple[None, ...], Launcher | None]:
    """Return the size of the result, a tuple of Nones, and the launch (None if plain PyTorch stacks these weights).

    The kernel takes MAX_PROJECTIONS weights. The Nones fill the arguments of the weights that a call does not have.
    """
    K, ranks = weights[0].shape[1], [weight.shape[0] for weight in weights]
    size = (sum(ranks), K)
    if len(weights) > MAX_PROJECTIONS or len({weight.dtype for weight in weights}) > 1 or 0 in size:
        return size, (), None
    config = _config(K)
    launcher = Launcher(
        mode,
        stack_kernel,
        (sum(cdiv(rank, config.BLOCK_R) for rank in ranks), cdiv(K, config.BLOCK_K)),
        config,
        weights[0].device,
        K=K,
        **numbered("R", ranks, 0),
        **numbered_strides("A", weights, "rk"),
        COUNT=len(weights),
    )
    return size, (None,) * (MAX_PROJECTIONS - len(weights)), launcher
