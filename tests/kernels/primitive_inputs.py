"""Shapes, inputs and the comparison with float64 for the tests of the Triton primitives.

The criterion: the largest error of a kernel is at most twice the largest error of plain PyTorch in the same dtype
(which rounds as PEFT's layers do), plus one machine epsilon of that dtype times the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flare_kernels import dropout
from flare_kernels.fusion import FUSIONS, get_fusion

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL = (None, *FUSIONS)
SCALING = 0.7
KEEP_SCALE = dropout.keep_scale(0.3)


@dataclass(frozen=True)
class Shape:
    """One set of sizes and dtypes.

    M is the number of rows of x, K its width, N the output width and R the rank. ``compute`` is the dtype of T, S, y
    and its gradient G, ``x`` the dtype of x and x_source, ``adapter`` the dtype of A and B. None means ``compute``.
    """

    M: int = 37
    K: int = 96
    N: int = 65
    R: int = 8
    compute: torch.dtype = F32
    x: torch.dtype | None = None
    adapter: torch.dtype | None = None

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.compute, self.x, self.adapter) if dtype)
        return f"M{self.M}-K{self.K}-N{self.N}-R{self.R}-{dtypes}"


DTYPES = (F16, BF16, F32)
# every dtype at a common shape and at a very small one, then other sizes, ranks and mixtures of dtypes
SHAPES = [
    *(Shape(compute=dtype) for dtype in DTYPES),
    *(Shape(M=1, K=33, N=17, R=1, compute=dtype) for dtype in DTYPES),
    Shape(M=130, K=33, N=65, R=5, compute=BF16),
    Shape(M=130, K=160, N=144, R=64, compute=BF16),
    Shape(M=37, K=96, N=80, R=65, compute=F16),
    Shape(M=40, K=48, N=48, R=256, compute=BF16),
    Shape(M=33, K=33, N=33, R=200, compute=F32),
    Shape(compute=BF16, adapter=F32),  # PEFT's default
    Shape(compute=BF16, adapter=F32, x=F32),  # under autocast
    Shape(compute=F16, adapter=F32, x=F32, R=64),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@dataclass
class Inputs:
    x: Tensor
    x_source: Tensor
    A: Tensor
    B: Tensor
    y: Tensor
    G: Tensor
    T: Tensor
    S: Tensor
    mask: Tensor
    mask_source: Tensor

    def __getitem__(self, names: str) -> list[Tensor]:
        return [getattr(self, name) for name in names.split()]


def make(shape: Shape, device: torch.device) -> Inputs:
    def randn(rows: int, cols: int, dtype: torch.dtype | None, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cols, dtype=F64) * scale).to(device, dtype or shape.compute)

    M, K, N, R = shape.M, shape.K, shape.N, shape.R
    seed = torch.tensor(5, device=device)
    return Inputs(
        x=randn(M, K, shape.x),
        x_source=randn(M, K, shape.x),
        A=randn(R, K, shape.adapter, K**-0.5),
        B=randn(N, R, shape.adapter, R**-0.5),
        y=randn(M, N, None),
        G=randn(M, N, None),
        T=randn(M, R, None),
        S=randn(M, R, None),
        mask=dropout.packed_mask(seed, M, K, 0.3, 0),
        mask_source=dropout.packed_mask(seed, M, K, 0.3, 1),
    )


def drop(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if mask is None else x * dropout.unpack(mask, x.shape[1], dtype) * KEEP_SCALE


def hidden(T: Tensor, S: Tensor, fusion: str | None, dtype: torch.dtype) -> Tensor:
    return T.to(dtype) if fusion is None else get_fusion(fusion)(S.to(dtype), T.to(dtype))


def assert_close(actual: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Assert the criterion that the module docstring defines.

    ``plain`` is the result of plain PyTorch in ``dtype``, ``truth`` the float64 result. ``scale`` is a typical
    magnitude of the values, which replaces the largest value of ``truth`` if it is larger. Results of a few elements
    need it, because all their elements can be small by cancellation, while the errors are not.
    """
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return
    error = (actual.to(F64) - truth).abs().max().item()
    scale = max(scale, truth.abs().max().item())
    allowed = 2 * (plain.to(F64) - truth).abs().max().item() + torch.finfo(dtype).eps * scale
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def strided(x: Tensor, how: str) -> Tensor:
    """Return a tensor with the values of x and other strides."""
    if how == "rows":  # every other row of a taller tensor
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
    if how == "transposed":
        return x.T.contiguous().T
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 3:] = x
    return wide[:, 3:]  # an unaligned slice of a wider buffer
