"""SourceStateCache: the same numbers as without it, and each source block once per example."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import safetensors
import tiny
import torch
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
from flare.source_cache.row_keys import counts_relatively


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_second_pass_reads_what_the_first_computed(family, padding, tier, tmp_path) -> None:
    model, batch = fused(family, source_padding=padding), batch_of(family)
    want = step(model, batch)
    ran = SourceBlocks(model)
    cache = cache_in(tier, tmp_path)
    model.set_source_cache(cache)
    assert_same(step(model, batch), want)
    assert ran.since() == {3}
    cache.flush()
    assert_same(step(model, batch), want)
    assert ran.since() == {0}
    stats = cache.stats()
    assert (stats.rows, stats.hits, stats.hit_rate, stats.entries) == (6, 3, 0.5, {tier: 3})
    assert 0 < stats.nbytes[tier] <= MB
    model.set_source_cache(None)
    assert_same(step(model, batch), want)
    assert ran.since() == {3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_rows_that_miss_are_computed_in_a_smaller_pass(family, padding) -> None:
    model, batch = fused(family, source_padding=padding), batch_of(family)
    want = step(model, batch)
    model.set_source_cache(flare.SourceStateCache(MB))
    step(model, take(batch, 1))
    ran = SourceBlocks(model)
    assert_same(step(model, batch), want, exact=False)
    assert ran.since() == {2}
    assert_same(step(model, batch), want, exact=False)
    twice = take(batch, 2, 0, 2, 0)
    model.set_source_cache(None)
    want = step(model, twice)
    ran.since()
    model.set_source_cache(flare.SourceStateCache(MB))
    assert_same(step(model, twice), want, exact=False)
    assert ran.since() == {2}, "equal rows of one batch are one row"


def test_the_encoder_alone_and_both_stacks_are_other_rows() -> None:
    model, batch = fused("mt5"), batch_of("mt5")
    encoder = {name: value for name, value in batch.items() if name != "source_labels"}
    want = step(model, encoder)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    assert_same(step(model, encoder), want)
    assert cache.stats().hits == 0
    assert_same(step(model, encoder), want)
    assert cache.stats().hits == 3


@pytest.mark.parametrize("offset", [0, 1])
def test_states_are_those_of_their_offset(offset) -> None:
    """Two adapters of other offsets share a cache, and never a row."""
    model, batch = fused("bert", source_layer_offset=offset), batch_of("bert")
    other = fused("bert", source_layer_offset=1 - offset)
    want = step(other, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    other.set_source_cache(cache)
    step(model, batch)
    assert_same(step(other, batch), want)
    assert cache.stats().hits == 0


def test_everything_a_state_depends_on_is_part_of_the_key() -> None:
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
        "as it is": row,
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
        want = model(**row).loss
        model.set_source_cache(None)
        assert torch.equal(model(**row).loss, want)
    assert cache.stats().hits == 1


def widened(family: str, batch: dict[str, torch.Tensor], by: int = 3) -> dict[str, torch.Tensor]:
    """The same texts padded further, on the family's side."""
    where = (by, 0) if family == "llama" else (0, by)
    fills = {"input_ids": 1, "source_input_ids": 1}
    texts = {n: v for n, v in batch.items() if n.removeprefix("source_") in ("input_ids", "attention_mask")}
    rest = {n: v for n, v in batch.items() if n not in texts}
    if family == "llama":
        rest["labels"] = torch.nn.functional.pad(batch["labels"], where, value=-100)
    return rest | {n: torch.nn.functional.pad(v, where, value=fills.get(n, 0)) for n, v in texts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_pads_the_width_does_not_count(family) -> None:
    model, batch = fused(family, source_padding="zero"), batch_of(family)
    wide = widened(family, batch)
    want = step(model, wide)
    ran, cache = SourceBlocks(model), flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    ran.since()
    assert_same(step(model, wide), want, exact=False)
    assert ran.since() == {0}
    tokens = int(batch["source_attention_mask"].sum())
    decoder = 2 * 3 * 5 if family == "mt5" else 0
    exact = (tokens * tiny.LAYERS + decoder) * tiny.HIDDEN * 4
    assert exact <= cache.nbytes < exact + 3 * 64 + 1, "pads are not stored"


def test_a_learned_position_is_part_of_the_key() -> None:
    """BERT padded on the left: the same words at other positions have other states."""
    model, batch = fused("bert", source_padding="zero"), batch_of("llama")
    batch["labels"] = torch.tensor([0, 1, 2])
    wide = widened("llama", {**batch, "labels": batch["input_ids"]}) | {"labels": batch["labels"]}
    want = step(model, wide)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    assert_same(step(model, wide), want, exact=False)
    assert cache.stats().hits == 0


def test_rotary_frequencies_that_follow_the_width_make_it_count() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model, batch = fused("llama", source_padding="zero", base={"rope_parameters": rope}), batch_of("llama")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    step(model, widened("llama", batch))
    assert cache.stats().hits == 0


def test_attention_in_chunks_counts_from_the_first_position() -> None:
    model = fused("llama").get_base_model()
    assert counts_relatively(model)
    model.config.attention_chunk_size = 4
    assert not counts_relatively(model)


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_row_without_any_source_and_one_with_a_hole(tier, tmp_path) -> None:
    model, batch = fused("bert", source_padding="zero"), batch_of("bert")
    batch["source_attention_mask"][1] = 0
    batch["source_attention_mask"][2] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0])
    want = step(model, batch)
    cache = cache_in(tier, tmp_path)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), want)
        cache.flush()
    assert cache.stats().hits == 3
    assert_same(step(model, take(batch, 2, 1)), (step(model, take(batch, 2, 1))), exact=False)
    if tier == "disk":
        safetensors.safe_open(shards(tmp_path)[0], "pt")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant) -> None:
    model, batch = fused("llama"), batch_of("llama")
    want = step(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), want, exact=False)
    assert (cache.stats().rows, cache.stats().hits) == (6, 3)


