"""Invalid input raises an error that names the argument, the value, and what is accepted."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from torch import nn

import flare


def fused(family: str = "llama", **overrides):
    model = flare.fast_lora(tiny.model(family), **{"r": 4, **overrides})
    tiny.randomize_lora(model)
    return model


CONFIGS = [
    ({"fusion": "sum"}, "fusion='sum'.*'add', 'mul', 'add_relu', 'mul_relu', 'cross_attention', 'matmul', .*None"),
    ({"source_layer_offset": 2}, "source_layer_offset=2.*1, 0"),
    ({"source_layer_offset": True}, "source_layer_offset=True"),
    ({"source_padding": "drop"}, "source_padding='drop'.*'keep', 'zero'"),
    ({"source_memory": "disk"}, "source_memory='disk'"),
    ({"latent_dim": 0}, "latent_dim=0 must be a positive integer"),
    ({"latent_dim": 8, "fusion": None}, "latent_dim=8 needs a fusion"),
    ({"r": 0}, "r.*0"),
    ({"r": 6, "cross_attention_heads": 4}, "cross_attention_heads=4 must divide r=6"),
    ({"use_dora": True}, "use_dora cannot be combined with a fusion"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS, ids=[str(f) for f, _ in CONFIGS])
def test_invalid_config_raises_and_does_not_change_the_model(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        flare.FlareConfig(**fields)
    model = tiny.model("llama")
    with pytest.raises(ValueError, match=message):
        flare.fast_lora(model, **fields)
    assert not any("lora" in name for name, _ in model.named_modules()), "the model must be unchanged"


def test_arguments_of_a_wrong_type_raise() -> None:
    with pytest.raises(TypeError, match=r"model must be a transformers model or a peft.PeftModel, got str"):
        flare.fast_lora("bert-base-uncased")
    with pytest.raises(TypeError, match=r"config must be a FlareConfig.*got dict"):
        flare.fast_lora(tiny.model("bert"), {"r": 4})
    with pytest.raises(TypeError, match="rank: not a field of FlareConfig"):
        flare.fast_lora(tiny.model("bert"), rank=4)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])


class _NoStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


def test_architectures_that_cannot_be_mapped_raise() -> None:
    with pytest.raises(
        ValueError, match="_Mlp: query and value projections cannot be found: no linear layer is named q_proj"
    ):
        flare.fast_lora(_Mlp())
    with pytest.raises(ValueError, match="_NoStack: its blocks cannot be found"):
        flare.fast_lora(_NoStack())


def test_targets_without_a_module_that_fuses_raise() -> None:
    model = tiny.model("llama")
    with pytest.raises(
        ValueError, match=r"nothing fuses: .*adapter 'default'.*Include the query and value projections"
    ):
        flare.fast_lora(model, target_modules=["up_proj"])
    assert not any("lora" in name for name, _ in model.named_modules())


def test_peft_models_that_cannot_be_converted_raise() -> None:
    other = peft.get_peft_model(tiny.model("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="only LoRA adapters can fuse, and this PeftModel has a IA3Model"):
        flare.fast_lora(other)
    with pytest.raises(ValueError, match="are FLARE adapters already"):
        flare.fast_lora(fused())
    merged = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights"):
        flare.fast_lora(merged)


def _longer(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[:, :1]], dim=1)


SOURCES = [
    (
        "length",
        lambda i: {"source_input_ids": _longer(i["source_input_ids"])},
        ValueError,
        r"source_input_ids has shape \(3, 10\).*\(3, 9\)",
    ),
    ("batch", lambda i: {"source_input_ids": i["source_input_ids"][:2]}, ValueError, r"source_input_ids .* \(2, 9\)"),
    ("floats", lambda i: {"source_input_ids": i["source_input_ids"].float()}, TypeError, "must be an integer tensor"),
    ("list", lambda i: {"source_input_ids": [[1]]}, TypeError, "source_input_ids must be an integer .* got list"),
    ("mask", lambda i: {"source_attention_mask": torch.ones(3, 4)}, ValueError, r"source_attention_mask is \(3, 4\)"),
    (
        "no ids",
        lambda i: {"source_input_ids": None},
        ValueError,
        "source_attention_mask was given without source_input",
    ),
    (
        "labels",
        lambda i: {"source_labels": i["source_input_ids"]},
        ValueError,
        "source_labels: LlamaForCausalLM is not an encoder-decoder",
    ),
    ("states", lambda i: {"source_states": torch.zeros(3, 9, 8)}, TypeError, r"must be a flare\.SourceStates"),
]


@pytest.mark.parametrize(("change", "error", "message"), [s[1:] for s in SOURCES], ids=[s[0] for s in SOURCES])
def test_invalid_source_arguments_raise(change, error, message) -> None:
    inputs = tiny.batch("llama")
    with pytest.raises(error, match=message):
        fused()(**{**inputs, **change(inputs)})


LATENT = [
    ({"source_input_ids": torch.ones(3, 9, dtype=torch.long)}, ValueError, "source_input_ids: .*latent_dim=8"),
    ({"source_states": torch.zeros(3, 9, 7)}, ValueError, r"source_states has shape \(3, 9, 7\), .*\(B, m, 8\)"),
    ({"source_states": torch.zeros(9, 8)}, ValueError, r"source_states has shape \(9, 8\)"),
    ({"source_states": torch.zeros(3, 4, 8)}, ValueError, r"source_states has shape \(3, 4, 8\).*\(3, 9\)"),
    ({"source_states": torch.zeros(3, 9, 8).long()}, TypeError, "source_states must be a floating tensor .*int64"),
    ({"source_states": [0.0]}, TypeError, "source_states must be a floating tensor .*list"),
    ({"source_attention_mask": torch.ones(3, 4)}, ValueError, r"source_attention_mask is \(3, 4\)"),
    ({"source_states": None, "source_attention_mask": torch.ones(3, 9)}, ValueError, "without source_states"),
]


@pytest.mark.parametrize(("change", "error", "message"), LATENT)
def test_invalid_latent_source_arguments_raise(change, error, message) -> None:
    inputs = {**tiny.batch("llama", source=False), "source_states": torch.zeros(3, 9, 8)}
    model = fused(latent_dim=8)
    with pytest.raises(error, match=message):
        model(**{**inputs, **change})
    with pytest.raises(ValueError, match=r"encode_source: .*latent_dim=8"):
        model.encode_source(inputs["input_ids"])
    with pytest.raises(ValueError, match="'default' trains latent_proj"):
        model.add_weighted_adapter(["default"], [1.0], "both", combination_type="linear")


def test_source_states_that_do_not_match_raise() -> None:
    inputs = tiny.batch("llama")
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    model, released = fused(), fused(source_layer_offset=0)
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    with pytest.raises(ValueError, match="source_layer_offset=1, the adapter has 0"):
        released(**rest, source_states=states)
    with pytest.raises(ValueError, match="both given"):
        model(**inputs, source_states=states)
    with pytest.raises(ValueError, match=r"source of shape \(3, 9\).*\(2, 9\)"):
        model(**{k: v[:2] for k, v in rest.items()}, source_states=states)
    shallow = fused(layers_to_transform=[0], target_modules=["q_proj", "v_proj"])
    partial = shallow.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    with pytest.raises(ValueError, match=r"lacks .*position=2"):
        model(**rest, source_states=partial)


def test_encode_source_without_a_fusing_adapter_raises() -> None:
    ids = tiny.batch("llama")["source_input_ids"]
    with pytest.raises(ValueError, match="no active adapter of this model fuses"):
        fused(fusion=None).encode_source(ids)


def test_adapter_names_with_a_source_raise() -> None:
    model = fused().eval()
    model.add_adapter("second", flare.FlareConfig(r=4, task_type="CAUSAL_LM"))
    inputs = tiny.batch("llama")
    names = ["default", "second", "__base__"]
    with pytest.raises(ValueError, match=r"adapter_names .* cannot be combined with source_input_ids"):
        model(**inputs, adapter_names=names)
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    mixed = model(**rest, adapter_names=names).logits
    torch.testing.assert_close(mixed[0], model(**rest).logits[0], rtol=1e-5, atol=1e-5)


def test_adapters_with_different_source_settings_cannot_be_active_together() -> None:
    model = fused()
    model.add_adapter("second", flare.FlareConfig(r=4, source_padding="zero", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active together must share source_padding"):
        model(**tiny.batch("llama"))
