"""Test calls that could fail silently or leave a model half changed: each one raises an error or works."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from peft.tuners.lora import LoraModel
from torch import nn

import flare
from flare._compat import LoraLayer, LoraLinear


def fused(family: str = "llama", **overrides) -> peft.PeftModel:
    model = flare.fast_lora(tiny.model(family), **{"r": 4, "lora_alpha": 8, **overrides})
    tiny.randomize_lora(model)
    return model


def stock(**fields) -> peft.PeftModel:
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    return peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(**config))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def state(model: nn.Module) -> dict:
    """Return what a refused call must not change: identities of modules and parameters, flags, attributes, hooks."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": hooks(model),
    }


# --- adapter_names ----------------------------------------------------------------------------------------------------


def test_a_refused_batch_with_adapter_names_leaves_no_hooks() -> None:
    model = fused().eval()
    model.add_adapter("second", flare.FlareConfig(r=4, task_type="CAUSAL_LM"))
    inputs, names = tiny.batch("llama"), ["default", "second", "default"]
    expected, before = model(**inputs).logits, hooks(model)
    with pytest.raises(ValueError, match=r"adapter_names .* cannot be combined with source_input_ids"):
        model(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match=r"adapter_names .* cannot be combined with source_input_ids"):
        model.generate(input_ids=inputs["input_ids"], source_input_ids=inputs["source_input_ids"], adapter_names=names)
    assert hooks(model) == before
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


# --- the model card ---------------------------------------------------------------------------------------------------

USERS = b"# my project\r\n\r\nlibrary_name: peft\n\xff"


def test_a_users_readme_is_not_changed(tmp_path) -> None:
    (tmp_path / "README.md").write_bytes(USERS)
    flare.FlareConfig().save_pretrained(tmp_path / "config")
    flare.FlareConfig().save_pretrained(tmp_path)
    fused().save_pretrained(tmp_path / "model")
    assert (tmp_path / "README.md").read_bytes() == USERS
    assert not (tmp_path / "config" / "README.md").exists()
    assert "## Loading this adapter" in (tmp_path / "model" / "README.md").read_text()


def test_a_named_adapter_is_described_in_the_card_of_the_parent_folder(tmp_path) -> None:
    flare.fast_lora(tiny.model("llama"), r=4, adapter_name="own").save_pretrained(tmp_path)
    assert (tmp_path / "own" / "adapter_config.json").is_file()
    assert (tmp_path / "README.md").read_text().count("## Loading this adapter") == 1


# --- combining adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["add", "add_relu"])
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_combination_with_an_adapter_of_zeros_changes_nothing(fusion, how) -> None:
    model, inputs = fused(fusion=fusion), tiny.batch("llama")
    model.add_adapter("zero", flare.FlareConfig(r=4, lora_alpha=8, fusion=fusion, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".zero." in name:
                parameter.zero_()
    expected = model.eval()(**inputs).logits
    model.add_weighted_adapter(["default", "zero"], [1.0, 1.0], "both", combination_type=how)
    model.set_adapter("both")
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "weights", "how", "message"),
    [
        ("add_relu", [1.0, 1.0], {}, "combination_type='svd' cannot .*'linear' or 'cat'"),  # PEFT's default
        ("add", [1.0, 1.0], {"combination_type": "ties", "density": 0.5}, "combination_type='ties'"),
        ("add_relu", [1.0, -1.0], {"combination_type": "cat"}, r"weights=\[1.0, -1.0\] .*above 0"),
        ("add_relu", [1.0, 0.0], {"combination_type": "linear"}, "weights="),
        ("mul", [1.0, 1.0], {"combination_type": "linear"}, "fusion='mul' .*fusion 'add' or 'add_relu'"),
        ("mul_relu", [1.0, 1.0], {"combination_type": "cat"}, "fusion='mul_relu'"),
        ("matmul", [1.0, 1.0], {"combination_type": "linear"}, "fusion='matmul'"),
    ],
)
def test_unsupported_combinations_are_refused(fusion, weights, how, message) -> None:
    model = fused(fusion=fusion)
    model.add_adapter("second", flare.FlareConfig(r=4, lora_alpha=8, fusion=fusion, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default", "second"], weights, "both", **how)
    assert "both" not in model.peft_config


def test_plain_lora_combines_as_in_peft() -> None:
    model = fused(fusion=None)
    model.add_adapter("second", flare.FlareConfig(r=4, lora_alpha=8, fusion=None, task_type="CAUSAL_LM"))
    model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "svd")
    model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "cat", "cat")
    assert model.peft_config["cat"].r == 8 and "svd" in model.peft_config


# --- a refused fast_lora ----------------------------------------------------------------------------------------------

REFUSED = {
    "strict": ({"target_modules": "all-linear", "strict": True}, "strict=True"),
    "nothing fuses": ({"target_modules": ["key", "k_proj"]}, "nothing fuses"),
    "no such target": ({"target_modules": ["nope"]}, "[Tt]arget"),
    "no such fusion module": ({"fusion_modules": ["value", "v_proj", "nope"]}, "fusion_modules: .*'nope'"),
}


