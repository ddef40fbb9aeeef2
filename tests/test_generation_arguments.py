"""Arguments of generate with a source: refused options, source arguments, and generation configs."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from generating import fused, generated, plain, prompts

REFUSED = [
    ({"use_cache": False}, "use_cache=False cannot be combined with a source: .*; pass use_cache=True$"),
    ({"cache_implementation": "static"}, "cache_implementation=static"),
    ({"cache_implementation": "quantized"}, "cache_implementation=quantized"),
    ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
    ({"dola_layers": "high"}, "dola_layers=high"),
    ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups=2"),
    ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    ({"custom_generate": "somewhere"}, "custom_generate=somewhere"),
    ({"token_healing": True}, "token_healing=True"),
    ({"past_key_values": transformers.DynamicCache()}, "past_key_values=DynamicCache"),
    ({"generation_config": transformers.GenerationConfig(use_cache=False)}, "use_cache=False"),
    ({"source_alignment": "late"}, "source_alignment='late' is not accepted; one of: 'training', 'release'"),
    ({"source_padding": "drop"}, "source_padding='drop' is not accepted; one of: keep, zero"),
    ({"source_alignment": "release", "prefill_chunk_size": 2}, "prefill_chunk_size"),
    ({"source_alignment": "release", "source_padding": "zero"}, "source_padding='zero'"),
    (
        {"source_labels": torch.ones(3, 7, dtype=torch.long)},
        "source_labels: LlamaForCausalLM is not an encoder-decoder",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_options_that_cannot_be_combined_with_a_source_raise(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused().generate(**prompts(), **{"max_new_tokens": 2, "pad_token_id": 1, **options})


def test_generation_config_can_be_a_positional_argument() -> None:
    model, inputs = fused(), prompts()
    config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=1, do_sample=False)
    ids = inputs.pop("input_ids")
    sequences, _ = generated(model, {"input_ids": ids, **inputs}, 3)
    assert torch.equal(model.generate(ids, config, **inputs), sequences)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, transformers.GenerationConfig(use_cache=False), **inputs)


def test_assistant_is_refused_and_dynamic_cache_implementation_is_accepted() -> None:
    model = fused()
    with pytest.raises(ValueError, match="assistant_model=LlamaForCausalLM"):
        model.generate(**prompts(), assistant_model=tiny.model("llama"), max_new_tokens=2)
    expected, _ = generated(model, prompts())
    assert torch.equal(generated(model, prompts(), cache_implementation="dynamic", past_key_values=None)[0], expected)


SOURCES = [
    (lambda i: {"source_input_ids": i["source_input_ids"][:, 1:]}, r"source_input_ids has shape \(3, 6\).*\(3, 7\)"),
    (
        lambda i: {"source_attention_mask": i["source_attention_mask"].flip(1)},
        "source_attention_mask ends in padding.*on the left",
    ),
    (lambda i: {"input_ids": None}, "a source needs the target's input_ids"),
    (lambda i: {"source_input_ids": None}, "source_attention_mask was given without source_input_ids"),
]


@pytest.mark.parametrize(("change", "message"), SOURCES)
def test_invalid_source_arguments_raise(change, message) -> None:
    inputs = prompts()
    with pytest.raises(ValueError, match=message):
        fused().generate(**{**inputs, **change(inputs)}, max_new_tokens=2)


def test_source_states_of_a_prompt_raise() -> None:
    model, inputs = fused(), prompts()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    with pytest.raises(ValueError, match="source_states: these belong to the prompt only"):
        model.generate(**plain(inputs), source_states=states, max_new_tokens=2)


def test_release_alignment_needs_a_length() -> None:
    with pytest.raises(ValueError, match="source_alignment='release' needs max_new_tokens"):
        fused().generate(**prompts(), source_alignment="release")


@pytest.mark.parametrize("fusion", ["cross_attention", "matmul"])
def test_fusions_that_mix_positions_need_the_releases_alignment(fusion) -> None:
    model = fused(fusion=fusion)
    with pytest.raises(ValueError, match=f"fusion='{fusion}' .* all positions of the text"):
        model.generate(**prompts(), max_new_tokens=2)
    out = model.generate(**prompts(), max_new_tokens=2, source_alignment="release", pad_token_id=1)
    assert out.shape[1] == 9


def test_train_mode_with_checkpointing_is_refused() -> None:
    model = fused()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.generate(**prompts(), max_new_tokens=2)
    assert model.eval().generate(**prompts(), max_new_tokens=2, pad_token_id=1).shape == (3, 9)
