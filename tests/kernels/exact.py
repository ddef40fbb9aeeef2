"""Bitwise comparison of each kernel with simple kernels of the same formula under Triton's sanitizer FpSan.

    TRITON_INSTRUMENTATION_MODE=fpsan python tests/kernels/exact.py     # a GPU and Triton 3.8 or later
    TRITON_INTERPRET=1 python tests/kernels/exact.py --close            # with tolerances, in float arithmetic

FpSan, the floating-point sanitizer, replaces floating-point arithmetic by integer arithmetic in which sums and products
do not depend on their order. Two kernels that compute the same formula give the same bits, independent of tiles, splits
and fused operations. Kernels that compute different formulas give different bits. All tensors are float32, because
FpSan treats a rounding as part of the formula.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flare_kernels import dropout
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.device import FUSION_ID, dot, fuse, fuse_grad

#: Number of tokens M, input width K, output width N, rank R.
SIZES = ((70, 130, 67, 5), (600, 700, 48, 16), (9, 40, 33, 64))
KEEP_SCALE = dropout.keep_scale(0.3)


@triton.jit
def product_kernel(
    a, b, c, out, M, N, K, a_0, a_1, b_0, b_1, mask, mask_0, mask_1, scale, HAS_C: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Compute out (M, N) = c + scale * (mask * a) b, with one program per 16 x 16 tile. c and out are contiguous."""
    o_m = tl.program_id(0) * 16 + tl.arange(0, 16)
    o_n = tl.program_id(1) * 16 + tl.arange(0, 16)
    b_sum = tl.zeros((16, 16), dtype=tl.float32)
    for i_k in range(0, K, 16):
        o_k = i_k + tl.arange(0, 16)
        m_a = (o_m < M)[:, None] & (o_k < K)[None, :]
        b_a = tl.load(a + o_m[:, None] * a_0 + o_k[None, :] * a_1, mask=m_a, other=0.0)
        if HAS_MASK:
            b_mask = tl.load(mask + o_m[:, None] * mask_0 + o_k[None, :] * mask_1, mask=m_a, other=0)
            b_a = tl.where(b_mask != 0, b_a, 0.0)
        m_b = (o_k < K)[:, None] & (o_n < N)[None, :]
        b_b = tl.load(b + o_k[:, None] * b_0 + o_n[None, :] * b_1, mask=m_b, other=0.0)
        b_sum = dot(b_a, b_b, b_sum)
    b_sum = b_sum * scale
    o_out = o_m[:, None] * N + o_n[None, :]
    m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
    if HAS_C:
        b_sum = tl.load(c + o_out, mask=m_out, other=0.0) + b_sum
    tl.store(out + o_out, b_sum, mask=m_out)


@triton.jit
def elementwise_kernel(t, s, dh, out_0, out_1, numel, FUSION: tl.constexpr, BACKWARD: tl.constexpr):
    """Compute out_0 = phi(s, t), or if BACKWARD, out_0 = dh * dphi/dt and out_1 = dh * dphi/ds.

    All tensors are contiguous.
    """
    o = tl.program_id(0) * 64 + tl.arange(0, 64)
    m = o < numel
    b_t = tl.load(t + o, mask=m, other=0.0)
    b_s = tl.load(s + o, mask=m, other=0.0)
    if BACKWARD:
        b_dt, b_ds = fuse_grad(tl.load(dh + o, mask=m, other=0.0), b_t, b_s, FUSION)
        tl.store(out_0 + o, b_dt, mask=m)
        tl.store(out_1 + o, b_ds, mask=m)
    else:
        tl.store(out_0 + o, fuse(b_t, b_s, FUSION), mask=m)


