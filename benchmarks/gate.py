"""Nothing is timed that is wrong: the comparison with the float64 oracle that every case passes first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: ||out - truth|| / ||truth|| that operands of a dtype explain, through a chain of a few products.
RELATIVE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}


class WrongResult(AssertionError):
    """A variant does not compute what its row says; it must not be timed."""


def require_correct(
    out: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    plain: Mapping[str, Tensor | None] | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Every result near the float64 truth, by norm and, where ``plain`` is given, element by element.

    Args:
        out: name -> what the variant computed.
        truth: name -> the oracle's, float64.
        plain: name -> plain PyTorch's in the same dtype: the largest error may be twice its, plus one epsilon.
        dtype: of the computation.

    Raises:
        WrongResult: a missing, non-finite or wrong result; the message names it.
    """
    if set(out) != set(truth):
        raise WrongResult(f"results {sorted(out)}, expected {sorted(truth)}")
    for name, expected in truth.items():
        got = out[name]
        if (got is None) != (expected is None):
            raise WrongResult(f"{name}: {'missing' if got is None else 'unexpected'}")
        if got is None or expected is None:
            continue
        if got.shape != expected.shape:
            raise WrongResult(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        wide = got.detach().to(expected.device, torch.float64)
        if not torch.isfinite(wide).all():
            raise WrongResult(f"{name}: not finite; was all of it written?")
        error = float((wide - expected).norm() / expected.norm().clamp_min(1e-300))
        if not error <= RELATIVE[dtype]:
            raise WrongResult(f"{name}: relative error {error:.2e} > {RELATIVE[dtype]:.0e} for {dtype}")
        reference = None if plain is None else plain[name]
        if reference is not None:
            worst = float((wide - expected).abs().max())
            theirs = float((reference.detach().to(expected.device, torch.float64) - expected).abs().max())
            allowed = 2 * theirs + torch.finfo(dtype).eps * float(expected.abs().max())
            if not worst <= allowed:
                raise WrongResult(f"{name}: largest error {worst:.3e} > {allowed:.3e}, twice plain PyTorch's")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that `torch.empty` hands out is full of NaN, so that what nobody writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(made: Tensor) -> Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return spoil(empty(*args, **kwargs))

    def poisoned_like(*args: Any, **kwargs: Any) -> Tensor:
        return spoil(empty_like(*args, **kwargs))

    with mock.patch.object(torch, "empty", poisoned_empty), mock.patch.object(torch, "empty_like", poisoned_like):
        yield


def exact(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors in float64, without a graph."""
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
