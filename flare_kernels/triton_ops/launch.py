"""Configurations of kernel launches, and the launchers that plans cache.

A primitive is an operation of the adapter, such as shrink. A form is one of its implementations
(:mod:`flare_kernels.forms`).

A plan is what a primitive computes once per distinct call (:mod:`flare_kernels.launch_mode`). The key of a plan holds
everything that the plan depends on: shapes, dtypes, strides, the low bits of every address, options and device. This
includes everything that Triton specialises a kernel on, so a cached launcher may call the compiled kernel directly.
Tensors that the primitives allocate are not part of a key, because PyTorch aligns them to more than 16 bytes.
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

from .._compat import compiled_runner, current_cuda_device, with_descriptor_allocator
from ..forms import class_of, select_form
from ..launch_mode import Mode
from .config import FORMS, LARGE_SHARED_BYTES, TileConfig, choose

#: Shared memory per block if the device does not report it: the minimum of GPUs since 2020.
_FALLBACK_SHARED_BYTES = 99 * 1024
#: Shared memory per block to assume without a CUDA device: the value of sm_90 and sm_100.
_CPU_SHARED_BYTES = 227 * 1024
assert _CPU_SHARED_BYTES >= LARGE_SHARED_BYTES

#: Largest number of projections in one launch: query, key and value.
MAX_PROJECTIONS = 3

TL_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Functions that read the parts of a tensor that belong to a key. They are called through `map`, which loops in C,
# because a Python loop would take longer than the launch.
LAYOUT = operator.attrgetter("shape", "dtype")
STRIDE = Tensor.stride
ADDRESS = Tensor.data_ptr
#: The low bits of an address, which are zero if it is a multiple of 16.
LOW_BITS = (15).__and__


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid, its arguments by name, and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: TileConfig


class Launcher:
    """A launch of a plan, with all arguments except the tensors.

    ``launcher.run(*tensors, *launcher.constants)`` launches the kernel. Every kernel takes its tensors (or None) first.
    The first run is an ordinary ``kernel[grid](...)``. Later runs call the compiled kernel directly, if Triton's
    version allows this (otherwise a warning says why not). If the mode records launches or leaves out kernels, ``run``
    appends to the mode's list and launches nothing.
    """

    __slots__ = ("_device", "_grid", "_jit_launch", "_mode", "_name", "constants", "run")

    def __init__(
        self, mode: Mode, kernel: Any, grid: tuple[int, ...], config: TileConfig, device: torch.device, **named: Any
    ) -> None:
        named |= config.tiles_of(kernel.arg_names)
        self.constants = tuple(named[name] for name in kernel.arg_names[len(kernel.arg_names) - len(named) :])
        self._mode, self._device, self._name = mode, device, kernel.fn.__name__
        self._grid = (*grid, 1, 1)[:3]
        self._jit_launch = functools.partial(
            kernel[grid], num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )
        self.run: Callable[..., Any]
        if mode.recorded is not None:
            recorded = mode.recorded
            self.run = lambda *args: recorded.append(
                Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=True)), config)
            )
        elif mode.left_out is not None:
            self.run = self._counted(_append_name(mode.left_out, self._name))
        elif isinstance(kernel, triton.JITFunction):
            self.run = self._counted(self._first)
        else:  # the interpreter compiles nothing
            self.run = self._counted(self._on_device(self._jit_launch))

    def _first(self, *args: Any) -> None:
        """Launch through the JIT, and replace ``run`` by the launcher of the compiled kernel."""
        compiled = self._on_device(self._jit_launch)(*args)
        runner, reason = compiled_runner(compiled, self._grid)
        if runner is None:
            _warn_of_slow_launches(reason)
            runner = self._jit_launch
        self.run = self._counted(self._on_device(runner))

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        for names in self._mode.counters:
            run = _append_name(names, self._name, run)
        return run

    def _on_device(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``run`` with the tensors' device as current device, because Triton launches on the current device."""
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
    """A launch of a kernel that makes tensor descriptors, for which Triton allocates memory."""

    __slots__ = ()

    def _on_device(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return super()._on_device(with_descriptor_allocator(run))


def _append_name(names: list[str], name: str, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function that appends the name to a list and then calls ``run``, if there is one."""

    def without_launch(*args: Any) -> None:
        nonlocal names
        names += [name]  # not names.append: tests count the calls of a training step, and append is a call

    def with_launch(*args: Any) -> Any:
        names.append(name)
        return run(*args)  # type: ignore[misc]

    return without_launch if run is None else with_launch


@functools.cache
def _warn_of_slow_launches(reason: str) -> None:
    warnings.warn(
        f"Triton {triton.__version__}: {reason}; every launch binds its arguments again, which is slower",
        RuntimeWarning,
        stacklevel=4,
    )


def shared_memory_bytes(device: torch.device) -> int:
    """Return the shared memory that one block may use on the device, in bytes."""
    if device.type != "cuda":
        return _CPU_SHARED_BYTES
    return _cuda_shared_bytes(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_shared_bytes(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) or _FALLBACK_SHARED_BYTES


def fits_descriptor(dtype: torch.dtype, *matrices: Tensor | None) -> bool:
    """Return whether tensor descriptors can read these matrices.

    They must have this dtype, contiguous rows that do not overlap, and addresses and row strides that are multiples of
    16 bytes.
    """
    for x in matrices:
        if x is not None:
            row, column = x.stride()
            if x.dtype != dtype or column != 1 or row < x.shape[1] or row * x.itemsize % 16 or x.data_ptr() % 16:
                return False
    return True


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def batches(*operands: Sequence[Tensor | None]) -> list[slice]:
    """Return slices of projections that share a launch: neighbours of equal dtypes, at most MAX_PROJECTIONS each."""
    dtypes = [tuple(None if t is None else t.dtype for t in tensors) for tensors in zip(*operands, strict=True)]
    slices, start = [], 0
    for end in range(1, len(dtypes) + 1):
        if end == len(dtypes) or dtypes[end] != dtypes[start] or end - start == MAX_PROJECTIONS:
            slices.append(slice(start, end))
            start = end
    return slices


def columns_of(T: Tensor | None, at: slice, rank: int) -> Tensor | None:
    """Return the columns of T that belong to a slice of projections with ``rank`` columns each; None without T."""
    return None if T is None else T[:, at.start * rank : at.stop * rank]


def numbered(name: str, values: Sequence[Any], missing: Any = None) -> dict[str, Any]:
    """Return the arguments name_0, name_1 and name_2 of a kernel; ``missing`` if there are fewer values."""
    return {f"{name}_{i}": values[i] if i < len(values) else missing for i in range(MAX_PROJECTIONS)}


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, Any]:
    """Return arguments such as x_stride_m for the axes of a tensor; the strides are 0 if x is None."""
    return {f"{name}_stride_{axis}": 0 if x is None else x.stride(dim) for dim, axis in enumerate(axes)}


def numbered_strides(name: str, tensors: Sequence[Tensor | None], axes: str) -> dict[str, Any]:
    """Return arguments such as y_0_stride_m for the axes of up to three tensors; strides of missing tensors are 0."""
    arguments: dict[str, Any] = {}
    for i in range(MAX_PROJECTIONS):
        arguments |= strides(f"{name}_{i}", tensors[i] if i < len(tensors) else None, axes)
    return arguments


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
    """Return the form of a step and the tiles of its kernels, for a launch over (rows, width).

    Args:
        mode: the launch mode.
        step: a key of ``FORMS``.
        rank: as in :class:`~flare_kernels.launch_table.Key`.
        compute_dtype: dtype of the products' operands.
        wide, thin: the operands, as in :func:`flare_kernels.forms.class_of`.
        rows, width: as in :class:`~flare_kernels.launch_table.Key`.
        excluded: forms that this call cannot take.
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
    """Return the result of :func:`form_for` for an operand class instead of the operands."""
    form, entry = select_form(mode, step, operands, rank, rows, width, device, excluded)
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
