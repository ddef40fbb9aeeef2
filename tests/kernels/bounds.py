"""Bounds checker for kernels under Triton's interpreter: every access must be to an element of a tensor argument.

    with bounds.checked() as accesses:
        kernel[grid](x, y, ...)
    assert accesses["shrink_kernel"].loads

Only elements whose mask is true count as accessed; without a mask, all elements of the tile do. The gap between two
rows of a view is out of bounds. An out-of-bounds access raises an error before memory is read or written.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel read or wrote outside its tensors."""


@dataclass
class Accesses:
    """Numbers of elements that the launches of a kernel read, wrote and updated atomically."""

    loads: int = 0
    stores: int = 0
    atomics: int = 0


class _Launch:
    """The addresses that a launch may access."""

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.name = name
        self.tensors = tensors
        addresses = {argument: addresses_of(tensor) for argument, tensor in tensors.items()}
        self.by_size: dict[int, np.ndarray] = {}
        for size in {tensor.element_size() for tensor in tensors.values()}:
            same_size = [a for argument, a in addresses.items() if tensors[argument].element_size() == size]
            self.by_size[size] = np.unique(np.concatenate(same_size))

    def check(self, what: str, pointers: Any, mask: Any) -> int:
        """Return the number of accessed addresses; raise OutOfBounds if one is not an element of a tensor."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data))
        accessed = np.asarray(pointers.data)[active].astype(np.uint64)
        valid = self.by_size.get(size, np.empty(0, np.uint64))
        at = np.minimum(np.searchsorted(valid, accessed), max(len(valid) - 1, 0))
        wrong = accessed[valid[at] != accessed] if len(valid) else accessed
        if len(wrong):
            near = self._near(int(wrong[0]))
            raise OutOfBounds(f"{self.name} {what}s {len(wrong)} elements of {size} bytes outside its tensors: {near}")
        return int(accessed.size)

    def _near(self, address: int) -> str:
        """Describe the argument nearest to an address, and the distance from its first element."""

        def distance(tensor: Tensor) -> int:
            first, last = tensor.data_ptr(), int(addresses_of(tensor)[-1])
            return max(first - address, address - last, 0)

        name, tensor = min(self.tensors.items(), key=lambda item: distance(item[1]))
        offset = address - tensor.data_ptr()
        layout = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        return f"the first of them is {offset} bytes from the start of {name}, {layout}"


def addresses_of(tensor: Tensor) -> np.ndarray:
    """Return the sorted addresses of a tensor's elements."""
    offsets = np.zeros((1,) * max(tensor.dim(), 1), dtype=np.int64)
    for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        along = [1] * tensor.dim()
        along[dim] = length
        offsets = offsets + (np.arange(length) * stride).reshape(along)
    return np.sort(offsets.ravel() * tensor.element_size() + tensor.data_ptr()).astype(np.uint64)


@contextlib.contextmanager
def checked() -> Iterator[dict[str, Accesses]]:
    """Check every access of every kernel that the interpreter runs. Yields the accesses by kernel name.

    A launch that accesses memory outside its tensors raises an error of the interpreter, whose cause is OutOfBounds.
    """
    builder, execute = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    accesses: dict[str, Accesses] = defaultdict(Accesses)
    running: list[_Launch] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.numel()}
        running.append(_Launch(self.fn.__name__, tensors))
        try:
            execute(self, *args, **kwargs)
        finally:
            running.pop()

    def load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        accesses[running[-1].name].loads += running[-1].check("read", pointers, mask)
        return masked_load(pointers, mask, *rest, **options)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        accesses[running[-1].name].stores += running[-1].check("write", pointers, mask)
        return masked_store(pointers, value, mask, *rest, **options)

    def update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        accesses[running[-1].name].atomics += running[-1].check("update", pointers, mask)
        return atomic_update(operation, pointers, value, mask, *rest, **options)

    atomic_update = builder.create_atomic_rmw
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (interpreter.GridExecutor, "__call__", launch),
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (builder, "create_atomic_rmw", update),
        ):
            stack.enter_context(_replaced(owner, name, new))
        yield accesses


@contextlib.contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
