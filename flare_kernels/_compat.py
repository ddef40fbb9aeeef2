"""Private symbols of torch and Triton that this package uses, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Whether a functorch transform (vmap, grad, jvp, ...) is active.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python wrapper, which makes some 29 calls for functorch's sake alone."""
    return super(torch.autograd.Function, function).apply
