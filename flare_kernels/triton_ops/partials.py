"""The second half of every split sum: float32 partial results added in a fixed order, so that bits repeat.

Either a second launch adds them, or (form "last_adds") the program of a tile that comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compat import current_raw_stream
from ..launch_mode import Mode
from .config import TileConfig
from .device import round_to, store_tile
from .launch import Launcher, cdiv

#: Tiles of one result that form "last_adds" can count.
MAX_COUNTERS = 4096

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
    """Return the launch ``run(partials, out, *constants)``, out = partials.sum(0) rounded once; None for a single part.

    partials: its size, the parts first. Both tensors are contiguous.
    """
    splits, numel = partials[0], math.prod(partials[1:])
    if splits == 1:
        return None
    grid = (cdiv(numel, _CONFIG.BLOCK_N),)
    return Launcher(mode, sum_partials_kernel, grid, _CONFIG, device, splits=splits, numel=numel)


@triton.jit
def is_last(counter, splits):
    """Return whether this program is the last of ``splits`` to come here. It sees what the others stored before.

    The counter is zero before the first comes and after the last.
    """
    tl.debug_barrier()  # the stores of all threads come before the release by one
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_splits(
    partials, out, splits, rows, columns, start, end, o_col, m_col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr
):
    """out[i, o_col] = sum over s of partials[s, i, o_col], in the order of s, for BLOCK_ROW rows i from start to end.

    partials (splits, rows, columns), out (rows, columns), both contiguous.
    """
    HALF: tl.constexpr = BLOCK_ROW // 2  # a whole tile and the next of its parts do not fit the registers
    for i_half in range(2):
        o_row = start + i_half * HALF + tl.arange(0, HALF)
        m_row = o_row < end
        b_sum = tl.zeros((HALF, BLOCK_COL), dtype=tl.float32)
        o_partial = o_row.to(tl.int64)
        for _ in range(splits):
            p_partials = partials + o_partial[:, None] * columns + o_col[None, :]
            # from L2: other multiprocessors wrote them
            b_sum += tl.load(p_partials, mask=m_row[:, None] & m_col[None, :], other=0.0, cache_modifier=".cg")
            o_partial += rows
        store_tile(out, b_sum, o_row, m_row, columns, o_col, m_col, 1)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Return MAX_COUNTERS zeros (int32) for the next launch on the current stream, which leaves them zero.

    Launches of one stream follow each other and share them.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a graph may be replayed on any stream, next to work on the one it was captured on
        return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    key = device, current_raw_stream(device)
    try:
        return _counters[key]
    except KeyError:
        return _counters.setdefault(key, torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device))
