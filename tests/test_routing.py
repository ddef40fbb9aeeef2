"""Which module is which, on architectures that flare was not written for: they fuse, or say why not before training."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import flare
from flare.routing import ModelMap

_SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def test_paths_of_a_block() -> None:
    found = ModelMap.of(tiny.model("llama"))
    assert found.stacks == {"model.layers": tiny.LAYERS}
    site = found.sites["model.layers.1.self_attn.v_proj"]
    assert (site.stack, site.block, site.attention, site.owner) == (
        "model.layers",
        1,
        "model.layers.1.self_attn",
        "model",
    )
    assert found.default_targets() == {"q_proj", "v_proj"}
    assert "model.layers.0.mlp.up_proj" not in found.sites


def test_cross_attention_and_both_stacks_of_an_encoder_decoder() -> None:
    found = ModelMap.of(tiny.model("mt5"))
    assert found.stacks == {"encoder.block": tiny.LAYERS, "decoder.block": 2}
    assert found.sites["decoder.block.0.layer.1.EncDecAttention.q"].is_cross_attention
    assert not any("EncDecAttention" in path for path in found.query_and_value)


def test_blocks_that_share_weights_are_refused() -> None:
    albert = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**_SIZE, embedding_size=8))
    with pytest.raises(ValueError, match=r"AlbertForSequenceClassification.*names 3 blocks.*holds 1"):
        flare.fast_lora(albert)


def test_a_stack_that_takes_no_keyword_arguments_is_refused() -> None:
    deberta = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**_SIZE))
    with pytest.raises(ValueError, match=r"DebertaV2.*cannot reach its attention.*no further keyword arguments"):
        flare.fast_lora(deberta)
    assert not any("lora" in name for name, _ in deberta.named_modules())


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Roberta", "DistilBert"])
def test_other_families(name) -> None:
    """The source reaches every fusing layer and moves the output."""
    sizes = dict(_SIZE)
    if name == "DistilBert":
        sizes = {
            "vocab_size": 32,
            "dim": 16,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 16,
            "max_position_embeddings": 32,
        }
    elif name in ("Qwen3", "Mistral"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = flare.fast_lora(getattr(transformers, f"{name}ForSequenceClassification")(config), r=4).eval()
    model.get_base_model().config.pad_token_id = 1
    tiny.randomize_lora(model)
    assert len(model.fast_lora_report().fused) == 6
    ids = torch.randint(2, 32, (2, 7))
    mask = torch.ones_like(ids)
    plain = model(input_ids=ids, attention_mask=mask).logits
    fused = model(input_ids=ids, attention_mask=mask, source_input_ids=ids.flip(1), source_attention_mask=mask).logits
    assert not torch.allclose(plain, fused, atol=1e-5)


def test_source_arguments_of_the_wrong_form() -> None:
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
