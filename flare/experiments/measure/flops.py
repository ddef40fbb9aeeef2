"""Count the FLOPs (floating-point operations) of matrix products and attention.

PyTorch's FlopCounterMode counts them. This module adds formulas for operators that FlopCounterMode does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

_aten: Any = torch.ops.aten
_Shape = torch.Size


def _addmm_flops(added: _Shape, a: _Shape, b: _Shape, **_: Any) -> int:
    """Return the FLOPs of the product of a (..., M, K) and b (..., K, N)."""
    return 2 * a.numel() * b[-1]


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention: query (B, heads, m, c), key (B, heads, n, c), value (B, heads, n, v)."""
    scores = query[:3].numel() * key[2]
    return 2 * scores * (query[3] + value[3])


def _attention_backward_flops(grad: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of recomputing the scores and of the gradients of scores, query, key and value."""
    scores = query[:3].numel() * key[2]
    return 2 * scores * (3 * query[3] + 2 * value[3])


#: Operators without a formula in PyTorch: in-place matrix products, and attention on a CPU.
_MORE_FLOPS: dict[Any, Any] = {
    _aten.addmm_: _addmm_flops,
    _aten.baddbmm_: _addmm_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _NoModuleTracker(ModuleTracker):
    """A ModuleTracker that tracks no modules.

    The hooks of ModuleTracker raise an error in ``torch.autograd.grad`` with respect to a module's input.
    """

    def __enter__(self) -> _NoModuleTracker:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass
class FlopCount:
    """Result of :func:`count_flops`.

    Attributes:
        total: floating-point operations of all products, 2 per multiply-add.
        by_op: floating-point operations of each operator, by the operator's name.
    """

    total: int = 0
    by_op: dict[str, int] = field(default_factory=dict)


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the FLOPs of matrix products and attention inside the ``with`` block, in forward and backward passes.

    Element-wise operations and Triton kernels are not counted. An attention operator counts as the matrix products
    that it computes: 2 in the forward pass, and 5 in the backward pass if it computes the scores again.

    Yields:
        A :class:`FlopCount`, which is complete when the block ends.
    """
    result = FlopCount()
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
    counter.mod_tracker = _NoModuleTracker()
    try:
        with counter:
            yield result
    finally:
        result.total = counter.get_total_flops()
        result.by_op = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
