"""Test generation of encoder-decoders in which the encoder fuses, or both stacks fuse.

The reference is one forward without a KV cache over the finished text.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from encoder_decoders import (
    START,
    TOLERANCE,
    add_relu,
    batch,
    by_hand,
    frozen_text,
    fused,
    generated,
    teacher_forced,
    without,
)
from torch import nn


def texts(**options: Any) -> dict[str, torch.Tensor]:
    return without(batch(**options), "labels", "source_labels")


@pytest.mark.parametrize("fusion", ["add_relu", "mul", "cross_attention"])
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_the_encoder_fuses_in_generate(fusion, padding) -> None:
    model, inputs = fused(fusion=fusion, source_padding=padding).eval(), texts()
    sequences, logits = generated(model, inputs)
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, None).float(), **TOLERANCE)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    assert not torch.allclose(generated(model, plain)[1][:, 0], logits[:, 0], atol=1e-4)


@pytest.mark.parametrize("fusion", ["add_relu", "mul"])
@pytest.mark.parametrize("offset", [1, 0])
@pytest.mark.parametrize("source_given_as", ["labels", "ids"])
def test_both_stacks_fuse_in_generate(fusion, offset, source_given_as) -> None:
    """The frozen model writes the text that the decoder fuses with. The values of source_labels are not used."""
    model, inputs = fused(fusion=fusion, source_layer_offset=offset).eval(), texts()
    source = {"source_labels": batch()["source_labels"]}
    if source_given_as == "ids":
        source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    sequences, logits = generated(model, {**inputs, **source})
    source_text = frozen_text(model, inputs, 6, [])
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, source_text).float(), **TOLERANCE)
    assert not torch.allclose(logits, teacher_forced(model, inputs, sequences, None).float(), atol=1e-4)


def test_the_source_starts_with_its_own_label_if_the_targets_first_token_is_forced() -> None:
    """As in training. Rows without a label, or with only an end token, continue with the frozen decoder's choice."""
    model, inputs, end = fused().eval(), texts(), 2
    labels = torch.tensor([[7, 9], [-100, -100], [end, -100]])
    options = {"forced_bos_token_id": 5, "eos_token_id": end, "min_new_tokens": 6}
    sequences, logits = generated(model, {**inputs, "source_labels": labels}, 6, **options)
    assert sequences[:, 1].tolist() == [5, 5, 5]
    started = frozen_text(model, inputs, 5, [], torch.tensor([[START, 7]] * 3))
    source_text = torch.cat([started[:1], frozen_text(model, inputs, 6, [])[1:]])
    expected = teacher_forced(model, inputs, sequences, source_text).float()
    assert end not in source_text
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    with pytest.raises(ValueError, match=r"source_labels has shape \(2, 2\): with forced_bos_token_id"):
        generated(model, {**inputs, "source_labels": labels[:2]}, forced_bos_token_id=5)


def test_beams_and_samples_match_one_forward() -> None:
    model, inputs = fused().eval(), texts()
    source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0, "max_new_tokens": 6, "pad_token_id": 1}
    out = model.generate(**inputs, **source, **options, return_dict_in_generate=True, output_scores=True)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    source_text = frozen_text(model, inputs, 6, []).repeat_interleave(2, dim=0)
    logits = teacher_forced(model, repeated, out.sequences, source_text)
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum(1), rtol=0, atol=1e-5)
    torch.manual_seed(4)
    sequences, logits = generated(model, {**inputs, **source}, do_sample=True, top_k=0, num_return_sequences=2)
    torch.testing.assert_close(logits, teacher_forced(model, repeated, sequences, source_text).float(), **TOLERANCE)


def test_a_source_stays_at_its_end_token_and_rows_are_independent() -> None:
    model, inputs = fused().eval(), texts()
    text = frozen_text(model, inputs, 7, [])
    end = int(text[0, 2])  # the source of row 0 ends with its second new token
    assert end not in text[0, :2].tolist()
    source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    sequences, logits = generated(model, {**inputs, **source}, 6, eos_token_id=end, min_new_tokens=6)
    source_text = frozen_text(model, inputs, 6, [end])
    # teacher forcing reads on after the source's end token, so it agrees with generation only up to this token
    expected = teacher_forced(model, inputs, sequences, source_text).float()
    torch.testing.assert_close(logits[0, :3], expected[0, :3], **TOLERANCE)
    assert not torch.allclose(logits[0, 3:], expected[0, 3:], atol=1e-4)
    base = model.get_base_model()
    states = states_of_decoder(model, inputs, source_text)
    # generation fuses every later position with the end token's state
    for state in states:
        state[0, 3:] = state[0, 2]
    encoder = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    with by_hand(model, {"encoder": list(encoder), "decoder": states}, add_relu):
        expected_logits = base(**plain, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits[0], expected_logits[0].float(), **TOLERANCE)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in {**inputs, **source}.items()}
        one, row_logits = generated(model, alone, 6, eos_token_id=end, min_new_tokens=6)
        assert torch.equal(one[0], sequences[row])
        torch.testing.assert_close(row_logits[0], logits[row], **TOLERANCE)


