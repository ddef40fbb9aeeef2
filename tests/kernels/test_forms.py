"""All Triton forms (implementations) of shrink and grad_weight, compared with float64 and with each other."""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from primitive_inputs import BF16, F16, F32, F64, KEEP_SCALE, Shape, assert_close, drop, make

from flare_kernels import tuning
from flare_kernels.launch_mode import counting, forcing
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops import split_k
from flare_kernels.triton_ops.config import FORMS, TileConfig

pytestmark = pytest.mark.usefixtures("poisoned_empty")

by_form = pytest.mark.parametrize("form", ["triton", "tma", "last_adds"])
#: Case -> launch configuration. "few programs": there are more output tiles than programs. "splits": sums are split
#: among programs. "one tile": the output is a single tile.
TILES = {
    "few programs": TileConfig(64, 64, 0, 64, 4, 2, programs=3),
    "splits": TileConfig(16, 16, 0, 128, 4, 2, programs=200),
    "one tile": TileConfig(128, 128, 0, 16, 4, 2, programs=1),
}
SHAPES = {
    "few programs": Shape(M=202, K=200, R=72, compute=BF16),
    "splits": Shape(M=138, K=136, R=67, compute=F16),
    "one tile": Shape(M=1, K=40, R=5, compute=BF16),
}


