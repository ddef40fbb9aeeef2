"""Test sites with several adapters, and with adapters that are switched, merged, scaled or disabled.

A site computes all projections of an attention module in one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import tiny
import torch
from site_models import alone, assert_same, first_attention, forget, fused, is_empty, plain, step

import flare
from flare.source.context import THREAD


def stock_twin(model: peft.PeftModel, adapters: dict[str, dict]) -> peft.PeftModel:
    """Return PEFT's LoRA model with the weights of `model`; `adapters` maps adapter names to fields of LoraConfig."""
    first, *others = (peft.LoraConfig(task_type="CAUSAL_LM", **fields) for fields in adapters.values())
    twin = peft.get_peft_model(tiny.model("llama"), first, adapter_name=next(iter(adapters)))
    for name, config in zip(list(adapters)[1:], others, strict=True):
        twin.add_adapter(name, config)
    twin.double().load_state_dict(model.state_dict())
    return twin


TWO = {
    "default": {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "second": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "o_proj"]},
}


def scale(model: peft.PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 3.0)


@contextlib.contextmanager
def merged(model: peft.PeftModel) -> Iterator[None]:
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def unmerged(model: peft.PeftModel) -> None:
    with merged(model):
        pass


@contextlib.contextmanager
def after(change: Callable[[Any], Any], model: peft.PeftModel) -> Iterator[None]:
    """Change the model on entering the ``with`` statement. The change is not undone."""
    change(model)
    yield


STATES: dict[str, Callable[[Any], Any]] = {
    "the first": lambda model: contextlib.nullcontext(),
    "off": lambda model: model.disable_adapter(),
    "the first again": lambda model: contextlib.nullcontext(),
    "merged": merged,
    "scaled by set_scale": lambda model: after(scale, model),
    "scaled by a helper": lambda model: peft.helpers.rescale_adapter_scale(model, 0.5),
    "the second": lambda model: after(lambda m: m.set_adapter("second"), model),
    "the second merged": merged,
    "both": lambda model: after(lambda m: m.base_model.set_adapter(["default", "second"]), model),
    "both merged": merged,
    "both unmerged": lambda model: after(unmerged, model),
    "layers switched off": lambda model: after(lambda m: m.base_model.disable_adapter_layers(), model),
    "layers switched on": lambda model: after(lambda m: m.base_model.enable_adapter_layers(), model),
    "without the second": lambda model: after(lambda m: m.delete_adapter("second"), model),
}


def test_switched_merged_and_scaled_adapters_match_peft() -> None:
    """Bring one model into all STATES in turn. A site caches a plan for its call, which holds for one state only."""
    inputs = plain(tiny.batch("llama"))
    model = fused("llama", fusion=None, **{k: v for k, v in TWO["default"].items() if k not in ("r", "lora_alpha")})
    model.add_adapter("second", flare.FlareConfig(fusion=None, task_type="CAUSAL_LM", **TWO["second"]))
    tiny.randomize_lora(model)
    twin = stock_twin(model.double(), TWO)
    logits: list[torch.Tensor] = []
    for name, state in STATES.items():
        with state(model), state(twin):
            actual, expected = model(**inputs), twin(**inputs)
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-9, atol=1e-10, msg=name)
            assert (
                all(not torch.equal(actual.logits, one) for one in logits[-1:]) or "again" in name or "merged" in name
            )
            logits.append(actual.logits)
            if "merged" not in name and "off" not in name:
                assert_same(step(model, inputs), step(twin, inputs))


def test_a_batch_with_several_adapter_names_matches_peft(calls) -> None:
    model = fused("llama", fusion=None, target_modules=TWO["default"]["target_modules"])
    model.add_adapter("second", flare.FlareConfig(fusion=None, task_type="CAUSAL_LM", **TWO["second"]))
    tiny.randomize_lora(model)
    twin, inputs = stock_twin(model.double(), TWO).eval(), plain(tiny.batch("llama"))
    model.eval()
    forget(calls)
    names = ["default", "second", "__base__"]
    actual = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(actual, twin(**inputs, adapter_names=names).logits, rtol=1e-9, atol=1e-10)
    assert not calls


def test_weights_are_read_at_each_call() -> None:
    """A call uses the current weights, after writing to .data, with functional_call, and after copying new values."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64)
    step(model, inputs)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data * 1.5
    expected = step(alone(model), inputs)
    assert_same(step(model, inputs), expected)
    swapped = {n: p.detach().flip(0).requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    loss = torch.func.functional_call(model, swapped, (), inputs).loss
    grads = torch.autograd.grad(loss, list(swapped.values()))
    with torch.no_grad():
        for name, value in swapped.items():
            model.get_parameter(name).copy_(value)
    expected = step(alone(model), inputs)
    assert_same({"loss": loss.detach(), **dict(zip(swapped, grads, strict=True))}, expected)
    assert_same(step(model, inputs), expected)


def test_dropout_and_requires_grad_are_read_at_each_call(calls) -> None:
    """The changes are: another dropout probability, a dropout module in eval mode, and a frozen A."""
    inputs = tiny.batch("llama")
    model = fused("llama", dtype=torch.float64, lora_dropout=0.5)
    attention = first_attention(model)
    for dropout in (m.lora_dropout["default"] for m in model.modules() if hasattr(m, "lora_dropout")):
        dropout.p = 0.0
    attention.v_proj.lora_dropout["default"].p = 0.5
    step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS - 1, 2)
    attention.v_proj.lora_dropout["default"].eval()
    attention.q_proj.lora_A["default"].weight.requires_grad_(False)
    expected = step(alone(model), inputs)
    forget(calls)
    actual = step(model, inputs)
    assert (calls["joint"], calls["single"]) == (tiny.LAYERS, 0)
    assert not any("layers.0.self_attn.q_proj.lora_A" in name for name in actual)
    assert_same(actual, expected)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_error_names_an_adapter_on_another_device(part) -> None:
    model = fused("llama", fusion=None)
    q_proj = first_attention(model).q_proj
    getattr(q_proj, part)["default"].to("meta")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: .*meta.*move the adapter to its layer's device"):
        model(**plain(tiny.batch("llama")))
    assert is_empty(THREAD.slot)


def test_error_names_matrices_of_wrong_shape() -> None:
    model = fused("llama")
    first_attention(model).q_proj.lora_A["default"].weight.data = torch.zeros(4, tiny.HIDDEN)
    with pytest.raises(ValueError, match=r"q_proj: lora_A has shape \(4, 32\) and lora_B \(32, 5\), expected"):
        model(**plain(tiny.batch("llama")))
