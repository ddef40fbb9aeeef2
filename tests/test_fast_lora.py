"""Test fast_lora: which modules fuse, the model's logits and gradients, and PEFT's operations on the model."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import tiny
import torch
from fused_models import fused, without_source

import flare
from flare.tuner.layer import FlareLayer
from flare_kernels import FUSIONS, reference

QV = {"bert": ("query", "value"), "xlmr": ("query", "value"), "llama": ("q_proj", "v_proj")}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("fusion", [*FUSIONS, "matmul", "matmul_relu"])
@pytest.mark.parametrize("offset", [1, 0])
def test_logits_and_gradients_match_the_formula(family, fusion, offset) -> None:
    """The reference computes the formula with PEFT's layers in eager PyTorch."""
    inputs = tiny.batch(family)
    stock = peft.get_peft_model(
        tiny.model(family), peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(QV[family]), **_task(family))
    )
    tiny.randomize_lora(stock)
    states = tiny.source_hidden_states(stock, inputs, offset)
    with tiny.eager_fusion(stock, states, lambda S, T: reference.fuse(S, T, fusion), QV[family]):
        expected = stock(**without_source(inputs))
        expected.loss.backward()
    model = fused(family, fusion=fusion, source_layer_offset=offset)
    actual = model(**inputs)
    actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    expected_grads, grads = tiny.gradients(stock), tiny.gradients(model)
    assert expected_grads.keys() == grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def _task(family: str) -> dict:
    return {"task_type": "CAUSAL_LM" if family == "llama" else "SEQ_CLS"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_lora_without_a_source_matches_peft(family) -> None:
    inputs = without_source(tiny.batch(family))
    stock = peft.get_peft_model(
        tiny.model(family), peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(QV[family]), **_task(family))
    )
    tiny.randomize_lora(stock)
    model = fused(family)
    with pytest.warns(UserWarning, match=r"remove_unused_columns[\s\S]*FlareDataCollator") as seen:
        actual = model(**inputs)
    assert seen[0].filename == __file__, "the warning points at the user's line"
    expected = stock(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
    actual.loss.backward()
    expected.loss.backward()
    grads = tiny.gradients(model)
    for name, grad in tiny.gradients(stock).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**inputs)  # the warning is given once


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bf16_error_is_at_most_twice_the_error_of_peft(family) -> None:
    inputs = without_source(tiny.batch(family))
    targets = {"r": 5, "lora_alpha": 7, "target_modules": list(QV[family]), **_task(family)}
    exact = peft.get_peft_model(tiny.model(family).double(), peft.LoraConfig(**targets), autocast_adapter_dtype=False)
    stock = peft.get_peft_model(tiny.model(family, dtype=torch.bfloat16), peft.LoraConfig(**targets))
    model = flare.fast_lora(tiny.model(family, dtype=torch.bfloat16), **targets).eval()
    for each in (exact, stock, model):
        tiny.randomize_lora(each)
        each.eval()
    with torch.no_grad():
        truth = exact(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = stock(**inputs).logits.double()
        actual = model(**inputs).logits.double()
    assert (actual - truth).abs().max() <= 2 * (plain - truth).abs().max() + torch.finfo(torch.bfloat16).eps


def test_report_lists_fused_modules_and_reasons() -> None:
    model = flare.fast_lora(tiny.model("llama"), r=4, target_modules="all-linear")
    report = model.fast_lora_report()
    assert {row.module.rpartition(".")[2] for row in report.fused} == {"q_proj", "v_proj"}
    assert len(report.fused) == 2 * tiny.LAYERS
    reasons = {row.module.rpartition(".")[2]: row.reason for row in report.declined}
    assert "fusion_modules" in reasons["k_proj"]
    assert "not a projection of a block's attention" in reasons["up_proj"]
    assert f"{2 * tiny.LAYERS} of {7 * tiny.LAYERS} LoRA modules fuse" in str(report)


def test_strict_raises_and_does_not_change_the_model() -> None:
    model = tiny.model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"strict=True, and .* do not fuse"):
        flare.fast_lora(model, r=4, target_modules="all-linear", strict=True)
    assert [name for name, _ in model.named_modules()] == names
    assert not model._forward_pre_hooks
    flare.fast_lora(model, r=4, strict=True)


