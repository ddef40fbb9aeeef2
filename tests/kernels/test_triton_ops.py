"""Each Triton primitive against float64 mathematics: on the GPU if there is one, else under Triton's interpreter.

The criterion everywhere: the largest error is at most twice that of plain PyTorch in the same dtype (with the roundings
PEFT's layers make), plus one machine epsilon of that dtype at the scale of the values.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from flare_kernels import dropout, torch_ops, triton_ops
from flare_kernels.fusion import FUSIONS, get_fusion
from flare_kernels.triton_ops import config
from flare_kernels.triton_ops.launch import recording

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL = (None, *FUSIONS)
SCALING = 0.7
KEEP_SCALE = dropout.keep_scale(0.3)


@dataclass(frozen=True)
class Shape:
    """One set of sizes and dtypes; ``compute`` is the dtype of T and S."""

    M: int = 37
    K: int = 96
    N: int = 65
    R: int = 8
    compute: torch.dtype = F32
    x: torch.dtype | None = None
    adapter: torch.dtype | None = None

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.compute, self.x, self.adapter) if dtype)
        return f"M{self.M}-K{self.K}-N{self.N}-R{self.R}-{dtypes}"


DTYPES = (F16, BF16, F32)
# every dtype at a common shape, then what is odd about each of the rest
SHAPES = [
    *(Shape(compute=dtype) for dtype in DTYPES),
    *(Shape(M=1, K=33, N=17, R=1, compute=dtype) for dtype in DTYPES),
    Shape(M=130, K=33, N=65, R=5, compute=BF16),
    Shape(M=130, K=160, N=144, R=64, compute=BF16),
    Shape(M=37, K=96, N=80, R=65, compute=F16),
    Shape(M=40, K=48, N=48, R=256, compute=BF16),
    Shape(M=33, K=33, N=33, R=200, compute=F32),
    Shape(compute=BF16, adapter=F32),  # PEFT's default
    Shape(compute=BF16, adapter=F32, x=F32),  # under autocast
    Shape(compute=F16, adapter=F32, x=F32, R=64),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaNs (all bits set for integers), so an output that no kernel writes is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


@dataclass
class Inputs:
    x: Tensor
    x_source: Tensor
    A: Tensor
    B: Tensor
    y: Tensor
    G: Tensor
    T: Tensor
    S: Tensor
    mask: Tensor
    mask_source: Tensor

    def __getitem__(self, names: str) -> list[Tensor]:
        return [getattr(self, name) for name in names.split()]


def make(shape: Shape, device: torch.device) -> Inputs:
    def randn(rows: int, cols: int, dtype: torch.dtype | None, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cols, dtype=F64) * scale).to(device, dtype or shape.compute)

    M, K, N, R = shape.M, shape.K, shape.N, shape.R
    seed = torch.tensor(5, device=device)
    return Inputs(
        x=randn(M, K, shape.x),
        x_source=randn(M, K, shape.x),
        A=randn(R, K, shape.adapter, K**-0.5),
        B=randn(N, R, shape.adapter, R**-0.5),
        y=randn(M, N, None),
        G=randn(M, N, None),
        T=randn(M, R, None),
        S=randn(M, R, None),
        mask=dropout.packed_mask(seed, M, K, 0.3, 0),
        mask_source=dropout.packed_mask(seed, M, K, 0.3, 1),
    )


def drop(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if mask is None else x * dropout.unpack(mask, x.shape[1], dtype) * KEEP_SCALE


def hidden(T: Tensor, S: Tensor, fusion: str | None, dtype: torch.dtype) -> Tensor:
    return T.to(dtype) if fusion is None else get_fusion(fusion)(S.to(dtype), T.to(dtype))


def assert_close(got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The criterion of this module; truth is float64."""
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    error = (got.to(F64) - truth).abs().max().item()
    allowed = 2 * (plain.to(F64) - truth).abs().max().item() + torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def strided(x: Tensor, how: str) -> Tensor:
    """x with the same values and other strides."""
    if how == "rows":  # every other row of a taller tensor
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
    if how == "transposed":
        return x.T.contiguous().T
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 3:] = x
    return wide[:, 3:]  # an unaligned slice of a wider buffer


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_shrink(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    masks = (i.mask, i.mask_source) if masked else (None, None)
    options = {"compute_dtype": shape.compute, "keep_scale": KEEP_SCALE}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, mask=masks[0], mask_source=masks[1], **options)
    results = {}
    for dtype in (shape.compute, F64):
        streams = zip((i.x, i.x_source), masks, strict=True)
        results[dtype] = [drop(x, bits, dtype) @ i.A.to(dtype).T for x, bits in streams]
    for got, plain, truth in zip((T, S), results[shape.compute], results[F64], strict=True):
        assert got.dtype == shape.compute and got.is_contiguous()
        assert_close(got, plain, truth, shape.compute)

    both, nothing = triton_ops.shrink(
        i.x, i.x_source, i.A, mask=masks[0], mask_source=masks[1], sum_streams=True, **options
    )
    assert nothing is None
    assert_close(both, sum(results[shape.compute]), sum(results[F64]), shape.compute)

    # one stream alone gives the same bits, on its own side
    alone, nothing = triton_ops.shrink(i.x, None, i.A, mask=masks[0], **options)
    assert nothing is None and torch.equal(alone, T)
    nothing, alone = triton_ops.shrink(None, i.x_source, i.A, mask_source=masks[1], **options)
    assert nothing is None and torch.equal(alone, S)


