"""The least shared memory that a kernel asks for, known before it is compiled.

What the compiler's pipeline holds of the tiles that a loop loads, for two streams of 2-byte operands. Less than the
compiler's figure where it also converts layouts through shared memory, so nothing that fits is taken for too large.
"""

from __future__ import annotations

from collections.abc import Callable

from .config import TileConfig


def _shrink(t: TileConfig) -> int:
    return 2 * t.num_stages * (2 * t.BLOCK_M * t.BLOCK_K + t.BLOCK_R * t.BLOCK_K)


def _expand(t: TileConfig) -> int:
    return 2 * (t.num_stages * t.BLOCK_N * t.BLOCK_R + t.BLOCK_M * t.BLOCK_R)


def _grad_bottleneck(t: TileConfig) -> int:
    rows = 2 * t.num_stages * t.BLOCK_K * (t.BLOCK_M + t.BLOCK_R)
    # T and S are consumed before G: one copy less of them waits
    strips = 2 * t.BLOCK_K * (t.num_stages * t.BLOCK_N + (t.num_stages - 1) * 2 * t.BLOCK_R)
    return max(rows, strips)


def _grad_weight(t: TileConfig) -> int:
    return 2 * t.num_stages * (2 * t.BLOCK_M * t.BLOCK_K + 2 * t.BLOCK_M * t.BLOCK_R)


def _grad_input(t: TileConfig) -> int:
    return 2 * (t.num_stages * t.BLOCK_K * t.BLOCK_R + t.BLOCK_M * t.BLOCK_R)


#: kernel -> bytes.
LEAST_BYTES: dict[str, Callable[[TileConfig], int]] = {
    "shrink": _shrink,
    "shrink_tma": _shrink,
    "shrink_last_adds": _shrink,
    "expand": _expand,
    "grad_bottleneck": _grad_bottleneck,
    "grad_weight": _grad_weight,
    "grad_weight_tma": _grad_weight,
    "grad_weight_last_adds": _grad_weight,
    "grad_input": _grad_input,
}


def least_shared_bytes(kernel: str, tiles: TileConfig) -> int:
    """Return the least shared memory that a kernel with these tiles asks for; 0 where no estimate is known."""
    of_kernel = LEAST_BYTES.get(kernel)
    return 0 if of_kernel is None else of_kernel(tiles)
