"""Generation with a source: cached steps match one forward, and a row does not depend on its batch.

The reference is one forward without a cache over the finished text, with the states of the source's finished text.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers

import flare
from flare.generation.caches import SourceCache

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # generate returns logits in float32; rotary angles are float32 too


def fused(family: str = "llama", *, base: dict | None = None, **overrides: Any) -> Any:
    base_model = tiny.model(family, **(base or {}))
    base_model.generation_config.eos_token_id = None
    embeddings = base_model.get_input_embeddings().weight
    embeddings.data[1] = embeddings.data[2]  # the pad token's embedding is zero, which would hide errors
    model = flare.fast_lora(base_model, **{"r": 5, "lora_alpha": 7, "source_padding": "zero", **overrides})
    tiny.randomize_lora(model)
    return model.double().eval()


def prompts(B: int = 3, m: int = 7, seed: int = 5, *, pads: bool = True) -> dict[str, torch.Tensor]:
    """Return left-padded prompts; the source is longer than the target in some rows, and shorter in others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for prefix, shift in (("", 0), ("source_", 2)):
        ids = torch.randint(3, tiny.VOCAB, (B, m), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(B if pads else 0):
            mask[row, : (row + shift) % 4] = 0
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 1), mask
    return inputs


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("source")}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return one row, without the columns in which both of its texts are padding."""
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    used = (alone["attention_mask"] + alone["source_attention_mask"])[0] > 0
    return {name: value[:, used] for name, value in alone.items()}


def source_text(model: Any, inputs: dict[str, torch.Tensor], new: int, ends: list[int]) -> torch.Tensor:
    """Return the frozen model's greedy continuation of the source, with its prompt, from transformers' generate."""
    with model.disable_adapter():
        text = model.generate(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            max_new_tokens=new,
            min_new_tokens=new if not ends else None,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=1,
        )
    short = inputs["source_input_ids"].shape[1] + new - text.shape[1]
    return torch.nn.functional.pad(text, (0, short), value=1)


def teacher_forced(model: Any, inputs: dict, sequences: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Return logits (B, new, V) of one forward without a cache; each new position fuses with the source's."""
    B, m = inputs["input_ids"].shape
    new = sequences.shape[1] - m
    text = source_text(model, inputs, new, ends)[:, : m + new - 1]
    mask = torch.cat([inputs["source_attention_mask"], torch.ones(B, new - 1, dtype=torch.long)], dim=1)
    states = model.encode_source(text, mask)
    held = {}
    for key, state in states.states.items():
        state = state.clone()
        for row in range(B):
            ended = [j for j in range(m, m + new - 1) if text[row, j] in ends]
            if ended:
                state[row, ended[0] + 1 :] = state[row, ended[0]]
        held[key] = state
    target_mask = torch.cat([inputs["attention_mask"], torch.ones(B, new - 1, dtype=torch.long)], dim=1)
    out = model(
        input_ids=sequences[:, :-1],
        attention_mask=target_mask,
        position_ids=(target_mask.cumsum(1) - 1).clamp(min=0),
        source_states=flare.SourceStates(held, states.offset, mask),
        use_cache=False,
    )
    return out.logits[:, m - 1 :]


