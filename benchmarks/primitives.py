"""Call the primitives (the five steps of an adapter) directly. Most other benchmarks call the public functions.

A case is one primitive on one projection. ``operands`` makes its inputs, ``run`` calls the primitive in a module that
implements it, ``oracle`` computes the results in float64, and ``flops`` counts the operations.
``bytes_moved.step_bytes`` computes the bytes of a case. Shapes, with M tokens, input width d, output width n and rank
r: x, x_source (M, d); T, S, dT, dS (M, r); y, G (M, n); A (r, d); B (n, r).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from shapes import KernelShape
from torch import Tensor

import flare_kernels
from flare_kernels import selection, torch_ops
from flare_kernels.fusion import get_fusion

FUSION = "add_relu"
SCALING = 2.0
DTYPE = torch.bfloat16

Operands = dict[str, Tensor]
Results = dict[str, Tensor | None]


def module(variant: str, device: torch.device) -> ModuleType | str:
    """Return the module with the primitives of a variant, or the reason why they cannot run on this machine.

    Args:
        variant: "flare": the package chooses at each size. "triton": only Triton kernels. "peer": only PyTorch
            products.
    """
    if variant == "peer":
        return torch_ops
    status = flare_kernels.backends()["triton"]
    if device.type != "cuda":
        return f"Triton kernels: {status}" if not status else "Triton kernels are timed on a CUDA device only"
    if not status:
        return f"Triton kernels: {status}"
    return selection.primitives("auto" if variant == "flare" else "triton", device, DTYPE)


def recorded_launches(shape: KernelShape) -> int | None:
    """Return the number of Triton kernels that a call launches, without running the kernels; None without Triton."""
    try:
        from flare_kernels.launch_mode import recording
        from flare_kernels.triton_ops import primitives as triton_ops
    except ImportError:
        return None
    with recording(shared_bytes=227 * 1024) as launches:
        run(shape.primitive, triton_ops, operands(shape, torch.device("cpu")))
    return len(launches)


def operands(shape: KernelShape, device: torch.device) -> Operands:
    """Return random inputs in bf16. A and B are scaled so that the entries of products with them have unit scale."""
    M, r, d, n = shape.M, shape.r, shape.model.d, shape.n

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=DTYPE) * scale

    makers = {
        "shrink": lambda: {"x": randn(M, d), "x_source": randn(M, d), "A": randn(r, d, scale=d**-0.5)},
        "expand": lambda: {
            "y": randn(M, n),
            "T": randn(M, r),
            "S": randn(M, r),
            "B": randn(n, r, scale=r**-0.5),
        },
        "grad_bottleneck": lambda: {
            "G": randn(M, n),
            "T": randn(M, r),
            "S": randn(M, r),
            "B": randn(n, r, scale=n**-0.5),
        },
        "grad_weight": lambda: {"dT": randn(M, r), "x": randn(M, d), "dS": randn(M, r), "x_source": randn(M, d)},
        "grad_input": lambda: {"dT": randn(M, r), "A": randn(r, d, scale=r**-0.5)},
    }
    return makers[shape.primitive]()


def run(primitive: str, ops: ModuleType, t: Operands) -> Results:
    """Call a primitive of the module ``ops`` once, and return its results by name.

    ``expand`` adds to t["y"] in place, as in training.
    """
    call: Any = ops
    if primitive == "shrink":
        T, S = call.shrink(t["x"], t["x_source"], t["A"], compute_dtype=DTYPE)
        return {"T": T, "S": S}
    if primitive == "expand":
        call.expand_([t["y"]], t["T"], t["S"], [t["B"]], scalings=[SCALING], fusion=FUSION)
        return {"y": t["y"]}
    if primitive == "grad_bottleneck":
        dT, dS = torch.empty_like(t["T"]), torch.empty_like(t["S"])
        outs: dict[str, Any] = {"dT": dT, "dS": dS, "B_grad_dtype": torch.float32}
        (dB,) = call.grad_bottleneck([t["G"]], t["T"], t["S"], [t["B"]], scalings=[SCALING], fusion=FUSION, **outs)
        return {"dT": dT, "dS": dS, "dB": dB}
    if primitive == "grad_weight":
        return {"dA": call.grad_weight(t["dT"], t["x"], t["dS"], t["x_source"], grad_dtype=torch.float32)}
    return {"dx": call.grad_input(t["dT"], t["A"], dtype=DTYPE)}


def oracle(primitive: str, t: Operands) -> dict[str, Tensor]:
    """Return the results of a primitive's formula in plain PyTorch. The operands ``t`` are in float64."""
    if primitive == "shrink":
        return {"T": t["x"] @ t["A"].T, "S": t["x_source"] @ t["A"].T}
    if primitive == "expand":
        return {"y": t["y"] + SCALING * get_fusion(FUSION)(t["S"], t["T"]) @ t["B"].T}
    if primitive == "grad_bottleneck":
        phi = get_fusion(FUSION)
        dT, dS = phi.backward(SCALING * t["G"] @ t["B"], t["S"], t["T"])
        return {"dT": dT, "dS": dS, "dB": SCALING * t["G"].T @ phi(t["S"], t["T"])}
    if primitive == "grad_weight":
        return {"dA": t["dT"].T @ t["x"] + t["dS"].T @ t["x_source"]}
    return {"dx": t["dT"] @ t["A"]}


def flops(shape: KernelShape) -> int:
    """Return the floating-point operations of the matrix products."""
    M, r, d, n = shape.M, shape.r, shape.model.d, shape.n
    wide, out = 2 * M * r * d, 2 * M * r * n
    return {
        "shrink": 2 * wide,
        "expand": out,
        "grad_bottleneck": 2 * out,
        "grad_weight": 2 * wide,
        "grad_input": wide,
    }[shape.primitive]
