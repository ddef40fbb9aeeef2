"""How a call becomes a launch: its configuration, its splits, and the one door that ahead-of-time compiling watches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .config import TileConfig, choose, operand_class

#: What a device of unknown make is credited with: the least that cards since 2020 allow a block.
_FALLBACK_SHARED_BYTES = 99 * 1024

#: The fewest tiles worth a program of their own, and the most partial results worth adding up afterwards.
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 64

TL_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and the compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: TileConfig


@dataclass
class _Recorder:
    shared_bytes: int
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(shared_bytes: int) -> Iterator[list[Launch]]:
    """Within it nothing runs: launches are collected, with configurations for a device of that shared-memory limit."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(shared_bytes, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def launch(kernel: Any, grid: tuple[int, ...], config: TileConfig, device: torch.device, **args: Any) -> None:
    """Runs ``kernel[grid](**args)`` with the tiles of config that the kernel names, on the device of its tensors."""
    args.update(config.tiles_of(kernel.arg_names))
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, args, config))
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**args, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that one block may use on the device."""
    if _recorder is not None:
        return _recorder.shared_bytes
    if device.type != "cuda":
        return 227 * 1024  # the interpreter has no limit: test what the large cards run
    return _cuda_shared_bytes(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _cuda_shared_bytes(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) or _FALLBACK_SHARED_BYTES


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton can use 16-byte accesses: it asks that of pointers, and multiples of 16 elements of strides."""
    for x in tensors:
        if x is not None and (x.data_ptr() % 16 or any(s != 1 and s % 16 for s in x.stride())):
            return False
    return True


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def config_for(
    kernel: str, rank: int, compute_dtype: torch.dtype, *, wide: Sequence[Tensor | None], thin: Sequence[Tensor | None]
) -> TileConfig:
    """Configuration for a launch whose operands have a wide row (x, G, y, A) or one of rank elements (T, S, B)."""
    given = [x for x in (*wide, *thin) if x is not None]
    # rows of a handful of elements cannot be aligned, and need not be
    aligned = is_aligned(*wide) and (rank <= 16 or is_aligned(*thin))
    operands = operand_class(compute_dtype.itemsize, max(x.element_size() for x in given), aligned)
    return choose(kernel, operands, rank, shared_memory_bytes(given[0].device))


def split_sum(length: int, block: int, programs: int, *, target: int) -> tuple[int, int]:
    """How a sum over ``length`` is cut so that some ``target`` programs run: (splits, tiles of ``block`` per split).

    From shapes and constants only, so the same call adds in the same order on every run.
    """
    tiles = cdiv(length, block)
    splits = max(1, min(target // programs, tiles // _MIN_TILES_PER_SPLIT, _MAX_SPLITS))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split
