"""Triton kernel that generates packed dropout masks, as :mod:`flare_kernels.dropout` defines them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_mode
from .config import TileConfig
from .launch import ADDRESS, LOW_BITS, Launcher, cdiv

#: A program computes BLOCK_K mask bytes of each of BLOCK_M rows.
_CONFIG = TileConfig(BLOCK_M=8, BLOCK_K=128, BLOCK_N=0, BLOCK_R=0, num_warps=4, num_stages=1)


@triton.jit
def pack_word(b_word, threshold, SHIFT: tl.constexpr):
    """Return the mask bits of the two 16-bit random numbers in a 32-bit word, at bits SHIFT and SHIFT + 1."""
    b_low = ((b_word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    b_high = ((b_word >> 16).to(tl.int32) >= threshold).to(tl.int32)
    return (b_low << SHIFT) | (b_high << (SHIFT + 1))


@triton.jit
def dropout_mask_kernel(
    seed, out, rows, cols, n_bytes, threshold, stream_id, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Set bit j of byte b in out (rows, n_bytes) uint8 if the random number of column 8 b + j is at least threshold."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_b = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_zero = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    b_seed = tl.load(seed)
    b_0, b_1, b_2, b_3 = tl.philox(
        b_seed, b_zero + o_b[None, :], b_zero + o_m[:, None], b_zero + stream_id, b_zero, n_rounds=10
    )
    b_out = pack_word(b_0, threshold, 0) | pack_word(b_1, threshold, 2)
    b_out = b_out | pack_word(b_2, threshold, 4) | pack_word(b_3, threshold, 6)
    # bits past the last column are zero
    b_valid = tl.minimum(tl.maximum(cols - o_b * 8, 0), 8)
    b_out = b_out & ((1 << b_valid) - 1)[None, :]
    p_out = out + o_m.to(tl.int64)[:, None] * n_bytes + o_b[None, :]
    tl.store(p_out, b_out.to(tl.uint8), mask=(o_m < rows)[:, None] & (o_b < n_bytes)[None, :])


def dropout_mask(seed: Tensor, rows: int, cols: int, threshold: int, stream: int) -> Tensor:
    """Return a packed mask, uint8 (rows, ceil(cols / 8)), contiguous; the same bits as ``torch_ops.dropout_mask``.

    Args:
        seed: int64 scalar tensor.
        rows, cols: size of the stream, both positive.
        threshold: from :func:`flare_kernels.dropout.drop_threshold`.
        stream: number of the stream, below 2**31.
    """
    mode, device = launch_mode.current, seed.device
    key = ("dropout_mask", device, seed.dtype, rows, cols, threshold, stream, *map(LOW_BITS, map(ADDRESS, (seed,))))
    try:
        size, launcher = mode.plans[key]
    except KeyError:
        n_bytes = cdiv(cols, 8)
        grid = (cdiv(rows, _CONFIG.BLOCK_M), cdiv(n_bytes, _CONFIG.BLOCK_K))
        constants: dict[str, Any] = {"rows": rows, "cols": cols, "n_bytes": n_bytes, "threshold": threshold}
        launcher = Launcher(mode, dropout_mask_kernel, grid, _CONFIG, device, **constants, stream_id=stream)
        size, launcher = mode.plans.add(key, ((rows, n_bytes), launcher))
    out = torch.empty(size, dtype=torch.uint8, device=device)
    launcher.run(seed, out, *launcher.constants)
    return out
