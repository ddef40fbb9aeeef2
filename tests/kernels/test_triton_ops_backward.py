"""The Triton primitives of the backward pass compared with float64.

tests/kernels/test_triton_ops.py compares the primitives of the forward pass with float64.
"""

from __future__ import annotations

import pytest
import torch
from primitive_inputs import (
    ALL,
    BF16,
    F64,
    KEEP_SCALE,
    SCALING,
    Shape,
    assert_close,
    by_shape,
    drop,
    hidden,
    make,
)

pytest.importorskip("triton", reason="Triton is not installed")

from flare_kernels import dropout
from flare_kernels.fusion import get_fusion
from flare_kernels.triton_ops import primitives as triton_ops

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@by_shape
@pytest.mark.parametrize("fusion", ALL, ids=str)
def test_grad_bottleneck_matches_float64(shape: Shape, fusion: str | None, device: torch.device) -> None:
    i = make(shape, device)
    S = None if fusion is None else i.S
    B_grad_dtype = shape.adapter or shape.compute
    options = {"scalings": [SCALING], "fusion": fusion}
    dT, dS = torch.empty_like(i.T), None if fusion is None else torch.empty_like(i.T)
    (dB,) = triton_ops.grad_bottleneck([i.G], i.T, S, [i.B], dT=dT, dS=dS, B_grad_dtype=B_grad_dtype, **options)
    results = {}
    for dtype in (shape.compute, F64):
        dH = SCALING * (i.G.to(dtype) @ i.B.to(dtype))
        grads = (dH, None) if fusion is None else get_fusion(fusion).backward(dH, i.S.to(dtype), i.T.to(dtype))
        results[dtype] = [*grads, (SCALING * i.G.to(dtype)).T @ hidden(i.T, i.S, fusion, dtype)]
    for actual, plain, truth in zip((dT, dS, dB), results[shape.compute], results[F64], strict=True):
        if truth is not None:
            assert_close(actual, plain, truth, shape.compute)
    assert dB.dtype == B_grad_dtype

    # a call for dB only gives the same dB, and a call for dT and dS only gives the same dT and dS, bit for bit
    (only_dB,) = triton_ops.grad_bottleneck([i.G], i.T, S, [i.B], B_grad_dtype=B_grad_dtype, **options)
    assert torch.equal(only_dB, dB)
    only_dT = torch.empty_like(dT)
    only_dS = None if dS is None else torch.empty_like(dT)
    assert triton_ops.grad_bottleneck([i.G], i.T, S, [i.B], dT=only_dT, dS=only_dS, **options) is None
    assert torch.equal(only_dT, dT)
    assert dS is None or torch.equal(only_dS, dS)


def test_grad_input_adds_to_out(device: torch.device) -> None:
    i = make(Shape(compute=BF16), device)
    for mask in (None, i.mask):
        before = torch.randn_like(i.x)
        out = before.clone()
        options = {"mask": mask, "keep_scale": KEEP_SCALE}
        assert triton_ops.grad_input(i.T, i.A, dtype=BF16, out=out, **options) is out
        plain, truth = (before.to(t) + drop(i.T.to(t) @ i.A.to(t), mask, t) for t in (BF16, F64))
        assert_close(out, plain, truth, BF16)


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_grad_weight_matches_float64(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    masks = (i.mask, i.mask_source) if masked else (None, None)
    grad_dtype = shape.adapter or shape.compute
    options = {"keep_scale": KEEP_SCALE, "grad_dtype": grad_dtype}
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, mask=masks[0], mask_source=masks[1], **options)
    results = {}
    for dtype in (shape.compute, F64):
        pairs = zip((i.T, i.S), (i.x, i.x_source), masks, strict=True)
        results[dtype] = [grad.to(dtype).T @ drop(x, mask, dtype) for grad, x, mask in pairs]
    assert dA.dtype == grad_dtype
    assert_close(dA, sum(results[shape.compute]), sum(results[F64]), shape.compute)
    for stream, arguments in enumerate(((i.T, i.x, None, None), (None, None, i.S, i.x_source))):
        alone = triton_ops.grad_weight(*arguments, mask=masks[0], mask_source=masks[1], **options)
        assert_close(alone, results[shape.compute][stream], results[F64][stream], shape.compute)


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_grad_input_matches_float64(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    mask = i.mask if masked else None
    x_dtype = shape.x or shape.compute
    dx = triton_ops.grad_input(i.T, i.A, mask=mask, keep_scale=KEEP_SCALE, dtype=x_dtype)
    plain, truth = (drop(i.T.to(dtype) @ i.A.to(dtype), mask, dtype) for dtype in (shape.compute, F64))
    assert dx.dtype == x_dtype
    assert_close(dx, plain, truth, shape.compute)
    assert mask is None or not dx[dropout.unpack(mask, shape.K, torch.bool).logical_not()].any()
