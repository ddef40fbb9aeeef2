"""Test generation with a source: steps with a KV cache match one forward, and a row does not depend on its batch.

The reference is one forward without a KV cache on the generated text, fused with the source's generated text.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import generating
import peft
import pytest
import tiny
import torch
import transformers
from generating import ENDING, TOLERANCE, ends_of, fused, generated, plain, prompts, row_of, source_text, teacher_forced

import flare
from flare.generation.caches import SourceCache

# --- cached steps match one forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["add_relu", "mul", "add", "mul_relu"])
@pytest.mark.parametrize("offset", [1, 0])
def test_cached_steps_match_one_forward(fusion, offset) -> None:
    model = fused(fusion=fusion, source_layer_offset=offset)
    inputs = prompts()
    sequences, logits = generated(model, inputs)
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, []).float(), **TOLERANCE)
    without = model(input_ids=sequences[:, :-1]).logits[:, -1].float()
    assert not torch.allclose(logits[:, -1], without, atol=1e-3), "the source made no difference"


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2", "Qwen2"])
def test_models_with_sliding_windows_match_one_forward(name) -> None:
    """The sliding windows of both KV caches, the target's and the source's, are shorter than the text."""
    torch.manual_seed(0)
    values = {**tiny._DECODER, "head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    config = getattr(transformers, f"{name}Config")(**values)
    base = getattr(transformers, f"{name}ForCausalLM")(config)
    base.generation_config.eos_token_id = None
    model = flare.fast_lora(base, r=5, source_padding="zero")
    tiny.randomize_lora(model)
    model = model.double().eval()
    inputs = prompts(pads=name != "Gemma2")  # Gemma 2 only runs eager attention, which gives NaN on padding
    sequences, logits = generated(model, inputs)
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, []).float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("padded", [True, False])
def test_ended_source_stays_at_its_end_token(padded) -> None:
    model, inputs = fused(), prompts(seed=ENDING, pads=padded)
    ends = ends_of(model, inputs, 7)
    sequences, logits = generated(model, inputs, 7, eos_token_id=ends, min_new_tokens=7)
    assert sequences.shape[1] == 14
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, ends).float(), **TOLERANCE)
    without_end = teacher_forced(model, inputs, sequences, []).float()
    assert not torch.allclose(logits[0], without_end[0], atol=1e-4), "the end token made no difference"
    torch.testing.assert_close(logits[2], without_end[2], **TOLERANCE)


def test_no_source_pass_after_all_sources_have_ended() -> None:
    model, inputs = fused(), prompts(seed=ENDING)
    ends = source_text(model, inputs, 2, [])[:, -1].tolist()  # every source ends with its second new token
    passes, backbone = [], model.get_base_model().model.layers[0]

    def count(module: Any, args: Any) -> None:
        passes.append(args[0].shape[1])

    handle = backbone.register_forward_pre_hook(count)
    sequences, logits = generated(model, inputs, 6, eos_token_id=ends, min_new_tokens=6)
    handle.remove()
    source_passes = len(passes) - 6
    assert source_passes <= 3, "the prompt and two new tokens"
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, ends).float(), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunked_prefill_gives_the_same_text_and_logits(chunk) -> None:
    model, inputs = fused(), prompts()
    sequences, logits = generated(model, inputs)
    same, chunked = generated(model, inputs, prefill_chunk_size=chunk)
    assert torch.equal(same, sequences)
    torch.testing.assert_close(chunked, logits, **TOLERANCE)


def test_sampling_several_sequences_matches_one_forward() -> None:
    model, inputs = fused(), prompts()
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    torch.manual_seed(3)
    sequences, logits = generated(model, inputs, **options)
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in inputs.items()}
    torch.testing.assert_close(logits, teacher_forced(model, repeated, sequences, []).float(), **TOLERANCE)
    assert len({tuple(row) for row in sequences.tolist()}) > 3, "nothing was sampled"
    torch.manual_seed(3)
    assert torch.equal(generated(model, inputs, **options)[0], sequences)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_of_beams_match_one_forward(sample) -> None:
    model, inputs = fused(), prompts()
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0, "do_sample": sample, "top_k": 0}
    out = model.generate(
        **inputs, **options, max_new_tokens=6, pad_token_id=1, return_dict_in_generate=True, output_scores=True
    )
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    logits = teacher_forced(model, repeated, out.sequences, [])
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, 7:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum(1), rtol=0, atol=1e-5)
    parents = out.beam_indices.view(3, 2, -1)
    assert any(len(set(row.tolist())) > 1 for row in parents.flatten(0, 1)), "no beam was reordered"


def test_embeddings_instead_of_ids_give_the_same_text() -> None:
    model, inputs = fused(), prompts()
    sequences, _ = generated(model, inputs)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    new, _ = generated(model, {**rest, "inputs_embeds": embeds})
    assert torch.equal(new, sequences[:, 7:])


def test_prompts_of_the_collator_give_the_same_text_alone_and_in_a_batch() -> None:
    from two_streams import tokenizer

    rows = [{"input_ids": [5, 6, 7], "source_input_ids": [8, 9]}, {"input_ids": [9], "source_input_ids": [5, 6, 7, 8]}]
    batch = flare.FlareDataCollator(tokenizer(), layout="causal")(rows)
    model = fused()
    sequences = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, single in enumerate(rows):
        alone = flare.FlareDataCollator(tokenizer(), layout="causal")([single])
        single_sequences = model.generate(**alone, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(single_sequences[0, -4:], sequences[row, -4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast_are_close_to_float64(dtype) -> None:
    """The logits of the first step are close to the float64 logits, and in float32 the text is equal too."""
    model, inputs = fused(fusion="add"), prompts()
    expected, logits = generated(model, inputs, 4)
    model = model.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sequences, close = generated(model, inputs, 4)
        tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.05
        assert (close[:, 0] - logits[:, 0]).abs().max() < tolerance
        assert sequences.shape == expected.shape
    if dtype == torch.float32:
        assert torch.equal(generated(model, inputs, 4)[0], expected)


def test_a_compiled_model_generates_the_same_text() -> None:
    model, inputs = fused(), prompts()
    expected, logits = generated(model, inputs, 2)
    model.get_base_model().compile(backend="eager")
    sequences, compiled = generated(model, inputs, 2)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(compiled, logits, **TOLERANCE)


def test_generation_continues_from_a_cache() -> None:
    model, inputs = fused(), prompts()
    sequences, _ = generated(model, inputs, 6)
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    assert isinstance(cache, SourceCache)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    continuation = {"input_ids": first.sequences, "attention_mask": mask, "max_new_tokens": 3, "pad_token_id": 1}
    assert torch.equal(model.generate(**continuation, past_key_values=cache, do_sample=False), sequences)
    with pytest.raises(ValueError, match="needs the target's token ids or embeddings"):
        model(past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"past_key_values holds 10 positions, but its source has been used for 12"):
        model(input_ids=sequences[:, -1:], past_key_values=cache)


# --- a row does not depend on its batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("fusion", ["add_relu", "add"])
def test_row_alone_matches_row_in_a_batch(padding, fusion) -> None:
    """generate uses source_padding="zero" by default, independent of the adapter's config."""
    model, inputs = fused(source_padding=padding, fusion=fusion), prompts()
    sequences, logits = generated(model, inputs)
    for row in range(3):
        alone, row_logits = generated(model, row_of(inputs, row))
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(row_logits[0], logits[row], **TOLERANCE)


