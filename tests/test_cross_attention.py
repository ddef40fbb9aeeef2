"""Tests of fusion='cross_attention': saving, several adapters, and masks."""

from __future__ import annotations

import warnings

import peft
import pytest
import tiny
import torch
from fused_models import fused, without_source

import flare
from flare_kernels.launch_mode import forcing


def cross_attentions(model) -> dict[str, torch.nn.Module]:
    """Return a dictionary from the path of each layer with cross-attention to the module with its trained weights."""
    return {
        path.removeprefix("base_model.model.").rpartition(".lora_cross_attention.")[0]: module
        for path, module in model.named_modules()
        if path.rpartition(".")[0].endswith(".lora_cross_attention")
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cross_attention_is_saved_and_loaded_with_its_adapter(family, tmp_path) -> None:
    """Cross-attention's float32 weights exist only in modules that fuse. Without a source, an adapter is plain LoRA."""
    inputs = tiny.batch(family)
    options = {"r": 4, "fusion": "cross_attention", "cross_attention_heads": 2}
    model = fused(family, dtype=torch.bfloat16, target_modules="all-linear", **options).eval()
    report = model.fast_lora_report()
    assert set(cross_attentions(model)) == {row.module for row in report.fused} and report.declined
    trained = [p for module in cross_attentions(model).values() for p in module.parameters()]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trained)
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in trained)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            base = tiny.model(family, dtype=torch.bfloat16)
            loaded = peft.PeftModel.from_pretrained(
                base, tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
            ).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
        assert not any(p.requires_grad for p in loaded.parameters())
    plain = fused(family, dtype=torch.bfloat16, target_modules="all-linear", r=4, fusion=None).eval()
    lora = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    plain.load_state_dict(lora, strict=False)
    text = without_source(inputs)
    with forcing(form="frozen_first"):  # the order in which layers with cross-attention always run
        torch.testing.assert_close(model(**text).logits, plain(**text).logits, rtol=0, atol=0)


def test_adapters_have_separate_cross_attention_weights() -> None:
    inputs = tiny.batch("llama")
    stock = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model = flare.fast_lora(stock, fusion="cross_attention")  # cross-attention can be added to an existing PEFT model
    tiny.randomize_lora(model)
    first = model(**inputs).logits
    config = flare.FlareConfig(r=6, fusion="cross_attention", cross_attention_heads=3, rank_pattern={"v_proj": 4})
    model.add_adapter("second", config)
    flags = lambda name: {  # noqa: E731
        p.requires_grad for path, p in model.named_parameters() if f"lora_cross_attention.{name}." in path
    }
    assert (flags("default"), flags("second")) == ({True}, {False})
    model.set_adapter("second")
    assert (flags("default"), flags("second")) == ({False}, {True})
    declined = {row.reason for row in model.fast_lora_report().declined if row.adapter == "second"}
    assert declined == {"cross_attention_heads=3 does not divide its rank 4"}
    model(**inputs).loss.backward()
    with pytest.raises(ValueError, match="'second' trains cross_attention's query, key and value"):
        model.add_weighted_adapter(["second"], [1.0], "both", combination_type="linear")
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not flags("second")
    torch.testing.assert_close(model(**inputs).logits, first, rtol=0, atol=0)


def model_without_dropout(family: str):
    return tiny.model(family, **({"dropout_rate": 0.0} if family == "mt5" else {}))


def model_with_cross_attention(family: str, masked: bool = True):
    options = {"fusion": "cross_attention", "cross_attention_heads": 2, "cross_attention_mask": masked}
    model = flare.fast_lora(model_without_dropout(family), r=4, **options)
    tiny.randomize_lora(model)
    return model


def test_masked_cross_attention_ignores_padding() -> None:
    """With the mask, padding does not change a row's output. Without the mask (the authors' release), it does."""
    inputs = without_source(tiny.batch("bert"))
    inputs["source_input_ids"], inputs["source_attention_mask"] = inputs["input_ids"].flip(0), inputs["attention_mask"]
    free, masked = model_with_cross_attention("bert", False).eval(), model_with_cross_attention("bert").eval()
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {name: x[row : row + 1, real] for name, x in inputs.items() if x.dim() > 1}
        expected = free(**alone).logits
        torch.testing.assert_close(masked(**alone).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(masked(**inputs).logits[row : row + 1], expected, rtol=1e-5, atol=1e-6)
        assert real.all() or not torch.allclose(free(**inputs).logits[row : row + 1], expected, rtol=1e-4, atol=1e-6)


def test_masked_cross_attention_ignores_later_tokens_in_causal_models() -> None:
    inputs = tiny.batch("llama")
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] += 1
    real = inputs["attention_mask"][:, :-1].bool()
    for masked, same in ((True, True), (False, False)):
        model = model_with_cross_attention("llama", masked).eval()
        first, second = (model(**one).logits[:, :-1][real] for one in (inputs, other))
        assert torch.allclose(first, second, atol=1e-6) == same


@pytest.mark.parametrize("family", ["bert", "llama", "mt5"])
def test_masked_cross_attention_is_saved_and_works_with_checkpointing(family, tmp_path) -> None:
    inputs, model = tiny.batch(family), model_with_cross_attention(family)
    if family == "mt5":
        inputs["source_labels"] = inputs["labels"]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_without_dropout(family), tmp_path, is_trainable=True).train()
    model, loaded = model.double(), loaded.double()
    out = model(**inputs)
    out.loss.backward()
    expected = tiny.gradients(model)
    assert any("cross_attention" in name and grad.any() for name, grad in expected.items())
    for use_reentrant in (None, False, True):
        loaded.zero_grad()
        if use_reentrant is not None:
            loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            loaded.enable_input_require_grads()
        again = loaded(**inputs)
        torch.testing.assert_close(again.logits, out.logits)
        again.loss.backward()
        for name, grad in tiny.gradients(loaded).items():
            torch.testing.assert_close(grad, expected[name], msg=name)


def test_masked_cross_attention_needs_a_two_dimensional_mask() -> None:
    with pytest.raises(ValueError, match="cross_attention_mask=True needs fusion='cross_attention', got fusion='mul'"):
        flare.FlareConfig(fusion="mul", cross_attention_mask=True)
    with pytest.raises(TypeError, match="cross_attention_mask=1 must be True or False"):
        flare.FlareConfig(fusion="cross_attention", cross_attention_mask=1)
    inputs, model = tiny.batch("llama"), model_with_cross_attention("llama").eval()
    with pytest.raises(ValueError, match=r"attention_mask is of shape \(3, 1, 9, 9\), and with a source"):
        model(**{**inputs, "attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)})
    prompts = {name: x for name, x in inputs.items() if name != "labels"}
    prompts["source_attention_mask"] = torch.ones_like(prompts["source_attention_mask"])
    with pytest.raises(ValueError, match="cross_attention_mask=True of adapter 'default': the target's mask is not"):
        model.generate(**prompts, source_alignment="release", max_new_tokens=2)