def generated(model: Any, inputs: dict, new: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences, and the logits (B, new, V) of every step."""
    options = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": new, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, dim=1)


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
def test_other_families(name) -> None:
    """Their sliding windows are shorter than the text, in the target's cache and in the source's."""
    torch.manual_seed(0)
    values = {**tiny._DECODER, "head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    config = getattr(transformers, f"{name}Config")(**values)
    base = getattr(transformers, f"{name}ForCausalLM")(config)
    base.generation_config.eos_token_id = None
    model = flare.fast_lora(base, r=5, source_padding="zero")
    tiny.randomize_lora(model)
    model = model.double().eval()
    inputs = prompts(pads=name != "Gemma2")  # it only runs eager attention, which gives NaN on padding in float64
    sequences, logits = generated(model, inputs)
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, []).float(), rtol=0, atol=5e-6)


def ends_of(model: Any, inputs: dict, new: int) -> list[int]:
    """Return end tokens with which the source of row 0 ends early, that of row 1 later, and that of row 2 never."""
    text = source_text(model, inputs, new, [])[:, inputs["input_ids"].shape[1] :]
    ends = [int(text[0, 1]), int(text[1, 3])]
    stops = [[j for j in range(new) if row[j] in ends] for row in text.tolist()]
    assert stops[0][0] == 1 and stops[1][0] == 3 and not stops[2], "choose another seed"
    return ends


ENDING = 45  # a seed for prompts that ends_of accepts


@pytest.mark.parametrize("padded", [True, False])
def test_ended_source_stays_at_its_end_token(padded) -> None:
    model, inputs = fused(), prompts(seed=ENDING, pads=padded)
    ends = ends_of(model, inputs, 7)
    sequences, logits = generated(model, inputs, 7, eos_token_id=ends, min_new_tokens=7)
    assert sequences.shape[1] == 14
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, ends).float(), **TOLERANCE)
    going_on = teacher_forced(model, inputs, sequences, []).float()
    assert not torch.allclose(logits[0], going_on[0], atol=1e-4), "the end token made no difference"
    torch.testing.assert_close(logits[2], going_on[2], **TOLERANCE)


def test_no_source_pass_after_all_sources_have_ended() -> None:
    model, inputs = fused(), prompts(seed=ENDING)
    ends = source_text(model, inputs, 2, [])[:, -1].tolist()  # every row ends with its second token
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
def test_chunked_prefill(chunk) -> None:
    model, inputs = fused(), prompts()
    sequences, logits = generated(model, inputs)
    same, chunked = generated(model, inputs, prefill_chunk_size=chunk)
    assert torch.equal(same, sequences)
    torch.testing.assert_close(chunked, logits, **TOLERANCE)


def test_sampling_and_several_sequences() -> None:
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
def test_beams(sample) -> None:
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


def test_embeddings_instead_of_ids() -> None:
    model, inputs = fused(), prompts()
    sequences, _ = generated(model, inputs)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    new, _ = generated(model, {**rest, "inputs_embeds": embeds})
    assert torch.equal(new, sequences[:, 7:])


def test_prompts_of_the_collator() -> None:
    from two_streams import tokenizer

    rows = [{"input_ids": [5, 6, 7], "source_input_ids": [8, 9]}, {"input_ids": [9], "source_input_ids": [5, 6, 7, 8]}]
    batch = flare.FlareDataCollator(tokenizer(), layout="causal")(rows)
    model = fused()
    sequences = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, given in enumerate(rows):
        alone = flare.FlareDataCollator(tokenizer(), layout="causal")([given])
        own = model.generate(**alone, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(own[0, -4:], sequences[row, -4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype) -> None:
    """The first step's logits are close to float64's, and in float32 the text is equal."""
    model, inputs = fused(fusion="add"), prompts()
    want, logits = generated(model, inputs, 4)
    model = model.to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sequences, close = generated(model, inputs, 4)
        tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.05
        assert (close[:, 0] - logits[:, 0]).abs().max() < tolerance
        assert sequences.shape == want.shape
    if dtype == torch.float32:
        assert torch.equal(generated(model, inputs, 4)[0], want)


def test_a_compiled_model() -> None:
    model, inputs = fused(), prompts()
    want, logits = generated(model, inputs, 2)
    model.get_base_model().compile(backend="eager")
    sequences, compiled = generated(model, inputs, 2)
    assert torch.equal(sequences, want)
    torch.testing.assert_close(compiled, logits, **TOLERANCE)


def test_generation_continues_from_a_cache() -> None:
    model, inputs = fused(), prompts()
    sequences, _ = generated(model, inputs, 6)
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    assert isinstance(cache, SourceCache)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    go_on = {"input_ids": first.sequences, "attention_mask": mask, "max_new_tokens": 3, "pad_token_id": 1}
    assert torch.equal(model.generate(**go_on, past_key_values=cache, do_sample=False), sequences)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"past_key_values holds 10 positions and its source has been used for 12"):
        model(input_ids=sequences[:, -1:], past_key_values=cache)


# --- a row does not depend on its batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("fusion", ["add_relu", "add"])
def test_row_alone_matches_row_in_a_batch(padding, fusion) -> None:
    """generate uses source_padding="zero" by default, independent of the adapter's config."""
    model, inputs = fused(source_padding=padding, fusion=fusion), prompts()
    sequences, logits = generated(model, inputs)
    for row in range(3):
        alone, own = generated(model, row_of(inputs, row))
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(own[0], logits[row], **TOLERANCE)


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
        alone, own = generated(model, row_of(inputs, row))
        assert torch.equal(alone[0, -6:], sequences[row, -6:])
        torch.testing.assert_close(own[0], logits[row], **TOLERANCE)


def test_source_padding_keep_warns_once_if_a_source_is_shorter() -> None:
    model, inputs = fused(), prompts(seed=8)
    inputs["source_attention_mask"] = torch.ones_like(inputs["source_attention_mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, logits = generated(model, inputs, source_padding="keep")
    _, own = generated(model, row_of(inputs, 2), source_padding="keep")
    torch.testing.assert_close(own[0], logits[2], **TOLERANCE)
    with pytest.warns(UserWarning, match="source_padding='keep' and a source prompt that is shorter") as seen:
        _, kept_logits = generated(model, prompts(), source_padding="keep")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated(model, prompts(), source_padding="keep")
    assert not torch.allclose(kept_logits, generated(model, prompts())[1], atol=1e-4)


# --- what else adapters can do ----------------------------------------------------------------------------------------


def test_several_adapters() -> None:
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
        fused_off = generated(model, prompts())
    with lora.disable_adapter():
        torch.testing.assert_close(fused_off[1], generated(lora, inputs)[1], **TOLERANCE)


def test_generation_leaves_no_hooks_or_state(tmp_path) -> None:
    model, inputs = fused(), prompts()
    want = model(**inputs).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    generated(model, inputs)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, want, rtol=0, atol=0)


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
    given = {"source_states": longer}
    if masked:
        given["source_attention_mask"] = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    want = model(
        input_ids=sequences[:, :-1],
        attention_mask=target_mask,
        position_ids=(target_mask.cumsum(1) - 1).clamp(min=0),
        **given,
    ).logits[:, 6:]
    torch.testing.assert_close(logits, want.float(), **TOLERANCE)


# --- errors -----------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"use_cache": False}, "use_cache=False cannot be combined with a source"),
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
def test_options_that_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused().generate(**prompts(), **{"max_new_tokens": 2, "pad_token_id": 1, **options})


def test_generation_config_as_positional_argument() -> None:
    model, inputs = fused(), prompts()
    own = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=1, do_sample=False)
    ids = inputs.pop("input_ids")
    sequences, _ = generated(model, {"input_ids": ids, **inputs}, 3)
    assert torch.equal(model.generate(ids, own, **inputs), sequences)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, transformers.GenerationConfig(use_cache=False), **inputs)


