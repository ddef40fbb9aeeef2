"""Compute the memory traffic of an adapter's steps in bytes: lower bounds, and what recorded launches move.

The steps are the primitives shrink, expand, grad_bottleneck, grad_weight and grad_input. ``step_bytes`` returns the
lower bound of each step at a shape, with every input read once and every output written once. The products with the
frozen weights ("frozen products") are not counted. A form is one way to launch a step, and ``moved`` adds up what the
launches of a form read and write. The numbers hold for bf16 and deterministic kernels; dA, dB and partial sums are
float32.
Sizes, with M tokens, input width d and rank r: x, x_source and dx are (M, d). For each projection i, y_i and its
gradient G_i are (M, n_i), and N is the sum of the n_i; T, S, dT and dS are (M, R), and R is r times the number of
projections; A is (R, d); B_i is (n_i, r). H_i = phi(S_i, T_i) is (M, r), and dH_i = G_i B_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from shapes import KernelShape, ProjectionShape
from torch import Tensor

from flare_kernels.launch_mode import forcing, recording

if TYPE_CHECKING:
    from flare_kernels.tuning import Problem

#: Orders in which frozen products and adapters run, as in flare_kernels/order.py.
ORDERS = ("frozen_first", "adapter_first")
_BYTES, _SUM_BYTES = 2, 4
_SHARED_BYTES = 227 * 1024

# --- lower bounds ----------------------------------------------------------------------------------------------------


def step_bytes(
    shape: ProjectionShape | KernelShape, order: str = "frozen_first", *, accumulate_dx: bool | None = None
) -> dict[str, int]:
    """Return the bytes of each step by name.

    Args:
        shape: sizes of the projections.
        order: "frozen_first": the adapters read and write y and dx. "adapter_first": the adapters only write y and dx,
            and they read the bias.
        accumulate_dx: whether dx is added to an existing dx. None: it is added if the frozen products run first.

    Raises:
        ValueError: unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    adds = order == "frozen_first"
    accumulate_dx = adds if accumulate_dx is None else accumulate_dx
    M, d, N, R = shape.M, shape.model.d, sum(shape.widths), len(shape.widths) * shape.r
    stream, bottleneck, out, A, B = (_BYTES * size for size in (M * d, M * R, M * N, R * d, N * shape.r))
    bias = _BYTES * N if shape.model.bias and not adds else 0
    return {
        "shrink": 2 * stream + A + 2 * bottleneck,
        "expand": (2 if adds else 1) * out + bias + 2 * bottleneck + B,
        "grad_bottleneck": out + 4 * bottleneck + B + _SUM_BYTES * N * shape.r,
        "grad_weight": 2 * stream + 2 * bottleneck + _SUM_BYTES * R * d,
        "grad_input": (2 if accumulate_dx else 1) * stream + bottleneck + A,
    }


def adapter_bytes(shape: ProjectionShape, *, accumulate_dx: bool) -> int:
    """Return the bytes of all steps together, if the frozen products ran first.

    ``accumulate_dx`` tells whether the adapters add their dx to the dx of the frozen products.
    """
    return sum(step_bytes(shape, accumulate_dx=accumulate_dx).values())


def moved_reads(shape: ProjectionShape) -> dict[str, int]:
    """Return, for each buffer, the bytes that the frozen products read additionally if the adapters run first.

    The products of q and v then read the y that they add to, and every product of dx adds to dx. If the frozen products
    run first, the first product of dx only writes.
    """
    M, model = shape.M, shape.model
    return {"y of q": _BYTES * M * model.n_q, "y of v": _BYTES * M * model.n_v, "dx": _BYTES * M * model.d}


def least_reading_once(shape: ProjectionShape, programs: int) -> int:
    """Return the least bytes of a grad_bottleneck that computes both products (dH and dB) from one read of G.

    In a grid of ``row_groups`` x ``column_groups`` programs, program (i, j) reads the rows of group i and the columns
    of group j; a group of columns lies within one projection. If a projection has several groups of columns, its dH is
    a sum of partial sums. If there are several groups of rows, dB is a sum of partial sums. Each partial sum is written
    and read once. For each number of groups of rows from 1 to ``programs``, the grid has the fewest groups of columns
    that give at least ``programs`` programs. The result is the minimum over these grids.
    """
    M, N, count, r = shape.M, sum(shape.widths), len(shape.widths), shape.r

    def partials(row_groups: int, column_groups: int) -> int:
        dH = column_groups * M * r if column_groups > count else 0
        dB = row_groups * N * r if row_groups > 1 else 0
        return 2 * _SUM_BYTES * (dH + dB)

    grids = ((rows, -(-programs // rows)) for rows in range(1, programs + 1))
    return step_bytes(shape)["grad_bottleneck"] + min(partials(*grid) for grid in grids)


# --- forms ------------------------------------------------------------------------------------------------------------


#: Tensors that the two kinds of programs of grad_bottleneck read and write: row programs compute dT and dS, strip
#: programs compute dB.
_ROWS = {"G_0", "G_1", "G_2", "T", "S", "B_0", "B_1", "B_2", "dT", "dS"}
_STRIPS = {"G_0", "G_1", "G_2", "T", "S", "out"}


def launches(problem: Problem, form: str, **tiles: Any) -> list[Any]:
    """Return the launches of a step in one form, recorded for a GPU with 227 KiB of shared memory per thread block.

    ``tiles`` has the TileConfig of kernels by name. Other kernels use the configuration that the package chooses.
    """
    from flare_kernels.triton_ops.primitives import tuned

    inputs = problem.make(torch.device("cpu"), real=False)
    with forcing(form=form, **tiles), recording(_SHARED_BYTES) as recorded:
        problem.run(tuned, inputs)
    return recorded


def moved(recorded: Iterable[Any]) -> int:
    """Return the bytes that launches move. Partial sums count twice: they are written, then read."""
    return sum(tensor.nbytes for launch in recorded for tensor in _moved_by(launch))


def _moved_by(launch: Any) -> Iterator[Tensor]:
    """Yield the tensors that each kind of program of a launch reads or writes.

    A tensor that is both an input and a result counts once. This is too little for expand without biases, which reads
    y and writes it.
    """
    tensors = {name: value for name, value in launch.args.items() if isinstance(value, Tensor)}
    if tensors.pop("counters", None) is not None:  # the last program of a tile reads the partial sums again
        yield tensors["out"]
    parts = [set(tensors)]
    if "ROWS" in launch.args:
        parts = [part for part, runs in ((_ROWS, "ROWS"), (_STRIPS, "STRIPS")) if launch.args[runs]]
        if launch.args["group_chunks"] == 1:  # strip programs read from the L2 cache what row programs loaded
            parts = [set.union(*parts)]
    for part in parts:
        yield from {id(tensor): tensor for name, tensor in tensors.items() if name in part}.values()