@pytest.mark.parametrize("family", ["bert", "llama"])  # bert's head is replaced by PEFT's modules_to_save
@pytest.mark.parametrize("case", REFUSED)
def test_refused_call_does_not_change_a_model(family, case) -> None:
    overrides, message = REFUSED[case]
    model = tiny.model(family)
    next(model.parameters()).requires_grad_(False)  # frozen by the caller
    model.gradient_checkpointing_enable()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        flare.fast_lora(model, r=4, **overrides)
    assert state(model) == before
    flare.fast_lora(model, r=4)(**tiny.batch(family)).loss.backward()


@pytest.mark.parametrize(
    ("targets", "overrides", "message"),
    [
        (["k_proj"], {}, "nothing fuses"),
        (["q_proj", "k_proj"], {"strict": True, "lora_dropout": 0.3}, "strict=True"),
        (["q_proj", "v_proj"], {"fusion_modules": ["nope"]}, "matches no LoRA module .* q_proj, v_proj"),
        (["q_proj", "v_proj"], {"fusion": "cross_attention", "cross_attention_heads": 2, "strict": True}, "does not"),
    ],
)
def test_refused_call_does_not_change_a_peft_model(targets, overrides, message) -> None:
    """The last case fails after a layer has got new parameters, because some ranks cannot be split into two heads."""
    model = stock(target_modules=targets, rank_pattern={"v_proj": 3} if "cross_attention_heads" in overrides else {})
    before, config = state(model), model.peft_config["default"]
    inputs = tiny.batch("llama", source=False)
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=message):
        flare.fast_lora(model, **overrides)
    assert state(model) == before
    assert type(model.base_model) is LoraModel and model.peft_type == "LORA"
    assert model.peft_config["default"] is config and type(config) is peft.LoraConfig
    assert all(type(m) is LoraLinear for m in model.modules() if isinstance(m, LoraLayer))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    model.merge_and_unload()


# --- settings of an existing PEFT model -------------------------------------------------------------------------------


def test_lora_dropout_can_be_set_on_an_existing_adapter() -> None:
    def dropouts(model: nn.Module) -> list[float]:
        return [getattr(m.lora_dropout["default"], "p", 0.0) for m in model.modules() if isinstance(m, LoraLayer)]

    model = flare.fast_lora(stock().eval(), lora_dropout=0.3)
    assert model.peft_config["default"].lora_dropout == 0.3
    assert dropouts(model) == [0.3] * 2 * tiny.LAYERS
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    assert set(dropouts(flare.fast_lora(stock(lora_dropout=0.3), lora_dropout=0.0))) == {0.0}
    assert set(dropouts(flare.fast_lora(stock(lora_dropout=0.3), peft.LoraConfig()))) == {0.3}
    inputs = tiny.batch("llama")
    tiny.randomize_lora(model.train())
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("override", [{"task_type": "SEQ_CLS"}, {"inference_mode": True}])
def test_fields_fixed_by_the_peft_model_cannot_be_overridden(override) -> None:
    model = stock()
    with pytest.raises(
        ValueError, match=f"{next(iter(override))}=.* is fixed by the PeftModel, .* for adapter 'default'"
    ):
        flare.fast_lora(model, **override)
    assert type(model.base_model) is LoraModel
    flare.fast_lora(model, task_type="CAUSAL_LM", inference_mode=False)


# --- a base model that would not be frozen ----------------------------------------------------------------------------

CHANGED_BASE = [
    *({"init_lora_weights": init} for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    {"bias": "all"},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("fields", CHANGED_BASE, ids=str)
def test_settings_that_change_the_base_model_are_refused(fields) -> None:
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name}='{value}' .*source pass runs the frozen base model.*fusion=None"):
        flare.FlareConfig(**fields)
    if value in ("pissa", "all"):
        assert getattr(flare.FlareConfig(**fields, fusion=None), name) == value
        with pytest.raises(ValueError, match=f"{name}='{value}'"):
            flare.fast_lora(stock(**fields))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_other_initialisations_do_not_change_the_base_model(init) -> None:
    expected = dict(tiny.model("llama").named_parameters())
    model = flare.fast_lora(tiny.model("llama"), r=4, init_lora_weights=init)
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, expected[name.replace(".base_layer", "")]), name


# --- values of FlareConfig --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"r": "8"}, TypeError),
        ({"r": 8.0}, TypeError),
        ({"r": True}, TypeError),
        ({"cross_attention_heads": None}, TypeError),
        ({"cross_attention_heads": 0}, ValueError),
        ({"latent_dim": 1.5}, TypeError),
        ({"source_dropout": "yes"}, TypeError),
        ({"fusion_modules": 3}, TypeError),
        ({"fusion_modules": ["q_proj", 3]}, TypeError),
        ({"lora_dropout": 1.5}, ValueError),
        ({"lora_dropout": -0.1}, ValueError),
        ({"lora_dropout": "0.1"}, TypeError),
    ],
    ids=str,
)
def test_error_names_a_wrong_value(fields, error) -> None:
    name, value = next(iter(fields.items()))
    with pytest.raises(error) as caught:
        flare.FlareConfig(**fields)
    assert f"{name}={value!r} must be" in str(caught.value)


def test_fusion_modules_accepts_names_and_paths() -> None:
    assert flare.FlareConfig(fusion_modules="q_proj").fusion_modules == ["q_proj"]
    path = "model.layers.1.self_attn.v_proj"
    model = fused(fusion_modules=("q_proj", path))
    assert {row.module for row in model.fast_lora_report().fused if "v_proj" in row.module} == {path}