def test_assistant_is_refused_and_dynamic_cache_implementation_is_accepted() -> None:
    model = fused()
    with pytest.raises(ValueError, match="assistant_model=LlamaForCausalLM"):
        model.generate(**prompts(), assistant_model=tiny.model("llama"), max_new_tokens=2)
    want, _ = generated(model, prompts())
    assert torch.equal(generated(model, prompts(), cache_implementation="dynamic", past_key_values=None)[0], want)


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
def test_source_arguments(change, message) -> None:
    inputs = prompts()
    with pytest.raises(ValueError, match=message):
        fused().generate(**{**inputs, **change(inputs)}, max_new_tokens=2)


def test_states_of_a_prompt_cannot_be_continued() -> None:
    model, inputs = fused(), prompts()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    with pytest.raises(ValueError, match="source_states: these belong to the prompt only"):
        model.generate(**plain(inputs), source_states=states, max_new_tokens=2)


def test_release_alignment_needs_a_length() -> None:
    with pytest.raises(ValueError, match="source_alignment='release' needs max_new_tokens"):
        fused().generate(**prompts(), source_alignment="release")


@pytest.mark.parametrize("fusion", ["cross_attention", "matmul"])
def test_fusions_that_mix_positions(fusion) -> None:
    model = fused(fusion=fusion)
    with pytest.raises(ValueError, match=f"fusion='{fusion}' .* at all positions of the text"):
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
