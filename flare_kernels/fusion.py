"""The element-wise fusion functions phi(S, T) and their derivatives (FLARE, section 3; docs/how-it-works.md).

Shapes: S and T are (..., m, r): the down-projected source and target stream. H = phi(S, T) has the same shape. dH,
dT and dS are the gradients of the loss with respect to H, T and S, and [T > 0] is 1 where T > 0 and 0 elsewhere. This
module computes in plain PyTorch; the Triton functions with the same formulas are in ``triton_ops/device.py``.

    add       H = S + T                dT = dH                  dS = dH
    mul       H = S * T                dT = dH * S              dS = dH * T
    add_relu  H = relu(S) + relu(T)    dT = dH * [T > 0]        dS = dH * [S > 0]
    mul_relu  H = relu(S) * relu(T)    dT = dH*relu(S)*[T > 0]  dS = dH*relu(T)*[S > 0]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fusion:
    """An element-wise fusion phi.

    Attributes:
        name: the value of the argument ``fusion``.
        kernel_id: the number of the fusion in the Triton kernels (0 is plain LoRA).
        forward: (S, T) -> H.
        backward: (dH, S, T) -> (dT, dS).
    """

    name: str
    kernel_id: int
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, S: Tensor, T: Tensor) -> Tensor:
        return self.forward(S, T)


def _mul_relu_backward(dH: Tensor, S: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    return (dH * S.relu()).masked_fill(T <= 0, 0.0), (dH * T.relu()).masked_fill(S <= 0, 0.0)


def _add_relu_backward(dH: Tensor, S: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    # masked_fill and not a product with 0 or 1: 0 * inf and 0 * NaN are NaN
    return dH.masked_fill(T <= 0, 0.0), dH.masked_fill(S <= 0, 0.0)


_REGISTRY: dict[str, Fusion] = {
    fusion.name: fusion
    for fusion in (
        Fusion("add", 1, lambda S, T: S + T, lambda dH, S, T: (dH, dH)),
        Fusion("mul", 2, lambda S, T: S * T, lambda dH, S, T: (dH * S, dH * T)),
        Fusion("add_relu", 3, lambda S, T: S.relu() + T.relu(), _add_relu_backward),
        Fusion("mul_relu", 4, lambda S, T: S.relu() * T.relu(), _mul_relu_backward),
    )
}

#: Fusions with fused kernels.
FUSIONS: tuple[str, ...] = tuple(_REGISTRY)

#: Fusions that combine different token positions. They have no fused kernel and run in plain PyTorch
#: (:mod:`flare_kernels.reference`).
EAGER_FUSIONS: tuple[str, ...] = ("cross_attention", "matmul", "matmul_relu")

ALL_FUSIONS: tuple[str, ...] = FUSIONS + EAGER_FUSIONS


def get_fusion(name: str) -> Fusion:
    """Return the element-wise fusion of a name.

    Raises:
        ValueError: the name has no fused kernel.
    """
    try:
        return _REGISTRY[name]
    except (KeyError, TypeError):
        raise ValueError(f"fusion={name!r} is not one of {', '.join(FUSIONS)} (or None for plain LoRA)") from None
