"""The non-public symbols of PyTorch that the kernels use do what the kernels expect."""

from __future__ import annotations

import torch
from torch import Tensor

from flare_kernels import _compat


def test_views_and_transforms_are_recognised() -> None:
    x = torch.zeros(3, 4)
    assert _compat.is_view(x[0]) and not _compat.is_view(x) and not _compat.is_view(x.clone())
    seen = []

    def recorded(row: Tensor) -> Tensor:
        seen.append(_compat.functorch_is_active())
        return row

    torch.vmap(recorded)(x)
    assert seen == [True] and not _compat.functorch_is_active()


def test_plain_apply_is_apply() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, label: str) -> Tensor:
            ctx.label = label
            return 2 * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
            assert ctx.label == "label"
            return 2 * grad, None

    x = torch.ones(3, requires_grad=True)
    y = _compat.plain_apply(Doubled)(x, "label")
    y.sum().backward()
    assert torch.equal(y, 2 * x) and torch.equal(x.grad, torch.full((3,), 2.0))


def test_streams_of_a_cpu_are_zero() -> None:
    assert _compat.current_raw_stream(torch.device("cpu")) == 0 and callable(_compat.current_cuda_device())
