"""Dropout with packed masks of one bit per element, regenerated from a seed. No dropped-out copy of x is stored.

A stream is x (M, K), the hidden states of the target or of the source. Its mask is uint8 (M, ceil(K / 8)). Bit j of
byte b is 1 if column 8 b + j is kept and 0 if it is dropped. Bits past column K are zero.

Byte b of a row is a pure function of (seed, number of the stream, row, b): Philox 4x32-10 with

    counter = (b, row, stream, 0)    key = (low, high word of the seed)

gives 128 bits, which are split into eight 16-bit numbers u_j (even j: low half of word j // 2, odd j: its high half).
Column 8 b + j is kept if u_j >= round(p * 65536). The PyTorch and the Triton implementation give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Stream numbers. Masks of the two streams are independent even if they have the same seed.
TARGET_STREAM, SOURCE_STREAM = 0, 1

_LEVELS = 1 << 16
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: Mask bytes that the PyTorch implementation computes at a time. Its temporary tensors then fit in a CPU's cache, and
#: take about 500 MiB on a GPU.
_CHUNK_BYTES = {"cpu": 1 << 15, "other": 1 << 22}


def drop_threshold(p: float) -> int:
    """Return round(p * 65536). A column is kept if its 16-bit number is at least this threshold."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p={p!r} is not a probability (0 to 1)")
    return round(p * _LEVELS)


def keep_scale(p: float) -> float:
    """Return 1 / (1 - p') for the probability p' that the 16-bit threshold represents; 0 if everything is dropped."""
    keep_levels = _LEVELS - drop_threshold(p)
    return _LEVELS / keep_levels if keep_levels else 0.0


def draw_seed(device: torch.device | str) -> Tensor:
    """Return a seed as an int64 scalar tensor on the device, from the device's default generator.

    Gradient checkpointing restores that generator before it recomputes a forward pass, so the recompute uses the same
    masks as the first pass. The host does not wait for the device, and each replay of a CUDA graph draws a new seed.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def packed_mask(
    seed: Tensor,
    rows: int,
    cols: int,
    p: float,
    stream: int,
    generate: Callable[[Tensor, int, int, int, int], Tensor] | None = None,
) -> Tensor | None:
    """Return the packed mask of a (rows, cols) stream, uint8 (rows, ceil(cols / 8)), on the seed's device.

    A pure function of its arguments. None for p = 0 (nothing is dropped), all zeros for p = 1.

    Args:
        seed: int64 scalar tensor, from :func:`draw_seed`.
        rows, cols: size of the stream.
        p: probability of dropping, with a resolution of 1/65536.
        stream: number of the stream (TARGET_STREAM, SOURCE_STREAM, or another number below 2**31).
        generate: the primitive that generates the bits (``ops.dropout_mask``); None: :func:`dropout_mask_torch`. All
            implementations give the same bits.

    Raises:
        ValueError: p is not a probability.
    """
    threshold = drop_threshold(p)
    if p == 0.0:
        return None
    if threshold == _LEVELS or rows == 0 or cols == 0 or seed.is_meta:
        return torch.zeros((rows, (cols + 7) // 8), dtype=torch.uint8, device=seed.device)
    return (generate or dropout_mask_torch)(seed, rows, cols, threshold, stream)


def unpack(mask: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """Return a packed mask as a (rows, cols) tensor of ones (kept) and zeros (dropped)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts).bitwise_and_(1)
    return bits.flatten(1)[:, :cols].to(dtype)


def dropout_mask_torch(seed: Tensor, rows: int, cols: int, threshold: int, stream: int) -> Tensor:
    """Return a packed mask, generated in plain PyTorch on any device, a chunk of rows at a time.

    All four Philox words are computed by the same operators, because on a GPU the number of launches decides the time.
    """
    n_bytes = (cols + 7) // 8
    out = torch.empty((rows, n_bytes), dtype=torch.uint8, device=seed.device)
    o_byte = torch.arange(n_bytes, dtype=torch.int64, device=seed.device)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=seed.device).view(4, 1, 1)
    chunk = max(1, _CHUNK_BYTES["cpu" if seed.device.type == "cpu" else "other"] // n_bytes)
    for start in range(0, rows, chunk):
        end = min(start + chunk, rows)
        o_row = torch.arange(start, end, dtype=torch.int64, device=seed.device).unsqueeze(1)
        words = philox(seed, o_byte.expand(end - start, n_bytes), o_row.expand(end - start, n_bytes), stream)
        bits = ((words & 0xFFFF) >= threshold).to(torch.uint8).bitwise_left_shift_(shift)
        bits |= (words >= threshold << 16).to(torch.uint8).bitwise_left_shift_(shift + 1)
        torch.sum(bits, dim=0, dtype=torch.uint8, out=out[start:end])
    if cols % 8:
        out[:, -1] &= (1 << cols % 8) - 1
    return out


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: int) -> Tensor:
    """Return Philox 4x32-10 of counter (c0, c1, c2, 0) and key = seed: four words below 2**32, int64 (4, *c0.shape).

    int64 products wrap modulo 2**64, so both of their 32-bit halves are correct.
    """
    shape = (2, *[1] * c0.dim())
    even = torch.stack((c0, torch.full_like(c0, c2, memory_format=torch.contiguous_format)))  # words 0 and 2
    odd = torch.stack((torch.zeros_like(c1), c1))  # words 3 and 1
    multipliers = _pair(_MULTIPLIERS, seed.device).view(shape)
    steps = _pair(_KEY_STEPS, seed.device) * torch.arange(_ROUNDS, device=seed.device).unsqueeze(1)
    keys = (torch.stack((seed, seed >> 32)) + steps).bitwise_and_(_MASK32)
    for key in keys.flip(1).view(_ROUNDS, *shape).unbind():
        product = even * multipliers
        even = (product >> 32).bitwise_and_(_MASK32).bitwise_xor_(odd).bitwise_xor_(key).flip(0)
        odd = product.bitwise_and_(_MASK32)
    return torch.stack((even, odd.flip(0)), dim=1).flatten(0, 1)


def _pair(values: tuple[int, int], device: torch.device) -> Tensor:
    """Return two numbers as an int64 tensor, computed on the device: graph capture forbids copies from the host."""
    first, second = values
    return torch.arange(2, device=device).mul_(second - first).add_(first)
