"""Test the inputs of a site, and that a forward pass leaves no state on the modules.

A site computes all projections of an attention module in one call. A sibling is a projection of the site without an
adapter, such as k_proj.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from site_models import (
    NAMES,
    all_sites,
    alone,
    assert_same,
    first_attention,
    forget,
    fused,
    is_empty,
    plain,
    siblings,
    step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import flare
from flare.source.context import THREAD
from flare.tuner.site import Site


class Attention(nn.Module):
    """Attention with a choice of inputs.

    how: "same": all projections read one tensor; "another": q reads another tensor than k and v; "written to": the
    tensor is changed in place before q reads it. order: the order in which the projections are called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 6) for _ in range(3))
        self.order, self.how = "kvq", "same"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        other = hidden_states * 2 if self.how == "another" else hidden_states
        outputs = {}
        for name in self.order:
            if name == "q" and self.how == "written to":
                hidden_states += 1
            outputs[name] = getattr(self, f"{name}_proj")(hidden_states if name == "q" else other)
        q = outputs["q"]
        q *= 2  # in place, as modeling code may
        return q + outputs["k"] * outputs["v"]


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.checkpointed = Attention(), Attention(), checkpointed
        self.out = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention in (self.first, self.second):
            y = checkpoint(attention, x, use_reentrant=False) if self.checkpointed else attention(x)
            x = x + self.out(y)
        return x


