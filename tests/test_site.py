"""Test sites. A site computes all projections of an attention module in one call, with one buffer for dx.

The results must equal the results of separate calls, which compute each projection alone (`site_models.alone`).
"""

from __future__ import annotations

import collections
import contextlib

import pytest
import tiny
import torch
import torch.nn.functional as F
from site_models import NAMES, SUBSETS, alone, assert_same, forget, fused, plain, siblings, step
from torch.utils._python_dispatch import TorchDispatchMode

import flare
from flare.tuner import site as sites
from flare_kernels import dropout as kernel_dropout
from flare_kernels import launch_mode, reference


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("source", [True, False], ids=["source", "plain"])
def test_one_call_per_attention_matches_separate_calls(family, subset, source, calls) -> None:
    inputs = tiny.batch(family, source=source)
    exact = family != "gemma2"  # in float64 its left-padded rows are NaN
    model = fused(family, subset, dtype=torch.float64 if exact else torch.float32)
    twin = alone(model)
    actual = step(model, inputs)
    attentions, cross = (tiny.LAYERS + 2, 2) if family == "mt5" else (tiny.LAYERS, 0)
    assert calls["joint"] == attentions and set(calls.names) == {frozenset(NAMES[family])}
    assert calls["lone"] == cross * len(SUBSETS[subset]), "in cross-attention, q reads another sequence than k and v"
    assert calls["owned"] == attentions + calls["lone"] and not calls["single"]
    forget(calls)
    assert_same(actual, step(twin, inputs), **({} if exact else {"rtol": 1e-5, "atol": 1e-7}))
    assert (calls["joint"], calls["single"]) == (0, (attentions + cross) * len(SUBSETS[subset]))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_call_matches_separate_calls_in_float32_up_to_rounding(family) -> None:
    inputs, model = tiny.batch(family), fused(family)
    twin = alone(model)
    assert_same(step(model, inputs), step(twin, inputs), rtol=1e-5, atol=1e-7)


class _Buffers(TorchDispatchMode):
    """Count sums of two tensors and matrix products whose result has as many numbers as the hidden state."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.counts = numel, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("add", "add_", "mm", "addmm_") and isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.counts[name] += 1
        return out


@pytest.mark.parametrize(("subset", "apart"), [("qv", 5), ("qkv", 6), ("q", 4)])
def test_backward_accumulates_dx_in_one_buffer(subset, apart, calls) -> None:
    """In separate calls, each frozen layer and each adapter computes a dx of its own, and autograd adds all of them.

    apart: number of dx tensors of a block in separate calls.
    """
    inputs = tiny.batch("llama", B=2, m=7)
    model = fused("llama", subset)
    operations = {}
    for name, each in (("joint", model), ("apart", alone(model))):
        each.enable_input_require_grads()
        loss = each(**inputs).loss
        with _Buffers(2 * 7 * tiny.HIDDEN) as seen:
            loss.backward()
        operations[name] = seen.counts
    sums = {name: counts["add"] + counts["add_"] for name, counts in operations.items()}
    assert operations["joint"]["addmm_"] == 3 * tiny.LAYERS, "frozen products and adapters accumulate into q's dx"
    assert operations["apart"]["mm"] - operations["joint"]["mm"] == (apart - 1) * tiny.LAYERS
    assert sums["apart"] - sums["joint"] == (apart - 1) * tiny.LAYERS


class _Copies(TorchDispatchMode):
    """Count all operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("train", [True, False])
def test_adapters_add_no_copies_to_the_frozen_model(family, train) -> None:
    model, seen = fused(family, fusion=None), {}
    inputs = plain(tiny.batch(family))
    for name in ("adapter", "frozen"):
        off = model.disable_adapter() if name == "frozen" else contextlib.nullcontext()
        with torch.set_grad_enabled(train), off, _Copies() as mode:
            model(**inputs)
        seen[name] = mode.counts
    for name in ("clone", "copy_", "_to_copy"):
        assert seen["adapter"][name] == seen["frozen"][name], name


