"""Test that hooks on an adapter's modules, from the user or from accelerate, run for both source and target states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from cached_states import batch_of, fused, no_warnings_allowed
from torch import nn


def offloaded(model: Any, how: str, folder: Path) -> Any:
    """Return a copy of a model with weights that accelerate offloads: between calls, these parameters are meta tensors.

    ``how`` names accelerate's function. dispatch_model offloads only the weights of block 1; the other
    functions offload all weights.
    """
    model = copy.deepcopy(model)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    else:
        block = next(
            name for name, _ in model.named_modules() if name.endswith(("layers.1", "encoder.layer.1", "block.1"))
        )
        places = {"": "cpu", block: "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    assert any(p.device.type == "meta" for name, p in model.named_parameters() if "lora_A" in name)
    return model


def with_hooks(model: Any, part: str) -> Any:
    """Double the output of each adapter module named ``part`` (lora_A or lora_B), with a forward hook."""
    for name, module in model.named_modules():
        if name.endswith(f"{part}.default"):
            module.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def twice(model: Any, part: str) -> Any:
    """Double the weights of the adapter modules named ``part``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{part}.default" in name:
                parameter *= 2
    return model


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("llama", {"source_padding": "zero"}),
        ("llama", {"fusion": "matmul"}),
        ("llama", {"latent_dim": 6}),
        ("mt5", {}),
    ],
    ids=["bert", "zero", "matmul", "latent", "mt5"],
)
def test_offloaded_weights_do_not_change_the_logits(family, fields, how, tmp_path) -> None:
    model, inputs = fused(family, **fields).eval(), batch_of(family)
    if "latent_dim" in fields:
        inputs = {**tiny.batch(family, source=False), "source_states": torch.randn(3, 9, 6)}
    twin = offloaded(model, how, tmp_path)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = model(**inputs).logits
            for _ in range(2):
                torch.testing.assert_close(twin(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 1])
def test_offloaded_weights_do_not_change_generation(offset, tmp_path) -> None:
    model, inputs = fused("llama", source_layer_offset=offset).eval(), tiny.batch("llama")
    del inputs["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options).logits
    actual = offloaded(model, "cpu_offload", tmp_path).generate(**inputs, **options).logits
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_user_hooks_run_for_source_and_target(family, padding, memory) -> None:
    """A hook that doubles lora_A's output acts like a doubled A, in prediction and in training."""
    fields = {"source_padding": padding, "source_memory": memory}
    model, doubled = with_hooks(fused(family, **fields), "lora_A"), twice(fused(family, **fields), "lora_A")
    inputs = batch_of(family)
    with torch.no_grad():
        logits = doubled.eval()(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, logits, rtol=1e-5, atol=1e-6)
    if memory == "recompute":
        with pytest.warns(UserWarning, match="source_memory='recompute': hooks on lora_A .* stay on the device"):
            loss = model.train()(**inputs).loss
    else:
        loss = model.train()(**inputs).loss
    with no_warnings_allowed():
        model(**inputs)
    loss.backward()
    doubled.train()(**inputs).loss.backward()
    expected = tiny.gradients(doubled)
    for name, grad in tiny.gradients(model).items():
        factor = 2 if "lora_A" in name else 1  # the hook's factor is also in the gradient of A
        torch.testing.assert_close(grad, factor * expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_cross_attention_with_hooks_raises() -> None:
    model = with_hooks(fused("llama", fusion="cross_attention"), "lora_A")
    with pytest.raises(ValueError, match=r"q_proj: hooks .* cannot be combined with fusion='cross_attention'"):
        model(**batch_of("llama"))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_an_adapter_on_another_device_raises(part, source, grad) -> None:
    """The meta device takes the role of a second device."""
    model = fused("llama").eval()
    layer: Any = tiny.block_list(model.get_base_model())[1].self_attn.q_proj
    linear: nn.Linear = getattr(layer, part)["default"]
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    inputs = {n: v for n, v in batch_of("llama").items() if source or not n.startswith("source_")}
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"q_proj: .*meta.*cpu: move the adapter"):
        model(**inputs)
