"""Tests of the Triton primitives, on a GPU if there is one, otherwise under Triton's interpreter.

The primitives of the forward pass are compared with float64; tests/kernels/primitive_inputs.py defines the allowed
error. The other tests are about properties of all primitives, such as strided inputs and equal bits on every run.
tests/kernels/test_triton_ops_backward.py compares the primitives of the backward pass with float64.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from primitive_inputs import (
    ALL,
    BF16,
    F16,
    F32,
    F64,
    KEEP_SCALE,
    SCALING,
    Inputs,
    Shape,
    assert_close,
    by_shape,
    drop,
    hidden,
    make,
    strided,
)
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from flare_kernels import torch_ops
from flare_kernels.launch_mode import counting, recording
from flare_kernels.triton_ops import config
from flare_kernels.triton_ops import primitives as triton_ops

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_shrink_matches_float64(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    masks = (i.mask, i.mask_source) if masked else (None, None)
    options = {"compute_dtype": shape.compute, "keep_scale": KEEP_SCALE}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, mask=masks[0], mask_source=masks[1], **options)
    results = {}
    for dtype in (shape.compute, F64):
        streams = zip((i.x, i.x_source), masks, strict=True)
        results[dtype] = [drop(x, mask, dtype) @ i.A.to(dtype).T for x, mask in streams]
    scales = []
    for actual, plain, truth, x, mask in zip(
        (T, S), results[shape.compute], results[F64], (i.x, i.x_source), masks, strict=True
    ):
        assert actual.dtype == shape.compute and actual.is_contiguous()
        # for a result of one element, its scale is the norm of its summands
        norms = (drop(x, mask, F64).square() @ i.A.to(F64).square().T).sqrt()
        scales.append(norms.item() if norms.numel() == 1 else 0.0)
        assert_close(actual, plain, truth, shape.compute, scales[-1])

    both, no_S = triton_ops.shrink(
        i.x, i.x_source, i.A, mask=masks[0], mask_source=masks[1], sum_streams=True, **options
    )
    assert no_S is None
    assert_close(both, sum(results[shape.compute]), sum(results[F64]), shape.compute, math.hypot(*scales))

    # a call with one stream gives the same bits
    alone, no_S = triton_ops.shrink(i.x, None, i.A, mask=masks[0], **options)
    assert no_S is None and torch.equal(alone, T)
    no_T, alone = triton_ops.shrink(None, i.x_source, i.A, mask_source=masks[1], **options)
    assert no_T is None and torch.equal(alone, S)


@by_shape
@pytest.mark.parametrize("fusion", ALL, ids=str)
def test_expand_matches_float64(shape: Shape, fusion: str | None, device: torch.device) -> None:
    i = make(shape, device)
    S = None if fusion is None else i.S
    y = i.y.clone()
    assert triton_ops.expand_([y], i.T, S, [i.B], scalings=[SCALING], fusion=fusion) is None
    results = {}
    for dtype in (shape.compute, F64):
        results[dtype] = i.y.to(dtype) + SCALING * (hidden(i.T, i.S, fusion, dtype) @ i.B.to(dtype).T)
    assert y.dtype == i.y.dtype
    assert_close(y, results[shape.compute], results[F64], shape.compute)


WIDTHS = (70, 33, 48)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", [5, 16, 130])
@pytest.mark.parametrize("fusion", [None, "mul_relu"])
def test_one_launch_for_several_projections_gives_the_results_of_single_calls(
    count: int, rank: int, fusion: str | None, device: torch.device
) -> None:
    """Projections of different widths share one launch of each primitive, with the results of separate calls."""
    parts = [make(Shape(M=130, N=N, R=rank), device) for N in WIDTHS[:count]]
    scalings = [0.5 + i for i in range(count)]
    T, S = torch.cat([i.T for i in parts], 1), torch.cat([i.S for i in parts], 1) if fusion else None
    ys, Gs, Bs = ([getattr(i, name) for i in parts] for name in ("y", "G", "B"))
    outs = [torch.empty_like(y) for y in ys]
    dT, dS = torch.empty_like(T), torch.empty_like(T) if fusion else None
    options = {"scalings": scalings, "fusion": fusion}
    with counting() as names:
        triton_ops.expand_(ys, T, S, Bs, outs=outs, **options)
        dBs = triton_ops.grad_bottleneck(Gs, T, S, Bs, dT=dT, dS=dS, B_grad_dtype=F32, **options)
    assert [n for n in names if n != "split_k_reduce_kernel"] == ["expand_kernel", "grad_bottleneck_kernel"]
    for at, i in enumerate(parts):
        columns = slice(at * rank, (at + 1) * rank)
        expected = i.y.clone()
        alone = {"scalings": scalings[at : at + 1], "fusion": fusion}
        S_i, dS_i = (i.S, torch.empty_like(i.T)) if fusion else (None, None)
        triton_ops.expand_([expected], i.T, S_i, [i.B], **alone)
        dT_i = torch.empty_like(i.T)
        (dB,) = triton_ops.grad_bottleneck([i.G], i.T, S_i, [i.B], dT=dT_i, dS=dS_i, B_grad_dtype=F32, **alone)
        assert torch.equal(outs[at], expected) and not torch.equal(ys[at], expected)
        assert torch.equal(dT[:, columns], dT_i)
        assert dS is None or torch.equal(dS[:, columns], dS_i)
        torch.testing.assert_close(dBs[at], dB, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
def test_stack_concatenates_in_the_given_dtype(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    to, adapter = dtypes
    As = [torch.randn(r, 37, device=device).to(adapter) for r in (5, 9, 16)]
    As[1] = strided(As[1], "transposed")
    for count in (1, 2, 3):
        stacked = triton_ops.stack(As[:count], to)
        assert stacked.dtype == to and torch.equal(stacked, torch.cat([A.to(to) for A in As[:count]]))
    assert triton_ops.stack(As[:1], adapter) is As[0]
    assert torch.equal(triton_ops.stack([*As, As[0]], to), torch.cat([A.to(to) for A in (*As, As[0])]))


DECODE_SHAPES = [
    Shape(M=1, K=600, N=65, R=16, compute=BF16, adapter=F32),
    Shape(M=37, K=96, N=65, R=5, compute=F32),
    Shape(M=64, K=2100, N=40, R=64, compute=F16),
    Shape(M=3, K=33, N=17, R=128, compute=BF16),
]


@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=str)
@pytest.mark.parametrize("fusion", ALL, ids=str)
@pytest.mark.parametrize("with_S", [False, True], ids=["x_source", "S"])
def test_decode_matches_float64(shape: Shape, fusion: str | None, with_S: bool, device: torch.device) -> None:
    """For a few tokens, two launches compute two projections.

    With save_for_backward, T and S are returned: for "add" only T + S, without fusion only T.
    """
    i, j = make(shape, device), make(replace(shape, N=shape.N + 7), device)
    x_source = None if fusion is None or with_S else i.x_source
    Ss = [i.S, j.S] if fusion is not None and with_S else []
    outs = [torch.empty_like(i.y), torch.empty_like(j.y)]
    call = {"compute_dtype": shape.compute, "scalings": [SCALING, 2.0], "fusion": fusion}
    with counting() as names:
        args = (i.x, x_source, Ss, [i.y, j.y], [i.A, j.A], [i.B, j.B])
        T, S = triton_ops.decode(*args, save_for_backward=True, outs=outs, **call)
    assert names == ["shrink_decode_kernel", "expand_decode_kernel"]
    for at, (k, scaling) in enumerate(((i, SCALING), (j, 2.0))):
        columns, results = slice(at * shape.R, (at + 1) * shape.R), {}
        for dtype in (shape.compute, F64):
            A = k.A.to(shape.compute).to(dtype)
            T_k = i.x.to(dtype) @ A.T
            S_k = k.S.to(dtype) if with_S else i.x_source.to(dtype) @ A.T
            H = hidden(T_k, S_k, fusion, dtype)
            results[dtype] = (k.y.to(dtype) + scaling * (H @ k.B.to(dtype).T), H if fusion == "add" else T_k, S_k)
        plain, truth = results[shape.compute], results[F64]
        assert_close(outs[at], plain[0], truth[0], shape.compute)
        assert_close(T[:, columns], plain[1], truth[1], shape.compute)
        if fusion in (None, "add"):
            assert S is None
        else:
            assert_close(S[:, columns], plain[2], truth[2], shape.compute)
    assert triton_ops.decode(
        i.x, x_source, Ss[:1], [i.y], [i.A], [i.B], save_for_backward=False, **(call | {"scalings": [1.0]})
    ) == (
        None,
        None,
    )


def test_decoding_a_row_does_not_depend_on_other_rows(device: torch.device) -> None:
    shape = Shape(M=64, K=2100, N=40, R=16, compute=BF16)
    i = make(shape, device)
    call = {"compute_dtype": BF16, "scalings": [SCALING], "fusion": "mul", "save_for_backward": False}

    def rows(at: slice) -> Tensor:
        out = torch.empty_like(i.y[at])
        triton_ops.decode(i.x[at], i.x_source[at], [], [i.y[at]], [i.A], [i.B], outs=[out], **call)
        return out

    together = rows(slice(0, 64))
    for at in (slice(0, 1), slice(17, 18), slice(20, 45), slice(63, 64)):
        assert torch.equal(rows(at), together[at])


@pytest.mark.parametrize("how", ["rows", "transposed", "slice"])
def test_strided_inputs_give_the_results_of_contiguous_ones(how: str, device: torch.device) -> None:
    """Strided inputs give the results of contiguous ones, and the gaps between a destination's rows are unchanged."""
    i = make(Shape(compute=F32, R=16), device)
    names = "x x_source A B G T S"
    j = replace(i, **{name: strided(getattr(i, name), how) for name in names.split()})
    assert not any(tensor.is_contiguous() for tensor in j[names])

    def run(k: Inputs, y: Tensor, dT: Tensor, dS: Tensor) -> list[Tensor]:
        phi = {"scalings": [SCALING], "fusion": "mul_relu"}
        triton_ops.expand_([y], k.T, k.S, [k.B], **phi)
        (dB,) = triton_ops.grad_bottleneck([k.G], k.T, k.S, [k.B], dT=dT, dS=dS, B_grad_dtype=F32, **phi)
        masks = {"mask": k.mask, "mask_source": k.mask_source, "keep_scale": KEEP_SCALE}
        return [
            *triton_ops.shrink(k.x, k.x_source, k.A, compute_dtype=F32, **masks),
            *(y, dT, dS, dB),
            triton_ops.grad_weight(k.T, k.x, k.S, k.x_source, grad_dtype=F32, **masks),
            triton_ops.grad_input(k.T, k.A, mask=k.mask, keep_scale=KEEP_SCALE, dtype=F32),
        ]

    expected_results = run(i, i.y.clone(), torch.empty_like(i.T), torch.empty_like(i.T))
    frame = torch.full((i.y.shape[0] + 2, i.y.shape[1] + 4), 7.0, device=device)
    inside = frame[1:-1, 1:-3]
    inside.copy_(i.y)
    wide = torch.full((i.T.shape[0], 3 * i.T.shape[1]), 7.0, device=device)
    dT, dS, gap = wide.chunk(3, dim=1)
    for actual, expected in zip(run(j, inside, dT, dS), expected_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    inside.fill_(7.0)
    assert (frame == 7.0).all() and (gap == 7.0).all()


def test_add_writes_dT_and_dS(device: torch.device) -> None:
    i = make(Shape(), device)
    dT, dS = torch.empty_like(i.T), torch.empty_like(i.T)
    triton_ops.grad_bottleneck([i.G], i.T, i.S, [i.B], scalings=[SCALING], fusion="add", dT=dT, dS=dS)
    torch.testing.assert_close(dT, SCALING * i.G @ i.B)
    assert torch.equal(dT, dS)


def test_add_needs_only_the_sum_of_T_and_S(device: torch.device) -> None:
    """For "add", T + S can be passed instead of T and S. If dB is not computed, dT needs neither T nor S."""
    i = make(Shape(), device)
    y, expected = i.y.clone(), i.y.clone()
    phi = {"scalings": [SCALING], "fusion": "add"}
    triton_ops.expand_([y], i.T + i.S, None, [i.B], **phi)
    triton_ops.expand_([expected], i.T, i.S, [i.B], **phi)
    torch.testing.assert_close(y, expected)
    dT, expected_dT, frozen_dT = (torch.empty_like(i.T) for _ in range(3))
    (dB,) = triton_ops.grad_bottleneck([i.G], i.T + i.S, None, [i.B], dT=dT, B_grad_dtype=F32, **phi)
    (expected_dB,) = triton_ops.grad_bottleneck([i.G], i.T, i.S, [i.B], dT=expected_dT, B_grad_dtype=F32, **phi)
    assert torch.equal(dT, expected_dT)
    torch.testing.assert_close(dB, expected_dB)
    triton_ops.grad_bottleneck([i.G], None, None, [i.B], dT=frozen_dT, **phi)
    assert torch.equal(frozen_dT, expected_dT)
    with pytest.raises(ValueError, match="needs T"):
        triton_ops.grad_bottleneck([i.G], None, None, [i.B], dT=frozen_dT, B_grad_dtype=F32, **phi)


def test_dropout_on_one_stream_leaves_the_other_unchanged(device: torch.device) -> None:
    i = make(Shape(), device)
    options = {"mask": i.mask, "keep_scale": KEEP_SCALE}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32, **options)
    torch.testing.assert_close(T, drop(i.x, i.mask, F32) @ i.A.T)
    torch.testing.assert_close(S, i.x_source @ i.A.T)
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32, **options)
    torch.testing.assert_close(dA, i.T.T @ drop(i.x, i.mask, F32) + i.S.T @ i.x_source)