@by_shape
@pytest.mark.parametrize("fusion", ALL, ids=str)
def test_expand(shape: Shape, fusion: str | None, device: torch.device) -> None:
    i = make(shape, device)
    S = None if fusion is None else i.S
    y = i.y.clone()
    assert triton_ops.expand_(y, i.T, S, i.B, scaling=SCALING, fusion=fusion) is None
    results = {}
    for dtype in (shape.compute, F64):
        results[dtype] = i.y.to(dtype) + SCALING * (hidden(i.T, i.S, fusion, dtype) @ i.B.to(dtype).T)
    assert y.dtype == i.y.dtype
    assert_close(y, results[shape.compute], results[F64], shape.compute)


@by_shape
@pytest.mark.parametrize("fusion", ALL, ids=str)
def test_grad_bottleneck(shape: Shape, fusion: str | None, device: torch.device) -> None:
    i = make(shape, device)
    S = None if fusion is None else i.S
    B_grad_dtype = shape.adapter or shape.compute
    options = {"scaling": SCALING, "fusion": fusion, "B_grad_dtype": B_grad_dtype}
    dT, dS, dB = triton_ops.grad_bottleneck(i.G, i.T, S, i.B, **options)
    results = {}
    for dtype in (shape.compute, F64):
        dH = SCALING * (i.G.to(dtype) @ i.B.to(dtype))
        grads = (dH, None) if fusion is None else get_fusion(fusion).backward(dH, i.S.to(dtype), i.T.to(dtype))
        results[dtype] = [*grads, (SCALING * i.G.to(dtype)).T @ hidden(i.T, i.S, fusion, dtype)]
    for got, plain, truth in zip((dT, dS, dB), results[shape.compute], results[F64], strict=True):
        if truth is None:
            assert got is None
        else:
            assert_close(got, plain, truth, shape.compute)
    assert dT.dtype == shape.compute and dB.dtype == B_grad_dtype
    assert fusion != "add" or dS is dT

    # halves can be left out
    nothing = triton_ops.grad_bottleneck(i.G, i.T, S, i.B, need_hidden=False, **options)
    assert nothing[:2] == (None, None) and torch.equal(nothing[2], dB)
    only_hidden = triton_ops.grad_bottleneck(i.G, i.T, S, i.B, need_B=False, **options)
    assert only_hidden[2] is None and torch.equal(only_hidden[0], dT)


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_grad_weight(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    masks = (i.mask, i.mask_source) if masked else (None, None)
    grad_dtype = shape.adapter or shape.compute
    options = {"keep_scale": KEEP_SCALE, "grad_dtype": grad_dtype}
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, mask=masks[0], mask_source=masks[1], **options)
    results = {}
    for dtype in (shape.compute, F64):
        pairs = zip((i.T, i.S), (i.x, i.x_source), masks, strict=True)
        results[dtype] = [grad.to(dtype).T @ drop(x, bits, dtype) for grad, x, bits in pairs]
    assert dA.dtype == grad_dtype
    assert_close(dA, sum(results[shape.compute]), sum(results[F64]), shape.compute)
    for stream, arguments in enumerate(((i.T, i.x, None, None), (None, None, i.S, i.x_source))):
        alone = triton_ops.grad_weight(*arguments, mask=masks[0], mask_source=masks[1], **options)
        assert_close(alone, results[shape.compute][stream], results[F64][stream], shape.compute)