def product(a: Tensor, b: Tensor, scale: float = 1.0, mask: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """Return c + scale * (mask * a) b as a contiguous tensor. ``c`` and ``mask`` may be missing."""
    (M, K), N = a.shape, b.shape[1]
    out = torch.empty(M, N, device=a.device)
    mask_strides = (0, 0) if mask is None else mask.stride()
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
    options = {"HAS_C": c is not None, "HAS_MASK": mask is not None}
    product_kernel[grid](a, b, c, out, M, N, K, *a.stride(), *b.stride(), mask, *mask_strides, scale, **options)
    return out


def elementwise(T: Tensor, S: Tensor, fusion: str, dH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (H, H) with H = phi(S, T), or (dT, dS) if ``dH``, the gradient of H, is given."""
    T, S = T.contiguous(), S.contiguous()
    first, second = torch.empty_like(T), torch.empty_like(T)
    grid = (triton.cdiv(T.numel(), 64),)
    backward = dH is not None
    elementwise_kernel[grid](T, S, dH, first, second, T.numel(), FUSION=FUSION_ID[fusion], BACKWARD=backward)
    return first, second if backward else first


def comparisons(size: tuple[int, int, int, int], fusion: str, device: torch.device) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, results of the package's kernels, results of the simple kernels)."""
    M, K, N, R = size
    x, x_source = torch.randn(M, K, device=device), torch.randn(M, K, device=device)
    As = [torch.randn(R, K, device=device) * K**-0.5 for _ in range(2)]
    Bs = [torch.randn(n, R, device=device) * R**-0.5 for n in (N, N + 9)]
    ys, Gs = ([torch.randn(M, B.shape[0], device=device) for B in Bs] for _ in range(2))
    T, S = torch.randn(M, 2 * R, device=device), torch.randn(M, 2 * R, device=device)
    scalings, columns = [0.5, 2.0], [slice(0, R), slice(R, 2 * R)]
    A, seed = torch.cat(As), torch.tensor(7, device=device)
    masks = [triton_ops.dropout_mask(seed, M, K, dropout.drop_threshold(0.3), stream) for stream in (0, 1)]
    unpacked = [dropout.unpack(mask, K, torch.uint8) for mask in masks]
    phi: dict[str, Any] = {"scalings": scalings, "fusion": fusion}

    for dropped in (False, True):
        name = " with dropout" if dropped else ""
        scale, (mask, mask_source) = KEEP_SCALE if dropped else 1.0, unpacked if dropped else (None, None)
        both = {"mask": masks[0], "mask_source": masks[1], "keep_scale": scale} if dropped else {}
        one_mask = {"mask": masks[0], "keep_scale": scale} if dropped else {}
        naive = [product(x, A.T, scale, mask), product(x_source, A.T, scale, mask_source)]
        yield f"shrink{name}", triton_ops.shrink(x, x_source, A, compute_dtype=torch.float32, **both), naive
        dA = product(x.T, T, scale, None if mask is None else mask.T)
        dA = product(x_source.T, S, scale, None if mask_source is None else mask_source.T, dA).T
        yield f"grad_weight{name}", [triton_ops.grad_weight(T, x, S, x_source, grad_dtype=torch.float32, **both)], [dA]
        dx = product(T, A, scale)
        dx = dx if mask is None else torch.where(mask != 0, dx, 0.0)
        yield f"grad_input{name}", [triton_ops.grad_input(T, A, dtype=torch.float32, **one_mask)], [dx]
    H, _ = elementwise(T, S, fusion)
    expected = [
        product(H[:, at], B.T, scaling, c=y) for at, B, y, scaling in zip(columns, Bs, ys, scalings, strict=True)
    ]
    actual = [y.clone() for y in ys]
    triton_ops.expand_(actual, T, S, Bs, **phi)
    yield "expand", actual, expected
    dT, dS = torch.empty_like(T), torch.empty_like(S)
    dBs = triton_ops.grad_bottleneck(Gs, T, S, Bs, dT=dT, dS=dS, B_grad_dtype=torch.float32, **phi)
    dH = torch.cat([product(G, B, scaling) for G, B, scaling in zip(Gs, Bs, scalings, strict=True)], 1)
    expected = [product(G.T, H[:, at], scaling) for G, at, scaling in zip(Gs, columns, scalings, strict=True)]
    yield "grad_bottleneck", [dT, dS, *dBs], [*elementwise(T, S, fusion, dH), *expected]
    if triton_ops.can_decode(M, [R, R]):
        H, _ = elementwise(product(x, A.T), product(x_source, A.T), fusion)
        expected = [
            product(H[:, at], B.T, scaling, c=y) for at, B, y, scaling in zip(columns, Bs, ys, scalings, strict=True)
        ]
        actual = [y.clone() for y in ys]
        triton_ops.decode(x, x_source, [], actual, As, Bs, compute_dtype=torch.float32, save_for_backward=False, **phi)
        yield "decode", actual, expected


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons and print a line for each. Return 0 if all agree, 1 if not, 2 if FpSan cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--close", action="store_true", help="compare with tolerances, without FpSan")
    options = parser.parse_args(arguments)
    modes = os.environ.get("TRITON_INSTRUMENTATION_MODE", "").split(",")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if not options.close and ("fpsan" not in modes or version < (3, 8) or not torch.cuda.is_available()):
        print(
            f"exact.py needs a CUDA device, Triton 3.8 or later (this is {triton.__version__}) and "
            "TRITON_INSTRUMENTATION_MODE=fpsan"
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    different = 0
    for size in SIZES[::2] if options.close else SIZES:  # the interpreter is slow
        for fusion in ("add", "mul_relu"):
            for what, actual, expected in comparisons(size, fusion, device):
                pairs = list(zip(actual, expected, strict=True))
                if options.close:
                    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
                else:
                    same = all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)
                different += not same
                print(f"{size} {fusion:9} {what:26} {'same' if same else 'DIFFERENT'}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