def test_autocast_error_is_at_most_twice_the_error_of_separate_calls() -> None:
    for family in ("bert", "llama"):
        inputs = tiny.batch(family)
        model = fused(family)
        twin, truth = alone(model), step(alone(model).double(), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, plain = step(model, inputs), step(twin, inputs)
        for name, value in truth.items():
            allowed = 2 * (plain[name] - value).abs().max() + torch.finfo(torch.bfloat16).eps * value.abs().max()
            assert (actual[name] - value).abs().max() <= allowed, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_matches_separate_calls(mode, calls) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama").eval()
    twin = alone(model)
    with mode():
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)
    assert calls["joint"] == tiny.LAYERS
    plain = {k: v for k, v in inputs.items() if not k.startswith("source") and k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**plain, **options), twin.generate(**plain, **options))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adding_adapters_before_the_frozen_products_gives_the_same_step(family, dropout) -> None:
    """Compare both orders on whole models. BERT and XLM-R have biases; the key has no adapter."""
    model, inputs, results = fused(family, dtype=torch.float64, lora_dropout=dropout), tiny.batch(family), []
    for form in ("frozen_first", "adapter_first"):
        with launch_mode.forcing(form=form):
            torch.manual_seed(3)
            results.append(step(model, inputs))
            orders = [plan for key, plan in launch_mode.current.plans.items() if key[0] == "order"]
        assert orders and all((order is not None) == (form == "adapter_first") for order in orders)
    assert_same(*reversed(results))


def apply_reference(call, sizes, x, x_source, source_seed, Ss, A, As, Bs, Ws, biases) -> tuple[torch.Tensor, ...]:
    """Replacement for apply_with_products that computes its outputs with the reference, with the same dropout seeds."""
    x = x.flatten(0, -2)
    dropped = reference.drop(x, call.p, kernel_dropout.draw_seed(x.device), kernel_dropout.TARGET_STREAM)
    if x_source is not None:
        x_source = reference.drop(x_source.flatten(0, -2), call.p, source_seed, kernel_dropout.SOURCE_STREAM)
    outputs = [F.linear(x, W, bias) for W, bias in zip(Ws, biases, strict=True)]
    for projection, A_i, B_i in zip(call.projections, As, Bs, strict=True):
        fusing = projection.fusion is not None
        outputs[projection.output] = reference.fused_lora(
            dropped,
            x_source if fusing else None,
            outputs[projection.output],
            A_i,
            B_i,
            scaling=projection.scaling,
            fusion=projection.fusion,
        )
    assert not Ss
    return tuple(outputs)


def test_dropout_uses_one_mask_for_all_projections(monkeypatch) -> None:
    """With equal seeds, a step equals a step of the reference, which applies dropout to x once for all projections."""
    inputs = tiny.batch("llama")
    model = fused("llama", "qkv", dtype=torch.float64, lora_dropout=0.4)
    torch.manual_seed(3)
    actual = step(model, inputs)
    monkeypatch.setattr(sites, "apply_with_products", apply_reference)
    torch.manual_seed(3)
    assert_same(actual, step(model, inputs))
    torch.manual_seed(4)
    assert not torch.equal(step(model, inputs)["loss"], actual["loss"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("subset", ["qv", "qkv"])
def test_gradient_checkpointing_matches_separate_calls(family, use_reentrant, subset, calls) -> None:
    inputs = tiny.batch(family)
    model = fused(family, subset, dtype=torch.float64)
    expected = step(alone(model), inputs)
    forget(calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, inputs), expected)
    assert (calls["joint"], calls["single"]) == (2 * tiny.LAYERS, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_site_matches_separate_calls(backend) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama")
    expected = step(alone(model), inputs)
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, backend=backend), inputs), _compiled(expected), rtol=1e-5, atol=1e-7)


def _compiled(values: dict) -> dict:
    return {name if name == "loss" else f"_orig_mod.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base_computes_its_own_dx(kind, tmp_path, calls) -> None:
    """The joint call computes only the adapters of q and v. bitsandbytes computes the frozen products of q, k and v."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bnb)")
    from test_quantized import quantized

    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = flare.fast_lora(quantized(tmp_path, kind), r=4, lora_alpha=8)
    tiny.randomize_lora(model)
    model.train()
    inputs, twin = tiny.batch("llama"), alone(model)
    actual = step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0) and not siblings(model)
    assert set(calls.names) == {frozenset({"q_proj", "v_proj"})} and not calls["owned"]
    for name, value in step(twin, inputs).items():  # dx is summed in bf16, in another order
        assert (actual[name] - value).abs().max() <= 0.02 * value.abs().max(), name