def test_another_width_is_said_once_with_kept_pads() -> None:
    model, batch = fused("bert"), batch_of("bert")
    want = step(model, widened("bert", batch))
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    with pytest.warns(UserWarning, match="padded to another width.*max_length") as said:
        assert_same(step(model, widened("bert", batch)), want)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, widened("bert", batch, by=5))
        other = batch_of("bert", seed=77, m=12)
        step(model, other)


def test_under_recomputation_in_backward_a_reader_reads_again() -> None:
    """A second reading of one pass (in a backward) gives the same states and counts nothing."""
    from flare.source.source_pass import Preparation

    model, batch = fused("bert"), batch_of("bert")
    base = model.get_base_model()
    cache = flare.SourceStateCache(3500, tiers=("device",))  # room for one row of three
    model.set_source_cache(cache)
    wanted = {key for key, _, _ in runtime_of(base).state_uses()}
    inputs = {"input_ids": batch["source_input_ids"], "attention_mask": batch["source_attention_mask"]}
    read = cache.reader(base, inputs, wanted, Preparation())
    first: dict[Any, torch.Tensor] = {}
    second: dict[Any, torch.Tensor] = {}
    read(first.__setitem__)
    read(second.__setitem__)
    assert cache.stats().entries == {"device": 1} and cache.stats().rows == 3
    for key in wanted:
        torch.testing.assert_close(first[key], second[key])


def test_inference_mode_leaves_states_that_training_can_save() -> None:
    model, batch = fused("llama"), batch_of("llama")
    want = step(model, batch)
    model.set_source_cache(flare.SourceStateCache(MB))
    with torch.inference_mode():
        model(**batch)
    assert_same(step(model, batch), want)


def test_a_failing_pass_leaves_cache_and_model_usable() -> None:
    model, batch = fused("llama"), batch_of("llama")
    want = step(model, batch)
    cache = flare.SourceStateCache(11_000, tiers=("device",))  # room for these three rows and no more
    model.set_source_cache(cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    handle = tiny.block_list(model.get_base_model())[1].register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory, say"):
            model(**batch)
    handle.remove()
    assert cache.stats().entries == {"device": 0}
    assert_same(step(model, batch), want)
    assert_same(step(model, batch), want)
    assert cache.stats().entries == {"device": 3}, "the failed passes have given their room back"


def test_generation_and_encode_source_do_without() -> None:
    model, batch = fused("llama").eval(), batch_of("llama")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    prompts = {n: v for n, v in batch.items() if n != "labels"}
    model.generate(**prompts, max_new_tokens=3)
    model.encode_source(batch["source_input_ids"], batch["source_attention_mask"])
    assert cache.stats().rows == 0


def test_copies_share_the_cache_and_pickles_do_not_carry_it() -> None:
    cache = flare.SourceStateCache(MB, tiers=("host",))
    model, batch = fused("bert"), batch_of("bert")
    model.set_source_cache(cache)
    step(model, batch)
    twin = copy.deepcopy(model)
    step(twin, batch)
    assert cache.stats().hits == 3
    empty = pickle.loads(pickle.dumps(cache))
    assert repr(empty) == repr(cache) and empty.stats().rows == 0
