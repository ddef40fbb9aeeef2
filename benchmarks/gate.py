"""Compare results with a float64 oracle. A variant (one way to compute a case) whose results are wrong is not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: Largest accepted ||out - truth|| / ||truth|| by dtype of the operands, for a chain of a few products.
RELATIVE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}


class WrongResult(AssertionError):
    """Raised if the results of a variant are wrong, so that it is not timed."""


def require_correct(
    out: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    plain: Mapping[str, Tensor | None] | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Check the norm of every result's error against float64 and, with ``plain``, the largest error of an element.

    Args:
        out: name -> result of the variant.
        truth: name -> result of the oracle, in float64.
        plain: name -> result of plain PyTorch in the same dtype. The largest error may be at most twice the largest
            error of plain PyTorch, plus the machine epsilon times the largest value.
        dtype: dtype of the computation.

    Raises:
        WrongResult: a result is missing, non-finite or wrong; the message names it.
    """
    if set(out) != set(truth):
        raise WrongResult(f"results {sorted(out)}, expected {sorted(truth)}")
    for name, expected in truth.items():
        result = out[name]
        if (result is None) != (expected is None):
            raise WrongResult(f"{name}: {'missing' if result is None else 'unexpected'}")
        if result is None or expected is None:
            continue
        if result.shape != expected.shape:
            raise WrongResult(f"{name}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
        wide = result.detach().to(expected.device, torch.float64)
        if not torch.isfinite(wide).all():
            raise WrongResult(f"{name}: not finite; is every element written?")
        error = float((wide - expected).norm() / expected.norm().clamp_min(1e-300))
        if not error <= RELATIVE[dtype]:
            raise WrongResult(f"{name}: relative error {error:.2e} > {RELATIVE[dtype]:.0e} for {dtype}")
        reference = None if plain is None else plain[name]
        if reference is not None:
            worst = float((wide - expected).abs().max())
            plain_worst = float((reference.detach().to(expected.device, torch.float64) - expected).abs().max())
            allowed = 2 * plain_worst + torch.finfo(dtype).eps * float(expected.abs().max())
            if not worst <= allowed:
                raise WrongResult(
                    f"{name}: largest error {worst:.3e} > {allowed:.3e} (twice plain PyTorch's error, plus epsilon "
                    "times the largest value)"
                )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory from `torch.empty` and `torch.empty_like` with NaN, so that elements never written are detected."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return fill(empty(*args, **kwargs))

    def poisoned_like(*args: Any, **kwargs: Any) -> Tensor:
        return fill(empty_like(*args, **kwargs))

    with mock.patch.object(torch, "empty", poisoned_empty), mock.patch.object(torch, "empty_like", poisoned_like):
        yield


def exact(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with floating tensors detached and in float64."""
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
