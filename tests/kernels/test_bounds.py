"""No kernel reads or writes outside its tensors: every access of the interpreter is checked, and margins are compared.

Tensors are views into larger buffers. Their margins hold NaN, so that a read that reaches a result shows in it, and
must be the same bits after the call. The checker (bounds.py) sees the reads and writes that leave no trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import bounds
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from flare_kernels import dropout, torch_ops
from flare_kernels.triton_ops import primitives as triton_ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bounds are checked by the interpreter, on a CPU")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
MIXED = (BF16, F32)
#: M, K, N, R, dtypes of T and of A and B: a tile ends within each axis, axes of one element, several blocks of R.
CASES = [
    (70, 130, 67, 5, (F32, F32)),
    (33, 40, 129, 130, (F32, F32)),
    (1, 64, 1, 16, (BF16, BF16)),
    (3, 33, 18, 1, (F16, F16)),
    (70, 32, 48, 64, (BF16, BF16)),
    (17, 37, 20, 3, MIXED),
]
MARGIN = 24
KEEP_SCALE = dropout.keep_scale(0.3)


class Framed:
    """Makes tensors inside larger buffers, and compares what lies around them with what lay there."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, values: Tensor) -> Tensor:
        """Return a view with these values; between its rows and around it lies NaN (or bytes of all ones)."""
        rows, cols = values.shape
        filling = torch.nan if values.is_floating_point() else 255
        # rows of 16-byte multiples where the columns are: the aligned forms of a kernel are checked as well
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
            assert torch.equal(self.bits(buffer)[outside], before), f"written around a tensor of {tuple(buffer.shape)}"


@pytest.fixture
def framed() -> Iterator[Framed]:
    made = Framed()
    yield made
    assert made.buffers
    made.require_untouched()


def calls(case: tuple[int, int, int, int, tuple[torch.dtype, torch.dtype]], framed: Framed) -> Iterator[Any]:
    """Call every primitive, with and without dropout; yield its results and those of plain PyTorch."""
    M, K, N, R, (dtype, adapter) = case

    def randn(rows: int, cols: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return framed((torch.randn(rows, cols) * scale).to(of))

    seed = torch.tensor(7)
    x, x_source = randn(M, K), randn(M, K)
    As = [randn(R, K, adapter, K**-0.5) for _ in range(2)]
    Bs = [randn(n, R, adapter, R**-0.5) for n in (N, N + 9)]
    ys, Gs = ([randn(M, B.shape[0]) for B in Bs] for _ in range(2))
    T, S = randn(M, 2 * R), randn(M, 2 * R)
    bits = [triton_ops.keep_bits(seed, M, K, 6554, stream) for stream in (0, 1)]
    yield bits, [torch_ops.keep_bits(seed, M, K, 6554, stream) for stream in (0, 1)]
    masks = {"mask": framed(bits[0]), "mask_source": framed(bits[1]), "keep_scale": KEEP_SCALE}
    A = triton_ops.stack(As, dtype)
    yield [A], [torch_ops.stack(As, dtype)]
    phi: dict[str, Any] = {"scalings": [0.5, 2.0], "fusion": "mul_relu"}
    for dropped in ({}, masks):
        yield from _both("shrink", x, x_source, A, compute_dtype=dtype, **dropped)
        yield from _both("grad_weight", T, x, S, x_source, grad_dtype=adapter, **dropped)
        one = {key: value for key, value in dropped.items() if key != "mask_source"}
        yield from _both("grad_input", T, A, dtype=dtype, **one)
        dx = randn(M, K)
        want = torch_ops.grad_input(T, A, dtype=dtype, out=dx.clone(), **one)
        yield [triton_ops.grad_input(T, A, dtype=dtype, out=dx, **one)], [want]
    got, want = [framed(y) for y in ys], [y.clone() for y in ys]
    triton_ops.expand_(got, T, S, Bs, **phi)
    torch_ops.expand_(want, T, S, Bs, **phi)
    yield got, want
    results = []
    for ops in (triton_ops, torch_ops):
        dT, dS = (framed(torch.full((M, 2 * R), torch.nan, dtype=dtype)) for _ in range(2))
        dBs = ops.grad_bottleneck(Gs, T, S, Bs, dT=dT, dS=dS, B_grad_dtype=adapter, **phi)
        results.append([dT, dS, *dBs])
    yield tuple(results)
    if triton_ops.can_decode(M, [R, R]):
        for given in ([], [S[:, :R], S[:, R:]]):
            got = [framed(y) for y in ys]
            call = {"compute_dtype": dtype, "keep": True, **phi}
            triton_ops.decode(x, None if given else x_source, given, got, As, Bs, **call)
            T_own, S_own = (s @ A.float().T for s in (x.float(), x_source.float()))
            want = [y.clone().float() for y in ys]
            torch_ops.expand_(want, T_own, S.float() if given else S_own, [B.float() for B in Bs], **phi)
            yield got, want


def _both(name: str, *args: Any, **options: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """One primitive in both forms."""

    def listed(found: Any) -> list[Tensor]:
        return [found] if isinstance(found, Tensor) else [one for one in found if one is not None]

    yield listed(getattr(triton_ops, name)(*args, **options)), listed(getattr(torch_ops, name)(*args, **options))


KERNELS = {"shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input", "keep_bits", "stack"}
DECODE = {"shrink_decode", "expand_decode"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])) + f"-{case[4][0]}-{case[4][1]}")
def test_every_kernel_stays_within_its_tensors(case: Any, framed: Framed) -> None:
    (M, *_, R, (dtype, _)) = case
    tolerance = 1e-4 if dtype == F32 else 0.1
    with bounds.checked() as seen:
        for got, want in calls(case, framed):
            for ours, plain in zip(got, want, strict=True):
                atol = tolerance * float(plain.double().abs().max() + 1)
                torch.testing.assert_close(ours.double(), plain.double(), rtol=tolerance, atol=atol)
    ran = {name.removesuffix("_kernel") for name, accesses in seen.items() if accesses.stores}
    assert ran >= KERNELS and (ran >= DECODE) == triton_ops.can_decode(M, [R, R]), ran
    assert all(accesses.loads for accesses in seen.values())


