"""The order adapter_first: its results, its products, and the calls that cannot use it.

In this order (flare_kernels/order.py), the adapters write the outputs, and the frozen products add to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flare_kernels import forms, fused_lora_qkv, launch_mode, launch_table, order
from flare_kernels.launch_mode import forcing
from flare_kernels.launch_table import Entry, LaunchTable
from flare_kernels.library import call_of

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
WIDTHS = {"q": 38, "k": 9, "v": 17}
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend"),
)
by_backend = pytest.mark.parametrize("backend", ["torch", TRITON])


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return NaNs, so that a read of y before its first write changes the result."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[order.Order]]:
    """Collect the orders that calls choose."""
    from flare_kernels import function

    orders: list[order.Order] = []
    monkeypatch.setattr(function, "choose_order", lambda *args: orders.append(order.choose_order(*args)) or orders[-1])
    with forcing():  # with an empty cache of plans
        yield orders


def make(dtype: torch.dtype, device: torch.device, M: int = 67, d: int = 34, r: int = 5, **ranks: int) -> dict:
    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, dtype=F64) * scale).to(device, dtype)

    t = {"x": randn(1, M, d), "x_source": randn(1, M, d)}
    for name, n in WIDTHS.items():
        R = ranks.get(name, r)
        t |= {f"W.{name}": randn(n, d, scale=d**-0.5), f"b.{name}": randn(n), f"G.{name}": randn(1, M, n)}
        t |= {f"A.{name}": randn(R, d, scale=d**-0.5), f"B.{name}": randn(n, R, scale=R**-0.5)}
    return t


def run(t: dict[str, Tensor], adapted: str, biased: str, backend: str, **options: Any) -> dict[str, Tensor | None]:
    """Return the outputs and the gradients of x, A and B."""
    leaves = {key: value.detach().clone() for key, value in t.items()}
    trained = ["x", *(f"{kind}.{name}" for kind in "AB" for name in adapted)]
    for key in trained:
        leaves[key].requires_grad_()
    torch.manual_seed(3)
    ys = fused_lora_qkv(
        leaves["x"],
        leaves["x_source"],
        None,
        {name: (leaves[f"A.{name}"], leaves[f"B.{name}"], 0.5 + len(name)) for name in adapted},
        weights={name: leaves[f"W.{name}"] for name in WIDTHS},
        biases={name: leaves[f"b.{name}"] for name in biased},
        training=True,
        backend=backend,
        **options,
    )
    torch.autograd.backward(list(ys.values()), [t[f"G.{name}"].to(y.dtype) for name, y in ys.items()])
    return {**{f"y.{n}": y.detach() for n, y in ys.items()}, **{f"d{key}": leaves[key].grad for key in trained}}


#: Adapted projections, projections with a bias, rank of v (q and k have rank 5), options.
CASES = {
    "qv": ("qv", "qkv", 5, {"fusion": "add_relu"}),
    "no bias": ("qv", "", 5, {"fusion": "mul_relu"}),
    "one bias": ("qkv", "k", 17, {"fusion": "mul"}),
    "add": ("qkv", "qv", 5, {"fusion": "add"}),
    "plain": ("v", "v", 5, {"fusion": None}),
    "two phi": ("qkv", "qkv", 17, {"fusion": {"q": "add", "v": "mul_relu"}}),
    "dropout": ("qv", "qkv", 5, {"fusion": "add_relu", "dropout_p": 0.5}),
}


@by_backend
@pytest.mark.parametrize("case", CASES)
def test_adapter_first_matches_the_oracle(case: str, backend: str, device, orders) -> None:
    """The kernels run in float32, and plain PyTorch in float64. No uninitialised memory is read."""
    adapted, biased, rank, options = CASES[case]
    dtype = F64 if backend == "torch" else F32
    t = make(dtype, device, v=rank)
    truth = run({key: value.double() for key, value in t.items()}, adapted, biased, "reference", **options)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 2e-4, "atol": 2e-4}
    for form in ("frozen_first", "adapter_first") if backend == "torch" else ("adapter_first",):
        orders.clear()
        with forcing(form=form):
            actual = run(t, adapted, biased, backend, **options)
        assert [chosen is not None for chosen in orders] == [form == "adapter_first"]
        for key, expected in truth.items():
            torch.testing.assert_close(actual[key].double(), expected, msg=f"{form} {key}", **tolerance)


@by_backend
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_adapter_first_in_16_bit_is_as_close_to_float64_as_peft(dtype: torch.dtype, backend: str, device) -> None:
    """The norm of the error is at most the norm of the error of PEFT's form, base + (H B^T) s.

    PEFT's form rounds each intermediate result.
    """
    t = make(dtype, device, M=70, d=256, r=8)
    wide = {key: value.double() for key, value in t.items()}
    truth = run(wide, "qv", "qkv", "reference", fusion="add")
    with forcing(form="adapter_first"):
        actual = run(t, "qv", "qkv", backend, fusion="add")
    eager = {"x": t["x"].clone().requires_grad_()}
    outputs = []
    for name in WIDTHS:
        y = F.linear(eager["x"], t[f"W.{name}"], t[f"b.{name}"])
        if name != "k":
            H = F.linear(eager["x"], t[f"A.{name}"]) + F.linear(t["x_source"], t[f"A.{name}"])
            y = y + F.linear(H, t[f"B.{name}"]) * 1.5
        eager[f"y.{name}"] = y.detach()
        outputs.append(y)
    torch.autograd.backward(outputs, [t[f"G.{name}"] for name in WIDTHS])
    eager["dx"] = eager["x"].grad
    for key in ("y.q", "y.k", "y.v", "dx"):
        error, peft = ((result[key].double() - truth[key]).norm() / truth[key].norm() for result in (actual, eager))
        assert error <= peft, f"{key}: {error:.3e}, PEFT's eager form {peft:.3e}"


@by_backend
def test_expand_with_biases_does_not_read_y(backend: str, device) -> None:
    """y_i = bias_i + s_i H_i B_i^T overwrites NaNs, with strided y and a bias for some projections only."""
    from flare_kernels.selection import primitives

    ops = primitives(backend, device, F32)
    M, R, widths = 37, 5, (70, 33, 16, 24)
    T = torch.randn(M, R * len(widths), device=device)
    S, Bs = torch.randn_like(T), [torch.randn(n, R, device=device) for n in widths]
    some = [torch.randn(2 * widths[0], device=device)[::2], None, torch.randn(16, device=device).bfloat16(), None]
    scalings = [0.5, 2.0, 1.0, 3.0]
    for biases in ([None] * 4, some, [torch.randn(n, device=device) for n in widths]):
        for fusion in (None, "mul_relu"):
            frame = torch.full((M, sum(widths) + 3), float("nan"), device=device)
            ys = list(frame[:, 3:].split(widths, dim=1))
            ops.expand_(ys, T, S if fusion else None, Bs, scalings=scalings, fusion=fusion, biases=biases)
            H = (T if fusion is None else T.relu() * S.relu()).double().split(R, dim=1)
            for y, h, B, scaling, bias in zip(ys, H, Bs, scalings, biases, strict=True):
                expected = scaling * h @ B.double().T + (0 if bias is None else bias.double())
                torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
            assert frame[:, :3].isnan().all()


def test_adapter_first_lets_the_frozen_products_add(device, monkeypatch) -> None:
    """In adapter_first, the frozen products of adapted y and of dx add to what the adapters have written."""
    calls: list[str] = []
    linear, addmm_ = F.linear, Tensor.addmm_
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(f"y = {a[1].shape[0]}") or linear(*a))
    monkeypatch.setattr(
        Tensor, "addmm_", lambda y, a, b, **k: calls.append(f"+= {tuple(b.shape)}") or addmm_(y, a, b, **k)
    )
    t = make(F32, device)
    products = {}
    for form in ("adapter_first", "frozen_first"):
        calls.clear()
        with forcing(form=form):
            run(t, "qv", "qkv", "torch")
        # leave out the products of the adapters, which have an axis of length 5 or 10
        products[form] = [call for call in calls if "(5, " not in call and "(10, " not in call]
    assert products["frozen_first"] == ["y = 38", "y = 9", "y = 17", "+= (9, 34)", "+= (17, 34)"]
    y_products, dx_products = ["+= (34, 38)", "+= (34, 17)"], ["+= (38, 34)", "+= (9, 34)", "+= (17, 34)"]
    assert products["adapter_first"] == ["y = 9", *y_products, *dx_products]


def test_unsupported_calls_run_the_frozen_products_first(device, orders) -> None:
    """Such calls have mixed dtypes, an autocast that casts, no adapter, or two adapters of one output."""
    t = make(F32, device)
    x, W, b = t["x"][0], t["W.q"], t["b.q"]
    valid = (("torch", device, F32, ((0, 5, 1.0, None),), 1, 0.0), x, W, b, None)
    refused = {
        "half x": (*valid[:1], x.half(), W, b, None),
        "half W": (*valid[:2], W.half(), b, None),
        "half bias": (*valid[:3], b.half(), None),
        "autocast": (*valid[:4], BF16),
        "no adapters": (("torch", device, F32, (), 1, 0.0), *valid[1:]),
        "two adapters of one output": (
            ("torch", device, F32, ((0, 5, 1.0, None), (0, 5, 1.0, None)), 1, 0.0),
            *valid[1:],
        ),
    }
    with forcing(form="adapter_first"):
        for name, arguments in {"valid": valid, "without bias": (*valid[:3], None, None), **refused}.items():
            constants, x_i, W_i, bias, autocast = arguments
            chosen = order.choose_order(launch_mode.current, call_of(*constants), x_i, [W_i], [bias], autocast)
            assert (chosen is None) == (name in refused), name
        with torch.autocast(device.type, BF16):  # every frozen product casts its float32 operands
            run(t, "qv", "qkv", "torch")
    assert orders == [None]


@pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend")
def test_a_few_tokens_use_the_decoding_kernels(device, orders) -> None:
    from flare_kernels.launch_mode import counting

    t = make(F32, device, M=7)
    with forcing(form="adapter_first"), counting() as names:
        run(t, "qv", "qkv", "triton")
    assert orders == [None] and "expand_decode_kernel" in names


def test_auto_follows_the_table_and_caches_the_order(device, monkeypatch, tmp_path) -> None:
    """With "auto", a call follows the table's entry for its size. Otherwise the general rule applies."""
    from flare_kernels.triton_ops.config import FORMS

    general = next(iter(FORMS["order"]))
    other = next(form for form in FORMS["order"] if form != general)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_table.ENVIRONMENT_VARIABLE, raising=False)
    launch_table.table_for.cache_clear()
    monkeypatch.setattr(forms, "_cuda_capability", lambda index: 90)
    monkeypatch.setattr(forms, "_gpu_name", lambda index: "Some GPU")
    key = forms.table_key("order", "narrow", 64, 8192, 4096)
    LaunchTable("Some GPU", {key: Entry(other)}).save(launch_table.user_path("Some GPU"))

    class OnGPU:
        """Stand-in for a tensor on a GPU."""

        device, dtype = torch.device("cuda", 0), BF16

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def data_ptr(self) -> int:
            return 0

        def stride(self) -> tuple[int, ...]:
            return (self.shape[1], 1)

        def element_size(self) -> int:
            return 2

    from types import SimpleNamespace

    from flare_kernels import torch_ops
    from flare_kernels.call import Call

    auto_ops = SimpleNamespace(**vars(torch_ops) | {"FOLLOWS_TABLE": True})
    for ops, M, expected in ((auto_ops, 8192, other), (auto_ops, 512, general), (torch_ops, 8192, general)):
        call = Call(ops, BF16, [(0, 64, 1.0, None), (1, 64, 1.0, None)], 2, 0.0)
        x, Ws = OnGPU(M, 4096), [OnGPU(4096, 4096), OnGPU(1024, 4096)]
        chosen = order.choose_order(launch_mode.current, call, x, Ws, [None, None], None)
        assert chosen == (((M, 4096), (M, 1024)) if expected == "adapter_first" else None)
    launch_table.table_for.cache_clear()

    t = make(F32, device)
    from flare_kernels import function

    with forcing(form="adapter_first"):
        run(t, "qv", "qkv", "torch")
        monkeypatch.setattr(function, "choose_order", lambda *args: pytest.fail("the order was chosen again"))
        run(t, "qv", "qkv", "torch")


def test_wrong_arguments_are_refused(device) -> None:
    t = make(F32, device)
    x, adapters = t["x"], {"q": (t["A.q"], t["B.q"], 1.0)}
    W, b = {"q": t["W.q"]}, {"q": t["b.q"]}
    with pytest.raises(ValueError, match="base_outputs and weights are both None"):
        fused_lora_qkv(x, None, None, adapters)
    with pytest.raises(ValueError, match="biases has the names \\['v'\\]"):
        fused_lora_qkv(x, None, None, adapters, weights=W, biases={"v": t["b.v"]})
    for wrong in (t["b.q"][:1], t["b.q"][None], torch.cat([t["b.q"], t["b.q"]])):
        with pytest.raises(ValueError, match=r"biases\['q'\] has shape .* expected \(\d+,\): the width of the output"):
            fused_lora_qkv(x, None, None, adapters, weights=W, biases={"q": wrong})
    with pytest.raises(ValueError, match="weights \\['q'\\] require grad"):
        fused_lora_qkv(x, None, None, adapters, weights={"q": t["W.q"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="biases were given with base_outputs"):
        fused_lora_qkv(x, None, {"q": F.linear(x, t["W.q"])}, adapters, weights=W, biases=b)
