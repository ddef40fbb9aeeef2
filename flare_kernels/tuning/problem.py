"""The problems that the tuner measures: every step at the sizes of the paper's models, on random data.

A step is one operation of the adapter (:mod:`flare_kernels.forms`). A module of primitives implements the operations,
for example :mod:`flare_kernels.torch_ops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import torch_ops
from ..forms import table_key
from ..function import apply_with_products
from ..launch_table import Key
from ..library import call_of
from ..triton_ops.config import operand_class

FUSION = "add_relu"


@dataclass(frozen=True)
class Shape:
    """Query and value projection of one block: input width d, output ``widths``. Lower tiers are tuned first."""

    name: str
    d: int
    widths: tuple[int, ...]
    tier: int = 0


#: The shapes of the paper's models, from their published configurations.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 4096, (4096, 1024)),
        Shape("xlm-r-large", 1024, (1024, 1024)),
        Shape("gemma-2-9b", 3584, (4096, 2048), tier=1),
        Shape("mt5-xl", 2048, (2048, 2048), tier=1),
    )
}

#: The inputs of a problem: name -> tensor or list of tensors.
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """How a step is called.

    Attributes:
        inputs: the names of the step's inputs.
        run: takes a module of primitives and the inputs, and returns the results. If ys is an input, it is changed in
            place.
    """

    inputs: tuple[str, ...]
    run: Callable[[Any, Inputs], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """One step at one size.

    Attributes:
        step: a key of ``STEPS``.
        shape: the widths of the projections.
        M: number of tokens.
        r: rank of one adapter.
        key: the key of the launch table's entry for this step and size.
        dtype: dtype of all inputs.
    """

    step: str
    shape: Shape
    M: int
    r: int
    key: Key
    dtype: torch.dtype = torch.bfloat16

    def make(self, device: torch.device, *, real: bool = True) -> Inputs:
        """Return random inputs, or uninitialised tensors of the same sizes if ``real`` is false."""
        M, r, d, widths = self.M, self.r, self.shape.d, self.shape.widths
        R = len(widths) * r

        def randn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            make = torch.randn if real else torch.empty
            x = make(rows, columns, device=device, dtype=self.dtype)
            return x.mul_(scale) if real and scale != 1.0 else x

        makers: dict[str, Callable[[], Any]] = {
            "x": lambda: randn(M, d),
            "x_source": lambda: randn(M, d),
            "A": lambda: randn(R, d, d**-0.5),
            "As": lambda: [randn(r, d, d**-0.5) for _ in widths],
            "Bs": lambda: [randn(n, r, r**-0.5) for n in widths],
            "Ws": lambda: [randn(n, d, d**-0.5) for n in widths],
            "ys": lambda: [randn(M, n) for n in widths],
            "Gs": lambda: [randn(M, n) for n in widths],
            "T": lambda: randn(M, R),
            "S": lambda: randn(M, R),
        }
        return {name: makers[name]() for name in STEPS[self.step].inputs}

    def run(self, ops: Any, inputs: Inputs) -> list[Tensor]:
        """Run the step with a module of primitives and return its results."""
        return STEPS[self.step].run(ops, inputs)

    def __str__(self) -> str:
        return f"{self.step:<16}{self.shape.name:<14}M={self.M:<7}r={self.r:<5}"


def problems(
    shapes: Iterable[Shape], tokens: Sequence[int], ranks: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> Iterator[Problem]:
    """Yield one problem per entry of the launch table: every step at every size, the most used sizes first.

    The order is: tiers of the shapes, then ranks, tokens and shapes in the order of the arguments. The step decode is
    measured at the sizes that its kernels take (few tokens and a rank of at most MAX_RANK), the other steps at all
    other sizes.
    """
    from ..triton_ops.decode import MAX_RANK, MAX_ROWS

    operands = operand_class(dtype.itemsize, dtype.itemsize, True)
    tiers = itertools.groupby(sorted(shapes, key=lambda shape: shape.tier), key=lambda shape: shape.tier)
    seen: set[Key] = set()
    for _, tier in tiers:
        for r, M, shape in itertools.product(ranks, tokens, list(tier)):
            R, N = len(shape.widths) * r, max(shape.widths)
            sizes = {"shrink": (R, shape.d), "expand": (r, N), "grad_bottleneck": (r, N), "grad_weight": (R, shape.d)}
            sizes |= {"grad_input": (R, shape.d), "order": (r, N), "decode": (r, shape.d)}
            for step, (rank, width) in sizes.items():
                key = table_key(step, operands, rank, M, width)
                if (step == "decode") == (M <= MAX_ROWS and r <= MAX_RANK) and key not in seen:
                    seen.add(key)
                    yield Problem(step, shape, M, r, key, dtype)


def _phi(t: Inputs) -> dict[str, Any]:
    return {"scalings": [0.5] * len(t["Bs"]), "fusion": FUSION}


def _shrink(ops: Any, t: Inputs) -> list[Tensor]:
    return list(ops.shrink(t["x"], t["x_source"], t["A"], compute_dtype=t["x"].dtype))


def _expand(ops: Any, t: Inputs) -> list[Tensor]:
    # in place, as in training: each call adds the same amount, so the sums stay finite
    ops.expand_(t["ys"], t["T"], t["S"], t["Bs"], **_phi(t))
    return list(t["ys"])


def _grad_bottleneck(ops: Any, t: Inputs) -> list[Tensor]:
    dT, dS = torch.empty_like(t["T"]), torch.empty_like(t["S"])
    dBs = ops.grad_bottleneck(t["Gs"], t["T"], t["S"], t["Bs"], dT=dT, dS=dS, B_grad_dtype=torch.float32, **_phi(t))
    return [dT, dS, *dBs]


def _grad_weight(ops: Any, t: Inputs) -> list[Tensor]:
    return [ops.grad_weight(t["T"], t["x"], t["S"], t["x_source"], grad_dtype=torch.float32)]


def _grad_input(ops: Any, t: Inputs) -> list[Tensor]:
    return [ops.grad_input(t["T"], t["A"], dtype=t["T"].dtype)]


def _decode(ops: Any, t: Inputs) -> list[Tensor]:
    if hasattr(ops, "decode"):
        call = _phi(t) | {"compute_dtype": t["x"].dtype, "save_for_backward": False}
        ops.decode(t["x"], t["x_source"], [], t["ys"], t["As"], t["Bs"], **call)
    else:
        T, S = ops.shrink(t["x"], t["x_source"], ops.stack(t["As"], t["x"].dtype), compute_dtype=t["x"].dtype)
        ops.expand_(t["ys"], T, S, t["Bs"], **_phi(t))
    return list(t["ys"])


def _order(ops: Any, t: Inputs) -> list[Tensor]:
    """Run both projections forward and backward with the frozen products, as a layer does."""
    backend = "torch" if ops is torch_ops else "auto"
    (x, *weights) = (tensor.detach().requires_grad_() for tensor in (t["x"], *t["As"], *t["Bs"]))
    As, Bs, Ws = weights[: len(t["As"])], weights[len(t["As"]) :], t["Ws"]
    adapters = tuple((i, A.shape[0], 0.5, FUSION) for i, A in enumerate(As))
    call = call_of(backend, x.device, x.dtype, adapters, len(Ws), 0.0)
    sizes = (0, 0, len(Ws))
    ys = apply_with_products(call, sizes, x, t["x_source"], None, [], None, As, Bs, Ws, [None] * len(Ws))
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *weights], t["Gs"])]


STEPS: dict[str, Step] = {
    "shrink": Step(("x", "x_source", "A"), _shrink),
    "expand": Step(("ys", "T", "S", "Bs"), _expand),
    "grad_bottleneck": Step(("Gs", "T", "S", "Bs"), _grad_bottleneck),
    "grad_weight": Step(("T", "x", "S", "x_source"), _grad_weight),
    "grad_input": Step(("T", "A"), _grad_input),
    "order": Step(("x", "x_source", "As", "Bs", "Ws", "Gs"), _order),
    "decode": Step(("x", "x_source", "ys", "As", "Bs"), _decode),
}