def test_zero_rows_give_empty_results_and_zero_weight_gradients(device: torch.device) -> None:
    i = make(Shape(M=0), device)
    phi = {"scalings": [SCALING], "fusion": "mul"}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32)
    triton_ops.expand_([i.y], T, S, [i.B], **phi)
    dT, dS = torch.empty_like(T), torch.empty_like(S)
    (dB,) = triton_ops.grad_bottleneck([i.G], T, S, [i.B], dT=dT, dS=dS, B_grad_dtype=F32, **phi)
    dA = triton_ops.grad_weight(dT, i.x, dS, i.x_source, grad_dtype=F32)
    dx = triton_ops.grad_input(dT, i.A, dtype=F32)
    assert [t.shape[0] for t in (T, S, dT, dS, dx)] == [0] * 5
    assert dB.shape == i.B.shape and dA.shape == i.A.shape and not dB.any() and not dA.any()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_split_sums_have_the_same_bits_on_every_run(dtype: torch.dtype, device: torch.device) -> None:
    """Split-K sums are correct and have the same bits on every run."""
    shape = Shape(M=600, K=600, N=48, R=16, compute=dtype)
    i = make(shape, device)
    i = replace(i, x=i.x[:40], x_source=i.x_source[:40])  # with few rows, the sum over K is split
    rows = make(replace(shape, K=48), device)  # with few columns, the sum over rows is split

    def run() -> list[Tensor]:
        phi = {"scalings": [SCALING], "fusion": "mul"}
        T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=dtype)
        dT, dS = torch.empty_like(rows.T), torch.empty_like(rows.S)
        outs = {"dT": dT, "dS": dS, "B_grad_dtype": F32}
        (dB,) = triton_ops.grad_bottleneck([rows.G], rows.T, rows.S, [rows.B], **outs, **phi)
        dA = triton_ops.grad_weight(rows.T, rows.x, rows.S, rows.x_source, grad_dtype=F32)
        return [T, S, dT, dS, dB, dA]

    with recording(config.LARGE_SHARED_BYTES) as launches:
        run()
    assert sum(launch.kernel.__name__ == "split_k_reduce_kernel" for launch in launches) == 3

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    truths, plains = (
        [
            i.x.to(t) @ i.A.to(t).T,
            (SCALING * rows.G.to(t)).T @ (rows.S.to(t) * rows.T.to(t)),
            rows.T.to(t).T @ rows.x.to(t) + rows.S.to(t).T @ rows.x_source.to(t),
        ]
        for t in (F64, dtype)
    )
    for actual, plain, truth in zip((first[0], first[4], first[5]), plains, truths, strict=True):
        assert_close(actual, plain, truth, dtype)


