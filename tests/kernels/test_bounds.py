"""Test that no kernel reads or writes outside its tensors.

Tensors are views into larger buffers whose margins contain NaN. An out-of-bounds read that affects a result makes it
NaN. An out-of-bounds write changes the margins, which must have the same bits after the call. The checker (bounds.py)
also detects accesses that change neither a result nor a margin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import bounds
import odd_forms
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from odd_calls import BF16, CASES, F16, F32, odd_calls, require_close

from flare_kernels.triton_ops import primitives as triton_ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bounds are checked by the interpreter, on a CPU")

MARGIN = 24


class Framed:
    """Makes tensors inside larger buffers, and checks that the memory around the tensors is unchanged."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, values: Tensor) -> Tensor:
        """Return a view with these values, surrounded by NaN (integers: 255), also between its rows."""
        rows, cols = values.shape
        filling = torch.nan if values.is_floating_point() else 255
        # the margin preserves the alignment of the rows, so that the aligned variants of the kernels are checked too
        buffer = torch.full((rows + 2, cols + 2 * MARGIN), filling, dtype=values.dtype)
        view = buffer[1:-1, MARGIN : MARGIN + cols]
        view.copy_(values)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:-1, MARGIN : MARGIN + cols] = False
        self.buffers.append((buffer, outside, self.bits(buffer)[outside].clone()))
        return view

    @staticmethod
    def bits(buffer: Tensor) -> Tensor:
        return buffer.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.element_size()])

    def require_untouched(self) -> None:
        for buffer, outside, before in self.buffers:
            assert torch.equal(self.bits(buffer)[outside], before), (
                f"a write into the margin of a buffer of {tuple(buffer.shape)}"
            )


@pytest.fixture
def framed() -> Iterator[Framed]:
    framed = Framed()
    yield framed
    assert framed.buffers
    framed.require_untouched()


KERNELS = {"shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input", "dropout_mask", "stack"}
DECODE = {"shrink_decode", "expand_decode"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])) + f"-{case[4][0]}-{case[4][1]}")
def test_every_kernel_stays_within_its_tensors(case: Any, framed: Framed) -> None:
    (M, *_, R, (dtype, _)) = case
    with bounds.checked() as seen:
        for actual, expected in odd_calls(case, framed, torch.device("cpu")):
            require_close(actual, expected, dtype)
    ran = {name.removesuffix("_kernel") for name, accesses in seen.items() if accesses.stores}
    assert ran >= KERNELS and (ran >= DECODE) == triton_ops.can_decode(M, [R, R]), ran
    assert all(accesses.loads for accesses in seen.values())


@pytest.mark.parametrize("case", odd_forms.CASES, ids=str)
def test_every_form_of_a_step_stays_within_its_tensors(case: Any, framed: Framed) -> None:
    with bounds.checked() as seen:
        for actual, expected in odd_forms.odd_forms(case, framed, torch.device("cpu")):
            require_close(actual, expected, case[3][0])
    ran = {name.removesuffix("_kernel") for name, accesses in seen.items() if accesses.stores and accesses.loads}
    tma = {"shrink_tma", "grad_weight_tma"} if case[2] == 24 else set()
    assert ran >= KERNELS - {"dropout_mask"} | tma and (tma or not ran & {"shrink_tma", "grad_weight_tma"}), ran
    assert {name for name, accesses in seen.items() if accesses.atomics} == {"shrink_kernel", "grad_weight_kernel"}


@pytest.mark.parametrize("name", ["shrink", "grad_weight"])
def test_split_k_stays_within_its_workspace(name: str) -> None:
    long, short, R = 700, 20, 5
    M, K = (short, long) if name == "shrink" else (long, short)
    x, x_source, A, T = torch.randn(M, K), torch.randn(M, K), torch.randn(R, K), torch.randn(M, R)
    with bounds.checked() as seen:
        if name == "shrink":
            triton_ops.shrink(x, x_source, A, compute_dtype=F32)
        else:
            triton_ops.grad_weight(T, x, T, x_source, grad_dtype=F32)
    assert seen["split_k_reduce_kernel"].loads > seen["split_k_reduce_kernel"].stores > 0


@triton.jit
def copy_kernel(x, y, rows, cols, x_stride, y_stride, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy x to y, with masks that let it read READ and write WRITE columns too many."""
    i_row = tl.program_id(0)
    o_col = tl.arange(0, BLOCK)
    b_x = tl.load(x + i_row * x_stride + o_col, mask=o_col < cols + READ, other=0.0)
    tl.store(y + i_row * y_stride + o_col, b_x, mask=o_col < cols + WRITE)


@triton.jit
def count_kernel(counters, at):
    tl.atomic_add(counters + at, 1)


def out_of_bounds(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the message of the OutOfBounds error that the interpreter wrapped."""
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, bounds.OutOfBounds):
        error = error.__cause__
    assert error is not None, caught.value
    return str(error)


def test_the_checker_detects_atomics() -> None:
    counters = torch.zeros(4, dtype=torch.int32)
    with bounds.checked() as seen:
        count_kernel[(3,)](counters[:2], 1)
        assert (seen["count_kernel"].atomics, counters.tolist()) == (3, [0, 3, 0, 0])
        with pytest.raises(Exception) as caught:
            count_kernel[(1,)](counters[:2], 2)
    assert re.search("updates 1 .* of counters", out_of_bounds(caught))
    assert counters.tolist() == [0, 3, 0, 0], "memory out of bounds must not be changed"


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("read", "write", "message"), [(0, 0, ""), (1, 0, "reads 1 .* of x"), (0, 1, "writes 1 .* of y")]
)
def test_the_checker_detects_one_element_too_many(dtype: torch.dtype, read: int, write: int, message: str) -> None:
    """An element between two rows of a view is out of bounds, even if its value is not used."""
    x, y = torch.ones(3, 8, dtype=dtype)[:, :5], torch.zeros(3, 9, dtype=dtype)[:, :5]

    def run() -> None:
        copy_kernel[(3,)](x, y, 3, 5, x.stride(0), y.stride(0), READ=read, WRITE=write, BLOCK=8)

    with bounds.checked() as seen:
        if not message:
            run()
            assert (seen["copy_kernel"].loads, seen["copy_kernel"].stores) == (15, 15) and torch.equal(x, y)
            return
        with pytest.raises(Exception) as caught:
            run()
    assert re.search(message, out_of_bounds(caught))
    assert not y._base[:, 5:].any(), "memory out of bounds must not be changed"
