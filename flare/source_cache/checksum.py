"""Checksums of tensors' bytes: integer sums, so that a GPU, a CPU and any order of summation agree to the last bit."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WORDS = 1 << 14  # 64-bit words that one sum covers
_AT_ONCE = 16  # sums taken by one call: 2 MiB, which a CPU's caches hold


def checksum(data: Tensor) -> bytes:
    """Return one 64-bit sum for every 128 KiB of a tensor, of its words mixed with odd numbers (modulo 2^64).

    A change of a single word always changes its sum. This guards against damage, not against an adversary.

    Args:
        data: contiguous, of any dtype, shape and device.
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
    """Multiply, fold, multiply: reversible for every word, and each of its bits counts differently at each place.

    Without the fold, a flip of bit 63 would add 2^63 whatever the weight, and two of them would cancel.
    """
    mixed = words * weights
    halves = mixed.view(torch.int32)
    halves[..., 0::2].bitwise_xor_(halves[..., 1::2])
    return mixed.mul_(weights)


def _words(data: Tensor) -> Tensor:
    """The bytes as int64 (copied only where they do not fill whole, aligned words; then zeros are added)."""
    flat = data.detach().contiguous().flatten().view(torch.uint8)
    over = flat.numel() % 8
    if over or flat.data_ptr() % 8 or flat.storage_offset() % 8:
        padded = flat.new_zeros(flat.numel() + (8 - over) % 8)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.view(torch.int64)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers without a pattern that data would share (multiples of the golden ratio's bits)."""
    with torch.inference_mode(False):
        index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
        mixed = index * -7046029254386353131
        return ((mixed ^ (mixed >> 29)) * -4658895280553007687) | 1
