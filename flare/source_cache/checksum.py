"""Checksums of tensors' bytes: integer sums, which are the same on every device and in any order of summation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WORDS = 1 << 14  # 64-bit words that one sum covers
_AT_ONCE = 16  # sums per call: 2 MiB, which fit into a CPU's caches


def checksum(data: Tensor) -> bytes:
    """Return one 64-bit sum per 128 KiB of a tensor: the sum (modulo 2^64) of its words, mixed with odd weights.

    A change of a single word always changes its sum. The checksum detects damage; it is not cryptographic.

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
    """Multiply, fold, multiply. This is invertible for each word, and the effect of a bit depends on the word's position.

    Without the fold, a flip of bit 63 would add 2^63 for every weight, and two such flips would cancel.
    """
    mixed = words * weights
    halves = mixed.view(torch.int32)
    halves[..., 0::2].bitwise_xor_(halves[..., 1::2])
    return mixed.mul_(weights)


def _words(data: Tensor) -> Tensor:
    """Return the bytes as int64. Bytes that are not whole, aligned words are copied and padded with zeros."""
    flat = data.detach().contiguous().flatten().view(torch.uint8)
    remainder = flat.numel() % 8
    if remainder or flat.data_ptr() % 8 or flat.storage_offset() % 8:
        padded = flat.new_zeros(flat.numel() + (8 - remainder) % 8)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.view(torch.int64)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Return odd pseudo-random weights, derived from multiples of the golden ratio's bits."""
    with torch.inference_mode(False):
        index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
        mixed = index * -7046029254386353131
        return ((mixed ^ (mixed >> 29)) * -4658895280553007687) | 1
