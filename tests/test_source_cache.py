"""Test that SourceStateCache does not change results, and that the source of each example is computed once."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import safetensors
import tiny
import torch
import transformers
from cached_states import (
    FAMILIES,
    MB,
    SourceBlocks,
    assert_same,
    batch_of,
    cache_in,
    fused,
    shards,
    step,
    take,
)

import flare
from flare.source.runtime import runtime_of
from flare.source_cache.row_keys import counts_relatively, needs_width


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_second_step_reads_the_states_that_the_first_computed(family, padding, tier, tmp_path) -> None:
    model, batch = fused(family, source_padding=padding), batch_of(family)
    expected = step(model, batch)
    ran = SourceBlocks(model)
    cache = cache_in(tier, tmp_path)
    model.set_source_cache(cache)
    assert_same(step(model, batch), expected)
    assert ran.since() == {3}
    cache.flush()
    assert_same(step(model, batch), expected)
    assert ran.since() == {0}
    stats = cache.stats()
    assert (stats.rows, stats.hits, stats.hit_rate, stats.entries) == (6, 3, 0.5, {tier: 3})
    assert 0 < stats.nbytes[tier] <= MB
    model.set_source_cache(None)
    assert_same(step(model, batch), expected)
    assert ran.since() == {3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_rows_that_are_not_cached_are_computed_in_a_smaller_pass(family, padding) -> None:
    model, batch = fused(family, source_padding=padding), batch_of(family)
    expected = step(model, batch)
    model.set_source_cache(flare.SourceStateCache(MB))
    step(model, take(batch, 1))
    ran = SourceBlocks(model)
    assert_same(step(model, batch), expected, exact=False)
    assert ran.since() == {2}
    assert_same(step(model, batch), expected, exact=False)
    twice = take(batch, 2, 0, 2, 0)
    model.set_source_cache(None)
    expected = step(model, twice)
    ran.since()
    model.set_source_cache(flare.SourceStateCache(MB))
    assert_same(step(model, twice), expected, exact=False)
    assert ran.since() == {2}, "rows that occur twice in a batch are computed once"


def test_states_of_an_encoder_alone_and_with_its_decoder_have_different_keys() -> None:
    model, batch = fused("mt5"), batch_of("mt5")
    encoder = {name: value for name, value in batch.items() if name != "source_labels"}
    expected = step(model, encoder)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    assert_same(step(model, encoder), expected)
    assert cache.stats().hits == 0
    assert_same(step(model, encoder), expected)
    assert cache.stats().hits == 3


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_of_different_layer_offsets_have_different_keys(offset) -> None:
    """Two models whose adapters have different offsets share a cache. Neither model reads the other model's rows."""
    model, batch = fused("bert", source_layer_offset=offset), batch_of("bert")
    other = fused("bert", source_layer_offset=1 - offset)
    expected = step(other, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    other.set_source_cache(cache)
    step(model, batch)
    assert_same(step(other, batch), expected)
    assert cache.stats().hits == 0


def test_the_key_covers_all_inputs_of_a_state() -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    row = take(batch, 0)
    types = torch.zeros_like(row["source_input_ids"])
    longer = {n: torch.nn.functional.pad(v, (0, 2)) if v.dim() == 2 else v for n, v in row.items()}
    masked = {**row, "source_attention_mask": row["source_attention_mask"].clone()}
    masked["source_attention_mask"][0, 1] = 0
    words = {**row, "source_input_ids": row["source_input_ids"].clone()}
    words["source_input_ids"][0, 1] += 1
    variants = {
        "unchanged": row,
        "types": {**row, "source_token_type_ids": types},
        "other types": {**row, "source_token_type_ids": types + 1},
        "mask": masked,
        "words": words,
        "width": longer,
    }
    for count, (what, inputs) in enumerate(variants.items(), start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**inputs)
        assert cache.stats().entries["device"] == count, what
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**row)
        assert cache.stats().entries["device"] == count + 1
        expected = model(**row).loss
        model.set_source_cache(None)
        assert torch.equal(model(**row).loss, expected)
    assert cache.stats().hits == 1


