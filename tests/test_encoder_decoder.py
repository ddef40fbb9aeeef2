"""Test encoder-decoders: one frozen pass gives the source states of both stacks (encoder and decoder).

The encoder fuses with every source. The decoder fuses only if the batch has source_labels or source_decoder_input_ids.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from encoder_decoders import (
    START,
    TOLERANCE,
    add_relu,
    batch,
    by_hand,
    frozen_text,
    fused,
    generated,
    mt5,
    shifted,
    states_of,
    step,
    teacher_forced,
    without,
)
from torch import nn

import flare

# --- compared with the formula ----------------------------------------------------------------------------------------


def assert_same_step(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    assert actual[2].keys() == expected[2].keys() and len(actual[2]) > 10
    for name, grad in expected[2].items():
        torch.testing.assert_close(actual[2][name], grad, msg=name, rtol=1e-9, atol=1e-12)


PHI = {"add_relu": add_relu, "mul": torch.mul, "add": torch.add}


@pytest.mark.parametrize("fusion", PHI)
@pytest.mark.parametrize("offset", [1, 0])
@pytest.mark.parametrize("decoder", [True, False])
def test_logits_and_gradients_equal_the_formula(fusion, offset, decoder) -> None:
    """With source_labels, both stacks fuse. Without them, the decoder is plain LoRA."""
    model = fused(fusion=fusion, source_layer_offset=offset)
    inputs = batch()
    states = states_of(model, inputs, offset)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    with by_hand(model, states if decoder else {"encoder": states["encoder"]}, PHI[fusion]):
        expected = step(model, plain)
    actual = step(model, inputs if decoder else without(inputs, "source_labels"))
    assert_same_step(actual, expected)
    other = step(model, without(inputs, "source_labels") if decoder else inputs)
    assert not torch.allclose(other[1], expected[1], atol=1e-3)


def test_eager_attention_and_sdpa_agree() -> None:
    """The results agree only to float32's precision, because mT5's eager attention computes its softmax in float32."""
    steps = {}
    for name in ("eager", "sdpa"):
        model = fused(base={"attn_implementation": name})
        assert model.get_base_model().config._attn_implementation == name
        steps[name] = step(model, batch())
    torch.testing.assert_close(steps["sdpa"][1], steps["eager"][1], rtol=1e-5, atol=1e-6)
    for name, grad in steps["eager"][2].items():
        torch.testing.assert_close(steps["sdpa"][2][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_decoders_source_can_be_ids_or_labels() -> None:
    model, inputs = fused(), batch()
    expected = step(model, inputs)
    ids = shifted(inputs["source_labels"])
    assert_same_step(step(model, {**without(inputs, "source_labels"), "source_decoder_input_ids": ids}), expected)
    # ids take precedence over labels, as in transformers
    assert_same_step(
        step(model, {**inputs, "source_labels": inputs["source_labels"].flip(0), "source_decoder_input_ids": ids}),
        expected,
    )


def test_source_padding_zero_acts_in_both_stacks() -> None:
    """S is zero at padding only, and not at the start token, whether the decoder's source is given as labels or ids."""
    model, inputs = fused(source_padding="zero"), batch()
    states = states_of(model, inputs, 1)
    real = torch.ones_like(inputs["source_labels"])
    real[:, 1:] = (inputs["source_labels"][:, :-1] != -100).long()
    assert (real == 0).any() and (inputs["source_attention_mask"] == 0).any()
    masks = {"encoder": inputs["source_attention_mask"], "decoder": real}
    zeroed = {name: [x * masks[name][..., None] for x in of_stack] for name, of_stack in states.items()}
    with by_hand(model, zeroed, add_relu):
        expected = step(model, {name: value for name, value in inputs.items() if not name.startswith("source")})
    assert_same_step(step(model, inputs), expected)
    ids = shifted(inputs["source_labels"])
    assert_same_step(step(model, {**without(inputs, "source_labels"), "source_decoder_input_ids": ids}), expected)


@pytest.mark.parametrize("decoder", [True, False])
def test_one_frozen_pass_ends_after_the_last_required_state(decoder) -> None:
    model, inputs = fused(source_layer_offset=0), batch()
    base, runs = model.get_base_model(), []
    for name in ("encoder", "decoder"):
        for index, block in enumerate(getattr(base, name).block):
            block.register_forward_hook(lambda *_, at=(name, index): runs.append(at))
    model(**(inputs if decoder else without(inputs, "source_labels")))
    encoder, target_decoder = [("encoder", i) for i in range(tiny.LAYERS)], [("decoder", 0), ("decoder", 1)]
    source = [*encoder, ("decoder", 0)] if decoder else encoder[:-1]
    assert runs == [*source, *encoder, *target_decoder]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_step(use_reentrant) -> None:
    model, inputs = fused(), batch()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = step(model, inputs)
    torch.testing.assert_close(actual[0], expected[0])
    for name, grad in expected[2].items():
        torch.testing.assert_close(actual[2][name], grad, msg=name)


