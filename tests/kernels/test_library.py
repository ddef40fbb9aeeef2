"""Tests of fused_lora and fused_lora_qkv under torch.compile: one graph, eager results, valid operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flare_kernels import fused_lora, fused_lora_qkv
from flare_kernels.library import lora, lora_backward

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend"),
)


def make(device: torch.device, m: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    return {
        "x": randn(2, m, 18),
        "x_source": randn(2, m, 18),
        "S": randn(2, m, 5),
        "W": randn(24, 18),
        "V": randn(11, 18),
        "A": randn(5, 18),
        "B": randn(24, 5),
        "A_v": randn(5, 18),
        "B_v": randn(11, 5),
    }


def gradients(call, t: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_(name not in ("W", "V")) for name, value in t.items()}
    ys = call(leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in ys)
    loss.backward()
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {name: leaf.grad for name, leaf in leaves.items()}


def one(t: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """Return the output of one projection with its frozen product."""
    base = F.linear(t["x"], t["W"])
    return (fused_lora(t["x"], t["x_source"], base, t["A"], t["B"], scaling=0.5, **options),)


def joint(t: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """Return the outputs of query and value with S, and of a frozen key.

    The frozen products are inputs of the call. The node computes their share of dx.
    """
    weights = {"q": t["W"], "k": t["W"][:9], "v": t["V"]}
    with torch.no_grad():
        base = {name: F.linear(t["x"], W) for name, W in weights.items()}
    adapters = {"q": (t["A"], t["B"], 0.5), "v": (t["A_v"], t["B_v"], 2.0)}
    S = {"q": t["S"], "v": 2 * t["S"]}
    ys = fused_lora_qkv(t["x"], None, base, adapters, source_bottleneck=S, weights=weights, **options)
    return tuple(ys.values())


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("call", [one, joint])
@pytest.mark.parametrize("fusion", ["add", "mul_relu"])
def test_a_compiled_layer_is_one_graph_with_eager_results(call, backend, fusion, device) -> None:
    t = make(device)
    options = {"backend": backend, "fusion": fusion}
    compiled = torch.compile(lambda leaves: call(leaves, **options), fullgraph=True, backend="aot_eager")
    expected, actual = gradients(lambda leaves: call(leaves, **options), t), gradients(compiled, t)
    assert expected["x"].any() and expected["A"].any() and expected["B"].any()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


def test_a_compiled_call_without_adapters_matches_eager_mode(device) -> None:
    """Only the frozen products are computed, as in a site whose adapters are disabled."""

    def frozen(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(fused_lora_qkv(t["x"], None, None, {}, weights={"q": t["W"], "v": t["V"]}).values())

    t = {name: value for name, value in make(device).items() if name in ("x", "W", "V")}
    leaves = {"x": t["x"].detach().requires_grad_()}
    grads = []
    for function in (frozen, torch.compile(frozen, fullgraph=True, backend="aot_eager")):
        ys = function({**t, **leaves})
        grads += [torch.autograd.grad(sum(y.square().sum() for y in ys), leaves["x"])[0]]
    assert grads[0].any()
    torch.testing.assert_close(grads[1], grads[0])


def test_inductor_compiles_one_graph_for_all_lengths(device) -> None:
    """Three lengths share one graph. Without gradients, the compiled function gives the eager output."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(one, fullgraph=True, dynamic=True)
    for m in (7, 12, 19):
        t = make(device, m)
        expected, actual = gradients(one, t), gradients(compiled, t)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=name) if value is not None else None
    assert graphs["unique_graphs"] == 1, "a new length must not compile again"
    with torch.no_grad():
        torch.testing.assert_close(compiled(t)[0], one(t)[0])


def test_a_compiled_layer_draws_the_dropout_masks_of_eager_mode(device) -> None:
    t = make(device)
    options = {"dropout_p": 0.4, "training": True}
    results = []
    for call in (one, torch.compile(one, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        results.append(gradients(lambda leaves, call=call: call(leaves, **options), t))
    for name, value in results[0].items():
        if value is not None:
            assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize("fusion", ["add", "mul"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_operators_pass_opcheck(fusion, trained, device) -> None:
    """torch.library.opcheck tests schema (no mutation, no aliases), autograd, fake implementations, dynamic shapes."""
    t = make(device)
    y = F.linear(t["x"], t["W"])
    leaves = [t[name].requires_grad_(trained) for name in ("x", "A", "B")]
    x, A, B = leaves
    for x_source, S in ((t["x_source"], []), (None, [t["S"]])):
        arguments = (x, x_source, S, None, [y], [A], [B], [], [0], [0.5], fusion, 0.0, trained, x.dtype, "torch")
        torch.library.opcheck(lora, arguments)
        *_, T, S_saved = lora(*arguments)
        if trained:
            saved = (T.detach(), S_saved.detach(), [A.detach()], [B.detach()], [])
            needs = [True, x_source is not None, *([True] * len(S)), True, True]
            x_plain = x.detach()
            backward = (
                [y.detach()],
                x_plain,
                x_source,
                S,
                None,
                *saved,
                [0],
                [0.5],
                fusion,
                0.0,
                needs,
                x.dtype,
                "torch",
            )
            torch.library.opcheck(lora_backward, backward)
