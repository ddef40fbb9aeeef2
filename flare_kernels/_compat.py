"""The non-public symbols of PyTorch and Triton that this package uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

#: Whether a functorch transform (vmap, grad, jvp, ...) is active.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Whether a tensor is a view of another tensor. Tensors made in inference mode are never marked as views.
is_view: Callable[[torch.Tensor], bool] = torch.Tensor._is_view


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python wrapper, which makes about 29 calls that only functorch needs."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def sleep_on_device(cycles: int) -> None:
    """Make the current CUDA stream sleep for a number of clock cycles."""
    torch.cuda._sleep(cycles)


def current_cuda_device() -> Callable[[], int]:
    """Return the fastest function that returns the current CUDA device's index."""
    # torch.cuda.current_device() also checks that CUDA is initialised, which is certain once a tensor is on the device
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def current_raw_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream; 0 for a device without streams."""
    if device.type != "cuda":
        return 0
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None or device.index is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(raw(device.index))


def with_descriptor_allocator(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that sets Triton's allocator for tensor descriptors if none is set, and then calls ``run``.

    Triton reads the allocator from a context variable, which the threads of the autograd engine do not inherit. It is
    therefore checked before each launch. An allocator that someone else has set is not replaced.
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

    Triton 3.6 to 3.9 return a ``CompiledKernel`` from ``kernel[grid](...)``. Its launcher ``compiled[grid]`` does not
    bind the arguments again, but it still calls Triton's launch hooks.

    Returns:
        The launcher and "", or None and the reason why this Triton version has no such launcher.
    """
    if not hasattr(type(compiled), "__getitem__"):
        return None, f"a launch returned {type(compiled).__name__} and not a compiled kernel"
    runner = compiled[grid]
    kinds = [parameter.kind for parameter in inspect.signature(runner).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return None, "a compiled kernel's launcher does not take its arguments by position"
    return runner, ""  # type: ignore[no-any-return]


def jit_source(
    kernel: Any, args: dict[str, Any], capability: int, options: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Return the signature, constants and attributes with which a launch on an NVIDIA GPU would compile the kernel.

    Triton's cache key contains all three. The attributes therefore have exactly Triton's form, in which an argument
    without attributes has an empty list.
    """
    backend, bind = _binder(kernel, capability)
    bound, specialization, _ = bind(**args, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return signature, constants, attributes


@functools.cache
def _binder(kernel: Any, capability: int) -> tuple[Any, Callable[..., Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)
