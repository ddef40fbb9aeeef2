"""The least shared memory that a kernel asks for, known before it is compiled.

What the compiler's pipeline holds of the tiles that a loop loads, for two streams of 2-byte operands. Less than the
compiler's figure where it also converts layouts through shared memory, so nothing that fits is taken for too large.
"""

from __future__ import annotations

from collections.abc import Callable

from .config import TileConfig


def _shrink(t: TileConfig) -> int:
    return 2 * t.num_stages * (2 * t.BLOCK_M * t.BLOCK_K + t.BLOCK_R * t.BLOCK_K)


def _grad_bottleneck(t: TileConfig) -> int:
    # a strip's G, T and S; the last T is consumed before the epilogue's
    hidden = t.BLOCK_M * t.BLOCK_R
    return 2 * (t.num_stages * (t.BLOCK_M * t.BLOCK_N + 2 * hidden) - hidden)


def _grad_weight(t: TileConfig) -> int:
    return 2 * t.num_stages * (2 * t.BLOCK_M * t.BLOCK_K + 2 * t.BLOCK_M * t.BLOCK_R)


#: kernel -> bytes; the tiles of other kernels are never near the limit.
LEAST_BYTES: dict[str, Callable[[TileConfig], int]] = {
    "shrink": _shrink,
    "grad_bottleneck": _grad_bottleneck,
    "grad_weight": _grad_weight,
}


def least_shared_bytes(kernel: str, tiles: TileConfig) -> int:
    """Return the least shared memory that a kernel with these tiles asks for; 0 where no estimate is known."""
    of_kernel = LEAST_BYTES.get(kernel)
    return 0 if of_kernel is None else of_kernel(tiles)
