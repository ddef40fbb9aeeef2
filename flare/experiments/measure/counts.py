"""Count the operators, Triton kernels and module calls of a training step, or of any other code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flare_kernels.launch_mode import counting

from .storages import iter_tensors

#: Operators that compute no elements: they allocate memory, change or read a shape, return the same tensor or read one
#: value. Views are not in this list, because PyTorch marks them (`is_view`).
_NO_WORK = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("detach", "detach_", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_"),
    *("is_same_size", "sym_size", "sym_stride", "sym_numel", "_local_scalar_dense", "item"),
}


@dataclass
class OpCount:
    """Result of :func:`count_ops`.

    Attributes:
        ops: names of the operators that compute, in order. On a GPU, an operator launches at least one kernel.
        kernels: names of this package's Triton kernels, in order.
    """

    ops: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of operators plus number of Triton kernels."""
        return len(self.ops) + len(self.kernels)

    @property
    def by_op(self) -> dict[str, int]:
        """How often each operator or kernel ran, the most frequent first."""
        return dict(Counter([*self.ops, *self.kernels]).most_common())


class _OpMode(TorchDispatchMode):
    def __init__(self, ops: list[str]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("profiler", "prim") or func.is_view or name in _NO_WORK:
            return result
        outputs = list(iter_tensors([result]))
        if outputs and all(output.numel() == 0 for output in outputs):
            return result
        self._ops.append(name)
        return result


@contextmanager
def count_ops() -> Iterator[OpCount]:
    """Count the operators and this package's Triton kernels that run inside the ``with`` block.

    Not counted are views, operators whose results have no elements, and operators that compute no elements, such as
    allocations, ``detach`` and ``item``.

    Yields:
        An :class:`OpCount`, which is complete when the block ends.
    """
    result = OpCount()
    with counting() as names, _OpMode(result.ops):
        yield result
    result.kernels = list(names)


@dataclass
class CallCount:
    """Result of :func:`count_calls`.

    Attributes:
        total: number of forward calls of the modules. If gradient checkpointing computes a module again, this counts as
            another call.
    """

    total: int = 0


@contextmanager
def count_calls(modules: Iterable[nn.Module]) -> Iterator[CallCount]:
    """Count the forward calls of the given modules inside the ``with`` block.

    Args:
        modules: the modules, for example the transformer blocks of a model.

    Yields:
        A :class:`CallCount`, which grows while the block runs.
    """
    result = CallCount()

    def count(*_: Any) -> None:
        result.total += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