@by_shape
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_grad_input(shape: Shape, masked: bool, device: torch.device) -> None:
    i = make(shape, device)
    mask = i.mask if masked else None
    x_dtype = shape.x or shape.compute
    dx = triton_ops.grad_input(i.T, i.A, mask=mask, keep_scale=KEEP_SCALE, dtype=x_dtype)
    plain, truth = (drop(i.T.to(dtype) @ i.A.to(dtype), mask, dtype) for dtype in (shape.compute, F64))
    assert dx.dtype == x_dtype
    assert_close(dx, plain, truth, shape.compute)
    assert mask is None or not dx[dropout.unpack(mask, shape.K, torch.bool).logical_not()].any()


@pytest.mark.parametrize("how", ["rows", "transposed", "slice"])
def test_any_strides(how: str, device: torch.device) -> None:
    """Strided inputs give the numbers of contiguous ones, and what lies between a destination's rows stays."""
    i = make(Shape(compute=F32, R=16), device)
    names = "x x_source A B G T S"
    j = replace(i, **{name: strided(getattr(i, name), how) for name in names.split()})
    assert not any(tensor.is_contiguous() for tensor in j[names])

    def run(k: Inputs, y: Tensor, out_dT: Tensor, out_dS: Tensor) -> list[Tensor]:
        triton_ops.expand_(y, k.T, k.S, k.B, scaling=SCALING, fusion="mul_relu")
        options = {"scaling": SCALING, "fusion": "mul_relu", "B_grad_dtype": F32, "out_dT": out_dT, "out_dS": out_dS}
        dT, dS, dB = triton_ops.grad_bottleneck(k.G, k.T, k.S, k.B, **options)
        assert dT is out_dT and dS is out_dS
        masks = {"mask": k.mask, "mask_source": k.mask_source, "keep_scale": KEEP_SCALE}
        return [
            *triton_ops.shrink(k.x, k.x_source, k.A, compute_dtype=F32, **masks),
            *(y, dT, dS, dB),
            triton_ops.grad_weight(k.T, k.x, k.S, k.x_source, grad_dtype=F32, **masks),
            triton_ops.grad_input(k.T, k.A, mask=k.mask, keep_scale=KEEP_SCALE, dtype=F32),
        ]

    expected = run(i, i.y.clone(), torch.empty_like(i.T), torch.empty_like(i.T))
    frame = torch.full((i.y.shape[0] + 2, i.y.shape[1] + 4), 7.0, device=device)
    inside = frame[1:-1, 1:-3]
    inside.copy_(i.y)
    wide = torch.full((i.T.shape[0], 3 * i.T.shape[1]), 7.0, device=device)
    dT, dS, gap = wide.chunk(3, dim=1)
    for got, want in zip(run(j, inside, dT, dS), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inside.fill_(7.0)
    assert (frame == 7.0).all() and (gap == 7.0).all()


def test_add_writes_both_destinations(device: torch.device) -> None:
    i = make(Shape(), device)
    outs = torch.empty_like(i.T), torch.empty_like(i.T)
    options = {"scaling": SCALING, "fusion": "add", "B_grad_dtype": F32, "out_dT": outs[0], "out_dS": outs[1]}
    dT, dS, _ = triton_ops.grad_bottleneck(i.G, i.T, i.S, i.B, **options)
    assert dT is outs[0] and dS is outs[1] and torch.equal(dT, dS)


def test_sum_in_T_needs_no_S(device: torch.device) -> None:
    """Fusion "add" may hand on T + S alone, and with a frozen B neither is needed for dH."""
    i = make(Shape(), device)
    y, want = i.y.clone(), i.y.clone()
    triton_ops.expand_(y, i.T + i.S, None, i.B, scaling=SCALING, fusion="add")
    triton_ops.expand_(want, i.T, i.S, i.B, scaling=SCALING, fusion="add")
    torch.testing.assert_close(y, want)
    options = {"scaling": SCALING, "fusion": "add", "B_grad_dtype": F32}
    dT, dS, dB = triton_ops.grad_bottleneck(i.G, i.T + i.S, None, i.B, **options)
    want_dT, _, want_dB = triton_ops.grad_bottleneck(i.G, i.T, i.S, i.B, **options)
    assert dS is None and torch.equal(dT, want_dT)
    torch.testing.assert_close(dB, want_dB)
    frozen = triton_ops.grad_bottleneck(i.G, None, None, i.B, need_B=False, **options)
    assert torch.equal(frozen[0], want_dT) and frozen[1:] == (None, None)


def test_dropout_on_one_stream_only(device: torch.device) -> None:
    i = make(Shape(), device)
    options = {"mask": i.mask, "keep_scale": KEEP_SCALE}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32, **options)
    torch.testing.assert_close(T, drop(i.x, i.mask, F32) @ i.A.T)
    torch.testing.assert_close(S, i.x_source @ i.A.T)
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32, **options)
    torch.testing.assert_close(dA, i.T.T @ drop(i.x, i.mask, F32) + i.S.T @ i.x_source)


