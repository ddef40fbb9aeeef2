"""fused_lora_qkv gives the results of one call per projection, and reads x and x_source only once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flare_kernels import FUSIONS, fused_lora, fused_lora_qkv, reference, selection

WIDTHS = {"q": 24, "k": 10, "v": 12}
RANKS = {"q": 5, "k": 3, "v": 4}
SUBSETS = [("q", "v"), ("q", "k", "v"), ("v",), ()]
# every subset uses the same kernels, so one subset is enough under the slow interpreter
CASES = [
    *(pytest.param("torch", subset, id="torch-" + ("".join(subset) or "none")) for subset in SUBSETS),
    pytest.param(
        "triton",
        ("q", "v"),
        id="triton-qv",
        marks=pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend"),
    ),
]


def make(dtype: torch.dtype, device: torch.device, d: int = 18) -> dict:
    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * 0.5).to(device, dtype)

    return {
        "x": randn(2, 7, d),
        "x_source": randn(2, 7, d),
        "W": {name: randn(n, d) for name, n in WIDTHS.items()},
        "A": {name: randn(r, d) for name, r in RANKS.items()},
        "B": {name: randn(WIDTHS[name], r) for name, r in RANKS.items()},
        "S": {name: randn(2, 7, r) for name, r in RANKS.items()},
        "G": {name: randn(2, 7, n) for name, n in WIDTHS.items()},
    }


def leaves_of(data: dict) -> dict[str, Tensor]:
    flat = {"x": data["x"], "x_source": data["x_source"]}
    for kind in ("A", "B", "S"):
        flat |= {f"{kind}.{name}": value for name, value in data[kind].items()}
    return {key: value.detach().clone().requires_grad_() for key, value in flat.items()}


def run(call, data: dict, subset: tuple[str, ...]) -> dict[str, Tensor]:
    """Run ``call(leaves, adapters)``, which returns name -> y, and backward; return the outputs and gradients."""
    leaves = leaves_of(data)
    adapters = {name: (leaves[f"A.{name}"], leaves[f"B.{name}"], 0.5 + RANKS[name]) for name in subset}
    ys = call(leaves, adapters)
    assert list(ys) == list(WIDTHS)
    sum((ys[name] * data["G"][name]).sum() for name in WIDTHS).backward()
    return {**{f"y.{n}": y.detach() for n, y in ys.items()}, **{k: v.grad for k, v in leaves.items()}}


def assert_equal(actual: dict, expected: dict, **tolerance: float) -> None:
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None or not actual[key].any(), key
        else:
            torch.testing.assert_close(actual[key], value, msg=key, **tolerance)


@pytest.mark.parametrize(("backend", "subset"), CASES)
@pytest.mark.parametrize("fusion", [*FUSIONS, None, {"q": "add", "v": "mul_relu"}, {"v": "add_relu"}], ids=str)
@pytest.mark.parametrize("source", ["x_source", "S"])
def test_joint_results_equal_the_oracle(backend, subset, fusion, source, device) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    data = make(dtype, device)

    def sources(leaves, adapters) -> dict:
        if source == "x_source":
            return {"x_source": leaves["x_source"]}
        return {"x_source": None, "source_bottleneck": {name: leaves[f"S.{name}"] for name in adapters}}

    def joint(leaves, adapters):
        base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
        return fused_lora_qkv(
            leaves["x"],
            base_outputs=base,
            adapters=adapters,
            fusion=fusion,
            backend=backend,
            **sources(leaves, adapters),
        )

    def oracle(leaves, adapters):
        base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
        for name, (A, B, scaling) in adapters.items():
            phi = fusion.get(name) if isinstance(fusion, dict) else fusion
            source_args = sources(leaves, adapters)
            S = source_args.get("source_bottleneck", {}).get(name)
            options = {"scaling": scaling, "fusion": phi, "source_bottleneck": S}
            base[name] = reference.fused_lora(leaves["x"], source_args["x_source"], base[name], A, B, **options)
        return base

    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert_equal(run(joint, data, subset), run(oracle, data, subset), **tolerance)


@pytest.mark.parametrize("subset", SUBSETS, ids=["qv", "qkv", "v", "none"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_node_computes_dx_of_the_frozen_products(subset, dropout_p, device) -> None:
    """With ``weights``, backend="torch" gives the outputs and gradients of backend="reference".

    Without adapters, the gradient of x is the sum of dy W over the projections.
    """
    data = make(torch.float64, device)
    results = []
    for backend in ("torch", "reference"):

        def joint(leaves, adapters, backend=backend):
            with torch.no_grad():
                base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
            torch.manual_seed(5)
            return fused_lora_qkv(
                leaves["x"],
                leaves["x_source"],
                base,
                adapters,
                weights=data["W"],
                dropout_p=dropout_p,
                training=True,
                backend=backend,
            )

        results.append(run(joint, data, subset))
    assert_equal(*results, rtol=1e-9, atol=1e-9)
    expected = sum(data["G"][name] @ W for name, W in data["W"].items())
    if not subset:
        torch.testing.assert_close(results[0]["x"], expected)


def test_each_stream_is_read_once(device, monkeypatch) -> None:
    """q and v share one call each of shrink, grad_weight and grad_input."""
    ops = selection.primitives("torch", device, torch.float32)
    calls: list[str] = []
    for name in ("shrink", "grad_weight", "grad_input"):
        plain = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _n=name, _f=plain, **k: (calls.append(_n), _f(*a, **k))[1])
    data = make(torch.float32, device)

    def joint(leaves, adapters):
        base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
        return fused_lora_qkv(leaves["x"], leaves["x_source"].detach(), base, adapters, backend="torch")

    run(joint, data, ("q", "v"))
    assert sorted(calls) == ["grad_input", "grad_weight", "shrink"]


#: number of tokens -> (kernels of the forward pass, kernels of the backward pass); "stack" joins the As in one tensor
LAUNCHES = {
    300: (["stack", "shrink", "expand"], ["grad_bottleneck", "grad_weight", "grad_input"]),
    # for a few tokens, forward does not stack A, so backward does
    9: (["shrink_decode", "expand_decode"], ["grad_bottleneck", "stack", "grad_weight", "grad_input"]),
}


@pytest.mark.skipif("not __import__('flare_kernels').backends()['triton']", reason="no Triton backend")
@pytest.mark.parametrize("tokens", LAUNCHES)
@pytest.mark.parametrize("fusion", ["add", "add_relu"])
def test_query_and_value_share_every_launch(tokens, fusion, device) -> None:
    """Two adapters with the same rank and fusion run each kernel of `LAUNCHES` once, and match plain PyTorch."""
    from flare_kernels.launch_mode import counting

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device) * 0.3

    x_source, W = randn(tokens, 48), {name: randn(n, 48) for name, n in WIDTHS.items()}
    inputs = {"x": randn(tokens, 48), "A.q": randn(6, 48), "A.v": randn(6, 48)}
    inputs |= {f"B.{name}": randn(WIDTHS[name], 6) for name in ("q", "v")}
    G = {name: randn(tokens, n) for name, n in WIDTHS.items()}
    results = []
    for backend in ("torch", "triton"):
        t = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        with torch.no_grad():
            base = {name: t["x"] @ w.T for name, w in W.items()}
        adapters = {name: (t[f"A.{name}"], t[f"B.{name}"], 0.5) for name in ("q", "v")}
        with counting() as forward:
            ys = fused_lora_qkv(t["x"], x_source, base, adapters, weights=W, fusion=fusion, backend=backend)
        with counting() as backward:
            torch.autograd.backward(list(ys.values()), list(G.values()))
        results.append({**ys, **{name: leaf.grad for name, leaf in t.items()}})
        launches = [
            [n.removesuffix("_kernel") for n in names if n != "split_k_reduce_kernel"] for names in (forward, backward)
        ]
        assert launches == ([[], []] if backend == "torch" else list(LAUNCHES[tokens]))
    assert_equal(*reversed(results), rtol=1e-4, atol=1e-5)


def test_adjacent_columns_are_not_copied(device) -> None:
    from flare_kernels.node import concat_columns

    S = torch.randn(2, 7, 9, device=device)
    parts = [part.reshape(14, -1) for part in S.split([4, 5], dim=-1)]
    assert concat_columns(parts).data_ptr() == S.data_ptr() and torch.equal(concat_columns(parts), S.flatten(0, 1))
    swapped = [parts[1], parts[0]]
    assert torch.equal(concat_columns(swapped), torch.cat(swapped, dim=1))
    cloned = [parts[0], parts[1].clone()]
    assert torch.equal(concat_columns(cloned), S.flatten(0, 1))


def test_a_joint_call_matches_separate_calls_in_16_bit(device) -> None:
    data = make(torch.bfloat16, device)

    def joint(leaves, adapters):
        base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
        return fused_lora_qkv(leaves["x"], leaves["x_source"], base, adapters)

    def separate(leaves, adapters):
        base = {name: leaves["x"] @ W.T for name, W in data["W"].items()}
        for name, (A, B, scaling) in adapters.items():
            base[name] = fused_lora(leaves["x"], leaves["x_source"], base[name], A, B, scaling=scaling)
        return base

    assert_equal(run(joint, data, ("q", "v")), run(separate, data, ("q", "v")), rtol=0.05, atol=0.1)


def test_wrong_input_is_refused(device) -> None:
    data = make(torch.float32, device)
    base = {name: data["x"] @ W.T for name, W in data["W"].items()}
    good = {"q": (data["A"]["q"], data["B"]["q"], 1.0)}
    with pytest.raises(ValueError, match=r"adapters has the names \['o'\]"):
        fused_lora_qkv(data["x"], None, base, {"o": good["q"]})
    with pytest.raises(ValueError, match=r"fusion has the names \['o'\]"):
        fused_lora_qkv(data["x"], data["x_source"], base, good, fusion={"o": "add"})
    with pytest.raises(ValueError, match="pass all names or no weights at all"):
        fused_lora_qkv(data["x"], None, base, good, weights={"q": data["W"]["q"]})
    with pytest.raises(ValueError, match="lora_A of 'v' has shape"):
        fused_lora_qkv(data["x"], None, base, {"v": (data["A"]["q"][:, :3], data["B"]["q"], 1.0)})
    tracked = {name: (data["x"].clone().requires_grad_() @ W.T) for name, W in data["W"].items()}
    with pytest.raises(ValueError, match="require grad while weights are given"):
        fused_lora_qkv(data["x"], None, tracked, good, weights=data["W"])


@pytest.mark.parametrize("passed", ["weights", "products without a graph"])
def test_forward_mode_counts_the_frozen_product_once(passed, device) -> None:
    W, A, B = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((6, 5), (2, 5), (6, 2)))
    x, direction, source = torch.randn(3, 4, 5, dtype=torch.float64, device=device)

    def joint(x: Tensor) -> Tensor:
        base = None
        if passed != "weights":
            with torch.no_grad():
                base = {"q": x @ W.T}
        return fused_lora_qkv(x, source, base, {"q": (A, B, 2.0)}, fusion="mul", weights={"q": W})["q"]

    def plain(x: Tensor) -> Tensor:
        return x @ W.T + 2.0 * ((source @ A.T) * (x @ A.T)) @ B.T

    actual, expected = (torch.func.jvp(function, (x,), (direction,))[1] for function in (joint, plain))
    torch.testing.assert_close(actual, expected)


def test_zero_rows_give_zero_gradients(device) -> None:
    """The batch has no tokens, and S is given as source_bottleneck."""
    S = torch.zeros(2, 0, 4, device=device, requires_grad=True)
    A, B = torch.randn(4, 18, device=device, requires_grad=True), torch.randn(6, 4, device=device, requires_grad=True)
    base = {"q": torch.zeros(2, 0, 6, device=device)}
    x = torch.zeros(2, 0, 18, device=device)
    ys = fused_lora_qkv(x, None, base, {"q": (A, B, 1.0)}, source_bottleneck={"q": S})
    ys["q"].sum().backward()
    assert ys["q"].shape == (2, 0, 6) and S.grad.shape == S.shape
    assert not A.grad.any() and not B.grad.any()


def test_weights_are_checked(device) -> None:
    data = make(torch.float32, device)
    base = {name: data["x"] @ W.T for name, W in data["W"].items()}
    with pytest.raises(ValueError, match=r"weights\['q'\] has shape"):
        fused_lora_qkv(data["x"], None, base, {}, weights={**data["W"], "q": data["W"]["q"].T})
    with pytest.raises(TypeError, match=r"weights\['q'\] has dtype torch.int8"):
        fused_lora_qkv(data["x"], None, base, {}, weights={**data["W"], "q": data["W"]["q"].to(torch.int8)})
    with pytest.raises(TypeError, match="scaling must be a number"):
        fused_lora_qkv(data["x"], None, base, {"q": (data["A"]["q"], data["B"]["q"], "1")})