def widened(family: str, batch: dict[str, torch.Tensor], by: int = 3) -> dict[str, torch.Tensor]:
    """Return the batch with `by` more columns of padding, on the left for Llama and on the right for other families."""
    where = (by, 0) if family == "llama" else (0, by)
    fills = {"input_ids": 1, "source_input_ids": 1}
    texts = {n: v for n, v in batch.items() if n.removeprefix("source_") in ("input_ids", "attention_mask")}
    rest = {n: v for n, v in batch.items() if n not in texts}
    if family == "llama":
        rest["labels"] = torch.nn.functional.pad(batch["labels"], where, value=-100)
    return rest | {n: torch.nn.functional.pad(v, where, value=fills.get(n, 0)) for n, v in texts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_zeroed_padding_the_width_is_not_part_of_the_key(family) -> None:
    model, batch = fused(family, source_padding="zero"), batch_of(family)
    wide = widened(family, batch)
    expected = step(model, wide)
    ran, cache = SourceBlocks(model), flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    ran.since()
    assert_same(step(model, wide), expected, exact=False)
    assert ran.since() == {0}
    tokens = int(batch["source_attention_mask"].sum())
    decoder = 2 * 3 * 5 if family == "mt5" else 0
    exact = (tokens * tiny.LAYERS + decoder) * tiny.HIDDEN * 4
    assert exact <= cache.nbytes < exact + 3 * 64 + 1, "padding is not stored"


def test_learned_positions_are_part_of_the_key() -> None:
    """With more padding on the left, BERT's words have other positions, and therefore other states."""
    model, batch = fused("bert", source_padding="zero"), batch_of("llama")
    batch["labels"] = torch.tensor([0, 1, 2])
    wide = widened("llama", {**batch, "labels": batch["input_ids"]}) | {"labels": batch["labels"]}
    expected = step(model, wide)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    assert_same(step(model, wide), expected, exact=False)
    assert cache.stats().hits == 0


def test_the_width_is_part_of_the_key_if_rotary_frequencies_depend_on_it() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model, batch = fused("llama", source_padding="zero", base={"rope_parameters": rope}), batch_of("llama")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    step(model, widened("llama", batch))
    assert cache.stats().hits == 0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ConvBert", {}, True),
        ("Nystromformer", {}, True),
        ("Yoso", {}, True),
        ("SqueezeBert", {"embedding_size": 32}, False),  # the kernel's size is 1
        ("DebertaV2", {"conv_kernel_size": 3}, False),  # padding is set to zero before the convolution
        ("Lfm2", {"num_key_value_heads": 4, "layer_types": ["conv", "full_attention"]}, False),  # causal
    ],
)
def test_needs_width_is_true_if_attention_or_convolutions_read_padding(
    name: str, options: dict, expected: bool
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=48, **options)
    assert needs_width(getattr(transformers, f"{name}Model")(config)) == expected


def test_the_width_is_part_of_the_key_if_convolutions_read_padding() -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "num_labels": 3}
    base = transformers.ConvBertConfig(**config, num_hidden_layers=2, intermediate_size=48, initializer_range=0.2)
    model = flare.fast_lora(transformers.ConvBertForSequenceClassification(base), r=4, source_padding="zero").eval()
    tiny.randomize_lora(model)
    batch = batch_of("bert")
    expected = model(**batch).logits
    model.set_source_cache(flare.SourceStateCache(MB))
    wide = widened("bert", batch)
    wide["source_attention_mask"][2] = 1  # a longer text, because columns without any token are not computed
    model(**wide)
    assert torch.equal(model(**batch).logits, expected)


