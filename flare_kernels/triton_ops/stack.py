"""The A matrices of several adapters as one matrix in the compute dtype.

Shape legend: K input width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import TileConfig
from .device import load_tile, pick, store_tile
from .launch import MAX_PROJECTIONS, cdiv, launch, numbered, numbered_strides

#: Rows and columns per program.
_CONFIG = TileConfig(BLOCK_M=0, BLOCK_K=512, BLOCK_N=0, BLOCK_R=8, num_warps=4, num_stages=1)


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
    """out (R_0 + R_1 + R_2, K) = A_0, A_1, A_2 below each other, rounded to out's dtype."""
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


def stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices (R_i, K) below each other in dtype, (sum of R_i, K), contiguous; a single one of dtype is itself."""
    if len(As) == 1 and As[0].dtype == dtype:
        return As[0]
    if len(As) > MAX_PROJECTIONS or len({A.dtype for A in As}) > 1:
        return torch.cat([A.to(dtype) for A in As])
    K = As[0].shape[1]
    out = torch.empty((sum(A.shape[0] for A in As), K), dtype=dtype, device=As[0].device)
    if K:
        launch(
            stack_kernel,
            (sum(cdiv(A.shape[0], _CONFIG.BLOCK_R) for A in As), cdiv(K, _CONFIG.BLOCK_K)),
            _CONFIG,
            out.device,
            **numbered("A", As),
            out=out,
            K=K,
            **numbered("R", [A.shape[0] for A in As], 0),
            **numbered_strides("A", As, "rk"),
            COUNT=len(As),
        )
    return out
