"""Checksums of tensors' bytes: integer sums, which are the same on every device and in any order of summation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WORDS = 1 << 14  # 64-bit words that one sum covers
_AT_ONCE = 16  # number of sums that one call computes: their 2 MiB of words fit into a CPU's caches


def checksum(data: Tensor) -> bytes:
    """Return one 64-bit sum for each 128 KiB of a tensor.

    Each 64-bit word is mixed with an odd weight, and the mixed words are added modulo 2^64. If a single word changes,
    the sum that contains it always changes. The checksum detects damage; it is not cryptographic.

    Args:
        data: a contiguous tensor of any dtype, shape and device.
    """
    words = _words(data)
    whole = len(words) // _WORDS * _WORDS
    weights = _weights(data.device)
    sums = [
        _mixed(part.view(-1, _WORDS), weights).sum(1) for part in words[:whole].split(_WORDS * _AT_ONCE) if part.numel()
    ]
    rest = words[whole:]
    if rest.numel():
        sums.append(_mixed(rest, weights[: len(rest)]).sum().view(1))
    return torch.cat(sums).cpu().numpy().tobytes() if sums else b""


def _mixed(words: Tensor, weights: Tensor) -> Tensor:
    """Multiply each word by its weight, xor its upper 32 bits into its lower 32 bits, and multiply it again.

    This is invertible for each word, and the effect of a bit depends on the word's position. Without the xor, a flip of
    bit 63 would add 2^63 whatever the weight is, and two such flips would cancel.
    """
    mixed = words * weights
    halves = mixed.view(torch.int32)
    halves[..., 0::2].bitwise_xor_(halves[..., 1::2])
    return mixed.mul_(weights)


def _words(data: Tensor) -> Tensor:
    """Return the bytes of a tensor as int64 words; copy and zero-pad them if they are not whole, aligned words."""
    flat = data.detach().contiguous().flatten().view(torch.uint8)
    remainder = flat.numel() % 8
    if remainder or flat.data_ptr() % 8 or flat.storage_offset() % 8:
        padded = flat.new_zeros(flat.numel() + (8 - remainder) % 8)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.view(torch.int64)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Return one odd pseudo-random weight per word, computed from multiples of the golden ratio's first 64 bits."""
    with torch.inference_mode(False):
        index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
        mixed = index * -7046029254386353131
        return ((mixed ^ (mixed >> 29)) * -4658895280553007687) | 1
