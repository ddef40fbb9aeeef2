"""Encoder-decoders: both stacks read one frozen pass, the decoder where it is given a source; seq2seq generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from torch import nn

import flare

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # generate hands logits out in float32
START = 0


def mt5(**changes: Any) -> Any:
    """A random mT5 without dropout, its head not tied to its embeddings: tied, it repeats what it reads."""
    model = tiny.model("mt5", dropout_rate=0.0, tie_word_embeddings=False, **changes)
    model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape) / 6)
    return model


def fused(*, base: dict | None = None, **overrides: Any) -> Any:
    base_model = mt5(**(base or {}))
    base_model.generation_config.eos_token_id = None
    base_model.generation_config.decoder_start_token_id = START
    model = flare.fast_lora(base_model, **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model.double()


def batch(B: int = 3, m: int = 7, u: int = 5, seed: int = 5) -> dict[str, torch.Tensor]:
    """Right-padded texts and labels of different lengths in the two streams."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for prefix, shift in (("", 0), ("source_", 2)):
        ids = torch.randint(3, tiny.VOCAB, (B, m), generator=generator)
        labels = torch.randint(3, tiny.VOCAB, (B, u), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(B):
            mask[row, m - (row + shift) % 4 :] = 0
            labels[row, u - (row + shift) % 3 :] = -100
        inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"] = ids.where(mask.bool(), 0), mask
        inputs[f"{prefix}labels"] = labels
    return inputs


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """What mT5's decoder reads of labels."""
    return torch.cat([labels.new_full((len(labels), 1), START), labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([labels.new_zeros(len(labels), 1), labels[:, :-1]], dim=1) == -100, 0
    )


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


# --- by hand ----------------------------------------------------------------------------------------------------------


def states_of(model: Any, inputs: dict, offset: int) -> dict[str, list[torch.Tensor]]:
    """x_S of every block of both stacks from a plain hooked pass of the frozen model."""
    base, found, handles = model.get_base_model(), {"encoder": [], "decoder": []}, []
    for name, states in found.items():
        for block in getattr(base, name).block:
            if offset == 0:
                handles.append(block.register_forward_pre_hook(lambda m, a, s=states: s.append(a[0].detach())))
            else:
                handles.append(block.register_forward_hook(lambda m, a, y, s=states: s.append(y[0].detach())))
    with torch.no_grad(), model.disable_adapter():
        base(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            decoder_input_ids=shifted(inputs["source_labels"]),
        )
    for handle in handles:
        handle.remove()
    return found


@contextlib.contextmanager
def by_hand(model: Any, states: dict[str, list[torch.Tensor]], phi: Any) -> Iterator[None]:
    """The self-attention's q and v of the given stacks replaced by the formula, in PEFT's eager style."""
    base, patched = model.get_base_model(), []
    for name, own in states.items():
        for block, state in zip(getattr(base, name).block, own, strict=True):
            for layer in (block.layer[0].SelfAttention.q, block.layer[0].SelfAttention.v):

                def forward(x: torch.Tensor, layer: Any = layer, state: torch.Tensor = state) -> torch.Tensor:
                    A, B = layer.lora_A["default"], layer.lora_B["default"]
                    return layer.base_layer(x) + B(phi(A(state), A(x))) * layer.scaling["default"]

                patched.append(layer)
                layer.forward = forward
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward


def step(model: Any, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), tiny.gradients(model)


def assert_same_step(got: Any, want: Any) -> None:
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert got[2].keys() == want[2].keys() and len(got[2]) > 10
    for name, grad in want[2].items():
        torch.testing.assert_close(got[2][name], grad, msg=name, rtol=1e-9, atol=1e-12)


def add_relu(S: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
    return S.relu() + T.relu()


PHI = {"add_relu": add_relu, "mul": torch.mul, "add": torch.add}


@pytest.mark.parametrize("fusion", PHI)
@pytest.mark.parametrize("offset", [1, 0])
@pytest.mark.parametrize("decoder", [True, False])
def test_logits_and_gradients_are_those_by_hand(fusion, offset, decoder) -> None:
    """With source_labels both stacks fuse; without them the decoder is plain LoRA."""
    model = fused(fusion=fusion, source_layer_offset=offset)
    inputs = batch()
    states = states_of(model, inputs, offset)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    with by_hand(model, states if decoder else {"encoder": states["encoder"]}, PHI[fusion]):
        want = step(model, plain)
    got = step(model, inputs if decoder else without(inputs, "source_labels"))
    assert_same_step(got, want)
    other = step(model, without(inputs, "source_labels") if decoder else inputs)
    assert not torch.allclose(other[1], want[1], atol=1e-3)


def test_eager_attention_and_sdpa_agree() -> None:
    """To float32's rounding: mT5's eager attention takes its softmax in float32."""
    steps = {}
    for name in ("eager", "sdpa"):
        model = fused(base={"attn_implementation": name})
        assert model.get_base_model().config._attn_implementation == name
        steps[name] = step(model, batch())
    torch.testing.assert_close(steps["sdpa"][1], steps["eager"][1], rtol=1e-5, atol=1e-6)
    for name, grad in steps["eager"][2].items():
        torch.testing.assert_close(steps["sdpa"][2][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_decoders_source_as_ids_and_as_labels() -> None:
    model, inputs = fused(), batch()
    want = step(model, inputs)
    ids = shifted(inputs["source_labels"])
    assert_same_step(step(model, {**without(inputs, "source_labels"), "source_decoder_input_ids": ids}), want)
    # ids stand in front of labels, as in transformers
    assert_same_step(
        step(model, {**inputs, "source_labels": inputs["source_labels"].flip(0), "source_decoder_input_ids": ids}), want
    )


def test_padding_of_both_stacks_as_zero() -> None:
    """The start token and every token before the padding count; in the labels' form and in the ids'."""
    model, inputs = fused(source_padding="zero"), batch()
    states = states_of(model, inputs, 1)
    real = torch.ones_like(inputs["source_labels"])
    real[:, 1:] = (inputs["source_labels"][:, :-1] != -100).long()
    assert (real == 0).any() and (inputs["source_attention_mask"] == 0).any()
    masks = {"encoder": inputs["source_attention_mask"], "decoder": real}
    zeroed = {name: [x * masks[name][..., None] for x in own] for name, own in states.items()}
    with by_hand(model, zeroed, add_relu):
        want = step(model, {name: value for name, value in inputs.items() if not name.startswith("source")})
    assert_same_step(step(model, inputs), want)
    ids = shifted(inputs["source_labels"])
    assert_same_step(step(model, {**without(inputs, "source_labels"), "source_decoder_input_ids": ids}), want)


@pytest.mark.parametrize("decoder", [True, False])
def test_one_frozen_pass_that_ends_where_it_may(decoder) -> None:
    model, inputs = fused(source_layer_offset=0), batch()
    base, runs = model.get_base_model(), []
    for name in ("encoder", "decoder"):
        for index, block in enumerate(getattr(base, name).block):
            block.register_forward_hook(lambda *_, at=(name, index): runs.append(at))
    model(**(inputs if decoder else without(inputs, "source_labels")))
    encoder, own = [("encoder", i) for i in range(tiny.LAYERS)], [("decoder", 0), ("decoder", 1)]
    source = [*encoder, ("decoder", 0)] if decoder else encoder[:-1]
    assert runs == [*source, *encoder, *own]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant) -> None:
    model, inputs = fused(), batch()
    want = step(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = step(model, inputs)
    torch.testing.assert_close(got[0], want[0])
    for name, grad in want[2].items():
        torch.testing.assert_close(got[2][name], grad, msg=name)


def test_report_and_life_cycle(tmp_path) -> None:
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
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mt5().double(), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, want)


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_other_encoder_decoders(name) -> None:
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
        own = frozen_text(model, text, 4, []) if source else None
        torch.testing.assert_close(logits, teacher_forced(model, text, sequences, own).float(), rtol=0, atol=5e-6)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_lengths_of_the_labels() -> None:
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
    given = {**without(inputs, "labels"), "decoder_input_ids": shifted(inputs["labels"])}
    torch.testing.assert_close(model(**given).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="source_labels was given without source_input_ids"):
        model(**without(inputs, "source_input_ids", "source_attention_mask"))


def test_encoded_sources_are_the_encoders() -> None:
    model, inputs = fused(), batch()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    assert {key.stack for key in states.states} == {"encoder.block"} and len(states) == tiny.LAYERS
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    want = model(**without(inputs, "source_labels")).logits
    torch.testing.assert_close(model(**plain, source_states=states).logits, want)
    with pytest.raises(ValueError, match=r"source_labels and source_states were both given.*the encoder's"):
        model(**plain, source_states=states, source_labels=inputs["source_labels"])


def test_adapters_in_the_decoder_alone() -> None:
    model = fused(target_modules=r"decoder\..*\.SelfAttention\.(q|v)")
    inputs = batch()
    with pytest.raises(ValueError, match="fuse in the decoder only, which reads source_labels"):
        model(**without(inputs, "source_labels"))
    with pytest.raises(ValueError, match="encode_source: the active adapters fuse in the decoder only"):
        model.encode_source(inputs["source_input_ids"])
    states = states_of(model, inputs, 1)
    with by_hand(model, {"decoder": states["decoder"]}, add_relu):
        want = step(model, {name: value for name, value in inputs.items() if not name.startswith("source")})
    got = step(model, inputs)
    torch.testing.assert_close(got[1], want[1])
    model.eval()
    text = without(inputs, "labels", "source_labels")
    sequences, logits = generated(model, {**text, "source_decoder_input_ids": torch.full((3, 1), START)}, 4)
    own = frozen_text(model, text, 4, [])
    torch.testing.assert_close(logits, teacher_forced(model, text, sequences, own).float(), **TOLERANCE)


def test_latent_states_are_the_encoders() -> None:
    model, inputs = fused(latent_dim=6).eval(), batch()
    assert {row.reason for row in model.fast_lora_report().declined} == {
        "cross-attention does not fuse",
        "with latent_dim, only the encoder of an encoder-decoder fuses: the states belong to its text",
    }
    latent = torch.randn(3, 7, 6, dtype=torch.float64)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    fused_loss = model(**plain, source_states=latent).loss
    assert not torch.allclose(fused_loss, model(**plain).loss)
    text = without(plain, "labels")
    sequences, logits = generated(model, {**text, "source_states": latent}, 4)
    want = model(**text, decoder_input_ids=sequences[:, :-1], source_states=latent).logits
    torch.testing.assert_close(logits, want.float(), **TOLERANCE)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"source_labels: an adapter with latent_dim=6 .* reads no source text"):
            call(**text, source_states=latent, source_labels=inputs["source_labels"])


# --- generation -------------------------------------------------------------------------------------------------------


def generated(model: Any, inputs: dict, new: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (with what they began with), and the logits (B, new, V) of every step."""
    options = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": new, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, dim=1)


def frozen_text(model: Any, inputs: dict, new: int, ends: list[int], prompt: torch.Tensor | None = None) -> Any:
    """What the frozen decoder writes for the source, by generate itself, and the states' held positions."""
    with model.disable_adapter():
        text = model.generate(
            input_ids=inputs["source_input_ids"],
            attention_mask=inputs["source_attention_mask"],
            decoder_input_ids=prompt,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=1,
        )
    begun = 1 if prompt is None else prompt.shape[1]
    text = nn.functional.pad(text, (0, begun + new - text.shape[1]), value=1)
    return text[:, :-1]


def teacher_forced(model: Any, inputs: dict, sequences: torch.Tensor, source_text: torch.Tensor | None) -> torch.Tensor:
    """Logits of one forward without a cache."""
    source = {} if source_text is None else {"source_decoder_input_ids": source_text}
    return model(**inputs, decoder_input_ids=sequences[:, :-1], **source, use_cache=False).logits


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
@pytest.mark.parametrize("given", ["labels", "ids"])
def test_both_stacks_fuse_in_generate(fusion, offset, given) -> None:
    """The source's decoder writes its own text; of source_labels only the presence counts."""
    model, inputs = fused(fusion=fusion, source_layer_offset=offset).eval(), texts()
    source = {"source_labels": batch()["source_labels"]}
    if given == "ids":
        source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    sequences, logits = generated(model, {**inputs, **source})
    own = frozen_text(model, inputs, 6, [])
    torch.testing.assert_close(logits, teacher_forced(model, inputs, sequences, own).float(), **TOLERANCE)
    assert not torch.allclose(logits, teacher_forced(model, inputs, sequences, None).float(), atol=1e-4)


def test_beams_and_samples() -> None:
    model, inputs = fused().eval(), texts()
    source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0, "max_new_tokens": 6, "pad_token_id": 1}
    out = model.generate(**inputs, **source, **options, return_dict_in_generate=True, output_scores=True)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    own = frozen_text(model, inputs, 6, []).repeat_interleave(2, dim=0)
    logits = teacher_forced(model, repeated, out.sequences, own)
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum(1), rtol=0, atol=1e-5)
    torch.manual_seed(4)
    sequences, logits = generated(model, {**inputs, **source}, do_sample=True, top_k=0, num_return_sequences=2)
    torch.testing.assert_close(logits, teacher_forced(model, repeated, sequences, own).float(), **TOLERANCE)


def test_a_source_that_has_ended_is_held_and_rows_are_independent() -> None:
    model, inputs = fused().eval(), texts()
    text = frozen_text(model, inputs, 7, [])
    end = int(text[0, 2])  # row 0 ends with its second token
    assert end not in text[0, :2].tolist()
    source = {"source_decoder_input_ids": torch.full((3, 1), START)}
    sequences, logits = generated(model, {**inputs, **source}, 6, eos_token_id=end, min_new_tokens=6)
    own = frozen_text(model, inputs, 6, [end])
    # up to its end token the source's text is its own; behind it every position meets that token's state
    want = teacher_forced(model, inputs, sequences, own).float()
    torch.testing.assert_close(logits[0, :3], want[0, :3], **TOLERANCE)
    assert not torch.allclose(logits[0, 3:], want[0, 3:], atol=1e-4)
    base = model.get_base_model()
    states = states_of_decoder(model, inputs, own)
    for state in states:
        state[0, 3:] = state[0, 2]
    encoder = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    with by_hand(model, {"encoder": list(encoder), "decoder": states}, add_relu):
        held = base(**plain, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits[0], held[0].float(), **TOLERANCE)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in {**inputs, **source}.items()}
        one, own_logits = generated(model, alone, 6, eos_token_id=end, min_new_tokens=6)
        assert torch.equal(one[0], sequences[row])
        torch.testing.assert_close(own_logits[0], logits[row], **TOLERANCE)


def states_of_decoder(model: Any, inputs: dict, text: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    base = model.get_base_model()
    handles = [b.register_forward_hook(lambda m, a, y: found.append(y[0].clone())) for b in base.decoder.block]
    with torch.no_grad(), model.disable_adapter():
        base(
            input_ids=inputs["source_input_ids"], attention_mask=inputs["source_attention_mask"], decoder_input_ids=text
        )
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("started", [True, False])
def test_decoder_prompts(started) -> None:
    """Both decoders begin with texts of their own; generate puts the start token in front where it is missing."""
    model, inputs = fused().eval(), texts()
    begin = {name: torch.randint(3, tiny.VOCAB, (3, 3)) for name in ("decoder_input_ids", "source_decoder_input_ids")}
    if started:
        begin = {name: nn.functional.pad(ids, (1, 0), value=START) for name, ids in begin.items()}
    sequences, logits = generated(model, {**inputs, **begin}, 4)
    prompt = begin["source_decoder_input_ids"]
    own = frozen_text(model, inputs, 4, [], prompt if started else nn.functional.pad(prompt, (1, 0), value=START))
    want = teacher_forced(model, inputs, sequences, own)[:, 3:].float()
    torch.testing.assert_close(logits, want, **TOLERANCE)
    with pytest.raises(ValueError, match=r"source_decoder_input_ids gives the source \(3, .* \(3, 1\)"):
        generated(model, {**inputs, "source_decoder_input_ids": prompt}, 4)


def test_states_of_the_encoder_can_be_generated_with() -> None:
    model, inputs = fused().eval(), texts()
    states = model.encode_source(inputs["source_input_ids"], inputs["source_attention_mask"])
    plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
    want = generated(model, inputs)
    torch.testing.assert_close(generated(model, {**plain, "source_states": states})[1], want[1], **TOLERANCE)
    with pytest.raises(ValueError, match="source_labels and source_states were both given"):
        generated(model, {**plain, "source_states": states, "source_labels": torch.ones(3, 2, dtype=torch.long)})


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
def test_what_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused().eval().generate(**{**texts(), "max_new_tokens": 2, **options})


def test_a_decoder_whose_fusion_mixes_positions() -> None:
    model = fused(fusion="cross_attention").eval()
    with pytest.raises(ValueError, match=r"fusion='cross_attention'.*at all positions"):
        model.generate(**texts(), source_labels=batch()["source_labels"], max_new_tokens=2)


def test_without_a_cache_where_the_decoder_is_plain() -> None:
    model, inputs = fused().eval(), texts()
    want, _ = generated(model, inputs)
    assert torch.equal(generated(model, inputs, use_cache=False)[0], want)
