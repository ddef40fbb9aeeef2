"""Test projections that a site computes separately, for example because they are hooked, patched or trained.

A site computes the other projections of an attention module in one joint call.
"""

from __future__ import annotations

import collections
from typing import Any

import peft
import pytest
import tiny
import torch
from site_models import alone, assert_same, first_attention, forget, fused, parametrized, plain, step
from torch import nn
from torch.nn.utils import parametrize, prune

import flare


class _Subclassed(nn.Parameter):
    """A parameter subclass. Sharded and quantised weights have such subclasses."""


def _patch_forward(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


def _subclass_weight(module: nn.Module) -> None:
    module.weight = _Subclassed(module.weight.detach(), requires_grad=False)


CHANGES = {
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "a patched forward": _patch_forward,
    "accelerate": lambda m: setattr(m, "_hf_hook", object()),
    "a tensor subclass": _subclass_weight,
    "a parametrisation": parametrized,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("projection", ["q_proj.base_layer", "k_proj"])
def test_hooked_or_patched_projection_is_called_as_a_module(change, projection, calls) -> None:
    """The changed projection leaves the joint call, even if the site has cached a plan that includes it.

    The other projections stay in the joint call. If only a frozen weight is a subclass or parametrised, the
    adapter of its projection stays in the joint call too.
    """
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    expected = step(alone(model), inputs)
    assert_same(step(model, inputs), expected)
    forget(calls)
    attention = first_attention(model)
    CHANGES[change](attention.get_submodule(projection))
    assert_same(step(model, inputs), expected)
    if change == "a tensor subclass" or (change, projection[0]) == ("a parametrisation", "q"):
        # autograd differentiates the frozen products one by one; the adapters share a call
        assert calls.names[0] == {"q_proj", "v_proj"} and not calls["single"]
        assert calls["owned"] == calls["joint"] - 1
        return
    assert calls.names[0] == {"q_proj", "k_proj", "v_proj"} - {projection.partition(".")[0]}
    assert calls["single"] == (1 if projection.startswith("q") else 0)


@pytest.mark.parametrize("how", ["hook", "scaled by a hook", "pruning", "parametrisation", "scaled forward"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_hooks_and_patches_of_lora_A_and_lora_B_act_as_in_peft(how, part) -> None:
    """Compare two SGD steps with PEFT's model. In an earlier step, the site has cached a plan without the change."""
    seen: collections.Counter[str] = collections.Counter()
    handles: list[Any] = []
    inputs = plain(tiny.batch("llama"))

    def apply_change(name: str, module: nn.Module) -> None:
        if how == "hook":
            handles.append(module.register_forward_hook(lambda *_: seen.update([name])))
        elif how == "scaled by a hook":
            handles.append(module.register_forward_hook(lambda module, args, output: output * 1.5))
        elif how == "pruning":
            prune.l1_unstructured(module, "weight", 0.4)
        elif how == "parametrisation":
            parametrize.register_parametrization(module, "weight", _Doubled())
        else:
            forward = module.forward
            module.forward = lambda x: 2 * forward(x)

    def trained(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
        tiny.randomize_lora(model)
        step(model, inputs)
        for path, module in list(model.named_modules()):
            if path.endswith(f"{part}.default"):
                apply_change(name, module)
        results = {}
        for index in range(2):
            results |= {f"{index} {key}": value for key, value in step(model, inputs).items()}
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.5 * p.grad
        return results

    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    stock = peft.get_peft_model(tiny.model("llama"), config).double()
    model = fused("llama", fusion=None, dtype=torch.float64).double()
    assert_same(trained("ours", model), trained("peft", stock))
    assert seen["ours"] == seen["peft"] and bool(seen) == (how == "hook")


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_pruned_A_projects_both_streams(memory) -> None:
    """Pruning recomputes A in each step. The projection of the source uses the pruned A too."""
    inputs, losses = tiny.batch("llama"), []
    for pruned in (True, False):
        model = fused("llama", dtype=torch.float64, source_memory=memory).double()
        layers = [module for path, module in model.named_modules() if path.endswith("lora_A.default")]
        for one in layers:
            prune.l1_unstructured(one, "weight", 0.4)
        with torch.no_grad():
            for one in layers:
                one.weight_orig *= 1.1
        if not pruned:  # the same weights without the pruning hook
            for one in layers:
                prune.remove(one, "weight")
        losses += [step(model, inputs)["loss"], step(model, inputs)["loss"]]
    torch.testing.assert_close(torch.stack(losses), losses[-1].expand(4), rtol=1e-12, atol=0)


def test_a_projection_with_a_trained_base_weight_is_differentiated_by_autograd(calls) -> None:
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    attention = first_attention(model)
    attention.q_proj.base_layer.weight.requires_grad_(True)
    expected = step(alone(model), inputs)
    forget(calls)
    actual = step(model, inputs)
    assert any(name.endswith("base_layer.weight") for name in actual)
    assert_same(actual, expected)
    assert calls.names == [{"q_proj", "v_proj"}, *[{"q_proj", "k_proj", "v_proj"}] * (tiny.LAYERS - 1)]
    assert calls["owned"] == tiny.LAYERS - 1
    attention.q_proj.base_layer.weight.requires_grad_(False)
    forget(calls)
    step(model, inputs)
    assert calls["owned"] == tiny.LAYERS, "all base weights are frozen again"


def test_eager_fusions_and_different_dropouts_are_computed_separately(calls) -> None:
    inputs = tiny.batch("llama")
    for overrides in ({"fusion": "matmul"}, {"fusion": "cross_attention", "r": 4}):
        step(fused("llama", **overrides), inputs)
        assert calls["joint"] == 0
    model = fused("llama", lora_dropout=0.3)
    for module in model.modules():
        if getattr(module, "flare_key", "").endswith("q_proj"):
            module.lora_dropout["default"].eval()
    forget(calls)
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)


def test_lora_bias_and_several_active_adapters_are_computed_separately(calls) -> None:
    inputs = tiny.batch("llama")
    step(fused("llama", lora_bias=True), inputs)
    assert (calls["joint"], calls["single"]) == (0, 2 * tiny.LAYERS)
    model = fused("llama")
    model.add_adapter("second", flare.FlareConfig(r=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    forget(calls)
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (0, 4 * tiny.LAYERS)
