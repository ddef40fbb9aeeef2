"""Calls of every primitive, of many layouts: what tests of keys, argument order and Python overhead run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BF16, F32 = torch.bfloat16, torch.float32


def plain(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(rows, cols, dtype=dtype)


def misaligned(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """Contiguous, but two elements into its memory."""
    return torch.zeros(rows * cols + 2, dtype=dtype)[2:].view(rows, cols)


def columns(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """The leading columns of a wider buffer, whose rows are 16 elements further apart."""
    return torch.zeros(rows, cols + 16, dtype=dtype)[:, :cols]


def transposed(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(cols, rows, dtype=dtype).T


LAYOUTS = {"plain": plain, "misaligned": misaligned, "columns": columns, "transposed": transposed}
#: M, K, N, R
SIZES = ((128, 256, 192, 16), (127, 129, 65, 8), (1, 64, 48, 1), (600, 96, 80, 64), (16, 1024, 1, 130))
FUSIONS = (None, "add", "mul", "add_relu", "mul_relu")


def calls(
    ops: Any, size: tuple[int, int, int, int], layout: str = "plain", which: int = 0
) -> Iterator[Callable[[], Any]]:
    """Calls of every primitive on new tensors; the ``which``-th drawn (0: each) has the layout, the rest are plain."""
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
    for one, options in (((x, None), masks), ((x, x_source), both), ((None, x_source), {"mask_source": mask_source})):
        yield lambda one=one: ops.shrink(*one, A, compute_dtype=BF16)
        yield lambda one=one, options=options: ops.shrink(*one, A, compute_dtype=BF16, **options)
    yield lambda: ops.shrink(x, x_source, A, compute_dtype=BF16, sum_streams=True, **both)
    for fusion in FUSIONS:
        phi = {"scalings": [0.5, 2.0], "fusion": fusion}
        S_or_none = None if fusion is None else S
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys, T, S, Bs, **phi)
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys, T, S, Bs, outs=outs, **phi)
        for some in (biases, [None, None]):
            yield lambda phi=phi, S=S_or_none, some=some: ops.expand_(ys, T, S, Bs, biases=some, **phi)
        yield lambda phi=phi, S=S_or_none: ops.expand_(ys[:1], T[:, :R], S, Bs[:1], **phi | {"scalings": [1]})
        for wanted in ({"dT": dT, "dS": dS}, {"B_grad_dtype": F32}, {"dT": dT, "dS": dS, "B_grad_dtype": BF16}):
            yield lambda phi=phi, S=S_or_none, w=wanted: ops.grad_bottleneck(ys, T, S, Bs, **w, **phi)
        if M <= 64 and R <= 128:
            for given in ([], [S[:, :R], S[:, R:]]):
                source = x_source if fusion and not given else None
                decode = {"compute_dtype": BF16, "save_for_backward": bool(given)} | phi
                yield lambda g=given, s=source, d=decode: ops.decode(x, s, g, ys, As, Bs, **d)
                yield lambda g=given, s=source, d=decode: ops.decode(x, s, g, ys, As, Bs, outs=outs, **d)
    yield lambda: ops.grad_bottleneck(ys, None, None, Bs, scalings=[1.0, 1.0], fusion=None, dT=dT)
    for options in ({}, both):
        yield lambda options=options: ops.grad_weight(dT, x, dS, x_source, grad_dtype=F32, **options)
        yield lambda options=options: ops.grad_weight(dT, x, None, None, grad_dtype=BF16, **options)
        options = {key: value for key, value in options.items() if key != "mask_source"}
        yield lambda options=options: ops.grad_input(dT, A, dtype=BF16, **options)
        yield lambda options=options: ops.grad_input(dT, A, dtype=BF16, out=x if x.stride(1) == 1 else None, **options)