def test_report_lists_both_stacks_and_a_saved_model_loads(tmp_path) -> None:
    model, inputs = fused(), batch()
    report = model.fast_lora_report()
    assert {row.module for row in report.fused} == {
        f"{stack}.block.{i}.layer.0.SelfAttention.{name}"
        for stack, blocks in (("encoder", tiny.LAYERS), ("decoder", 2))
        for i in range(blocks)
        for name in ("q", "v")
    }
    assert {row.reason for row in report.declined} == {"cross-attention does not fuse"}
    model.eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mt5().double(), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_t5_bart_and_mbart_fuse_and_generate(name) -> None:
    torch.manual_seed(0)
    if name == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    else:
        sizes = {"d_model": 16, "dropout": 0.0, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0}
        for stack in ("encoder", "decoder"):
            sizes |= {f"{stack}_layers": 2, f"{stack}_attention_heads": 2, f"{stack}_ffn_dim": 16}
    config = getattr(transformers, f"{name}Config")(vocab_size=tiny.VOCAB, decoder_start_token_id=2, **sizes)
    base = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    base.generation_config.eos_token_id = base.generation_config.forced_eos_token_id = None
    model = flare.fast_lora(base, r=4)
    tiny.randomize_lora(model)
    model = model.double().eval()
    inputs = batch()
    encoder = model(**without(inputs, "source_labels")).logits
    assert not torch.allclose(model(**inputs).logits, encoder, atol=1e-5)
    text = without(inputs, "labels", "source_labels")
    for source in ({}, {"source_decoder_input_ids": torch.full((3, 1), 2)}):
        sequences, logits = generated(model, {**text, **source}, 4)
        source_text = frozen_text(model, text, 4, []) if source else None
        torch.testing.assert_close(
            logits, teacher_forced(model, text, sequences, source_text).float(), rtol=0, atol=5e-6
        )


# --- arguments --------------------------------------------------------------------------------------------------------


def test_a_decoder_source_of_wrong_length_or_type_raises() -> None:
    model, inputs = fused(), batch()
    longer = nn.functional.pad(inputs["source_labels"], (0, 1), value=-100)
    with pytest.raises(
        ValueError, match=r"source_labels has shape \(3, 6\), the target's labels or decoder_input_ids \(3, 5\)"
    ):
        model(**{**inputs, "source_labels": longer})
    with pytest.raises(ValueError, match=r"source_decoder_input_ids has shape \(3, 4\), the target's labels"):
        model(**without(inputs, "source_labels"), source_decoder_input_ids=inputs["source_labels"][:, 1:])
    with pytest.raises(TypeError, match=r"source_labels must be an integer tensor \(B, u\), got list"):
        model(**{**inputs, "source_labels": inputs["source_labels"].tolist()})
    with_ids = {**without(inputs, "labels"), "decoder_input_ids": shifted(inputs["labels"])}
    torch.testing.assert_close(model(**with_ids).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="source_labels was given without source_input_ids"):
        model(**without(inputs, "source_input_ids", "source_attention_mask"))


def test_encode_source_returns_the_encoders_states() -> None:
    model, inputs = fused(), batch()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    assert {key.stack for key in states.states} == {"encoder.block"} and len(states) == tiny.LAYERS
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    expected = model(**without(inputs, "source_labels")).logits
    torch.testing.assert_close(model(**plain, source_states=states).logits, expected)
    with pytest.raises(ValueError, match=r"source_labels and source_states were both given.*the encoder's"):
        model(**plain, source_states=states, source_labels=inputs["source_labels"])


def test_model_with_adapters_only_in_the_decoder_needs_a_decoder_source() -> None:
    model = fused(target_modules=r"decoder\..*\.SelfAttention\.(q|v)")
    inputs = batch()
    with pytest.raises(ValueError, match="fuse in the decoder only, which reads source_labels"):
        model(**without(inputs, "source_labels"))
    with pytest.raises(ValueError, match="encode_source: the active adapters fuse in the decoder only"):
        model.encode_source(inputs["source_input_ids"])
    states = states_of(model, inputs, 1)
    with by_hand(model, {"decoder": states["decoder"]}, add_relu):
        expected = step(model, {name: value for name, value in inputs.items() if not name.startswith("source")})
    actual = step(model, inputs)
    torch.testing.assert_close(actual[1], expected[1])
    model.eval()
    text = without(inputs, "labels", "source_labels")
    sequences, logits = generated(model, {**text, "source_decoder_input_ids": torch.full((3, 1), START)}, 4)
    source_text = frozen_text(model, text, 4, [])
    torch.testing.assert_close(logits, teacher_forced(model, text, sequences, source_text).float(), **TOLERANCE)


def test_latent_states_are_read_by_the_encoder() -> None:
    model, inputs = fused(latent_dim=6).eval(), batch()
    assert {row.reason for row in model.fast_lora_report().declined} == {
        "cross-attention does not fuse",
        "with latent_dim, only an encoder-decoder's encoder fuses, because source_states are for the encoder",
    }
    latent = torch.randn(3, 7, 6, dtype=torch.float64)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    fused_loss = model(**plain, source_states=latent).loss
    assert not torch.allclose(fused_loss, model(**plain).loss)
    text = without(plain, "labels")
    sequences, logits = generated(model, {**text, "source_states": latent}, 4)
    expected = model(**text, decoder_input_ids=sequences[:, :-1], source_states=latent).logits
    torch.testing.assert_close(logits, expected.float(), **TOLERANCE)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"source_labels: an adapter with latent_dim=6 .* reads no source text"):
            call(**text, source_states=latent, source_labels=inputs["source_labels"])
