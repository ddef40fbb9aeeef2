"""Calls of every primitive with odd sizes, for the bounds checker (bounds.py) and for compute-sanitizer on a GPU.

The primitives are the functions of flare_kernels/triton_ops/primitives.py.

python tests/kernels/odd_calls.py     # on a CUDA device or in the interpreter; prints the number of launches by kernel
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flare_kernels import dropout, torch_ops
from flare_kernels.launch_mode import counting
from flare_kernels.triton_ops import primitives as triton_ops

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
MIXED = (BF16, F32)
#: Number of tokens M, input width K, output width N, rank R, (dtype of activations, dtype of A and B). The sizes give
#: partial tiles along each axis, axes of one element, and several blocks of R.
CASES = [
    (70, 130, 67, 5, (F32, F32)),
    (33, 40, 129, 130, (F32, F32)),
    (1, 64, 1, 16, (BF16, BF16)),
    (3, 33, 18, 1, (F16, F16)),
    (70, 32, 48, 64, (BF16, BF16)),
    (17, 37, 20, 3, MIXED),
]
KEEP_SCALE = dropout.keep_scale(0.3)
Case = tuple[int, int, int, int, tuple[torch.dtype, torch.dtype]]
Place = Callable[[Tensor], Tensor]
Results = tuple[list[Tensor], list[Tensor]]


def odd_calls(case: Case, place: Place, device: torch.device) -> Iterator[Results]:
    """Call every primitive, and yield (its results, the results of plain PyTorch) for each call.

    The primitives that take dropout masks are called with and without masks. ``place`` copies a tensor to the memory
    that a kernel reads or writes.
    """
    M, K, N, R, (dtype, adapter) = case
    randn = random_in(place, device, dtype)
    seed = torch.tensor(7, device=device)
    x, x_source = randn(M, K), randn(M, K)
    As = [randn(R, K, adapter, K**-0.5) for _ in range(2)]
    Bs = [randn(n, R, adapter, R**-0.5) for n in (N, N + 9)]
    ys, Gs = ([randn(M, B.shape[0]) for B in Bs] for _ in range(2))
    T, S = randn(M, 2 * R), randn(M, 2 * R)
    bits = [triton_ops.dropout_mask(seed, M, K, 6554, stream) for stream in (0, 1)]
    yield bits, [torch_ops.dropout_mask(seed, M, K, 6554, stream) for stream in (0, 1)]
    masks = {"mask": place(bits[0]), "mask_source": place(bits[1]), "keep_scale": KEEP_SCALE}
    A = triton_ops.stack(As, dtype)
    yield [A], [torch_ops.stack(As, dtype)]
    phi: dict[str, Any] = {"scalings": [0.5, 2.0], "fusion": "mul_relu"}
    for dropped in ({}, masks):
        yield both("shrink", x, x_source, A, compute_dtype=dtype, **dropped)
        yield both("grad_weight", T, x, S, x_source, grad_dtype=adapter, **dropped)
        one_mask = {key: value for key, value in dropped.items() if key != "mask_source"}
        yield both("grad_input", T, A, dtype=dtype, **one_mask)
        dx = randn(M, K)
        expected = torch_ops.grad_input(T, A, dtype=dtype, out=dx.clone(), **one_mask)
        yield [triton_ops.grad_input(T, A, dtype=dtype, out=dx, **one_mask)], [expected]
    actual, expected = [place(y) for y in ys], [y.clone() for y in ys]
    triton_ops.expand_(actual, T, S, Bs, **phi)
    torch_ops.expand_(expected, T, S, Bs, **phi)
    yield actual, expected
    yield grad_bottlenecks(place, Gs, T, S, Bs, B_grad_dtype=adapter, **phi)
    if triton_ops.can_decode(M, [R, R]):
        for Ss in ([], [S[:, :R], S[:, R:]]):
            actual = [place(y) for y in ys]
            call = {"compute_dtype": dtype, "save_for_backward": True, **phi}
            triton_ops.decode(x, None if Ss else x_source, Ss, actual, As, Bs, **call)
            T_exact, S_exact = (s @ A.float().T for s in (x.float(), x_source.float()))
            expected = [y.clone().float() for y in ys]
            torch_ops.expand_(expected, T_exact, S.float() if Ss else S_exact, [B.float() for B in Bs], **phi)
            yield actual, expected


def random_in(place: Place, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that makes random matrices, by default of dtype ``dtype``, and copies them with ``place``."""

    def randn(rows: int, cols: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return place((torch.randn(rows, cols, device=device) * scale).to(of))

    return randn


def both(name: str, *args: Any, **options: Any) -> Results:
    """Run a primitive as Triton kernels and in plain PyTorch; return both results."""

    def as_list(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]

    return as_list(getattr(triton_ops, name)(*args, **options)), as_list(getattr(torch_ops, name)(*args, **options))


def grad_bottlenecks(place: Place, Gs: list[Tensor], T: Tensor, *args: Any, **options: Any) -> Results:
    """Run grad_bottleneck as Triton kernels and in plain PyTorch, writing dT and dS to tensors made by ``place``.

    Return both results."""
    results = []
    for ops in (triton_ops, torch_ops):
        dT, dS = (place(torch.full_like(T, torch.nan)) for _ in range(2))
        results.append([dT, dS, *ops.grad_bottleneck(Gs, T, *args, dT=dT, dS=dS, **options)])
    return results[0], results[1]


def require_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Raise AssertionError if results are far from plain PyTorch's results. Other tests use smaller tolerances."""
    tolerance = 1e-4 if dtype == F32 else 0.1
    for ours, plain in zip(actual, expected, strict=True):
        atol = tolerance * float(plain.double().abs().max() + 1)
        torch.testing.assert_close(ours.double(), plain.double(), rtol=tolerance, atol=atol)


def main() -> int:
    """Run the calls of this module and of odd_forms, compare the results, and return 0."""
    import odd_forms  # imported here, because odd_forms imports this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with counting() as names:
        for calls, cases in ((odd_calls, CASES), (odd_forms.odd_forms, odd_forms.CASES)):
            for case in cases:
                for actual, expected in calls(case, torch.clone, device):
                    require_close(actual, expected, case[-1][0])
    print(", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
