"""How a call becomes a launch: its configuration, its splits, and the launch that is kept for the next such call.

A primitive looks its plan up by all that decides it: shapes, dtypes, strides, the low bits of every address, options
and device. That includes everything Triton specialises a kernel on, so a kept launch may call the compiled kernel
directly. Tensors that the primitives allocate are not part of a key: PyTorch aligns them to more than 16 bytes.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._compat import compiled_runner, current_cuda_device, with_scratch
from ..forms import class_of, form_in_force
from ..launch_mode import Mode
from .config import FORMS, LARGE_SHARED_BYTES, TileConfig, choose

#: What a device of unknown make is credited with: the least that cards since 2020 allow a block.
_FALLBACK_SHARED_BYTES = 99 * 1024
#: Without a CUDA device there is no limit: take what the large cards run.
_CPU_SHARED_BYTES = 227 * 1024
assert _CPU_SHARED_BYTES >= LARGE_SHARED_BYTES

#: The fewest tiles worth a program of their own, and the most partial results worth adding up afterwards.
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 64
#: Projections that one launch can hold: query, key and value.
MAX_PROJECTIONS = 3

TL_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# What a key reads off every tensor, for `map`: a loop in C, where a Python loop would cost more than the launch.
LAYOUT = operator.attrgetter("shape", "dtype")
STRIDE = Tensor.stride
ADDRESS = Tensor.data_ptr
#: The bits of an address that say whether it is a multiple of 16.
LOW_BITS = (15).__and__


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and the compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: TileConfig


class Launcher:
    """One launch of a plan, which knows all its arguments but the tensors.

    ``launcher.run(*tensors, *launcher.constants)`` launches the kernel. Every kernel takes its tensors (or None) first.
    The first run is an ordinary ``kernel[grid](...)``; later ones call the kernel that it compiled.
    """

    __slots__ = ("_device", "_grid", "_mode", "_name", "_ordinary", "constants", "run")

    def __init__(
        self, mode: Mode, kernel: Any, grid: tuple[int, ...], config: TileConfig, device: torch.device, **named: Any
    ) -> None:
        named |= config.tiles_of(kernel.arg_names)
        self.constants = tuple(named[name] for name in kernel.arg_names[len(kernel.arg_names) - len(named) :])
        self._mode, self._device, self._name = mode, device, kernel.fn.__name__
        self._grid = (*grid, 1, 1)[:3]
        self._ordinary = functools.partial(
            kernel[grid], num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )
        self.run: Callable[..., Any]
        if mode.recorded is not None:
            recorded = mode.recorded
            self.run = lambda *args: recorded.append(
                Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=True)), config)
            )
        elif mode.left_out is not None:
            self.run = self._counted(_noting(mode.left_out, self._name))
        elif isinstance(kernel, triton.JITFunction):
            self.run = self._counted(self._first)
        else:  # the interpreter compiles nothing
            self.run = self._counted(self._on_device(self._ordinary))

    def _first(self, *args: Any) -> None:
        """Launch as usual, and keep what was compiled."""
        compiled = self._on_device(self._ordinary)(*args)
        runner, reason = compiled_runner(compiled, self._grid)
        if runner is None:
            _warn_of_slow_launches(reason)
            runner = self._ordinary
        self.run = self._counted(self._on_device(runner))

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        for names in self._mode.counters:
            run = _noting(names, self._name, run)
        return run

    def _on_device(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Triton launches on the current device, which need not be the tensors' where there are several."""
        if self._device.type != "cuda" or torch.cuda.device_count() == 1:
            return run
        index, current_device = self._device.index, current_cuda_device()

        def guarded(*args: Any) -> Any:
            if current_device() == index:
                return run(*args)
            with torch.cuda.device(index):
                return run(*args)

        return guarded