def test_float32_does_not_use_tf32(device: torch.device) -> None:
    """TF32 has 10 mantissa bits; a product with an operand that needs 20 shows whether TF32 is used."""
    value = 1.0 + 2.0**-20
    x = torch.zeros(16, 32, device=device)
    x[:, 0] = value
    A = torch.zeros(16, 32, device=device)
    A[:, 0] = 1.0
    projected, _ = triton_ops.shrink(x, None, A, compute_dtype=F32)
    assert (projected == value).all()
    assert (triton_ops.grad_input(x[:, :16], A, dtype=F32)[:, 0] == value).all()


def test_expand_rounds_once_and_to_even(device: torch.device) -> None:
    """In bfloat16, 256 + 1.001 rounds to 258. With 1.001 rounded to 1 first, 257 would round to 256."""
    y = torch.full((2, 16), 256.0, dtype=BF16, device=device)
    T = torch.ones(2, 1, dtype=BF16, device=device)
    B = torch.ones(16, 1, dtype=BF16, device=device)
    triton_ops.expand_([y], T, None, [B], scalings=[1.001], fusion=None)
    assert (y == 258.0).all()
    y.fill_(256.0)
    triton_ops.expand_([y], T, None, [B], scalings=[1.0], fusion=None)
    assert (y == 256.0).all()