def test_counts_relatively_is_false_with_chunked_attention() -> None:
    model = fused("llama").get_base_model()
    assert counts_relatively(model)
    model.config.attention_chunk_size = 4
    assert not counts_relatively(model)


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_row_without_tokens_and_a_mask_with_a_gap_are_cached(tier, tmp_path) -> None:
    model, batch = fused("bert", source_padding="zero"), batch_of("bert")
    batch["source_attention_mask"][1] = 0
    batch["source_attention_mask"][2] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0])
    expected = step(model, batch)
    cache = cache_in(tier, tmp_path)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), expected)
        cache.flush()
    assert cache.stats().hits == 3
    permuted = step(model, take(batch, 2, 1))
    model.set_source_cache(None)
    assert_same(permuted, step(model, take(batch, 2, 1)), exact=False)
    if tier == "disk":
        safetensors.safe_open(shards(tmp_path)[0], "pt")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reads_the_cache(use_reentrant) -> None:
    model, batch = fused("llama"), batch_of("llama")
    expected = step(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), expected, exact=False)
    assert (cache.stats().rows, cache.stats().hits) == (6, 3)


def test_another_width_warns_once_with_kept_padding() -> None:
    model, batch = fused("bert"), batch_of("bert")
    expected = step(model, widened("bert", batch))
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    with pytest.warns(UserWarning, match="padded to another width.*max_length") as caught:
        assert_same(step(model, widened("bert", batch)), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, widened("bert", batch, by=5))
        other = batch_of("bert", seed=77, m=12)
        step(model, other)


def test_a_reader_can_be_called_again_in_backward() -> None:
    """A reader passes a batch's states to a visitor. A second call passes the same states, and is not counted."""
    from flare.source.source_pass import Preparation

    model, batch = fused("bert"), batch_of("bert")
    base = model.get_base_model()
    cache = flare.SourceStateCache(3500, tiers=("device",))  # room for one of the three rows
    model.set_source_cache(cache)
    keys_read = {key for key, _, _ in runtime_of(base).state_uses()}
    inputs = {"input_ids": batch["source_input_ids"], "attention_mask": batch["source_attention_mask"]}
    read = cache.reader(base, inputs, keys_read, Preparation())
    first: dict[Any, torch.Tensor] = {}
    second: dict[Any, torch.Tensor] = {}
    read(first.__setitem__)
    read(second.__setitem__)
    assert cache.stats().entries == {"device": 1} and cache.stats().rows == 3
    for key in keys_read:
        torch.testing.assert_close(first[key], second[key])


def test_states_cached_in_inference_mode_can_be_saved_for_backward() -> None:
    model, batch = fused("llama"), batch_of("llama")
    expected = step(model, batch)
    model.set_source_cache(flare.SourceStateCache(MB))
    with torch.inference_mode():
        model(**batch)
    assert_same(step(model, batch), expected)


def test_a_failing_pass_leaves_cache_and_model_usable() -> None:
    model, batch = fused("llama"), batch_of("llama")
    expected = step(model, batch)
    cache = flare.SourceStateCache(11_000, tiers=("device",))  # room for these three rows only
    model.set_source_cache(cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("simulated failure")

    handle = tiny.block_list(model.get_base_model())[1].register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="simulated failure"):
            model(**batch)
    handle.remove()
    assert cache.stats().entries == {"device": 0}
    assert_same(step(model, batch), expected)
    assert_same(step(model, batch), expected)
    assert cache.stats().entries == {"device": 3}, "the failed passes have released their memory"


def test_generation_and_encode_source_do_not_use_the_cache() -> None:
    model, batch = fused("llama").eval(), batch_of("llama")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    prompts = {n: v for n, v in batch.items() if n != "labels"}
    model.generate(**prompts, max_new_tokens=3)
    model.encode_source(batch["source_input_ids"], batch["source_attention_mask"])
    assert cache.stats().rows == 0


def test_copies_share_the_cache_and_pickles_do_not_contain_it() -> None:
    cache = flare.SourceStateCache(MB, tiers=("host",))
    model, batch = fused("bert"), batch_of("bert")
    model.set_source_cache(cache)
    step(model, batch)
    twin = copy.deepcopy(model)
    step(twin, batch)
    assert cache.stats().hits == 3
    empty = pickle.loads(pickle.dumps(cache))
    assert repr(empty) == repr(cache) and empty.stats().rows == 0
