"""Test that SourceStateCache detects changes of the base model, and test its fingerprints and checksums."""

from __future__ import annotations

import pytest
import tiny
import torch
from cached_states import MB, assert_same, batch_of, fused, step

import flare
from flare.experiments.measure import count_ops
from flare.source_cache.checksum import _mixed, _weights, checksum
from flare.source_cache.fingerprint import fingerprint
from flare.source_cache.watch import Watch
from flare.source_cache.weights import FrozenWeights


def test_another_base_model_is_refused() -> None:
    cache = flare.SourceStateCache(MB)
    fused("bert").set_source_cache(cache)
    for other in (fused("bert", seed=1), fused("xlmr"), fused("bert", base={"hidden_act": "relu"})):
        with pytest.raises(ValueError, match="source_cache is bound to another base model"):
            other.set_source_cache(cache)
    fused("bert", r=3, fusion="mul").set_source_cache(cache)  # another adapter on the same base is accepted


@pytest.mark.parametrize("change", ["in place", "requires_grad", "another tensor"])
def test_a_changed_base_model_is_detected_in_the_next_pass(change) -> None:
    model, batch = fused("bert"), batch_of("bert")
    model.set_source_cache(flare.SourceStateCache(MB))
    step(model, batch)
    output = model.get_base_model().bert.encoder.layer[1].output.dense
    if change == "in place":
        with torch.no_grad():
            output.weight[3, 5] += 1e-3
    elif change == "requires_grad":
        output.weight.requires_grad_(True)
    else:
        output.weight = torch.nn.Parameter(output.weight + 1e-3, requires_grad=False)
    with pytest.raises(ValueError, match="is trained" if change == "requires_grad" else "another base model"):
        model(**batch)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("qwen3", "model.layers.1.self_attn.sliding_window", 4),
        ("llama", "model.layers.1.self_attn.scaling", 0.5),
        ("llama", "model.norm.variance_epsilon", 1e-2),
        ("llama", "model.rotary_emb.inv_freq", None),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_attributes_and_unsaved_buffers_are_watched(family, name, value, again) -> None:
    """A value is changed after the cache was set on the model.

    again: if True, the change is detected when the cache is set again; if False, in the next pass.
    """
    model, batch = fused(family), batch_of(family)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    path, _, attribute = name.rpartition(".")
    module = model.get_base_model().get_submodule(path)
    if value is None:
        module.inv_freq.mul_(0.5)
    else:
        assert getattr(module, attribute) != value
        setattr(module, attribute, value)
    with pytest.raises(ValueError, match=f"before this base model's {name[6:]} was changed.*a new SourceStateCache"):
        if again:
            model.set_source_cache(cache)
        else:
            model(**batch)
    model.set_source_cache(flare.SourceStateCache(MB))
    step(model, batch)


