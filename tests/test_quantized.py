"""Test adapters on 4-bit and 8-bit linear layers of bitsandbytes, on a CPU."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import transformers

import flare
from flare_kernels import reference

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bnb)")

KINDS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


def quantized(checkpoint, kind: str):
    """Return a tiny Llama with quantised linear layers. All other weights are bf16."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind]),
        device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_matches_the_formula_and_can_be_trained_and_reloaded(kind, checkpoint, tmp_path) -> None:
    """Logits match the FLARE formula on PEFT's quantised layers. The model can be trained, saved and loaded."""
    inputs = tiny.batch("llama")
    plain = {k: v for k, v in inputs.items() if not k.startswith("source_")}
    lora = {"r": 4, "lora_alpha": 8}
    stock = peft.get_peft_model(
        quantized(checkpoint, kind), peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model = flare.fast_lora(quantized(checkpoint, kind), **lora)
    for each in (stock, model):
        tiny.randomize_lora(each)
        each.train()  # in eval mode bitsandbytes repacks 4-bit weights on some CPUs
    assert {row.backend_layer for row in model.fast_lora_report().fused} == {
        {"nf4": "FlareLinear4bit", "int8": "FlareLinear8bitLt"}[kind]
    }
    states = tiny.source_hidden_states(stock, inputs, offset=1)
    with (
        torch.no_grad(),
        tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, "add_relu"), ("q_proj", "v_proj")),
    ):
        expected = stock(**plain).logits
    actual = model(**inputs)
    scale = expected.abs().max().item()
    assert (actual.logits - expected).abs().max() <= 0.05 * scale
    with torch.no_grad():
        assert (model(**plain).logits - actual.logits).abs().max() > 0.05 * scale, "the source must matter"
    actual.loss.backward()
    grads = tiny.gradients(model)
    assert grads and all(torch.isfinite(g).all() and g.any() for g in grads.values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(checkpoint, kind), tmp_path).train()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, actual.logits.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_quantised_base_uses_the_source(kind, checkpoint) -> None:
    """The logits of the first new token match a forward pass over the prompt, and the source changes them."""
    model = flare.fast_lora(quantized(checkpoint, kind), r=4, source_padding="zero").eval()
    tiny.randomize_lora(model)
    inputs = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**inputs, **options).logits[0]
    expected = model(**inputs).logits[:, -1].float()
    plain = model.generate(**{k: v for k, v in inputs.items() if not k.startswith("source")}, **options).logits[0]
    assert (first - expected).abs().max() < 0.02 < (first - plain).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_pass_needs_a_base_whose_rows_are_independent(kind, checkpoint) -> None:
    """A shared pass runs source and target in one batch. int8 layers refuse it, because rows affect each other."""
    model = flare.fast_lora(quantized(checkpoint, kind), r=4, source_layer_offset=0, target_modules="all-linear").eval()
    tiny.randomize_lora(model)
    inputs = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options, source_pass="separate")
    if kind == "int8":
        with pytest.raises(ValueError, match=r"selects its 16-bit columns .* \(llm_int8_threshold\)"):
            model.generate(**inputs, **options, source_pass="shared")
        return
    actual = model.generate(**inputs, **options, source_pass="shared")
    assert actual.past_key_values.layers[0].keys.shape[0] == 6
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=0.02)
