"""Test the checks of source arguments, and ModelMap, which finds the blocks and projections of a model."""

from __future__ import annotations

import pytest
import tiny
import torch

import flare
from flare.tuner.routing import ModelMap


def test_the_map_gives_block_and_attention_of_each_projection() -> None:
    model_map = ModelMap.of(tiny.model("llama"))
    assert model_map.stacks == {"model.layers": tiny.LAYERS}
    place = model_map.places["model.layers.1.self_attn.v_proj"]
    assert (place.stack, place.block, place.attention, place.owner) == (
        "model.layers",
        1,
        "model.layers.1.self_attn",
        "model",
    )
    assert model_map.default_targets() == {"q_proj", "v_proj"}
    assert "model.layers.0.mlp.up_proj" not in model_map.places


def test_the_map_marks_cross_attention_and_has_both_stacks_of_an_encoder_decoder() -> None:
    model_map = ModelMap.of(tiny.model("mt5"))
    assert model_map.stacks == {"encoder.block": tiny.LAYERS, "decoder.block": 2}
    assert model_map.places["decoder.block.0.layer.1.EncDecAttention.q"].is_cross_attention
    assert not any("EncDecAttention" in path for path in model_map.query_and_value)


def test_a_vision_tower_is_left_out() -> None:
    """Its projections have the same names. It does not run on text, so its source states would be missing."""
    base = tiny.multimodal()
    assert ModelMap.of(base).stacks == {"model.language_model.layers": tiny.LAYERS}
    vision = base.model.vision_tower
    assert list(ModelMap.of(vision).stacks) == ["encoder.layers"]  # a model that reads no text keeps its blocks
    model = flare.fast_lora(base, r=4)
    report = model.fast_lora_report()
    assert len(report.fused) == 2 * tiny.LAYERS and all("language_model" in row.module for row in report.fused)
    assert {row.reason for row in report if "vision_tower" in row.module} == {
        "it is in a part of the model that does not read text"
    }
    tiny.randomize_lora(model)
    inputs = tiny.batch("gemma3")
    loss = model(**inputs).loss
    other = {**inputs, "source_input_ids": inputs["source_input_ids"].roll(1, 1)}
    assert loss.isfinite() and not torch.equal(model(**other).loss, loss)


def test_source_arguments_of_wrong_shape_or_type_raise() -> None:
    model = flare.fast_lora(tiny.model("bert"), r=4)
    inputs = tiny.batch("bert")
    with pytest.raises(ValueError, match=r"source_token_type_ids has shape \(3, 4\)"):
        model(**inputs, source_token_type_ids=torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="source_input_ids must be an integer tensor"):
        model(**{**inputs, "source_input_ids": inputs["source_input_ids"].bool()})
    rest = {k: v for k, v in inputs.items() if not k.startswith("source")}
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    with pytest.raises(ValueError, match="source_attention_mask and source_states were both given"):
        model(**rest, source_states=states, source_attention_mask=inputs["source_attention_mask"])
    wide = flare.SourceStates({k: x.repeat(1, 1, 2) for k, x in states.states.items()}, states.offset)
    with pytest.raises(ValueError, match="source_states are 64 wide, this model's hidden state 32"):
        model(**rest, source_states=wide)