def states_of_decoder(model: Any, inputs: dict, text: torch.Tensor) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    base = model.get_base_model()
    handles = [b.register_forward_hook(lambda m, a, y: states.append(y[0].clone())) for b in base.decoder.block]
    with torch.no_grad(), model.disable_adapter():
        base(
            input_ids=inputs["source_input_ids"], attention_mask=inputs["source_attention_mask"], decoder_input_ids=text
        )
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("started", [True, False])
def test_decoder_prompts_of_source_and_target_can_differ(started) -> None:
    """The decoder starts with different prompts on source and target. generate adds a missing start token."""
    model, inputs = fused().eval(), texts()
    begin = {name: torch.randint(3, tiny.VOCAB, (3, 3)) for name in ("decoder_input_ids", "source_decoder_input_ids")}
    if started:
        begin = {name: nn.functional.pad(ids, (1, 0), value=START) for name, ids in begin.items()}
    sequences, logits = generated(model, {**inputs, **begin}, 4)
    prompt = begin["source_decoder_input_ids"]
    started_prompt = prompt if started else nn.functional.pad(prompt, (1, 0), value=START)
    source_text = frozen_text(model, inputs, 4, [], started_prompt)
    expected = teacher_forced(model, inputs, sequences, source_text)[:, 3:].float()
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    with pytest.raises(ValueError, match=r"first tokens have shape \(3, .*for the source.* \(3, 1\)"):
        generated(model, {**inputs, "source_decoder_input_ids": prompt}, 4)


def test_generate_accepts_states_of_the_encoder() -> None:
    model, inputs = fused().eval(), texts()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    expected = generated(model, inputs)
    torch.testing.assert_close(generated(model, {**plain, "source_states": states})[1], expected[1], **TOLERANCE)
    with pytest.raises(ValueError, match="source_labels and source_states were both given"):
        generated(model, {**plain, "source_states": states, "source_labels": torch.ones(3, 2, dtype=torch.long)})


def test_generate_without_a_source_after_an_interrupted_forward_is_plain_lora() -> None:
    """generate calls the encoder directly. The hook that removes the source of an interrupted forward does not run."""
    model, inputs = fused().eval(), texts()
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    expected = generated(model, plain)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, labels=batch()["labels"])
    handle.remove()
    torch.testing.assert_close(generated(model, plain), expected, rtol=0, atol=0)


REFUSED = [
    ({"source_alignment": "release"}, "source_alignment='release': the authors' release has no encoder-decoder"),
    ({"encoder_outputs": (torch.zeros(3, 7, 32),)}, "encoder_outputs cannot be combined with a source"),
    ({"source_decoder_input_ids": torch.zeros(3, 1, dtype=torch.long), "use_cache": False}, "use_cache=False"),
    (
        {
            "source_decoder_input_ids": torch.zeros(3, 1, dtype=torch.long),
            "decoder_attention_mask": torch.ones(3, 1, dtype=torch.long),
        },
        "decoder_attention_mask cannot be combined",
    ),
    ({"source_input_ids": torch.ones(3, 4, dtype=torch.long)}, r"source_input_ids has shape \(3, 4\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_arguments_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused().eval().generate(**{**texts(), "max_new_tokens": 2, **options})


def test_a_decoder_whose_fusion_mixes_positions_is_refused() -> None:
    model = fused(fusion="cross_attention").eval()
    with pytest.raises(ValueError, match=r"fusion='cross_attention'.*all positions"):
        model.generate(**texts(), source_labels=batch()["source_labels"], max_new_tokens=2)


def test_use_cache_false_is_accepted_if_the_decoder_does_not_fuse() -> None:
    model, inputs = fused().eval(), texts()
    expected, _ = generated(model, inputs)
    assert torch.equal(generated(model, inputs, use_cache=False)[0], expected)
