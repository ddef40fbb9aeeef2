"""Fewest bytes through memory of the joint adapters of q and v, step by step, in both orders of product and adapter.

Forward + backward, deterministic, bf16, dA and dB float32; frozen products left out. Every input of each step is read
once, every output written once. Orders as in `flare_kernels/order.py`.
"""

from __future__ import annotations

from shapes import ProjectionShape

ORDERS = ("frozen_first", "adapter_first")
_BYTES = 2


def step_bytes(
    shape: ProjectionShape, order: str = "frozen_first", *, accumulate_dx: bool | None = None
) -> dict[str, int]:
    """Step -> its bytes.

    Args:
        order: "frozen_first": y is read and written, dx too. "adapter_first": y and dx are written, and bias is read.
        accumulate_dx: whether dx is added to one that is there, where that is not what the order says.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    adds = order == "frozen_first"
    accumulate_dx = adds if accumulate_dx is None else accumulate_dx
    M, r, d, n = shape.M, shape.r, shape.model.d, shape.model.n_q + shape.model.n_v
    stream, bottlenecks, out, A, B = (_BYTES * size for size in (M * d, 4 * M * r, M * n, 2 * r * d, n * r))
    bias = _BYTES * n if shape.model.bias and not adds else 0
    return {
        "shrink": 2 * stream + A + bottlenecks,
        "expand": (2 if adds else 1) * out + bias + bottlenecks + B,
        "grad_bottleneck": out + bottlenecks + B + bottlenecks + 2 * B,
        "grad_weight": 2 * stream + bottlenecks + 2 * A,
        "grad_input": (2 if accumulate_dx else 1) * stream + bottlenecks // 2 + A,
    }


def adapter_bytes(shape: ProjectionShape, *, accumulate_dx: bool) -> int:
    """Bytes of all steps where frozen outputs are there already; dx is added to the frozen products', or alone."""
    return sum(step_bytes(shape, accumulate_dx=accumulate_dx).values())


def moved_reads(shape: ProjectionShape) -> dict[str, int]:
    """Reads that frozen products make with the adapters first and do not make otherwise: buffer -> bytes.

    The products of q and v read the y they add to. Of those of dx, all add; otherwise the first of them writes.
    """
    M, model = shape.M, shape.model
    return {"y of q": _BYTES * M * model.n_q, "y of v": _BYTES * M * model.n_v, "dx": _BYTES * M * model.d}
