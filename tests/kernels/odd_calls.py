"""A few calls of every kernel on odd sizes: what bounds are checked with, and what a GPU's sanitizers run.

python tests/kernels/odd_calls.py          # on the CUDA device, or in the interpreter; prints the launches by kernel
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
#: M, K, N, R, dtypes of T and of A and B: a tile ends within each axis, axes of one element, several blocks of R.
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
    """Call every primitive, with and without dropout; yield its results and those of plain PyTorch.

    ``place`` returns a tensor of the same values, for a kernel to read or write.
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
        one = {key: value for key, value in dropped.items() if key != "mask_source"}
        yield both("grad_input", T, A, dtype=dtype, **one)
        dx = randn(M, K)
        want = torch_ops.grad_input(T, A, dtype=dtype, out=dx.clone(), **one)
        yield [triton_ops.grad_input(T, A, dtype=dtype, out=dx, **one)], [want]
    got, want = [place(y) for y in ys], [y.clone() for y in ys]
    triton_ops.expand_(got, T, S, Bs, **phi)
    torch_ops.expand_(want, T, S, Bs, **phi)
    yield got, want
    yield grad_bottlenecks(place, Gs, T, S, Bs, B_grad_dtype=adapter, **phi)
    if triton_ops.can_decode(M, [R, R]):
        for given in ([], [S[:, :R], S[:, R:]]):
            got = [place(y) for y in ys]
            call = {"compute_dtype": dtype, "save_for_backward": True, **phi}
            triton_ops.decode(x, None if given else x_source, given, got, As, Bs, **call)
            T_own, S_own = (s @ A.float().T for s in (x.float(), x_source.float()))
            want = [y.clone().float() for y in ys]
            torch_ops.expand_(want, T_own, S.float() if given else S_own, [B.float() for B in Bs], **phi)
            yield got, want


def random_in(place: Place, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return what makes a random matrix in a place, of this dtype unless another is named."""

    def randn(rows: int, cols: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return place((torch.randn(rows, cols, device=device) * scale).to(of))

    return randn


def both(name: str, *args: Any, **options: Any) -> Results:
    """Run one primitive as kernels and as plain PyTorch."""

    def listed(found: Any) -> list[Tensor]:
        return [found] if isinstance(found, Tensor) else [one for one in found if one is not None]

    return listed(getattr(triton_ops, name)(*args, **options)), listed(getattr(torch_ops, name)(*args, **options))


def grad_bottlenecks(place: Place, Gs: list[Tensor], T: Tensor, *args: Any, **options: Any) -> Results:
    """Run grad_bottleneck as :func:`both` does, into dT and dS of a place."""
    found = []
    for ops in (triton_ops, torch_ops):
        dT, dS = (place(torch.full_like(T, torch.nan)) for _ in range(2))
        found.append([dT, dS, *ops.grad_bottleneck(Gs, T, *args, dT=dT, dS=dS, **options)])
    return found[0], found[1]


def require_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """Raise AssertionError where results are far from those of plain PyTorch; other tests compare them closely."""
    tolerance = 1e-4 if dtype == F32 else 0.1
    for ours, plain in zip(got, want, strict=True):
        atol = tolerance * float(plain.double().abs().max() + 1)
        torch.testing.assert_close(ours.double(), plain.double(), rtol=tolerance, atol=atol)


def main() -> int:
    """Run the selection and compare; return 0."""
    import odd_forms  # which imports this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with counting() as names:
        for calls, cases in ((odd_calls, CASES), (odd_forms.odd_forms, odd_forms.CASES)):
            for case in cases:
                for got, want in calls(case, torch.clone, device):
                    require_close(got, want, case[-1][0])
    print(", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