@pytest.fixture(params=TILES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def framed(x: Tensor) -> Tensor:
    """Return x as a view into a NaN-filled buffer whose rows have a multiple of 16 bytes, as descriptors require."""
    rows, columns = x.shape
    frame = torch.full((rows + 2, -(-columns // 16) * 16 + 16), torch.nan, dtype=x.dtype, device=x.device)
    frame[1:-1, :columns] = x
    return frame[1:-1, :columns]


def forced(form: str, case: str) -> Any:
    if form == "tma" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    kernels = [kernel for step in ("shrink", "grad_weight") for kernel in FORMS[step][form]]
    general = ("shrink", "grad_weight")  # the fallback if the form cannot be used
    return forcing(form=form, **dict.fromkeys((*kernels, *general), TILES[case]))


def launched(names: list[str]) -> list[str]:
    return [name.removesuffix("_kernel") for name in names]


def expected_launches(step: str, form: str, case: str) -> list[str]:
    kernel = f"{step}_tma" if form == "tma" else step
    return [kernel, "split_k_reduce"] if case == "splits" and form != "last_adds" else [kernel]


@by_form
def test_each_form_of_shrink_matches_float64(form: str, case: str, device: torch.device) -> None:
    shape = SHAPES[case]
    i = make(shape, device)
    x, x_source, A = framed(i.x), framed(i.x_source), framed(i.A)
    results = {dtype: [s.to(dtype) @ i.A.to(dtype).T for s in (i.x, i.x_source)] for dtype in (shape.compute, F64)}
    plain, truth = results[shape.compute], results[F64]
    scale = max(exact.abs().max().item() for exact in truth)
    with forced(form, case), counting() as names:
        T, S = triton_ops.shrink(x, x_source, A, compute_dtype=shape.compute)
        assert launched(names) == expected_launches("shrink", form, case)
        again = triton_ops.shrink(x, x_source, A, compute_dtype=shape.compute)
        both, _ = triton_ops.shrink(x, x_source, A, compute_dtype=shape.compute, sum_streams=True)
        alone, _ = triton_ops.shrink(x, None, A, compute_dtype=shape.compute)
        _, source = triton_ops.shrink(None, x_source, A, compute_dtype=shape.compute)
    for actual, baseline, exact in zip((T, S), plain, truth, strict=True):
        assert_close(actual, baseline, exact, shape.compute, scale)
    assert_close(both, sum(plain), sum(truth), shape.compute, scale)
    assert torch.equal(alone, T) and torch.equal(source, S)
    assert torch.equal(torch.stack(again), torch.stack((T, S)))


@by_form
def test_each_form_of_grad_weight_matches_float64(form: str, case: str, device: torch.device) -> None:
    shape = SHAPES[case]
    i = make(shape, device)
    dT, x, dS, x_source = (framed(tensor) for tensor in i["T x S x_source"])
    results = {
        dtype: [d.to(dtype).T @ s.to(dtype) for d, s in ((i.T, i.x), (i.S, i.x_source))]
        for dtype in (shape.compute, F64)
    }
    plain, truth = results[shape.compute], results[F64]
    scale = sum(exact.abs().max().item() for exact in truth)
    with forced(form, case), counting() as names:
        dA = triton_ops.grad_weight(dT, x, dS, x_source, grad_dtype=F32)
        assert launched(names) == expected_launches("grad_weight", form, case)
        again = triton_ops.grad_weight(dT, x, dS, x_source, grad_dtype=F32)
        alone = triton_ops.grad_weight(None, None, dS, x_source, grad_dtype=shape.compute)
    assert_close(dA, sum(plain), sum(truth), shape.compute, scale)
    assert_close(alone, plain[1], truth[1], shape.compute)
    assert torch.equal(dA, again)


@pytest.mark.parametrize("step", ["shrink", "grad_weight"])
def test_dropout_and_unsupported_strides_do_not_use_descriptors(step: str, device: torch.device) -> None:
    """If descriptors cannot read the operands, a call falls back from the forced form "tma" to the form "triton"."""
    i = make(SHAPES["splits"], device)
    x, x_source, A, dT, dS = (framed(tensor) for tensor in i["x x_source A T S"])
    odd = torch.cat([i.x, i.x[:, :1]], 1)[:, :-1]  # an odd row stride
    masks = {"mask": i.mask, "mask_source": i.mask_source, "keep_scale": KEEP_SCALE}
    for stream, options in ((x, masks), (odd, {}), (x.T.contiguous().T, {})):
        with forced("tma", "splits"), counting() as names:
            if step == "shrink":
                actual, _ = triton_ops.shrink(stream, x_source, A, compute_dtype=F16, **options)
                expected = drop(i.x, options.get("mask"), F64) @ i.A.to(F64).T
            else:
                actual = triton_ops.grad_weight(dT, stream, dS, x_source, grad_dtype=F32, **options)
                pairs = ((i.T, i.x, "mask"), (i.S, i.x_source, "mask_source"))
                expected = sum(d.to(F64).T @ drop(s, options.get(mask), F64) for d, s, mask in pairs)
        assert launched(names) == [step, "split_k_reduce"]
        torch.testing.assert_close(actual.to(F64), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_last_adds_with_dropout_matches_the_triton_form(device: torch.device) -> None:
    i = make(SHAPES["splits"], device)
    masks = {"mask": i.mask, "mask_source": i.mask_source, "keep_scale": KEEP_SCALE}
    results = []
    for form in ("triton", "last_adds"):
        with forced(form, "splits"):
            shrunk = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F16, **masks)
            results.append([*shrunk, triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32, **masks)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_counters_are_zero_between_launches(device: torch.device) -> None:
    """A counter counts the finished programs of a tile in the form "last_adds".

    The last of these programs resets it to zero, because launches on a stream share the counters.
    """
    i = make(SHAPES["splits"], device)
    counters = split_k.counters(i.x.device)
    assert counters is split_k.counters(i.x.device) and not counters.any()
    with forced("last_adds", "splits"):
        first = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32)
        assert not counters.any()
        counters[0] = 1000  # if a counter does not start at zero, no program reduces its tile
        second = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32)
        counters.zero_()
    assert first.isfinite().all() and second.isnan().any()


MODELS = (("llama-3.1-8b", 8192), ("xlm-r-large", 8192), ("llama-3.1-8b", 512))


@pytest.mark.parametrize(("model", "M"), MODELS)
def test_each_form_moves_every_tensor_once_and_partial_sums_twice(model: str, M: int, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bytes_moved = importlib.import_module("bytes_moved")
    shape, r = tuning.SHAPES[model], 64
    d, R = shape.d, len(shape.widths) * r
    streams, bottlenecks = 2 * M * d * 2, 2 * M * R * 2
    least = {"shrink": streams + R * d * 2 + bottlenecks, "grad_weight": streams + bottlenecks + R * d * 4}
    partial = {"shrink": 2 * M * R * 4, "grad_weight": R * d * 4}
    problems = {problem.step: problem for problem in tuning.problems([shape], [M], [r])}
    for step, form in itertools.product(least, ("triton", "tma", "last_adds")):
        launches = bytes_moved.launches(problems[step], form)
        tiles, grid = launches[0].config, launches[0].grid
        blocks = -(-(M if step == "shrink" else d) // (tiles.BLOCK_M if step == "shrink" else tiles.BLOCK_K))
        programs = launches[0].args["tiles"] if form == "tma" else math.prod(grid)
        splits = programs // (blocks * -(-R // tiles.BLOCK_R))
        assert len(launches) == (2 if splits > 1 and form != "last_adds" else 1)
        assert bytes_moved.moved(launches) == least[step] + (2 * splits * partial[step] if splits > 1 else 0)
        if M == 8192 and d == 4096:
            assert bytes_moved.moved(launches) <= 1.15 * least[step]
