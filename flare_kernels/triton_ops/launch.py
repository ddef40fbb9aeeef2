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

from ..launch_table import ROW_BOUNDS, WIDTH_BOUNDS, Entry, Key, bucket, table_for
from .config import TileConfig, choose, operand_class, rank_bucket

#: What a device of unknown make is credited with: the least that cards since 2020 allow a block.
_FALLBACK_SHARED_BYTES = 99 * 1024

#: The fewest tiles worth a program of their own, and the most partial results worth adding up afterwards.
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 64
#: Projections that one launch can hold: query, key and value.
MAX_PROJECTIONS = 3

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
_counters: list[list[str]] = []
_forced: dict[str, TileConfig] = {}


@contextlib.contextmanager
def recording(shared_bytes: int) -> Iterator[list[Launch]]:
    """Within it nothing runs: launches are collected, with configurations for a device of that shared-memory limit."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(shared_bytes, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """Within it launches run as always, and the names of their kernels are collected."""
    names: list[str] = []
    _counters.append(names)
    try:
        yield names
    finally:
        _counters.remove(names)


def launch(kernel: Any, grid: tuple[int, ...], config: TileConfig, device: torch.device, **args: Any) -> None:
    """Runs ``kernel[grid](**args)`` with the tiles of config that the kernel names, on the device of its tensors."""
    args.update(config.tiles_of(kernel.arg_names))
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, args, config))
        return
    for names in _counters:
        names.append(kernel.fn.__name__)
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


def batches(*operands: Sequence[Tensor]) -> Iterator[slice]:
    """Which projections share a launch: neighbours, at most MAX_PROJECTIONS, whose tensors have the same dtypes."""
    count = len(operands[0])
    if count <= MAX_PROJECTIONS and all(len({tensor.dtype for tensor in of_one}) == 1 for of_one in operands):
        yield slice(0, count)
        return
    kinds = [tuple(tensor.dtype for tensor in of_one) for of_one in zip(*operands, strict=True)]
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start] or end - start == MAX_PROJECTIONS:
            yield slice(start, end)
            start = end


def columns_of(T: Tensor | None, at: slice, rank: int, count: int) -> Tensor | None:
    """The columns of some of ``count`` projections, each ``rank`` wide; T itself where they are all."""
    if T is None or at == slice(0, count):
        return T
    return T[:, at.start * rank : at.stop * rank]


def numbered(name: str, values: Sequence[Any], missing: Any = None) -> dict[str, Any]:
    """Arguments name_0, name_1 and name_2 of a kernel; ``missing`` where there are fewer values."""
    return {f"{name}_{i}": values[i] if i < len(values) else missing for i in range(MAX_PROJECTIONS)}


def numbered_strides(name: str, tensors: Sequence[Tensor], axes: str) -> dict[str, int]:
    """Arguments such as y_0_stride_m for the axes of (up to) three matrices."""
    return {
        f"{name}_{i}_stride_{axis}": tensors[i].stride(dim) if i < len(tensors) else 0
        for i in range(MAX_PROJECTIONS)
        for dim, axis in enumerate(axes)
    }


def config_for(
    kernel: str,
    rank: int,
    compute_dtype: torch.dtype,
    *,
    wide: Sequence[Tensor | None],
    thin: Sequence[Tensor | None],
    rows: int,
    width: int,
) -> TileConfig:
    """Configuration for a launch over (rows, width); operands have wide rows (x, G, y, A) or thin ones (T, S, B)."""
    operands = class_of(rank, compute_dtype, wide, thin)
    device = next(x.device for x in wide if x is not None)
    return _forced.get(kernel) or choose_config(kernel, operands, rank, rows, width, device)


def class_of(
    rank: int, compute_dtype: torch.dtype, wide: Sequence[Tensor | None], thin: Sequence[Tensor | None]
) -> str:
    """The operand class of a launch on tensors of wide rows and of thin ones."""
    # rows of a handful of elements cannot be aligned, and need not be
    aligned = is_aligned(*wide) and (rank <= 16 or is_aligned(*thin))
    widest = max(x.element_size() for x in (*wide, *thin) if x is not None)
    return operand_class(compute_dtype.itemsize, widest, aligned)


def choose_config(kernel: str, operands: str, rank: int, rows: int, width: int, device: torch.device) -> TileConfig:
    """The configuration of a launch: the tuned table's where it has one, else the general rule's."""
    entry = tuned_entry(step_of(kernel), operands, rank, rows, width, device)
    tiles = entry.tiles.get(kernel) if entry is not None else None
    if tiles is None:
        return choose(kernel, operands, rank, shared_memory_bytes(device))
    return _tile_config(tuple(sorted(tiles.items())))


@contextlib.contextmanager
def forcing(**configs: TileConfig) -> Iterator[None]:
    """Within it the kernels named run with these configurations (for the tuner)."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def table_key(step: str, operands: str, rank: int, rows: int, width: int) -> Key:
    """The table's key of a launch of these sizes."""
    return Key(step, operands, rank_bucket(rank), bucket(rows, ROW_BOUNDS), bucket(width, WIDTH_BOUNDS))


def tuned_entry(step: str, operands: str, rank: int, rows: int, width: int, device: torch.device) -> Entry | None:
    """The entry that a tuned table has for a step, None where it has none."""
    entries = tuned_entries(device)
    return entries.get(table_key(step, operands, rank, rows, width)) if entries else None


def tuned_entries(device: torch.device) -> dict[Key, Entry]:
    """What the tuned table of a device holds; empty where there is none."""
    if device.type != "cuda":
        return {}
    return table_for(_gpu_name(device.index if device.index is not None else torch.cuda.current_device())).entries


def step_of(kernel: str) -> str:
    """The primitive that a kernel belongs to."""
    return "decode" if kernel.endswith("_decode") else kernel


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache
def _tile_config(tiles: tuple[tuple[str, int], ...]) -> TileConfig:
    return TileConfig(**dict(tiles))


def split_sum(length: int, block: int, programs: int, *, target: int) -> tuple[int, int]:
    """How a sum over ``length`` is cut so that some ``target`` programs run: (splits, tiles of ``block`` per split).

    From shapes and constants only, so the same call adds in the same order on every run.
    """
    tiles = cdiv(length, block)
    splits = max(1, min(target // programs, tiles // _MIN_TILES_PER_SPLIT, _MAX_SPLITS))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split