def test_absolute_positions_are_counted_from_a_rows_first_token() -> None:
    torch.manual_seed(0)
    sizes = {name: tiny._DECODER[name] for name in tiny._DECODER if name != "num_key_value_heads"}
    base = transformers.BioGptForCausalLM(transformers.BioGptConfig(**sizes))
    base.generation_config.eos_token_id = None
    model = flare.fast_lora(base, r=5)
    tiny.randomize_lora(model)
    model, inputs = model.double().eval(), prompts()
    sequences, logits = generated(model, inputs)
    for row in range(3):
        alone, row_logits = generated(model, row_of(inputs, row))
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(row_logits[0], logits[row], **TOLERANCE)


def test_source_padding_keep_warns_once_if_a_source_is_shorter() -> None:
    model, inputs = fused(), prompts(seed=8)
    inputs["source_attention_mask"] = torch.ones_like(inputs["source_attention_mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, logits = generated(model, inputs, source_padding="keep")
    _, row_logits = generated(model, row_of(inputs, 2), source_padding="keep")
    torch.testing.assert_close(row_logits[0], logits[2], **TOLERANCE)
    with pytest.warns(UserWarning, match="source_padding='keep', and a source prompt is shorter") as seen:
        _, keep_logits = generated(model, prompts(), source_padding="keep")
    assert seen[0].filename == generating.__file__, "the warning points at the caller of generate"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated(model, prompts(), source_padding="keep")
    assert not torch.allclose(keep_logits, generated(model, prompts())[1], atol=1e-4)


# --- several adapters, and no source ----------------------------------------------------------------------------------


def test_each_of_two_adapters_and_both_together_match_one_forward() -> None:
    model, inputs = fused(), prompts()
    model.add_adapter("second", flare.FlareConfig(r=4, fusion="mul", source_padding="zero", task_type="CAUSAL_LM"))
    tiny.randomize_lora(model, seed=4)
    model.double()
    both = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        sequences, logits = generated(model, inputs)
        torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, []).float(), **TOLERANCE)
        both[name] = logits
    assert not torch.allclose(both["default"], both["second"], atol=1e-3)
    model.base_model.set_adapter(["default", "second"])
    sequences, logits = generated(model, inputs)
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, []).float(), **TOLERANCE)


