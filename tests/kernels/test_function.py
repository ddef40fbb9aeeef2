"""The public functions on every backend, compared with the float64 oracle: values, gradients, saved bytes, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flare_kernels
from flare_kernels import FUSIONS, fused_lora, reference

ALL = (None, *FUSIONS)
LEAVES = ("x", "base_output", "lora_A", "lora_B", "x_source", "source_bottleneck")


def make(
    lead: tuple[int, ...], d: int, n: int, r: int, dtype: torch.dtype, device: torch.device, adapter_dtype=None
) -> dict[str, Tensor]:
    """Return random inputs with a non-zero B and without source_bottleneck, which some tests add."""

    def randn(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, to)

    to = adapter_dtype or dtype
    return {
        "x": randn(*lead, d),
        "x_source": randn(*lead, d),
        "base_output": randn(*lead, n),
        "lora_A": randn(r, d, scale=d**-0.5, to=to),
        "lora_B": randn(n, r, scale=r**-0.5, to=to),
    }


def run(fn, inputs: dict[str, Tensor], G: Tensor, **options) -> dict[str, Tensor]:
    """Return the output of fn and the gradient of every tensor in inputs.

    fn gets a copy of base_output that is not a leaf, because a leaf is not overwritten.
    """
    leaves = {k: v.detach().clone().requires_grad_(True) for k, v in inputs.items()}
    call = {"x_source": None, **leaves, "base_output": leaves["base_output"] * 1}
    y = fn(**call, **options)
    y.backward(G.to(y.dtype))
    return {"y": y.detach(), **{k: v.grad for k, v in leaves.items()}}


def assert_as_close_as_plain(actual, plain, truth, dtype: torch.dtype) -> None:
    """Assert that each error is at most twice the error of plain PyTorch, plus epsilon times the largest value.

    ``plain`` is computed by plain PyTorch in ``dtype``, ``truth`` in float64. epsilon is the machine epsilon of dtype.
    """
    eps = torch.finfo(dtype).eps
    for key, expected in truth.items():
        if expected is None:
            assert actual[key] is None or not actual[key].any(), key
            continue
        error = (actual[key].double() - expected).abs().max().item() if expected.numel() else 0.0
        allowed = 2 * (plain[key].double() - expected).abs().max().item() if expected.numel() else 0.0
        allowed += eps * expected.abs().max().item() if expected.numel() else 0.0
        assert error <= allowed, f"{key}: error {error:.3e}, allowed {allowed:.3e}"
        assert actual[key].dtype == plain[key].dtype, key


BACKEND = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend"),
    ),
]


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("fusion", ALL)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("source", ["x_source", "source_bottleneck"])
def test_outputs_and_gradients_match_float64(backend, fusion, dtype, adapter_dtype, source, device) -> None:
    inputs = make((2, 19), 33, 21, 5, dtype, device, adapter_dtype)
    if source == "source_bottleneck":
        inputs["source_bottleneck"] = (inputs.pop("x_source").double() @ inputs["lora_A"].double().T).to(dtype)
    G = torch.randn_like(inputs["base_output"])
    options = {"scaling": 0.7, "fusion": fusion}
    truth = run(reference.fused_lora, {k: v.double() for k, v in inputs.items()}, G.double(), **options)
    plain = run(reference.fused_lora, inputs, G, **options)
    actual = run(fused_lora, inputs, G, backend=backend, **options)
    assert_as_close_as_plain(actual, plain, truth, dtype)
    again = run(fused_lora, inputs, G, backend=backend, **options)
    for key, value in actual.items():
        assert value is None or torch.equal(value, again[key]), f"{key} differs between two runs"


@pytest.mark.parametrize("fusion", ALL)
@pytest.mark.parametrize("source", ["x_source", "source_bottleneck"])
def test_gradients_pass_gradcheck(fusion, source) -> None:
    inputs = make((2, 3), 4, 5, 3, torch.float64, torch.device("cpu"))
    if source == "source_bottleneck":
        inputs["source_bottleneck"] = torch.randn(2, 3, 3, dtype=torch.float64)
        del inputs["x_source"]
    names = list(inputs)

    def call(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(names, tensors, strict=True))
        return fused_lora(**{"x_source": None, **arguments}, scaling=0.7, fusion=fusion, backend="torch")

    unused = {"x_source", "source_bottleneck"} if fusion is None else set()
    leaves = tuple(v.requires_grad_(k not in unused) for k, v in inputs.items())
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("fusion", ["add", "mul_relu"])
def test_dropout_matches_the_oracle_with_the_same_seed(backend, fusion, device) -> None:
    inputs = make((2, 19), 33, 21, 5, torch.float32, device)
    G = torch.randn_like(inputs["base_output"])
    options = {"scaling": 0.7, "fusion": fusion, "dropout_p": 0.3, "training": True}
    results = []
    for fn, extra in ((reference.fused_lora, {}), (fused_lora, {"backend": backend})):
        torch.manual_seed(7)
        results.append(run(fn, inputs, G, **options, **extra))
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=1e-4, atol=1e-5, msg=key)
    no_dropout = run(fused_lora, inputs, G, backend=backend, scaling=0.7, fusion=fusion, dropout_p=0.3)
    assert not torch.allclose(no_dropout["y"], results[0]["y"]), "training=False must not drop"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_mask_is_restored_under_checkpoint_recompute(use_reentrant, device) -> None:
    inputs = make((2, 19), 33, 21, 5, torch.float32, device)
    options = {"scaling": 0.7, "fusion": "add_relu", "dropout_p": 0.3, "training": True}

    def block(x: Tensor, A: Tensor) -> Tensor:
        return fused_lora(x, inputs["x_source"], inputs["base_output"].clone(), A, inputs["lora_B"], **options)

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x, A = inputs["x"].clone().requires_grad_(), inputs["lora_A"].clone().requires_grad_()
        y = checkpoint(block, x, A, use_reentrant=use_reentrant) if checkpointed else block(x, A)
        y.square().sum().backward()
        grads.append((x.grad, A.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("M", [5, 130])
def test_x_and_B_get_gradients_if_S_and_A_do_not_require_grad(backend, fusion, M, device) -> None:
    inputs = make((M,), 16, 12, 4, torch.float32, device)
    inputs["source_bottleneck"] = inputs.pop("x_source")[:, :4].contiguous()
    results = []
    for call, options in ((reference.fused_lora, {}), (fused_lora, {"backend": backend})):
        leaves = {k: v.clone().requires_grad_(k in ("x", "lora_B")) for k, v in inputs.items()}
        y = call(**{**leaves, "x_source": None}, scaling=0.7, fusion=fusion, **options)
        y.square().sum().backward()
        results.append((y.detach(), leaves["x"].grad, leaves["lora_B"].grad))
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize(
    ("lead", "d", "n", "r"),
    [((1,), 7, 3, 1), ((0,), 7, 3, 4), ((2, 0), 8, 8, 4), ((1, 1), 16, 16, 16), ((70,), 40, 24, 130)],
    ids=["M=1", "M=0", "3d-M=0", "decode", "wide-rank"],
)
def test_unusual_shapes_match_float64(backend, lead, d, n, r, device) -> None:
    inputs = make(lead, d, n, r, torch.float32, device)
    G = torch.randn_like(inputs["base_output"])
    truth = run(reference.fused_lora, {k: v.double() for k, v in inputs.items()}, G.double(), scaling=2.0)
    plain = run(reference.fused_lora, inputs, G, scaling=2.0)
    actual = run(fused_lora, inputs, G, scaling=2.0, backend=backend)
    assert actual["y"].shape == (*lead, n)
    assert_as_close_as_plain(actual, plain, truth, torch.float32)


@pytest.mark.parametrize("backend", BACKEND)
def test_non_contiguous_inputs_give_the_results_of_contiguous_ones(backend, device) -> None:
    inputs = make((6, 5), 16, 12, 4, torch.float32, device)
    G = torch.randn_like(inputs["base_output"])
    expected = run(fused_lora, inputs, G, scaling=1.0, backend=backend)
    strided = {k: v.repeat_interleave(2, dim=0)[::2] for k, v in inputs.items()}
    strided["lora_A"] = inputs["lora_A"].T.contiguous().T
    strided["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    leaves = {k: v.detach().requires_grad_() for k, v in strided.items()}
    y = fused_lora(**leaves, scaling=1.0, backend=backend)
    y.backward(G)
    torch.testing.assert_close(y.detach(), expected["y"])
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[key], msg=key)


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "x+lora_A", "all but x_source"])
def test_frozen_tensors_get_no_gradient_and_x_is_saved_for_dA_only(backend, frozen, device) -> None:
    inputs = make((3, 7), 16, 12, 4, torch.float32, device)
    skip = {"x", "lora_A", "lora_B", "base_output"} if frozen.startswith("all") else set(frozen.split("+"))
    truth = run(reference.fused_lora, inputs, torch.ones_like(inputs["base_output"]), scaling=1.0)
    leaves = {k: v.clone().requires_grad_(k not in skip) for k, v in inputs.items()}
    saved: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.add(t.data_ptr()), t)[1], lambda t: t):
        y = fused_lora(**{**leaves, "base_output": leaves["base_output"] * 1}, scaling=1.0, backend=backend)
    assert (leaves["x"].data_ptr() in saved) == ("lora_A" not in skip), "x is needed for dA only"
    y.sum().backward()
    for key, leaf in leaves.items():
        if key in skip:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, truth[key], msg=key)


def test_base_output_is_overwritten_only_if_it_is_not_shared(device) -> None:
    inputs = make((3, 7), 16, 12, 4, torch.float32, device)
    before = inputs["base_output"].clone()
    y = fused_lora(**inputs, scaling=1.0)
    assert y.data_ptr() == inputs["base_output"].data_ptr(), "a tensor that is not shared must be overwritten"
    wide = torch.zeros(3, 7, 24, device=device)
    inputs["base_output"] = wide[..., :12]
    fused_lora(**inputs, scaling=1.0)
    assert not wide.any(), "a view of the caller's tensor must be copied first"
    leaf = before.clone().requires_grad_()
    inputs["base_output"] = leaf
    fused_lora(**inputs, scaling=1.0).sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


@pytest.mark.parametrize("fusion", ALL)
@pytest.mark.parametrize("M", [64, 128])
def test_only_the_necessary_tensors_are_saved(M, fusion, device) -> None:
    """Only A, B, x, x_source, T, S and a bfloat16 copy of B are saved.

    The copy is saved if x has at least 16 times as many bytes. For "add", T + S is saved instead of T and S. Without
    fusion, x_source is not read, and there is no S.
    """
    d, r = 256, 8
    inputs = make((M,), d, d, r, torch.bfloat16, device, torch.float32)
    parameters = {inputs[k].requires_grad_().data_ptr() for k in ("lora_A", "lora_B")}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        fused_lora(**inputs, scaling=1.0, fusion=fusion)
    streams = 1 if fusion is None else 2
    bottlenecks = 1 if fusion in (None, "add") else 2
    saved_bytes = sum(size for pointer, size in saved.items() if pointer not in parameters)
    cast = d * r if M >= 128 else 0
    assert saved_bytes == (streams * M * d + bottlenecks * M * r + cast) * 2


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_has_the_dtype_of_base_output(wide, device) -> None:
    """Under bf16 autocast, float32 x, A and B get float32 gradients, for a float32 and for a bf16 base_output."""
    inputs = make((2, 19), 33, 21, 5, torch.float32, device)
    inputs["base_output"] = inputs["base_output"].to(wide)
    G = torch.randn_like(inputs["base_output"])
    expected = run(reference.fused_lora, inputs, G, scaling=1.0)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run(fused_lora, inputs, G, scaling=1.0)
    assert actual["y"].dtype == wide
    for key in ("x", "lora_A", "lora_B"):
        assert actual[key].dtype == torch.float32
    tolerance = {"rtol": 0.05, "atol": 0.1} if wide == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=key, **tolerance)


def test_double_backward_is_refused(device) -> None:
    inputs = {k: v.requires_grad_() for k, v in make((3,), 4, 4, 2, torch.float32, device).items()}
    y = fused_lora(**inputs, scaling=1.0)
    (grad,) = torch.autograd.grad(y, inputs["x"], torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated again \(create_graph=True\)"):
        grad.sum().backward()


def test_create_graph_works_in_a_checkpoint(device) -> None:
    """A checkpoint that is not reentrant lets the backward pass unpack its tensors once."""
    t = {k: v.requires_grad_() for k, v in make((3,), 4, 4, 2, torch.float32, device).items()}
    expected = torch.autograd.grad(fused_lora(**t, scaling=1.0).sum(), list(t.values()))
    y = checkpoint(lambda: fused_lora(**t, scaling=1.0), use_reentrant=False)
    grads = torch.autograd.grad(y.sum(), list(t.values()), create_graph=True)
    for actual, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, grad)


def test_select_backend_returns_the_backend_that_auto_uses() -> None:
    assert flare_kernels.select_backend("cpu", torch.float32) == "torch"
    assert flare_kernels.select_backend("cuda:0" if torch.cuda.is_available() else "cpu", torch.float64) == "torch"
    assert flare_kernels.select_backend("cpu", torch.float32, "matmul") == "reference"
    statuses = flare_kernels.backends()
    assert statuses["torch"] and statuses["reference"]
    assert statuses["triton"] or statuses["triton"].reason


def test_an_unsupported_gpu_is_named(monkeypatch) -> None:
    """On Turing (sm_75), backends() gives the reason, "auto" uses plain PyTorch, and "triton" is an error."""
    pytest.importorskip("triton")
    module = importlib.import_module("flare_kernels.selection")
    capability = {0: (7, 5), 1: (9, 0)}
    module._unsupported_reason.cache_clear()
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Old GPU")
    status = flare_kernels.backends()["triton"]
    assert not status and "Old GPU (cuda:0) has compute capability 7.5, the kernels need 8.0 or newer" in status.reason
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    assert flare_kernels.select_backend(old, torch.bfloat16) == "torch"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert flare_kernels.backends()["triton"], "the other GPU is supported"
    assert flare_kernels.select_backend(new, torch.bfloat16) == "triton"
    with pytest.raises(ValueError, match=r"cannot run here: Old GPU"):
        module.primitives("triton", old, torch.bfloat16)
    module._unsupported_reason.cache_clear()


BAD = [
    ({"fusion": "sum"}, ValueError, "fusion='sum'.*add, mul, add_relu, mul_relu"),
    ({"fusion": "cross_attention"}, ValueError, "reference.fuse"),
    ({"backend": "cuda"}, ValueError, "backend='cuda'.*triton, torch, reference"),
    ({"x_source": (2, 4, 8)}, ValueError, r"x_source has shape \(2, 4, 8\)"),
    ({"source_bottleneck": (2, 3, 5)}, ValueError, "both given"),
    ({"x_source": None, "source_bottleneck": (2, 4, 5)}, ValueError, "source_bottleneck has shape"),
    ({"x_source": None, "source_bottleneck": (2, 3, 4)}, ValueError, "rank r=5"),
    ({"lora_A": (5, 9)}, ValueError, r"lora_A has shape \(5, 9\), expected \(r, 8\)"),
    ({"lora_B": (6, 4)}, ValueError, r"lora_B has shape \(6, 4\), expected \(6, 5\)"),
    ({"base_output": (2, 2, 6)}, ValueError, "base_output has shape"),
    ({"x": torch.int64}, TypeError, "x has dtype torch.int64"),
    ({"lora_A": torch.float64}, TypeError, "lora_A in float64 cannot be mixed"),
    ({"lora_B": [[1.0]]}, TypeError, "lora_B must be a torch.Tensor, got list"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p=1.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:24] for _, _, m in BAD])
def test_wrong_input_is_refused(change, error, message) -> None:
    good = make((2, 3), 8, 6, 5, torch.float32, torch.device("cpu"))
    for key, value in change.items():
        if isinstance(value, tuple):
            value = torch.randn(*value)
        elif isinstance(value, torch.dtype):
            value = good[key].to(value)
        good[key] = value
    with pytest.raises(error, match=message):
        fused_lora(**good, scaling=1.0)


def test_triton_refuses_float64(device) -> None:
    if not flare_kernels.backends()["triton"]:
        pytest.skip(str(flare_kernels.backends()["triton"]))
    with pytest.raises(ValueError, match="no float64"):
        fused_lora(**make((2, 3), 8, 6, 5, torch.float64, device), scaling=1.0, backend="triton")


def test_memory_shared_with_an_input_is_not_overwritten(device) -> None:
    """If x, the source or another output shares base_output's storage, results are the same as with copies."""
    x, A, B = torch.randn(6, 8), torch.randn(4, 8), torch.randn(8, 4)
    x, A, B = (t.to(device) for t in (x, A, B))

    def dA(x: Tensor, x_source: Tensor | None, y: Tensor, joint: bool) -> Tensor:
        leaf = A.clone().requires_grad_()
        if joint:
            out = flare_kernels.fused_lora_qkv(x, x_source, {"q": y}, {"q": (leaf, B, 0.5)})["q"]
        else:
            out = fused_lora(x, x_source, y, leaf, B, scaling=0.5)
        out.square().sum().backward()
        return leaf.grad

    for joint in (False, True):
        expected = dA(x, x.clone(), x.clone(), joint)
        shared = x.clone()
        torch.testing.assert_close(dA(shared, x, shared, joint), expected)
        shared = x.clone()
        torch.testing.assert_close(dA(x, shared, shared, joint), expected)
    twice = torch.zeros(6, 8, device=device)
    ys = flare_kernels.fused_lora_qkv(x, None, {"q": twice, "k": twice}, dict.fromkeys(("q", "k"), (A, B, 1.0)))
    torch.testing.assert_close(ys["q"], x @ A.T @ B.T)
    torch.testing.assert_close(ys["k"], ys["q"])
    with torch.inference_mode():
        wide = torch.zeros(12, 8, device=device)
        fused_lora(x, None, wide[:6], A, B, scaling=1.0)
        assert not wide.any(), "inference mode hides that this is a view"