def test_nan_is_not_hidden_by_relu(device: torch.device) -> None:
    i = make(Shape(), device)
    i.T[3, 2] = torch.nan
    triton_ops.expand_([i.y], i.T, i.S, [i.B], scalings=[SCALING], fusion="add_relu")
    assert i.y[3].isnan().all() and not i.y[4].isnan().any()


def test_triton_and_torch_primitives_have_the_same_signatures() -> None:
    """The autograd node works with either module."""
    triton_only = {"DECODE_ROWS", "can_decode", "decode", "tuned"}
    for name in sorted({*triton_ops.__all__} - triton_only):
        ours, theirs = (dict(inspect.signature(getattr(module, name)).parameters) for module in (triton_ops, torch_ops))
        ours.pop("follow_table", None)
        kinds = [[(key, p.kind, p.default) for key, p in side.items()] for side in (ours, theirs)]
        assert kinds[0] == kinds[1], name


def test_every_choice_of_the_general_rule_is_a_listed_configuration() -> None:
    """The general rule (config.choose) returns valid tiles for any rank, operand class and size of shared memory."""
    table = {row[:4]: row[4] for row in config.all_configs()}
    # the kernels of the form last_adds use the configurations of shrink and grad_weight
    for kernel in {kernel.removesuffix("_last_adds") for kernel in config.KERNELS}:
        for operands in (config.NARROW,) if kernel.endswith("_tma") else config.OPERAND_CLASSES:
            for rank in (1, 5, 16, 17, 64, 100, 128, 200, 256, 300, 1000):
                for shared_bytes in (config.SMALL_SHARED_BYTES, config.LARGE_SHARED_BYTES):
                    chosen = config.choose(kernel, operands, rank, shared_bytes)
                    assert table[kernel, operands, config.rank_bucket(rank), shared_bytes] == chosen
                    assert all(t == 0 or (t >= 16 and t & (t - 1) == 0) for t in (chosen.BLOCK_M, chosen.BLOCK_R))
                assert config.choose(kernel, operands, rank, 48 * 1024).num_stages == 1


def test_a_rank_above_the_largest_bucket_gives_correct_results(device: torch.device) -> None:
    """The kernels process a large rank in blocks, as they do for several stacked adapters."""
    i = make(Shape(M=20, K=40, N=24, R=300, compute=F32), device)
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32)
    torch.testing.assert_close(T, i.x @ i.A.T)
    torch.testing.assert_close(S, i.x_source @ i.A.T)
    y = i.y.clone()
    triton_ops.expand_([y], i.T, i.S, [i.B], scalings=[SCALING], fusion="mul")
    torch.testing.assert_close(y, i.y + SCALING * (i.S * i.T) @ i.B.T, rtol=1e-5, atol=1e-5)
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32)
    torch.testing.assert_close(dA, i.T.T @ i.x + i.S.T @ i.x_source, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(triton_ops.grad_input(i.T, i.A, dtype=F32), i.T @ i.A, rtol=1e-5, atol=1e-5)
