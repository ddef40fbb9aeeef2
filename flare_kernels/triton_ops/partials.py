"""The second half of every split sum: float32 partial results added in a fixed order, so that bits repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch_mode import Mode
from .config import TileConfig
from .device import round_to
from .launch import Launcher, cdiv

#: BLOCK_M counts partials per step, BLOCK_N elements per program.
_CONFIG = TileConfig(BLOCK_M=8, BLOCK_K=0, BLOCK_N=256, BLOCK_R=0, num_warps=4, num_stages=2)


@triton.jit
def sum_partials_kernel(partials, out, splits, numel, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[i] = sum over s of partials[s, i]; partials (splits, numel) float32, out (numel,), both contiguous."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < numel
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_start in range(0, splits, BLOCK_M):
        o_s = i_start + tl.arange(0, BLOCK_M)
        p_partials = partials + o_s.to(tl.int64)[:, None] * numel + o_n[None, :]
        b_partials = tl.load(p_partials, mask=(o_s < splits)[:, None] & m_n[None, :], other=0.0)
        b_sum += tl.sum(b_partials, axis=0)
    tl.store(out + o_n, round_to(b_sum, out.dtype.element_ty), mask=m_n)


def adding(mode: Mode, partials: Sequence[int], device: torch.device) -> Launcher | None:
    """The launch ``run(partials, out, *constants)``: out = partials.sum(0), rounded once; None for a single part.

    partials: its size, the parts first. Both tensors are contiguous.
    """
    splits, numel = partials[0], math.prod(partials[1:])
    if splits == 1:
        return None
    grid = (cdiv(numel, _CONFIG.BLOCK_N),)
    return Launcher(mode, sum_partials_kernel, grid, _CONFIG, device, splits=splits, numel=numel)