def test_irrelevant_attributes_are_not_watched() -> None:
    """The changes are: train mode, gradient checkpointing, and rotary frequencies that are computed again."""
    model, batch = (
        fused("llama", base={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (batch_of("llama")),
    )
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    model.eval().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rotary = model.get_base_model().model.rotary_emb
    rotary.inv_freq, rotary.max_seq_len_cached = rotary.inv_freq.clone(), 128
    step(model, batch)
    assert cache.stats().hits == 3


def test_a_write_to_data_of_a_weight_is_detected_when_the_cache_is_set_again() -> None:
    model = fused("bert")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    model.get_base_model().bert.encoder.layer[1].output.dense.weight.data[3, 5] += 1e-3
    with pytest.raises(ValueError, match="another base model"):
        model.set_source_cache(cache)


def test_a_weight_that_is_replaced_by_an_equal_copy_is_accepted() -> None:
    model, batch = fused("bert"), batch_of("bert")
    expected = step(model, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    dense = model.get_base_model().bert.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.clone(), requires_grad=False)
    assert_same(step(model, batch), expected)
    assert cache.stats().hits == 3


def test_the_fingerprint_covers_the_frozen_backbone() -> None:
    """The fingerprint covers all weights, also in wrapped layers, but no adapters, heads, trained copies or poolers."""
    plain = fingerprint(tiny.model("bert").requires_grad_(False))
    assert fingerprint(fused("bert").get_base_model()) == plain
    wrapped = fused("bert", target_modules="all-linear", modules_to_save=["classifier", "word_embeddings"])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert fingerprint(wrapped.get_base_model()) == plain
    head = tiny.model("bert").requires_grad_(False)
    head.classifier.weight.add_(1.0)
    head.bert.pooler.dense.weight.add_(1.0)
    assert fingerprint(head) == plain
    assert fingerprint(tiny.model("bert", dtype=torch.bfloat16).requires_grad_(False)) != plain
    for name, parameter in tiny.model("bert").bert.named_parameters():
        if "pooler" in name:
            continue
        changed = tiny.model("bert").requires_grad_(False)
        changed.bert.get_parameter(name).view(-1)[parameter.numel() // 2] += 1e-3
        assert fingerprint(changed) != plain, name


def test_trained_heads_and_embeddings_do_not_change_cached_states() -> None:
    """modules_to_save trains a copy. The source pass uses the frozen original, so cached states stay valid."""
    model, batch = fused("llama", modules_to_save=["embed_tokens", "lm_head"]), batch_of("llama")
    model.set_source_cache(flare.SourceStateCache(MB))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        step(model, batch)
        optimizer.step()
    cached = step(model, batch)
    model.set_source_cache(None)
    assert_same(cached, step(model, batch))


def test_quantised_weights_are_part_of_the_fingerprint() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    fingerprints = set()
    for kind, seed in (("fp4", 0), ("nf4", 0), ("nf4", 1), ("nf4", 0)):
        torch.manual_seed(seed)
        linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind)
        linear.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type=kind)
        fingerprints.add(fingerprint(torch.nn.Sequential(linear.to("cpu"))))
    scaled = torch.nn.Sequential(linear)
    before = fingerprint(scaled)
    linear.weight.quant_state.absmax.mul_(2)
    assert len(fingerprints) == 3 and fingerprint(scaled) != before


def test_checking_quantised_weights_computes_nothing() -> None:
    """The check before every pass compares two stamps (Watch.stamp). It reads all weights only if the stamps differ."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 64), False, quant_type="nf4", compress_statistics=True)
    model = torch.nn.Sequential(linear.to("cpu"))
    names = [name.rpartition(".")[2] for name, _ in FrozenWeights(model).tensors]
    assert names == ["weight", "absmax", "nested_absmax", "nested_quant_map", "quant_map"]
    watch = Watch(model)
    with count_ops() as operators:
        assert watch.is_unchanged() and Watch(model).stamp == watch.stamp
    assert not operators.ops


def test_a_quantised_model_trains_with_a_cache_and_a_repacked_one_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny.model("llama", hidden_size=64, head_dim=16)
    for layer in tiny.block_list(base):
        old = layer.self_attn.o_proj
        new = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4")
        layer.self_attn.o_proj = new.to("cpu")
    base.is_loaded_in_4bit = True
    model, batch = flare.fast_lora(base, r=4), batch_of("llama")
    tiny.randomize_lora(model)
    expected = step(model, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), expected)
    assert cache.stats().hits == 3
    model.eval()
    with torch.no_grad():
        model(
            **batch
        )  # in eval mode bitsandbytes repacks the weights that it uses, if this CPU has the instructions for it
    if not getattr(new.weight.quant_state, "packing_format_for_cpu", False):
        assert_same(step(model.train(), batch), expected)
        return
    with pytest.raises(ValueError, match="bitsandbytes has repacked"):
        model(**batch)


def test_a_flipped_bit_at_any_position_changes_the_checksum() -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 256, (300_001,), dtype=torch.uint8)
    expected = checksum(data)
    assert checksum(data.clone()) == expected and checksum(data[:-1]) != expected
    for position in (0, 1, 131_071, 131_072, 262_144, 300_000):
        for bit in (0, 7):
            data[position] ^= 1 << bit
            assert checksum(data) != expected
            data[position] ^= 1 << bit
    data[:8], data[8:16] = data[8:16].clone(), data[:8].clone()
    assert checksum(data) != expected, "swapped words change the checksum"
    misaligned = torch.arange(100, dtype=torch.uint8)
    assert checksum(misaligned[3:67]) == checksum(misaligned[3:67].clone())


@pytest.mark.parametrize("bit", [63, 62, 31, 15])
def test_an_even_number_of_flipped_bits_changes_a_checksum(bit) -> None:
    torch.manual_seed(0)
    words = torch.randint(-(2**62), 2**62, (20_000,))
    expected = checksum(words)
    flip = torch.tensor(1 << bit if bit < 63 else -(2**63))
    for count in (2, 4, 100):
        for _ in range(100):
            changed = words.clone()
            changed[torch.randperm(len(words))[:count]] ^= flip
            assert checksum(changed) != expected, (bit, count)


def test_two_flipped_signs_never_cancel_in_a_checksum() -> None:
    """No two flipped signs change the sum by opposite amounts, in words that are all 0 and in the words 0, 1, 2, ..."""
    for data in (torch.zeros(1 << 14, dtype=torch.int64), torch.arange(1 << 14)):
        flipped = data ^ torch.tensor(-(2**63))
        changes = _mixed(flipped, _weights(data.device)) - _mixed(data, _weights(data.device))
        assert not torch.isin(changes, -changes).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_negated_weights_are_another_model(dtype) -> None:
    model = tiny.model("bert", dtype=dtype).requires_grad_(False)
    expected = fingerprint(model)
    weight = model.bert.encoder.layer[1].output.dense.weight
    for part in (weight[:, 1], weight[:, :2], weight[3], weight.view(-1)[3:12:8]):
        part.data.neg_()
        assert fingerprint(model) != expected
        part.data.neg_()
    assert fingerprint(model) == expected


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("mistral", "sliding_window", 2), ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 3.0})],
)
def test_a_changed_config_is_detected_in_every_pass(family, name, value) -> None:
    model, batch = fused(family), batch_of(family)
    config = model.get_base_model().config
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    expected = step(model, batch)
    before = getattr(config, name)
    setattr(config, name, value)
    for _ in range(3):
        with pytest.raises(ValueError, match="another base model"):
            step(model, batch)
    setattr(config, name, before)
    assert_same(step(model, batch), expected)
    assert cache.stats().hits == 3


def test_the_pad_token_of_position_embeddings_is_part_of_the_fingerprint() -> None:
    one, other = (tiny.model("xlmr", pad_token_id=pad).requires_grad_(False) for pad in (1, 0))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)
    one.config.pad_token_id, one.config.eos_token_id = 7, 8
    assert fingerprint(one) == fingerprint(fused("xlmr").get_base_model())
