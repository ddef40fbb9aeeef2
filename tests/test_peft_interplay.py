"""Test fusing adapters that start from a merged English adapter or from plain LoRA, and switching adapters."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import tiny
import torch
from site_models import assert_same, step

import flare

QV = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


def english(family: str, **fields: Any) -> Any:
    """Return a PEFT LoRA model with random weights, in place of a model that was trained on the English task."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV[family], task_type=TASK[family], **fields)
    model = peft.get_peft_model(tiny.model(family), config)
    tiny.randomize_lora(model, seed=8)
    return model


def text(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if not k.startswith("source_")}


@pytest.mark.parametrize("family", QV)
def test_a_fusing_adapter_trains_on_a_merged_english_adapter(family, tmp_path) -> None:
    """As in the paper, the fusing adapter is trained on the merged model, which also runs the source pass."""
    inputs = tiny.batch(family)
    task = english(family)
    expected = task.eval()(**text(inputs)).logits
    merged = task.merge_and_unload()
    model = flare.fast_lora(merged, r=5).eval()
    torch.testing.assert_close(model(**text(inputs)).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)  # B is zero
    tiny.randomize_lora(model)
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    fresh = flare.fast_lora(tiny.model(family), r=5)
    other = fresh.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(list(states)[1:], list(other)[1:], strict=True))
    out = model(**inputs)
    out.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(english(family).merge_and_unload(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, out.logits)


@pytest.mark.parametrize("target", ["up_proj", "v_proj", "embed_tokens"])
def test_an_adapter_merged_next_to_a_fusing_adapter_stays_merged(target) -> None:
    """The source pass uses the merged weights. In a merged layer the fusing adapter is off, as in PEFT."""
    inputs = tiny.batch("llama")
    model = flare.fast_lora(tiny.model("llama"), r=5).eval()
    model.add_adapter("english", flare.FlareConfig(fusion=None, r=4, target_modules=[target], task_type="CAUSAL_LM"))
    tiny.randomize_lora(model)
    model.merge_adapter(["english"])
    weights = {key.replace(f"{target}.base_layer", target): value for key, value in model.state_dict().items()}
    unmerged = [name for name in QV["llama"] if name != target]
    twin = flare.fast_lora(tiny.model("llama"), r=5, target_modules=unmerged).eval()
    assert not twin.load_state_dict(weights, strict=False).missing_keys
    expected = twin(**inputs).logits
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("family", QV)
def test_a_plain_lora_checkpoint_becomes_a_fusing_adapter(family, tmp_path) -> None:
    """A, B, rank, targets and head are kept. The saved adapter loads as a FLARE adapter."""
    inputs, task = tiny.batch(family), english(family)
    task.save_pretrained(tmp_path / "lora")
    plain = task.eval()(**text(inputs)).logits
    loaded = peft.PeftModel.from_pretrained(tiny.model(family), tmp_path / "lora", is_trainable=True)
    model = flare.fast_lora(loaded, fusion="mul", lora_dropout=0.1).eval()
    torch.testing.assert_close(model(**text(inputs)).logits, plain, rtol=1e-6, atol=1e-6)
    fused = model(**inputs)
    assert not torch.allclose(fused.logits, plain, atol=1e-4)
    fused.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in english(family).named_parameters() if p.requires_grad}
    assert trained == set(tiny.gradients(model))
    config = model.peft_config["default"]
    assert (config.fusion, config.r, config.lora_alpha, config.peft_type) == ("mul", 4, 8, "FLARE")
    model.save_pretrained(tmp_path / "flare")
    again = peft.PeftModel.from_pretrained(tiny.model(family), tmp_path / "flare").eval()
    torch.testing.assert_close(again(**inputs).logits, fused.logits, rtol=0, atol=0)


