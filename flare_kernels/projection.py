"""The down-projection of one stream and the gradient of its weights, without autograd.

    S = drop(x) A^T        dA = dS^T drop(x)              x (M, d), A (R, d), S and dS (M, R)

M tokens, d input width, R rank; drop is dropout. FLARE's source pass uses these functions to project the source states
before the layers that read S run. One seed gives the same dropout mask here as for the source stream of
:func:`flare_kernels.fused_lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dropout as _dropout
from .node import without_autocast
from .selection import primitives


def stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices (R_i, d) on one device, concatenated along the rows in dtype: (sum of R_i, d).

    A single matrix that already has this dtype is returned without a copy.
    """
    return primitives("auto", weights[0].device, dtype).stack(weights, dtype)  # type: ignore[no-any-return]


def project(x: Tensor, A: Tensor, *, seed: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Return S = drop(x) A^T, (M, R) in x's dtype.

    Args:
        x: (M, d).
        A: (R, d), any float dtype; rounded to x's dtype.
        seed: int64 scalar from :func:`flare_kernels.dropout.draw_seed`; None for no dropout.
        dropout_p: probability of zeroing an entry of x.
    """
    ops = primitives("auto", x.device, x.dtype)

    def shrink() -> Any:
        mask, scale = _mask(ops, x, seed, dropout_p), _dropout.keep_scale(dropout_p)
        return ops.shrink(None, x, A, compute_dtype=x.dtype, mask_source=mask, keep_scale=scale)

    return without_autocast(shrink, x.device)[1]  # type: ignore[no-any-return]


def project_grad(dS: Tensor, x: Tensor, *, seed: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Return dA = dS^T drop(x), (R, d) in float32 (float64 for float64), with the mask that :func:`project` used."""
    ops = primitives("auto", x.device, x.dtype)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def grad_weight() -> Any:
        mask, scale = _mask(ops, x, seed, dropout_p), _dropout.keep_scale(dropout_p)
        return ops.grad_weight(None, None, dS, x, mask_source=mask, keep_scale=scale, grad_dtype=dtype)

    return without_autocast(grad_weight, x.device)  # type: ignore[no-any-return]


def _mask(ops: Any, x: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    if seed is None:
        return None
    return _dropout.packed_mask(seed, x.shape[0], x.shape[1], p, _dropout.SOURCE_STREAM, ops.dropout_mask)