def model_with_inputs(how: str, order: str, checkpointed: bool = False) -> peft.PeftModel:
    """Return two blocks with adapters on q and v; see Attention for ``how`` and ``order``."""
    torch.manual_seed(0)
    model = flare.fast_lora(Model(checkpointed), fusion=None, r=2, target_modules=["q_proj", "v_proj"]).double()
    tiny.randomize_lora(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.how, module.order = how, order
    return model


def forward_and_back(model: nn.Module, graph: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
    if not graph:  # with autograd, writing to the input would be an error
        with torch.no_grad():
            return {"y": model(x.clone())}
    y = model(x.requires_grad_())
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **tiny.gradients(model)}


@pytest.mark.parametrize("order", ["kvq", "qkv", "vqk"])
@pytest.mark.parametrize("how", ["same", "another", "written to"])
def test_outputs_belong_to_the_input_of_the_call(how, order, calls) -> None:
    """Any projection may be called first. Projections that read different inputs are computed separately."""
    model = model_with_inputs(how, order)
    twin = alone(model)
    assert siblings(model) == {"k_proj"}
    for _ in range(2):
        forget(calls)
        actual = forward_and_back(model, how != "written to")
        joint = calls["joint"]
        assert_same(actual, forward_and_back(twin, how != "written to"))
    two_inputs = how == "another" or (how == "written to" and order != "qkv")
    assert joint == (0 if two_inputs else 2)
    shared = [site for site in all_sites(model) if len(site.names) > 1]
    assert [site.separate for site in shared] == [two_inputs] * 2
    assert is_empty(THREAD.slot)


@pytest.mark.parametrize("how", ["same", "another"])
def test_recomputation_gives_the_numbers_of_the_forward_pass(how) -> None:
    """The projections may read two inputs, which the site detects only during the first forward pass."""
    model = model_with_inputs(how, "qkv", checkpointed=True)
    twin = alone(model)
    for _ in range(2):
        assert_same(forward_and_back(model, True), forward_and_back(twin, True))


def test_outputs_do_not_outlive_the_models_forward(calls) -> None:
    """Projections that are called directly with one tensor use the adapters that are active at each call."""
    model = model_with_inputs("same", "qkv").eval()
    attention, x = model.get_submodule("base_model.model.first"), torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        adapted = attention.v_proj(x)
        attention.q_proj(x)
        with model.disable_adapter():
            base = attention.v_proj(x)
            attention.q_proj(x)
        again = attention.v_proj(x)
    assert torch.equal(base, attention.v_proj.base_layer(x)) and not torch.allclose(base, adapted)
    assert torch.equal(again, adapted) and is_empty(THREAD.slot) and not calls["joint"]


@pytest.mark.parametrize("shape", [(5, 8), (0, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_inputs_of_any_shape_match_separate_calls(shape) -> None:
    model = model_with_inputs("same", "qkv")
    twin = alone(model)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_made_in_inference_mode_match_separate_calls(mode) -> None:
    model = model_with_inputs("same", "qkv").eval()
    twin = alone(model)
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


# --- state on the modules after a forward pass ------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {path: {*module.__dict__} for path, module in model.named_modules()}


def fail_in_attention(model: nn.Module, inputs: dict) -> None:
    attention = first_attention(model)
    o_proj, attention.o_proj = attention.o_proj, None
    with pytest.raises(TypeError):
        model(**inputs)
    attention.o_proj = o_proj


def checkpointed_step(use_reentrant: bool) -> Callable[[nn.Module, dict], None]:
    def run(model: Any, inputs: dict) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        before = attributes(model)
        step(model, inputs)
        assert attributes(model) == before and is_empty(THREAD.slot)
        model.gradient_checkpointing_disable()

    return run


RUNS: dict[str, Callable[[Any, dict], Any]] = {
    "a forward": lambda model, inputs: model(**inputs),
    "a step": step,
    "an attention that raises": fail_in_attention,
    "checkpointing": checkpointed_step(False),
    "reentrant checkpointing": checkpointed_step(True),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fusion", [None, "add_relu"])
def test_forward_leaves_no_state_on_modules(run, fusion) -> None:
    inputs = tiny.batch("llama", source=fusion is not None)
    model = fused("llama", fusion=fusion)
    expected = step(model, inputs)  # the first step caches its plans on the model
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    before, state = attributes(model), {path: module.training for path, module in model.named_modules()}
    RUNS[run](model, inputs)
    assert is_empty(THREAD.slot)
    if "checkpointing" not in run:  # transformers adds attributes; checkpointed_step has compared them
        assert attributes(model) == before
    assert {path: module.training for path, module in model.named_modules()} == state
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())
    assert_same(step(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "mt5"])
def test_plan_is_reused_until_something_changes(family, monkeypatch) -> None:
    """A site searches for a plan of its call in the first forward pass and after its adapters or hooks change.

    A new scale needs no new plan. Some models slice their list of blocks in each forward pass. This registers modules,
    but needs no new plan either.
    """
    planned: list[str] = []
    find = Site._find
    monkeypatch.setattr(Site, "_find", lambda site, kind: planned.append(site.path) or find(site, kind))
    inputs, model = tiny.batch(family), fused(family)
    model.add_adapter("second", flare.FlareConfig(r=3, task_type=model.peft_config["default"].task_type))
    tiny.randomize_lora(model)
    paths = {site.path for site in all_sites(model)}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)

    def plans() -> list[str]:
        planned.clear()
        for _ in range(5):
            if model(**inputs).loss.requires_grad:  # False if adapters are disabled
                step(model, inputs)
                optimizer.step()
            model.eval()(**plain(inputs))
            model.train()
        return sorted(planned)

    assert len(paths) == (tiny.LAYERS + 2 + 2 * 2 if family == "mt5" else tiny.LAYERS) and plans() == sorted(paths)
    assert plans() == []
    attention = first_attention(model)
    for change in (
        lambda: model.set_adapter("second"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.delete_adapter("default"),
    ):
        change()
        assert plans() == sorted(paths) and plans() == []
    handle = attention._modules[NAMES[family][0]].register_forward_hook(lambda *_: None)
    assert plans() == [next(site.path for site in all_sites(model) if site.parent is attention)]
    handle.remove()
    assert len(plans()) == 1
    for module in (m for m in model.modules() if hasattr(m, "set_scale")):
        module.set_scale("second", 2.0)
    assert plans() == []