def test_fusion_modules_select_the_modules_that_fuse() -> None:
    model = flare.fast_lora(
        tiny.model("llama"), r=4, target_modules=["q_proj", "v_proj", "o_proj"], fusion_modules=["v_proj"]
    )
    assert {row.module.rpartition(".")[2] for row in model.fast_lora_report().fused} == {"v_proj"}


# --- PEFT's operations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_adapter_loads_with_the_same_logits(family, tmp_path) -> None:
    model = fused(family, fusion="mul", source_layer_offset=0).eval()
    inputs = tiny.batch(family)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["fusion"], saved["source_layer_offset"], saved["r"]) == ("FLARE", "mul", 0, 5)
    model.save_pretrained(tmp_path)  # a second time: the card must not grow
    assert (tmp_path / "README.md").read_text().count("`import flare` before") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(tiny.model(family), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    assert type(loaded) is type(model)


def test_disable_adapter_gives_the_base_models_output() -> None:
    base = tiny.model("bert").eval()
    inputs = tiny.batch("bert")
    expected = base(**without_source(inputs)).logits
    model = fused("bert").eval()
    model.get_base_model().classifier.original_module.load_state_dict(base.classifier.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_several_adapters_on_one_model() -> None:
    """Each adapter keeps its fusion, only active adapters are used, and two active adapters both change the output."""
    inputs = tiny.batch("llama")
    model = fused("llama", fusion="add_relu").eval()
    first = model(**inputs).logits
    model.add_adapter("second", flare.FlareConfig(r=3, fusion="mul", source_layer_offset=0, task_type="CAUSAL_LM"))
    tiny.randomize_lora(model)
    model.set_adapter("second")
    second = model(**inputs).logits
    assert not torch.allclose(first, second)
    assert {(r.adapter, r.fusion) for r in model.fast_lora_report().fused} == {
        ("default", "add_relu"),
        ("second", "mul"),
    }
    model.base_model.set_adapter(["default", "second"])
    both = model(**inputs).logits
    assert not torch.allclose(both, second) and not torch.allclose(both, first)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert {r.adapter for r in model.fast_lora_report()} == {"default"}
    for layer in model.modules():
        if isinstance(layer, FlareLayer):
            assert set(layer.flare_fusion) == {"default"}
    tiny.randomize_lora(model)
    torch.testing.assert_close(model(**inputs).logits, first)


@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention"])
def test_hotswap_needs_an_equal_fusion(fusion, tmp_path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    inputs = tiny.batch("llama")
    model, other = fused("llama", fusion=fusion).eval(), fused("llama", fusion=fusion).eval()
    tiny.randomize_lora(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    torch.testing.assert_close(model(**inputs).logits, other(**inputs).logits, rtol=0, atol=0)
    fused("llama", fusion="mul").save_pretrained(tmp_path / "mul")
    with pytest.raises(ValueError, match="fusion"):
        hotswap_adapter(model, tmp_path / "mul", adapter_name="default")


def test_weighted_combination_needs_equal_fusions() -> None:
    model = fused("llama")
    model.add_adapter("same", flare.FlareConfig(r=5, lora_alpha=7, task_type="CAUSAL_LM"))
    model.add_adapter("other", flare.FlareConfig(r=5, lora_alpha=7, fusion="mul", task_type="CAUSAL_LM"))
    model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "both", combination_type="linear")
    assert any(row.adapter == "both" and row.fusion == "add_relu" for row in model.fast_lora_report().fused)
    with pytest.raises(ValueError, match="fusion differs"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "bad", combination_type="linear")


MERGES = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_adapter": lambda m: m.merge_adapter(),
    "layer.merge": lambda m: next(x for x in m.modules() if isinstance(x, FlareLayer)).merge(),
}


@pytest.mark.parametrize("way", MERGES)
@pytest.mark.parametrize("fusion", ["add_relu", "cross_attention"])
def test_merging_a_fusing_adapter_is_refused_before_anything_is_merged(way, fusion) -> None:
    model = fused("llama", target_modules="all-linear", fusion=fusion)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"phi\(S, T\) depends on the source text and cannot be merged"):
        MERGES[way](model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_adapter_without_fusion_merges_as_in_peft() -> None:
    inputs = without_source(tiny.batch("llama"))
    model = fused("llama", fusion=None).eval()
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert not merged._forward_pre_hooks


def test_unload_removes_every_hook() -> None:
    base = tiny.model("bert")
    model = flare.fast_lora(base, r=4)
    assert base._forward_pre_hooks
    unloaded = model.unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unloaded.modules())


def test_deep_copy_and_pickle_use_their_own_layers() -> None:
    inputs = tiny.batch("bert")
    model = fused("bert").eval()
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tiny.randomize_lora(model, seed=5)  # changing the original must not change the copy
        torch.testing.assert_close(twin(**inputs).logits, expected, rtol=0, atol=0)
        tiny.randomize_lora(model)


def test_plain_lora_works_on_an_unknown_architecture() -> None:
    """With fusion=None, PEFT's default targets are used, and an architecture that cannot fuse is accepted."""
    import transformers

    config = transformers.CodeGenConfig(
        vocab_size=16, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = flare.fast_lora(transformers.CodeGenForCausalLM(config).eval(), fusion=None, r=4)
    assert {row.reason for row in model.fast_lora_report()} == {"fusion=None"}
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 16)
    with pytest.raises(ValueError, match="share one linear layer"):
        flare.fast_lora(transformers.CodeGenForCausalLM(config))


def test_a_backbone_without_head_and_task_type_fuses() -> None:
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaModel(tiny.config("llama"))
    model = flare.fast_lora(base, r=4)
    tiny.randomize_lora(model)
    inputs = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    with_source = model(**inputs).last_hidden_state
    assert not torch.allclose(with_source, model.eval()(**without_source(inputs)).last_hidden_state)


# --- an existing PEFT LoRA model --------------------------------------------------------------------------------------


def test_a_peft_model_keeps_its_trained_adapter() -> None:
    inputs = tiny.batch("llama")
    stock = peft.get_peft_model(
        tiny.model("llama"),
        peft.LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    tiny.randomize_lora(stock)
    plain = stock(**without_source(inputs)).logits
    parameters = {name: p for name, p in stock.named_parameters() if "lora_" in name}
    model = flare.fast_lora(stock, fusion="mul")
    assert model is stock
    assert all(p is parameters[name] for name, p in model.named_parameters() if "lora_" in name)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.fusion, str(config.peft_type)) == (6, 9, "mul", "FLARE")
    assert {r.module.rpartition(".")[2] for r in model.fast_lora_report().fused} == {"q_proj", "v_proj"}
    torch.testing.assert_close(model.eval()(**without_source(inputs)).logits, plain, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(**inputs).logits, plain)


@pytest.mark.parametrize("override", [{"r": 8}, {"lora_alpha": 1}, {"target_modules": ["q_proj"]}])
def test_an_override_that_contradicts_the_trained_adapter_raises(override) -> None:
    stock = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(r=6, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=f"{next(iter(override))}=.* contradicts the trained adapter 'default'"):
        flare.fast_lora(stock, **override)
    assert type(stock.base_model) is peft.LoraModel


def test_values_of_a_lora_config_are_used() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["v_proj"])
    model = flare.fast_lora(tiny.model("llama"), config)
    flare_config = model.peft_config["default"]
    assert (flare_config.r, flare_config.lora_alpha, flare_config.lora_dropout, flare_config.fusion) == (
        3,
        5,
        0.1,
        "add_relu",
    )
    assert str(config.peft_type) != "FLARE", "the config that was passed must not change"


def test_defaults_and_task_types_follow_the_paper_and_the_model() -> None:
    assert (flare.FlareConfig().r, flare.FlareConfig().lora_alpha, flare.FlareConfig().source_layer_offset) == (
        64,
        128,
        1,
    )
    bert, llama = flare.fast_lora(tiny.model("bert")), flare.fast_lora(tiny.model("llama"))
    assert isinstance(bert, peft.PeftModelForSequenceClassification)
    assert isinstance(llama, peft.PeftModelForCausalLM)
    trained = {name for name, p in bert.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained and all("classifier" in name for name in trained), "the classification head is trained"
    assert all("lora_" in name for name, p in llama.named_parameters() if p.requires_grad), "an LM head is not trained"
