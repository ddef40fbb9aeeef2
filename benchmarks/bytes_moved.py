"""Bytes through memory: the least that each step of a call must move, and what a form of a step moves.

bf16, deterministic; dA, dB and partial sums are float32. ``step_bytes`` is arithmetic over a shape: every input of a
step read once, every output written once, frozen products left out. ``moved`` adds up the launches that a form makes.
Sizes: G_i, y_i (M, n_i), N the sum of the n_i; T, S, dT, dS (M, R), R the projections times r; A (R, d); B_i (n_i, r).
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

#: As in flare_kernels/order.py.
ORDERS = ("frozen_first", "adapter_first")
_BYTES, _SUM_BYTES = 2, 4
_SHARED_BYTES = 227 * 1024

# --- the least --------------------------------------------------------------------------------------------------------


def step_bytes(
    shape: ProjectionShape | KernelShape, order: str = "frozen_first", *, accumulate_dx: bool | None = None
) -> dict[str, int]:
    """Return step -> its bytes.

    Args:
        order: "frozen_first": y is read and written, dx too. "adapter_first": y and dx are written, and bias is read.
        accumulate_dx: whether dx is added to one that is there, where that is not what the order says.
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
    """Return the bytes of all steps where frozen outputs are there already; dx is added to the frozen, or alone."""
    return sum(step_bytes(shape, accumulate_dx=accumulate_dx).values())


def moved_reads(shape: ProjectionShape) -> dict[str, int]:
    """Return the reads that frozen products make with the adapters first and not otherwise: buffer -> bytes.

    The products of q and v read the y they add to. Of those of dx, all add; otherwise the first of them writes.
    """
    M, model = shape.M, shape.model
    return {"y of q": _BYTES * M * model.n_q, "y of v": _BYTES * M * model.n_v, "dx": _BYTES * M * model.d}


def least_reading_once(shape: ProjectionShape, programs: int) -> int:
    """Return the least bytes of a grad_bottleneck whose programs compute both products from one read of G.

    Program (i, j) of ``row_groups`` x ``column_groups`` owns rows of group i and columns of group j. Its dH is one of
    ``column_groups`` partial sums and its dB one of ``row_groups``, each written and read once more; the count is the
    least over all such grids. A single group needs no partial sums.
    """
    M, N, count, r = shape.M, sum(shape.widths), len(shape.widths), shape.r

    def partials(row_groups: int, column_groups: int) -> int:
        # of one projection's dH, for each group of its columns: with several projections a group lies in one of them
        dH = column_groups * M * r if column_groups > count else 0
        dB = row_groups * N * r if row_groups > 1 else 0
        return 2 * _SUM_BYTES * (dH + dB)

    grids = ((rows, -(-programs // rows)) for rows in range(1, programs + 1))
    return step_bytes(shape)["grad_bottleneck"] + min(partials(*grid) for grid in grids)


# --- forms ------------------------------------------------------------------------------------------------------------


#: What the two kinds of programs of grad_bottleneck read and write.
_ROWS = {"G_0", "G_1", "G_2", "T", "S", "B_0", "B_1", "B_2", "dT", "dS"}
_STRIPS = {"G_0", "G_1", "G_2", "T", "S", "out"}


def launches(problem: Problem, form: str, **tiles: Any) -> list[Any]:
    """Return what a step launches in a form, with the general rule's tiles of a large card or those given."""
    from flare_kernels.triton_ops.primitives import tuned

    inputs = problem.make(torch.device("cpu"), real=False)
    with forcing(form=form, **tiles), recording(_SHARED_BYTES) as recorded:
        problem.run(tuned, inputs)
    return recorded


def moved(recorded: Iterable[Any]) -> int:
    """Return the bytes that launches move; partial sums are written and read once more, whoever adds them."""
    return sum(tensor.nbytes for launch in recorded for tensor in _moved_by(launch))


def _moved_by(launch: Any) -> Iterator[Tensor]:
    """Yield each tensor as often as a launch reads or writes it."""
    tensors = {name: one for name, one in launch.args.items() if isinstance(one, Tensor)}
    if tensors.pop("counters", None) is not None:  # the last program of a tile reads the partial sums again
        yield tensors["out"]
    parts = [set(tensors)]
    if "ROWS" in launch.args:
        parts = [part for part, runs in ((_ROWS, "ROWS"), (_STRIPS, "STRIPS")) if launch.args[runs]]
        if launch.args["group_chunks"] == 1:  # strips find in the L2 cache what the rows of their chunk have read
            parts = [set.union(*parts)]
    for part in parts:
        yield from {id(one): one for name, one in tensors.items() if name in part}.values()
