"""Lower bound of the shared memory that a kernel needs, computed before it is compiled.

The bound counts the tiles that the compiler's pipeline keeps in shared memory, for two streams of 2-byte operands. The
compiler may need more, for layout conversions. Because this is a lower bound, no configuration that fits is rejected.
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
    # in the programs that compute dB, T and S are consumed before G, so the pipeline holds one stage fewer of T and S
    # than of G
    strips = 2 * t.BLOCK_K * (t.num_stages * t.BLOCK_N + (t.num_stages - 1) * 2 * t.BLOCK_R)
    return max(rows, strips)


def _grad_weight(t: TileConfig) -> int:
    return 2 * t.num_stages * (2 * t.BLOCK_M * t.BLOCK_K + 2 * t.BLOCK_M * t.BLOCK_R)


def _grad_input(t: TileConfig) -> int:
    return 2 * (t.num_stages * t.BLOCK_K * t.BLOCK_R + t.BLOCK_M * t.BLOCK_R)


#: kernel -> lower bound in bytes, as a function of its tiles.
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
    """Return a lower bound of the shared memory of a kernel with these tiles, in bytes; 0 if there is no estimate."""
    estimate = LEAST_BYTES.get(kernel)
    return 0 if estimate is None else estimate(tiles)