def test_changing_the_adapter_between_two_steps_is_an_error() -> None:
    model, inputs = fused(), prompts()
    out = model.generate(**inputs, max_new_tokens=3, pad_token_id=1, return_dict_in_generate=True)
    model.add_adapter("second", flare.FlareConfig(r=4, task_type="CAUSAL_LM"))
    model.double().set_adapter("second")
    with pytest.raises(ValueError, match="other adapters were active when this generation began"):
        model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values)


def test_generation_without_a_source_matches_peft(tmp_path) -> None:
    model, inputs = fused(), plain(prompts())
    model.save_pretrained(tmp_path)
    stock = peft.LoraConfig.from_pretrained(tmp_path)
    assert stock.peft_type == "FLARE"
    base = tiny.model("llama").double().eval()
    base.generation_config.eos_token_id = None
    base.get_input_embeddings().weight.data[1] = base.get_input_embeddings().weight.data[2]
    lora = peft.get_peft_model(
        base, peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    lora.load_state_dict(model.state_dict(), strict=True)
    lora.eval()
    torch.testing.assert_close(generated(model, inputs)[1], generated(lora, inputs)[1], **TOLERANCE)
    with model.disable_adapter():
        disabled = generated(model, prompts())
    with lora.disable_adapter():
        torch.testing.assert_close(disabled[1], generated(lora, inputs)[1], **TOLERANCE)


def test_generation_leaves_no_hooks_or_state(tmp_path) -> None:
    model, inputs = fused(), prompts()
    expected = model(**inputs).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    generated(model, inputs)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected, rtol=0, atol=0)


# --- FLARE MT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alignment", ["training", "release"])
def test_new_tokens_use_the_last_latent_state(masked, alignment) -> None:
    model, inputs = fused(latent_dim=6), plain(prompts())
    latent = torch.randn(3, 7, 6, dtype=torch.float64)
    source = {"source_states": latent}
    last = torch.full((3,), 6)
    if masked:
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[0, 5:] = mask[1, :2] = 0
        source["source_attention_mask"], last[0] = mask, 4
    sequences, logits = generated(model, {**inputs, **source}, source_alignment=alignment)
    longer = torch.cat([latent, latent[torch.arange(3), last][:, None].expand(-1, 5, -1)], dim=1)
    target_mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    longer_source = {"source_states": longer}
    if masked:
        longer_source["source_attention_mask"] = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    expected = model(
        input_ids=sequences[:, :-1],
        attention_mask=target_mask,
        position_ids=(target_mask.cumsum(1) - 1).clamp(min=0),
        **longer_source,
    ).logits[:, 6:]
    torch.testing.assert_close(logits, expected.float(), **TOLERANCE)
