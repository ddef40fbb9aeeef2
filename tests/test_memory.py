"""Test that the adapters need little memory: bytes saved for the backward pass, and results added in place."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch

import flare
from flare.experiments.measure import saved_bytes
from flare_kernels import reference


def saved_by_adapters(model, inputs, plain_inputs) -> int:
    """Return the bytes that a forward pass saves for backward, minus the bytes that it saves without the adapters."""
    totals = []
    for adapters_on in (True, False):
        with saved_bytes(ignore=[model.parameters(), model.buffers(), inputs]) as saved:
            if adapters_on:
                loss = model(**inputs).loss
            else:
                with model.disable_adapter():
                    loss = model(**plain_inputs).loss
        totals.append(saved.total)
        del loss
    return totals[0] - totals[1]


@pytest.mark.parametrize("fusion", ["add_relu", "mul", "add"])
def test_adapters_save_fewer_bytes_than_pefts_eager_layers(fusion, capsys) -> None:
    """FLARE saves at most 0.4 times the bytes of eager PEFT, in a bf16 Llama with float32 adapters and no autocast."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "dtype": torch.bfloat16}
    inputs = tiny.batch("llama", B=4, m=64)
    plain = {k: v for k, v in inputs.items() if not k.startswith("source_")}
    targets = ("q_proj", "v_proj")
    lora = {"r": 16, "lora_alpha": 32}

    stock = peft.get_peft_model(
        tiny.model("llama", **size), peft.LoraConfig(**lora, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    fused = flare.fast_lora(tiny.model("llama", **size), fusion=fusion, **lora)
    for model in (stock, fused):
        tiny.randomize_lora(model)
        model.enable_input_require_grads()
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    states = tiny.source_hidden_states(stock, inputs, offset=1)
    with tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, fusion), targets):
        eager = saved_by_adapters(stock, plain, plain)
    ours = saved_by_adapters(fused, inputs, plain)
    with capsys.disabled():
        print(
            f"\nsaved by adapters, {fusion}: flare {ours:,} bytes, eager PEFT {eager:,} bytes, ratio {ours / eager:.3f}"
        )
    tokens, width, layers = 4 * 64, 256, 2
    assert ours >= 2 * layers * tokens * width * 2, (
        "less was saved than x and x_source of every block, so the measurement is wrong"
    )
    assert ours <= 0.4 * eager


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("train", [True, False])
def test_the_adapter_adds_to_the_frozen_output_in_place(family, train, monkeypatch) -> None:
    """The result of an adapted layer is in the memory of the frozen output, with a bias (BERT) or without (Llama)."""
    model = flare.fast_lora(tiny.model(family), r=4)
    tiny.randomize_lora(model)
    addresses = []
    for name, layer in model.named_modules():
        if name.endswith(".base_layer"):
            plain = layer.forward

            def recording_forward(x, plain=plain):
                y = plain(x)
                addresses.append(y.untyped_storage().data_ptr())
                return y

            monkeypatch.setattr(layer, "forward", recording_forward)
            owner = model.get_submodule(name.removesuffix(".base_layer"))
            owner.register_forward_hook(lambda m, a, y: addresses.append(y.untyped_storage().data_ptr()))
    with torch.set_grad_enabled(train):
        model(**tiny.batch(family))
    pairs = list(zip(addresses[::2], addresses[1::2], strict=True))
    assert len(pairs) == 2 * 2 * tiny.LAYERS, "source and target pass, query and value of each block"
    assert all(before == after for before, after in pairs)