def test_adapters_of_different_fusions_can_be_switched(tmp_path) -> None:
    """Each adapter gives its own output, whichever adapter was active before. Plain LoRA ignores the source."""
    inputs = tiny.batch("llama")
    configs = {
        "add": {"fusion": "add"},
        "mul": {"fusion": "mul_relu", "source_layer_offset": 0, "source_padding": "zero"},
        "cross": {"fusion": "cross_attention", "cross_attention_heads": 2},
        "plain": {"fusion": None},
    }
    expected, model = {}, None
    for seed, (name, fields) in enumerate(configs.items()):
        config = flare.FlareConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
        alone = flare.fast_lora(tiny.model("llama"), config).eval()
        tiny.randomize_lora(alone, seed=seed)
        expected[name] = alone(**inputs).logits
        alone.save_pretrained(tmp_path / name)
        if model is None:
            model = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path / name, adapter_name=name)
        else:
            model.load_adapter(tmp_path / name, adapter_name=name)
    model.eval()
    for name in ("cross", "plain", "add", "mul", "cross", "add"):
        model.set_adapter(name)
        torch.testing.assert_close(model(**inputs).logits, expected[name], rtol=1e-6, atol=1e-6)
    active = ["mul"]
    model.base_model.set_adapter(active)
    model(**inputs)
    active.append("plain")  # PEFT keeps this list
    model.base_model.set_adapter(active)
    both = model(**inputs).logits
    assert not torch.allclose(both, expected["mul"], atol=1e-3)
    model.base_model.set_adapter(["add"])
    model.base_model.set_adapter(["mul", "plain"])
    torch.testing.assert_close(model(**inputs).logits, both, rtol=0, atol=0)
    model.set_adapter("plain")
    torch.testing.assert_close(model(**text(inputs)).logits, expected["plain"], rtol=0, atol=0)
    assert len({tuple(logits.flatten()[:8].tolist()) for logits in expected.values()}) == len(configs)


@pytest.mark.parametrize("kind", ["DoRA", "aLoRA"])
def test_a_lora_variant_next_to_a_fusing_adapter_matches_peft(kind) -> None:
    inputs = tiny.batch("llama", source=False)
    fields = {"use_dora": True} if kind == "DoRA" else {"alora_invocation_tokens": inputs["input_ids"][0, 3:5].tolist()}
    twin = english("llama", **fields)
    model = flare.fast_lora(tiny.model("llama"), r=5, adapter_name="fusing")
    config = flare.FlareConfig(
        fusion=None, r=4, lora_alpha=8, target_modules=QV["llama"], task_type=TASK["llama"], **fields
    )
    model.add_adapter("default", config)
    model.set_adapter("default")
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(twin))
    expected = step(twin, inputs)
    assert kind != "DoRA" or any("lora_magnitude_vector" in name for name in expected)
    assert_same(step(model, inputs), expected, rtol=1e-5, atol=1e-6)
    if kind == "DoRA":
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).loss, expected["loss"], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_fuses_in_no_module_warns() -> None:
    """fast_lora raises an error instead (tests/test_errors.py)."""
    config = flare.FlareConfig(r=4, target_modules=["o_proj"])
    with pytest.warns(
        UserWarning, match=r"'default' has fusion='add_relu' but fuses in no module.*only self-attention"
    ):
        peft.get_peft_model(tiny.model("llama"), config)
    model = flare.fast_lora(tiny.model("llama"), fusion=None, use_dora=True, target_modules=QV["llama"])
    with pytest.warns(UserWarning, match=r"'second' has .*fuses in no module.*DoraLinearVariant"):
        model.add_adapter("second", flare.FlareConfig(r=4, target_modules=QV["llama"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fuses in no module")
        model.add_adapter("plain", flare.FlareConfig(fusion=None, r=4, target_modules=["o_proj"]))
        model.add_adapter(
            "partly", flare.FlareConfig(r=4, target_modules=["up_proj", "k_proj"], fusion_modules="k_proj")
        )


@pytest.mark.parametrize("r", [8, 64, 128])
@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention"])
def test_every_trained_weight_gets_a_gradient_at_the_papers_ranks(r, fusion) -> None:
    """The largest ranks exceed the width of the tiny model."""
    model = flare.fast_lora(tiny.model("llama"), r=r, lora_alpha=2 * r, fusion=fusion)
    tiny.randomize_lora(model)
    inputs = tiny.batch("llama")
    out = model(**inputs)
    assert (out.logits - model(**text(inputs)).logits).abs().max() > 1e-3
    out.loss.backward()
    grads = tiny.gradients(model)
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {r}
    # the key's bias has no effect on softmax
    assert all(torch.isfinite(g).all() and (g.any() or n.endswith("key.bias")) for n, g in grads.items())