def test_no_rows(device: torch.device) -> None:
    i = make(Shape(M=0), device)
    options = {"scaling": SCALING, "fusion": "mul", "B_grad_dtype": F32}
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32)
    triton_ops.expand_(i.y, T, S, i.B, scaling=SCALING, fusion="mul")
    dT, dS, dB = triton_ops.grad_bottleneck(i.G, T, S, i.B, **options)
    dA = triton_ops.grad_weight(dT, i.x, dS, i.x_source, grad_dtype=F32)
    dx = triton_ops.grad_input(dT, i.A, dtype=F32)
    assert [t.shape[0] for t in (T, S, dT, dS, dx)] == [0] * 5
    assert dB.shape == i.B.shape and dA.shape == i.A.shape and not dB.any() and not dA.any()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_sums_that_are_split_repeat_their_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Long sums, cut into partial results: right, and the same bits on every run."""
    shape = Shape(M=600, K=600, N=48, R=16, compute=dtype)
    i = make(shape, device)
    i = replace(i, x=i.x[:40], x_source=i.x_source[:40])  # K is cut where there are few rows
    rows = make(replace(shape, K=48), device)  # rows are cut where there are few columns

    def run() -> list[Tensor]:
        options = {"scaling": SCALING, "fusion": "mul", "B_grad_dtype": F32}
        T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=dtype)
        dT, dS, dB = triton_ops.grad_bottleneck(rows.G, rows.T, rows.S, rows.B, **options)
        dA = triton_ops.grad_weight(rows.T, rows.x, rows.S, rows.x_source, grad_dtype=F32)
        return [T, S, dT, dS, dB, dA]

    with recording(config.LARGE_SHARED_BYTES) as launches:
        run()
    assert sum(launch.kernel.__name__ == "sum_partials_kernel" for launch in launches) == 3

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    truths, plains = (
        [
            i.x.to(to) @ i.A.to(to).T,
            (SCALING * rows.G.to(to)).T @ (rows.S.to(to) * rows.T.to(to)),
            rows.T.to(to).T @ rows.x.to(to) + rows.S.to(to).T @ rows.x_source.to(to),
        ]
        for to in (F64, dtype)
    )
    for got, plain, truth in zip((first[0], first[4], first[5]), plains, truths, strict=True):
        assert_close(got, plain, truth, dtype)


def test_float32_is_not_rounded_on_the_way(device: torch.device) -> None:
    """TF32 keeps 10 bits of an operand; one product of numbers that need 23 tells."""
    value = 1.0 + 2.0**-20
    x = torch.zeros(16, 32, device=device)
    x[:, 0] = value
    A = torch.zeros(16, 32, device=device)
    A[:, 0] = 1.0
    projected, _ = triton_ops.shrink(x, None, A, compute_dtype=F32)
    assert (projected == value).all()
    assert (triton_ops.grad_input(x[:, :16], A, dtype=F32)[:, 0] == value).all()


def test_expand_rounds_once_and_to_even(device: torch.device) -> None:
    """256 + 1.001 is nearer to 258 than to 256 in bfloat16; a delta that is rounded first gives 257, and so 256."""
    y = torch.full((2, 16), 256.0, dtype=BF16, device=device)
    T = torch.ones(2, 1, dtype=BF16, device=device)
    B = torch.ones(16, 1, dtype=BF16, device=device)
    triton_ops.expand_(y, T, None, B, scaling=1.001, fusion=None)
    assert (y == 258.0).all()
    y.fill_(256.0)
    triton_ops.expand_(y, T, None, B, scaling=1.0, fusion=None)
    assert (y == 256.0).all()


def test_nan_is_not_hidden_by_relu(device: torch.device) -> None:
    i = make(Shape(), device)
    i.T[3, 2] = torch.nan
    triton_ops.expand_(i.y, i.T, i.S, i.B, scaling=SCALING, fusion="add_relu")
    assert i.y[3].isnan().all() and not i.y[4].isnan().any()


def test_same_signatures_as_the_torch_backend() -> None:
    """The autograd nodes are written once over either module."""
    for name in triton_ops.__all__:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (triton_ops, torch_ops))
        kinds = [[(key, p.kind, p.default) for key, p in side.items()] for side in (ours, theirs)]
        assert kinds[0] == kinds[1], name


def test_table_holds_every_choice() -> None:
    """Any rank, operands and card end in a row of the table, with tiles that a kernel can have."""
    table = {row[:4]: row[4] for row in config.all_configs()}
    for kernel in config.KERNELS:
        for operands in config.OPERAND_CLASSES:
            for rank in (1, 5, 16, 17, 64, 100, 128, 200, 256, 300, 1000):
                for shared_bytes in (config.SMALL_SHARED_BYTES, config.LARGE_SHARED_BYTES):
                    chosen = config.choose(kernel, operands, rank, shared_bytes)
                    assert table[kernel, operands, config.rank_bucket(rank), shared_bytes] == chosen
                    assert all(t == 0 or (t >= 16 and t & (t - 1) == 0) for t in (chosen.BLOCK_M, chosen.BLOCK_R))
                assert config.choose(kernel, operands, rank, 48 * 1024).num_stages == 1


def test_rank_above_the_largest_bucket(device: torch.device) -> None:
    """Several adapters side by side: R is walked in blocks."""
    i = make(Shape(M=20, K=40, N=24, R=300, compute=F32), device)
    T, S = triton_ops.shrink(i.x, i.x_source, i.A, compute_dtype=F32)
    torch.testing.assert_close(T, i.x @ i.A.T)
    torch.testing.assert_close(S, i.x_source @ i.A.T)
    y = i.y.clone()
    triton_ops.expand_(y, i.T, i.S, i.B, scaling=SCALING, fusion="mul")
    torch.testing.assert_close(y, i.y + SCALING * (i.S * i.T) @ i.B.T, rtol=1e-5, atol=1e-5)
    dA = triton_ops.grad_weight(i.T, i.x, i.S, i.x_source, grad_dtype=F32)
    torch.testing.assert_close(dA, i.T.T @ i.x + i.S.T @ i.x_source, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(triton_ops.grad_input(i.T, i.A, dtype=F32), i.T @ i.A, rtol=1e-5, atol=1e-5)
