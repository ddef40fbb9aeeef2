"""Calls of every primitive with many layouts, for the tests of cached plans, argument order and Python overhead.

The primitives are the functions of flare_kernels/triton_ops/primitives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flare_kernels.fusion import FUSIONS

BF16, F32 = torch.bfloat16, torch.float32


def plain(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(rows, cols, dtype=dtype)


def misaligned(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return a contiguous tensor that starts two elements into its storage."""
    return torch.zeros(rows * cols + 2, dtype=dtype)[2:].view(rows, cols)


def columns(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return the leading columns of a buffer that is 16 columns wider."""
    return torch.zeros(rows, cols + 16, dtype=dtype)[:, :cols]


def transposed(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(cols, rows, dtype=dtype).T


LAYOUTS = {"plain": plain, "misaligned": misaligned, "columns": columns, "transposed": transposed}
#: Number of tokens M, input width K, output width N, rank R.
SIZES = ((128, 256, 192, 16), (127, 129, 65, 8), (1, 64, 48, 1), (600, 96, 80, 64), (16, 1024, 1, 130))
ALL = (None, *FUSIONS)


def calls(
    ops: Any, size: tuple[int, int, int, int], layout: str = "plain", which: int = 0
) -> Iterator[Callable[[], Any]]:
    """Yield calls of every primitive on new tensors.

    ``which``: number of the only tensor that gets ``layout``, counted from 1 in the order of the calls of ``draw``; all
    other tensors are plain. 0: all tensors from ``draw`` get it. The masks and the seed are always plain.
    """
    M, K, N, R = size
    drawn = 0

    def draw(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
        nonlocal drawn
        drawn += 1
        return (LAYOUTS[layout] if which in (0, drawn) else plain)(rows, cols, dtype)

    x, x_source, A, T, S, dT, dS = draw(M, K), draw(M, K), draw(2 * R, K), *(draw(M, 2 * R) for _ in range(4))
    ys, outs = [draw(M, N), draw(M, N)], [draw(M, N), draw(M, N)]
    outs = [out if out.stride() == y.stride() else torch.empty_like(y) for out, y in zip(outs, ys, strict=True)]
    As, Bs = [draw(R, K, F32), draw(R, K, F32)], [draw(N, R), draw(N, R)]
    biases = [draw(1, N)[0], draw(1, N)[0]]
    mask, mask_source = (torch.zeros(M, (K + 7) // 8, dtype=torch.uint8) for _ in range(2))
    seed, masks = torch.tensor(3), {"mask": mask, "keep_scale": 1.25}
    both = masks | {"mask_source": mask_source}

    yield lambda: ops.stack(As, BF16)
    yield lambda: ops.stack([*As, As[0]], BF16)
    yield lambda: ops.dropout_mask(seed, M, K, 6554, 1)
    one_mask = {"mask_source": mask_source}
    for streams, options in (((x, None), masks), ((x, x_source), both), ((None, x_source), one_mask)):
        yield lambda streams=streams: ops.shrink(*streams, A, compute_dtype=BF16)
        yield lambda streams=streams, options=options: ops.shrink(*streams, A, compute_dtype=BF16, **options)
    yield lambda: ops.shrink(x, x_source, A, compute_dtype=BF16, sum_streams=True, **both)
    for fusion in ALL:
        phi = {"scalings": [0.5, 2.0], "fusion": fusion}
        S_or_none = None if fusion is None else S
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys, T, S, Bs, **phi)
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys, T, S, Bs, outs=outs, **phi)
        for bias_args in (biases, [None, None]):
            yield lambda phi=phi, S=S_or_none, b=bias_args: ops.expand_(ys, T, S, Bs, biases=b, **phi)
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys[:1], T[:, :R], S, Bs[:1], **phi | {"scalings": [1]})
        for grads in ({"dT": dT, "dS": dS}, {"B_grad_dtype": F32}, {"dT": dT, "dS": dS, "B_grad_dtype": BF16}):
            yield lambda phi=phi, S=S_or_none, grads=grads: ops.grad_bottleneck(ys, T, S, Bs, **grads, **phi)
        if M <= 64 and R <= 128:
            for Ss in ([], [S[:, :R], S[:, R:]]):
                source = x_source if fusion and not Ss else None
                decode = {"compute_dtype": BF16, "save_for_backward": bool(Ss)} | phi
                yield lambda Ss=Ss, s=source, d=decode: ops.decode(x, s, Ss, ys, As, Bs, **d)
                yield lambda Ss=Ss, s=source, d=decode: ops.decode(x, s, Ss, ys, As, Bs, outs=outs, **d)
    yield lambda: ops.grad_bottleneck(ys, None, None, Bs, scalings=[1.0, 1.0], fusion=None, dT=dT)
    for options in ({}, both):
        yield lambda options=options: ops.grad_weight(dT, x, dS, x_source, grad_dtype=F32, **options)
        yield lambda options=options: ops.grad_weight(dT, x, None, None, grad_dtype=BF16, **options)
        options = {key: value for key, value in options.items() if key != "mask_source"}
        yield lambda options=options: ops.grad_input(dT, A, dtype=BF16, **options)
        yield lambda options=options: ops.grad_input(dT, A, dtype=BF16, out=x if x.stride(1) == 1 else None, **options)