@pytest.mark.parametrize("name", ["shrink", "grad_weight"])
def test_partial_results_stay_within_their_buffer(name: str) -> None:
    """Sums that are cut into parts: another kernel adds those up."""
    long, short, R = 700, 20, 5
    M, K = (short, long) if name == "shrink" else (long, short)
    x, x_source, A, T = torch.randn(M, K), torch.randn(M, K), torch.randn(R, K), torch.randn(M, R)
    with bounds.checked() as seen:
        if name == "shrink":
            triton_ops.shrink(x, x_source, A, compute_dtype=F32)
        else:
            triton_ops.grad_weight(T, x, T, x_source, grad_dtype=F32)
    assert seen["sum_partials_kernel"].loads > seen["sum_partials_kernel"].stores > 0


@triton.jit
def copy_kernel(x, y, rows, cols, x_stride, y_stride, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, with masks that let READ more columns be read, and WRITE more be written."""
    i_row = tl.program_id(0)
    o_col = tl.arange(0, BLOCK)
    b_x = tl.load(x + i_row * x_stride + o_col, mask=o_col < cols + READ, other=0.0)
    tl.store(y + i_row * y_stride + o_col, b_x, mask=o_col < cols + WRITE)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(("read", "write", "said"), [(0, 0, ""), (1, 0, "reads 1 .* of x"), (0, 1, "writes 1 .* of y")])
def test_the_checker_sees_one_element_too_many(dtype: torch.dtype, read: int, write: int, said: str) -> None:
    """An element between two rows of a view is one too many, also where its value goes nowhere."""
    x, y = torch.ones(3, 8, dtype=dtype)[:, :5], torch.zeros(3, 9, dtype=dtype)[:, :5]

    def run() -> None:
        copy_kernel[(3,)](x, y, 3, 5, x.stride(0), y.stride(0), READ=read, WRITE=write, BLOCK=8)

    with bounds.checked() as seen:
        if not said:
            run()
            assert (seen["copy_kernel"].loads, seen["copy_kernel"].stores) == (15, 15) and torch.equal(x, y)
            return
        with pytest.raises(Exception) as caught:  # the interpreter wraps it
            run()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, bounds.OutOfBounds):
        error = error.__cause__
    assert error is not None and re.search(said, str(error)), caught.value
    assert not y._base[:, 5:].any(), "what is out of bounds is not written"
