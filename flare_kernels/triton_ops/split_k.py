"""Split-K: split a long sum among several programs, and add up their float32 partial sums.

The programs of each split write their partial sums to a workspace. In most forms (implementations of an operation), a
second launch adds up the splits. In the form "last_adds", the program that finishes a tile last adds up that tile's
splits. Both add in a fixed order, so results are deterministic.
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

#: Smallest number of tiles per split, and largest number of splits.
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 64

#: Largest number of tiles of one result in the form "last_adds", which has a counter per tile.
MAX_COUNTERS = 4096

#: Configuration of split_k_reduce_kernel. BLOCK_M is the number of splits per loop iteration, BLOCK_N the number of
#: elements per program.
_CONFIG = TileConfig(BLOCK_M=8, BLOCK_K=0, BLOCK_N=256, BLOCK_R=0, num_warps=4, num_stages=2)


def choose_splits(length: int, block: int, programs: int, *, target: int) -> tuple[int, int]:
    """Return (number of splits, tiles of ``block`` per split) of a sum over ``length``.

    Each split takes ``programs`` programs. The number of splits is chosen so that about ``target`` programs run. It
    depends on shapes and constants only, so the same call adds in the same order on every run.
    """
    tiles = cdiv(length, block)
    splits = max(1, min(target // programs, tiles // _MIN_TILES_PER_SPLIT, _MAX_SPLITS))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split


@triton.jit
def split_k_reduce_kernel(workspace, out, splits, numel, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute out[i] = sum over s of workspace[s, i]; workspace (splits, numel) float32, out (numel,), contiguous."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < numel
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_start in range(0, splits, BLOCK_M):
        o_s = i_start + tl.arange(0, BLOCK_M)
        p_splits = workspace + o_s.to(tl.int64)[:, None] * numel + o_n[None, :]
        b_splits = tl.load(p_splits, mask=(o_s < splits)[:, None] & m_n[None, :], other=0.0)
        b_sum += tl.sum(b_splits, axis=0)
    tl.store(out + o_n, round_to(b_sum, out.dtype.element_ty), mask=m_n)


def reduction_launcher(mode: Mode, workspace_size: Sequence[int], device: torch.device) -> Launcher | None:
    """Return the launcher of the reduction, or None if there is only one split.

    ``launcher.run(workspace, out, *launcher.constants)`` computes out = workspace.sum(0), rounded once. Both tensors
    are contiguous, and the first dimension of ``workspace_size`` is the number of splits.
    """
    splits, numel = workspace_size[0], math.prod(workspace_size[1:])
    if splits == 1:
        return None
    grid = (cdiv(numel, _CONFIG.BLOCK_N),)
    return Launcher(mode, split_k_reduce_kernel, grid, _CONFIG, device, splits=splits, numel=numel)


@triton.jit
def is_last_program(counter, splits):
    """Return whether this program is the last of ``splits`` programs to call this function with this counter.

    The last program sees all stores that the other programs made before their calls. The counter is zero before the
    first and after the last call.
    """
    tl.debug_barrier()  # orders the stores of all threads before the release, which one thread executes
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def reduce_splits(
    workspace, out, splits, rows, columns, start, end, o_col, m_col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr
):
    """Compute out[i, o_col] = sum over s of workspace[s, i, o_col], in the order of s, for one block of rows i.

    The block has the rows from start to start + BLOCK_ROW that are less than end. workspace (splits, rows, columns) and
    out (rows, columns) are contiguous.
    """
    HALF: tl.constexpr = BLOCK_ROW // 2  # the sum and the loaded split, both as full tiles, would not fit in registers
    for i_half in range(2):
        o_row = start + i_half * HALF + tl.arange(0, HALF)
        m_row = o_row < end
        b_sum = tl.zeros((HALF, BLOCK_COL), dtype=tl.float32)
        o_split_row = o_row.to(tl.int64)
        for _ in range(splits):
            p_splits = workspace + o_split_row[:, None] * columns + o_col[None, :]
            # .cg loads from L2: other multiprocessors wrote the splits
            b_sum += tl.load(p_splits, mask=m_row[:, None] & m_col[None, :], other=0.0, cache_modifier=".cg")
            o_split_row += rows
        store_tile(out, b_sum, o_row, m_row, columns, o_col, m_col, 1)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Return MAX_COUNTERS zeros (int32) for a launch on the current stream. The launch must reset them to 0.

    Launches on one stream run one after the other and share the counters.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a graph may be replayed on any stream, concurrently with work on the stream it was captured on, so each launch
        # of a graph gets its own counters
        return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    key = device, current_raw_stream(device)
    try:
        return _counters[key]
    except KeyError:
        return _counters.setdefault(key, torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device))
