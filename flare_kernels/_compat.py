"""The symbols of PyTorch and Triton that are not public, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: Whether a functorch transform (vmap, grad, jvp, ...) is active.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python wrapper, which makes some 29 calls for functorch's sake alone."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def current_cuda_device() -> Callable[[], int]:
    """Return the cheapest getter of the current CUDA device's index."""
    # torch.cuda.current_device() also initialises CUDA, which a tensor on the device has already done
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def current_raw_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream; 0 for a device without streams."""
    if device.type != "cuda":
        return 0
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None or device.index is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(raw(device.index))


def with_scratch(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with an allocator of the memory that Triton keeps tensor descriptors in.

    Triton asks a context variable, which the threads of the autograd engine do not inherit: it is set wherever it is
    not set yet. An allocator of somebody else stays.
    """
    import triton
    from triton.runtime import _allocation

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    def with_allocator(*args: Any) -> Any:
        if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
            triton.set_allocator(allocate)
        return run(*args)

    return with_allocator


def compiled_runner(compiled: Any, grid: tuple[int, ...]) -> tuple[Callable[..., Any] | None, str]:
    """Return the launcher of a compiled kernel, which takes every argument by position.

    Triton 3.6 to 3.9 return a ``CompiledKernel`` from ``kernel[grid](...)``. Its own ``compiled[grid]`` skips the
    binding of arguments and still calls the launch hooks.

    Returns:
        The launcher and "", or None and the reason there is none.
    """
    if not hasattr(type(compiled), "__getitem__"):
        return None, f"a launch returned {type(compiled).__name__} and not a compiled kernel"
    runner = compiled[grid]
    kinds = [parameter.kind for parameter in inspect.signature(runner).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return None, "a compiled kernel's launcher does not take its arguments by position"
    return runner, ""  # type: ignore[no-any-return]


def sleep_on_device(cycles: int) -> None:
    """Let the current CUDA stream wait for a number of clock cycles."""
    torch.cuda._sleep(cycles)