class DescriptorLauncher(Launcher):
    """The launch of a kernel that makes tensor descriptors, in memory that Triton asks for."""

    __slots__ = ()

    def _on_device(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return super()._on_device(with_scratch(run))


def _noting(names: list[str], name: str, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``run`` that notes a name first; without it nothing runs."""

    def left_out(*args: Any) -> None:
        nonlocal names
        names += [name]  # append would be counted as a second call

    def noted(*args: Any) -> Any:
        names.append(name)
        return run(*args)  # type: ignore[misc]

    return left_out if run is None else noted


@functools.cache
def _warn_of_slow_launches(reason: str) -> None:
    warnings.warn(
        f"Triton {triton.__version__}: {reason}; every launch binds its arguments again, which is slower",
        RuntimeWarning,
        stacklevel=4,
    )


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that one block may use on the device."""
    if device.type != "cuda":
        return _CPU_SHARED_BYTES
    return _cuda_shared_bytes(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_shared_bytes(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) or _FALLBACK_SHARED_BYTES


def describable(dtype: torch.dtype, *matrices: Tensor | None) -> bool:
    """Return whether tensor descriptors can read these matrices of one dtype: contiguous rows, 16-byte multiples."""
    for x in matrices:
        if x is not None:
            row, column = x.stride()
            if x.dtype != dtype or column != 1 or row < x.shape[1] or row * x.itemsize % 16 or x.data_ptr() % 16:
                return False
    return True


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def batches(*operands: Sequence[Tensor | None]) -> list[slice]:
    """Which projections share a launch: neighbours, at most MAX_PROJECTIONS, of the same dtypes (None: no tensor)."""
    kinds = [tuple(None if t is None else t.dtype for t in of_one) for of_one in zip(*operands, strict=True)]
    found, start = [], 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start] or end - start == MAX_PROJECTIONS:
            found.append(slice(start, end))
            start = end
    return found


def columns_of(T: Tensor | None, at: slice, rank: int) -> Tensor | None:
    """The columns of some projections, each ``rank`` wide."""
    return None if T is None else T[:, at.start * rank : at.stop * rank]


def numbered(name: str, values: Sequence[Any], missing: Any = None) -> dict[str, Any]:
    """Arguments name_0, name_1 and name_2 of a kernel; ``missing`` where there are fewer values."""
    return {f"{name}_{i}": values[i] if i < len(values) else missing for i in range(MAX_PROJECTIONS)}


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, Any]:
    """Arguments such as x_stride_m for the axes of a matrix; 0 without a matrix."""
    return {f"{name}_stride_{axis}": 0 if x is None else x.stride(dim) for dim, axis in enumerate(axes)}


def numbered_strides(name: str, tensors: Sequence[Tensor | None], axes: str) -> dict[str, Any]:
    """Arguments such as y_0_stride_m for the axes of (up to) three matrices."""
    found: dict[str, Any] = {}
    for i in range(MAX_PROJECTIONS):
        found |= strides(f"{name}_{i}", tensors[i] if i < len(tensors) else None, axes)
    return found


def form_for(
    mode: Mode,
    step: str,
    rank: int,
    compute_dtype: torch.dtype,
    *,
    wide: Sequence[Tensor | None],
    thin: Sequence[Tensor | None],
    rows: int,
    width: int,
    excluded: Collection[str] = (),
) -> tuple[str, dict[str, TileConfig]]:
    """Return the form of a step and its kernels' tiles for a launch over (rows, width).

    Operands have wide rows (x, G, y, A) or thin ones (T, S, B). ``excluded``: forms that this call cannot take.
    """
    operands = class_of(rank, compute_dtype, wide, thin)
    device = next(x.device for x in wide if x is not None)
    return form_of_class(mode, step, operands, rank, rows, width, device, excluded)


def form_of_class(
    mode: Mode,
    step: str,
    operands: str,
    rank: int,
    rows: int,
    width: int,
    device: torch.device,
    excluded: Collection[str] = (),
) -> tuple[str, dict[str, TileConfig]]:
    """Return :func:`form_for` of operands of a class."""
    form, entry = form_in_force(mode, step, operands, rank, rows, width, device, excluded)
    shared_bytes = shared_memory_bytes(device) if mode.shared_bytes is None else mode.shared_bytes
    tiles = {}
    for kernel in FORMS[step][form]:
        if kernel in mode.forced:
            tiles[kernel] = mode.forced[kernel]
        elif entry is not None and kernel in entry.tiles:
            tiles[kernel] = TileConfig(**entry.tiles[kernel])
        else:
            tiles[kernel] = choose(kernel, operands, rank, shared_bytes)
    return form, tiles


def split_sum(length: int, block: int, programs: int, *, target: int) -> tuple[int, int]:
    """How a sum over ``length`` is cut so that some ``target`` programs run: (splits, tiles of ``block`` per split).

    From shapes and constants only, so the same call adds in the same order on every run.
    """
    tiles = cdiv(length, block)
    splits = max(1, min(target // programs, tiles // _MIN_TILES_PER_SPLIT, _MAX_SPLITS))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split
