"""SourceStateCache: the same numbers, each source block once per example, and every fault really done."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import pickle
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny
import torch
from datasets import Dataset
from test_trainer import arguments, flare_model, lora
from two_streams import rows, tokenizer

import flare
from flare.runtime import runtime_of
from flare.source_cache.checksum import checksum
from flare.source_cache.fingerprint import fingerprint
from flare.source_cache.rows import counts_relatively
from flare.source_cache.shards import FORMAT, UNFINISHED
from flare.trainer import FlareSeq2SeqTrainer, FlareTrainer

FAMILIES = ("bert", "llama", "mt5")
MB = 1 << 20


def fused(family: str, *, base: dict | None = None, seed: int = 0, **overrides: Any) -> Any:
    quiet = {"dropout_rate": 0.0} if family == "mt5" else {}
    model = flare.fast_lora(
        tiny.model(family, seed=seed, **{**quiet, **(base or {})}), **{"r": 5, "lora_alpha": 7, **overrides}
    )
    tiny.randomize_lora(model)
    return model


def batch_of(family: str, **options: Any) -> dict[str, torch.Tensor]:
    batch = tiny.batch(family, **options)
    if family == "mt5":
        generator = torch.Generator().manual_seed(9)
        batch["source_labels"] = torch.randint(2, tiny.VOCAB, batch["labels"].shape, generator=generator)
    return batch


def take(batch: dict[str, torch.Tensor], *indices: int) -> dict[str, torch.Tensor]:
    return {name: value[list(indices)] for name, value in batch.items()}


class SourceBlocks:
    """How many rows went through each block of the frozen model's source pass: one list of counts per pass."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        runtime = runtime_of(base)
        self.rows: dict[str, int] = {}
        stacks = {**runtime.map.stacks, **dict.fromkeys(runtime.map.decoders)}
        for stack in stacks:
            for index, block in enumerate(base.get_submodule(stack)):
                block.register_forward_hook(self._count(f"{stack}.{index}", runtime))
                self.rows[f"{stack}.{index}"] = 0

    def _count(self, name: str, runtime: Any) -> Any:
        def count(module: Any, args: Any, output: Any) -> None:
            if runtime.in_source_pass:
                self.rows[name] += len(output if isinstance(output, torch.Tensor) else output[0])

        return count

    def since(self) -> set[int]:
        """The numbers of rows that blocks have read since the last call (one number where all blocks agree)."""
        found = set(self.rows.values())
        self.rows = dict.fromkeys(self.rows, 0)
        return found


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


def assert_same(got: Any, want: Any, exact: bool = True) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0 if exact else 1e-5, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        atol = 0.0 if exact else 1e-5 * float(grad.abs().max())
        torch.testing.assert_close(got[1][name], grad, msg=name, rtol=0, atol=atol)


def cache_in(tier: str, folder: Path, budget: int = MB) -> flare.SourceStateCache:
    return flare.SourceStateCache(budget, tiers=(tier,), directory=folder if tier == "disk" else None)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# --- the same numbers, computed once ----------------------------------------------------------------------------------


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
    from flare.source_pass import Preparation

    model, batch = fused("bert"), batch_of("bert")
    base = model.get_base_model()
    cache = flare.SourceStateCache(3500, tiers=("device",))  # room for one row of three
    model.set_source_cache(cache)
    wanted = {key for key, _, _ in runtime_of(base).wanted()}
    inputs = {"input_ids": batch["source_input_ids"], "attention_mask": batch["source_attention_mask"]}
    read = cache.reader(base, inputs, wanted, Preparation())
    first: dict[Any, torch.Tensor] = {}
    second: dict[Any, torch.Tensor] = {}
    with runtime_of(base).source_pass():
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


# --- budgets and tiers ------------------------------------------------------------------------------------------------


def one_row_bytes() -> int:
    return 9 * tiny.LAYERS * tiny.HIDDEN * 4  # a multiple of 64


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_full_cache_stays_as_it_is(tier, tmp_path) -> None:
    """Two epochs in order over more rows than there is room for: what came first is found, nothing is thrown out."""
    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    budget = 5 * (one_row_bytes() + (600 if tier == "disk" else 0))
    cache = cache_in(tier, tmp_path, budget)
    wants = [step(model, batch) for batch in batches]
    model.set_source_cache(cache)
    with pytest.warns(UserWarning, match="the budget is spent") as said:
        for _ in range(3):
            for batch, want in zip(batches, wants, strict=True):
                assert_same(step(model, batch), want, exact=False)
            cache.flush()
            assert cache.nbytes <= budget
    assert len([one for one in said if "source_cache" in str(one.message)]) == 1
    stats = cache.stats()
    assert stats.entries == {tier: 5} and stats.hits == 2 * 5
    if tier == "disk":
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget


def test_tiers_fill_in_order_each_within_its_budget(tmp_path) -> None:
    model = fused("bert")
    row = one_row_bytes()
    budget = {"device": row, "host": 2 * row, "disk": 10 * row}
    cache = flare.SourceStateCache(budget, directory=tmp_path)
    model.set_source_cache(cache)
    batches = [batch_of("bert", seed=seed) for seed in (0, 1)]
    wants = []
    for batch in batches:
        wants.append(step(model, batch))
    cache.flush()
    assert cache.tiers == ("device", "host", "disk")
    assert cache.stats().entries == {"device": 1, "host": 2, "disk": 3}
    for batch, want in zip(batches, wants, strict=True):
        assert_same(step(model, batch), want)
    assert cache.stats().hits == 6
    over_all = flare.SourceStateCache(4 * row, tiers=("host", "device"))
    model.set_source_cache(over_all)
    for batch in batches:
        step(model, batch)
    assert over_all.tiers == ("device", "host") and over_all.nbytes == 4 * row
    assert sum(over_all.stats().entries.values()) == 4


def test_a_shared_budget_leaves_memory_free_and_a_budget_of_ones_own_overrules_that(monkeypatch) -> None:
    from flare.source_cache import memory

    free = [1 << 30]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(memory, "memory_of", lambda device: 1 << 30)
    monkeypatch.setattr(memory, "_SLAB", 3 * one_row_bytes())
    model = fused("bert")
    for budget, entries in ((1 << 29, 3), ({"device": 1 << 29}, 9)):
        free[0] = 1 << 30
        cache = flare.SourceStateCache(budget, tiers=("device",) if isinstance(budget, dict) else ("device", "host"))
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for seed in range(3):
                model(**batch_of("bert", seed=seed))
                free[0] = 1 << 20  # the training itself has taken the rest
        assert cache.stats().entries["device"] == entries
        assert sum("little is free" in str(one.message) for one in said) == (2 if entries == 3 else 0), "one a tier"


def test_rows_on_disk_move_up_where_there_is_room(tmp_path) -> None:
    model, batch = fused("bert"), batch_of("bert")
    first = cache_in("disk", tmp_path)
    model.set_source_cache(first)
    want = step(model, batch)
    first.flush()
    second = flare.SourceStateCache({"host": 2 * one_row_bytes(), "disk": MB}, directory=tmp_path)
    model.set_source_cache(second)
    ran = SourceBlocks(model)
    assert_same(step(model, batch), want)
    assert ran.since() == {0} and second.stats().entries == {"host": 2, "disk": 3}
    for path in shards(tmp_path):
        path.unlink()
    assert_same(step(model, batch), want)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_keeps_a_tier_only_where_reading_beats_computing(fast, tmp_path, monkeypatch) -> None:
    from flare.source_cache import cache as module

    asked = []

    def seconds_to_read(tier: str, nbytes: int, device: Any, directory: Any) -> float:
        asked.append((tier, nbytes))
        return 0.0 if fast and tier != "disk" else 1e9

    monkeypatch.setattr(module, "seconds_to_read", seconds_to_read)
    model = fused("bert")
    cache = flare.SourceStateCache(MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    batches = [batch_of("bert", seed=seed) for seed in range(3)]
    wants = [step(model, batch) for batch in batches]
    assert asked == [(tier, one_row_bytes()) for tier in ("device", "host", "disk")]
    ran = SourceBlocks(model)
    for batch, want in zip(batches, wants, strict=True):
        assert_same(step(model, batch), want)
    assert cache.tiers == (("device", "host") if fast else ())
    assert ran.since() == ({0} if fast else {9}), "rows of the passes that were timed are kept too"
    assert "reading a row" in cache.decisions["disk"] and "disk not used" in cache.summary()


def test_auto_really_measures(tmp_path) -> None:
    model = fused("bert")
    cache = flare.SourceStateCache(MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    for seed in range(3):
        step(model, batch_of("bert", seed=seed))
    assert set(cache.decisions) == {"device", "host", "disk"}
    assert all(("used" in why) and " ms" in why for why in cache.decisions.values())
    assert not list(tmp_path.glob(f"*{UNFINISHED}")), "the file that was timed is gone"


def test_auto_says_what_it_leaves_out(tmp_path, monkeypatch) -> None:
    from flare.source_cache import cache as module

    measure = module.seconds_to_read
    monkeypatch.setattr(module, "seconds_to_read", lambda tier, *rest: 1e9 if tier != "disk" else measure(tier, *rest))
    model = fused("bert")
    model.set_source_cache(flare.SourceStateCache(MB, tiers="auto", directory=tmp_path / "states"))
    (tmp_path / "states").rmdir()
    with pytest.warns(UserWarning) as said:
        for _ in range(4):
            step(model, batch_of("bert"))
    text = [str(one.message) for one in said if "source_cache" in str(one.message)]
    assert len(text) == 2 and "leaves the disk tier out" in text[0] and "keeps nothing" in text[1]


def test_named_tiers_measure_nothing(monkeypatch, tmp_path) -> None:
    from flare.source_cache import cache as module

    monkeypatch.setattr(module, "seconds_to_read", lambda *_: pytest.fail("a named tier was measured"))
    model = fused("bert")
    model.set_source_cache(flare.SourceStateCache(MB, directory=tmp_path))
    for seed in range(3):
        step(model, batch_of("bert", seed=seed))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for match, error, arguments_ in [
        (r"budget=1.5 must be bytes", TypeError, {"budget": 1.5}),
        (r"budget=True must be bytes", TypeError, {"budget": True}),
        (r"tiers=\(\) is not accepted", ValueError, {"budget": 1, "tiers": ()}),
        (r"budget=-1 must be bytes, none below 0", ValueError, {"budget": -1}),
        (r"budget names 'gpu'.*'device', 'host', 'disk'", ValueError, {"budget": {"gpu": 1}}),
        (r"budget names 'host', which tiers", ValueError, {"budget": {"host": 1}, "tiers": ("device",)}),
        (r"tiers=\('ram',\) is not accepted: 'auto', or", ValueError, {"budget": 1, "tiers": ("ram",)}),
        (r"tiers='disk' is not accepted", ValueError, {"budget": 1, "tiers": "disk"}),
        (r"'disk' needs a directory=", ValueError, {"budget": 1, "tiers": ("disk",)}),
        (r"'disk' needs a directory=", ValueError, {"budget": {"disk": 1}}),
        (r"directory=.* is for the tier 'disk'", ValueError, {"budget": 1, "tiers": ("host",), "directory": "x"}),
        (r"directory=.* cannot be made", ValueError, {"budget": 1, "directory": file}),
    ]:
        with pytest.raises(error, match=match):
            flare.SourceStateCache(**arguments_)
    assert flare.SourceStateCache(1).tiers == ("device", "host")
    assert file.read_text() == "mine"


def test_what_cannot_be_kept_is_refused() -> None:
    cache = flare.SourceStateCache(MB)
    with pytest.raises(ValueError, match="source_dropout=True"):
        fused("bert", source_dropout=True).set_source_cache(cache)
    with pytest.raises(ValueError, match="no active adapter of this model fuses"):
        fused("bert", fusion=None).set_source_cache(cache)
    with pytest.raises(ValueError, match="latent_dim"):
        fused("bert", latent_dim=16).set_source_cache(cache)
    with pytest.raises(TypeError, match=r"cache must be a flare\.SourceStateCache"):
        fused("bert").set_source_cache({})
    model = fused("bert")
    model.get_base_model().bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings.weight is trained"):
        model.set_source_cache(cache)


def test_an_adapter_with_source_dropout_is_refused_when_it_becomes_active() -> None:
    model, batch = fused("bert"), batch_of("bert")
    model.set_source_cache(flare.SourceStateCache(MB))
    model.add_adapter("noisy", flare.FlareConfig(r=4, source_dropout=True, task_type="SEQ_CLS"))
    model.set_adapter("noisy")
    with pytest.raises(ValueError, match="source_dropout=True"):
        model(**batch)


def test_another_base_model_is_refused() -> None:
    cache = flare.SourceStateCache(MB)
    fused("bert").set_source_cache(cache)
    for other in (fused("bert", seed=1), fused("xlmr"), fused("bert", base={"hidden_act": "relu"})):
        with pytest.raises(ValueError, match="source_cache is bound to another base model"):
            other.set_source_cache(cache)
    fused("bert", r=3, fusion="mul").set_source_cache(cache)  # another adapter is none of its business


@pytest.mark.parametrize("change", ["in place", "requires_grad", "another tensor"])
def test_a_base_model_that_changes_is_noticed_in_the_next_pass(change) -> None:
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


def test_a_write_past_torch_is_noticed_when_the_cache_is_set_again() -> None:
    model = fused("bert")
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    model.get_base_model().bert.encoder.layer[1].output.dense.weight.data[3, 5] += 1e-3
    with pytest.raises(ValueError, match="another base model"):
        model.set_source_cache(cache)


def test_the_same_weights_elsewhere_are_the_same_model() -> None:
    model, batch = fused("bert"), batch_of("bert")
    want = step(model, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    step(model, batch)
    dense = model.get_base_model().bert.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.clone(), requires_grad=False)
    assert_same(step(model, batch), want)
    assert cache.stats().hits == 3


def test_the_fingerprint_is_of_the_frozen_backbone() -> None:
    """Not of adapters, heads, trained copies or poolers; of every weight, wherever it is wrapped."""
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


def test_trained_heads_and_embeddings_do_not_feed_back() -> None:
    """modules_to_save: the source reads the frozen original, so what is cached stays true while the copy trains."""
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
    found = set()
    for kind, seed in (("fp4", 0), ("nf4", 0), ("nf4", 1), ("nf4", 0)):
        torch.manual_seed(seed)
        linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind)
        linear.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type=kind)
        found.add(fingerprint(torch.nn.Sequential(linear.to("cpu"))))
    scaled = torch.nn.Sequential(linear)
    before = fingerprint(scaled)
    linear.weight.quant_state.absmax.mul_(2)
    assert len(found) == 3 and fingerprint(scaled) != before


def test_a_quantised_model_trains_with_a_cache_and_one_repacked_for_a_cpu_is_refused() -> None:
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
    want = step(model, batch)
    cache = flare.SourceStateCache(MB)
    model.set_source_cache(cache)
    for _ in range(2):
        assert_same(step(model, batch), want)
    assert cache.stats().hits == 3
    model.eval()
    with torch.no_grad():
        model(**batch)  # bitsandbytes repacks what it runs, where this CPU has the instructions for it
    if not getattr(new.weight.quant_state, "packing_format_for_cpu", False):
        assert_same(step(model.train(), batch), want)
        return
    with pytest.raises(ValueError, match="bitsandbytes has repacked"):
        model(**batch)


def test_every_word_counts_in_a_checksum() -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 256, (300_001,), dtype=torch.uint8)
    want = checksum(data)
    assert checksum(data.clone()) == want and checksum(data[:-1]) != want
    for position in (0, 1, 131_071, 131_072, 262_144, 300_000):
        for bit in (0, 7):
            data[position] ^= 1 << bit
            assert checksum(data) != want
            data[position] ^= 1 << bit
    data[:8], data[8:16] = data[8:16].clone(), data[:8].clone()
    assert checksum(data) != want, "exchanged words are noticed"
    misaligned = torch.arange(100, dtype=torch.uint8)
    assert checksum(misaligned[3:67]) == checksum(misaligned[3:67].clone())


# --- the disk ---------------------------------------------------------------------------------------------------------


def published(folder: Path, model: Any, *seeds: int) -> None:
    """One shard for each batch."""
    for seed in seeds:
        cache = cache_in("disk", folder)
        model.set_source_cache(cache)
        model(**batch_of("bert", seed=seed))
        cache.flush()
    model.set_source_cache(None)


def reopened(folder: Path, model: Any, *seeds: int, budget: int = MB) -> flare.SourceStateCache:
    """A fresh cache on a folder, used for some batches; losses are checked against those without a cache."""
    cache = cache_in("disk", folder, budget)
    batches = [batch_of("bert", seed=seed) for seed in seeds]
    model.set_source_cache(None)
    wants = [step(model, batch) for batch in batches]
    model.set_source_cache(cache)
    for batch, want in zip(batches, wants, strict=True):
        assert_same(step(model, batch), want, exact=False)
    return cache


@contextlib.contextmanager
def silence() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
        assert about["format"] == FORMAT and about["base"] == fingerprint(model.get_base_model())
        assert len(list(file.keys())) == 3
        for key in file.keys():  # noqa: SIM118
            assert file.get_tensor(key).numel() == one_row_bytes() and about[key].startswith("float32 32 ")
    with silence():
        assert reopened(tmp_path, model, 0).stats().hits == 3


def test_rows_of_other_sizes_and_dtypes_share_a_shard(tmp_path) -> None:
    model = fused("bert", source_padding="zero")
    batch = batch_of("bert", m=7)
    cache = cache_in("disk", tmp_path)
    model.set_source_cache(cache)
    wants = []
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            wants.append(model(**batch).loss)
    cache.flush()
    (path,) = shards(tmp_path)
    safetensors.safe_open(path, "pt")
    again = cache_in("disk", tmp_path)
    model.set_source_cache(again)
    for dtype, want in zip((torch.bfloat16, None), wants, strict=True):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            assert torch.equal(model(**batch).loss, want)
    assert again.stats().hits == 6


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def truncated_in_its_header(path: Path) -> None:
    os.truncate(path, 40)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped_in_its_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"float32") + 3] ^= 0xFF
    path.write_bytes(data)


def of_another_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(FORMAT.encode(), FORMAT[:-1].encode() + b"9"))


@pytest.mark.parametrize(
    "damage", [truncated, truncated_in_its_header, emptied, flipped_in_its_header, of_another_format]
)
def test_a_damaged_file_is_reported_left_alone_and_recomputed(damage, tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0, 1)
    intact, broken = shards(tmp_path)
    damage(broken)
    before = broken.read_bytes()
    with pytest.warns(UserWarning, match=rf"source_cache: not used, and left alone.*{broken.name}") as said:
        cache = reopened(tmp_path, model, 0, 1)
    assert len([one for one in said if issubclass(one.category, UserWarning)]) == 1
    assert cache.stats().hits == 3
    cache.flush()
    assert broken.read_bytes() == before and intact.exists()
    with pytest.warns(UserWarning, match="left alone"):
        assert reopened(tmp_path, model, 0, 1).stats().hits == 6, "the rows were written anew, into another file"


def test_every_flipped_byte_of_the_entries_is_noticed(tmp_path) -> None:
    """Of one row each: that row alone is computed anew, what is around it is used."""
    model = fused("bert")
    published(tmp_path, model, 0)
    (path,) = shards(tmp_path)
    intact = path.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8:start])
    header.pop("__metadata__")
    for place in header.values():
        begin, end = place["data_offsets"]
        for at in (begin, (begin + end) // 2, end - 1):
            data = bytearray(intact)
            data[start + at] ^= 0x10
            path.write_bytes(data)
            with pytest.warns(UserWarning, match="checksum of an entry does not match") as said:
                cache = reopened(tmp_path, model, 0)
            assert cache.stats().hits == 2 and len(said) == 1
            del cache
    path.write_bytes(intact)
    with silence():
        assert reopened(tmp_path, model, 0).stats().hits == 3


def test_a_file_cut_while_it_is_in_use_does_not_end_the_process(tmp_path) -> None:
    model = fused("bert")
    published(tmp_path, model, 0)
    cache = reopened(tmp_path, model, 0)
    assert cache.stats().hits == 3
    os.truncate(shards(tmp_path)[0], 100)
    want = step(model, batch_of("bert", seed=1))
    with pytest.warns(UserWarning, match="truncated"):
        step(model, batch_of("bert", seed=0))
    assert cache.stats().hits == 3
    assert_same(step(model, batch_of("bert", seed=1)), want)


def test_foreign_files_and_shards_of_another_model_are_left_alone(tmp_path) -> None:
    model, other = fused("bert"), fused("bert", seed=1)
    published(tmp_path, other, 0)
    mine = {"notes.txt": b"my notes", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "huge.bin": b"\xff" * 64}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning) as said:
        cache = reopened(tmp_path, model, 0)
    texts = " ".join(str(one.message) for one in said)
    assert all(name in texts for name in mine) and "of another base model" in texts
    assert cache.stats().hits == 0
    cache.flush()
    assert all((tmp_path / name).read_bytes() == content for name, content in mine.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reopened(tmp_path, model, 0).stats().hits == 3
        assert reopened(tmp_path, other, 0).stats().hits == 3, "two base models share a folder"


# --- processes --------------------------------------------------------------------------------------------------------


def in_child(work: Any) -> int:
    """The pid of a forked process that runs ``work`` and ends with 0, or with 1 after printing its error."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path) -> None:
    """Files may not grow beyond 12 KiB there: one row fits, a shard of three does not."""
    model = fused("bert")
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    wants = [step(model, batch) for batch in batches]
    published(tmp_path, model, 7)
    before = shards(tmp_path)

    def train() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        cache = cache_in("disk", tmp_path, 2 * MB)
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                for batch, want in zip(batches, wants, strict=True):
                    assert_same(step(model, batch), want, exact=False)
                cache.flush()
            model(**batch_of("bert", seed=7))
        told = [str(one.message) for one in said if "source_cache" in str(one.message)]
        assert len(told) == 1 and "takes no more source states" in told[0] and "File too large" in told[0], told
        assert cache.stats().hits == 3, cache.stats()

    assert succeeded(in_child(train))
    assert shards(tmp_path) == before and not list(tmp_path.glob(f"*{UNFINISHED}"))
    with silence():
        assert reopened(tmp_path, model, 7).stats().hits == 3


def mounted(folder: Path, nbytes: int) -> str:
    """A filesystem of a few bytes on a folder, in a user namespace of this process alone; why not, where it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts, own = 0x10000000, 0x00020000, {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if libc.unshare(user | mounts):
        return f"no user namespace: {os.strerror(ctypes.get_errno())}"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        for name, value in own.items():  # files cannot be made there by somebody it does not know
            Path("/proc/self", name).write_text(f"0 {value} 1")
    except OSError as error:
        return f"no user namespace: {error}"
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={nbytes}".encode()):
        return f"no tmpfs: {os.strerror(ctypes.get_errno())}"
    return ""


def test_a_filesystem_that_is_full_is_said_once_and_what_is_there_is_read(tmp_path) -> None:
    """A tmpfs of 16 KiB: a shard of three rows fits, a second does not."""
    model, folder = fused("bert"), tmp_path / "small"
    folder.mkdir()
    why = tmp_path / "why"
    batches = [batch_of("bert", seed=seed) for seed in range(4)]
    wants = [step(model, batch) for batch in batches]

    def train() -> None:
        why.write_text(mounted(folder, 16 * 1024))
        if why.read_text():
            return
        cache = cache_in("disk", folder)
        model.set_source_cache(cache)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                for batch, want in zip(batches, wants, strict=True):
                    assert_same(step(model, batch), want, exact=False)
                    cache.flush()
        told = [str(one.message) for one in said if "source_cache" in str(one.message)]
        assert len(told) == 1 and "No space left on device" in told[0], told
        assert cache.stats().hits == 3 and len(shards(folder)) == 1
        assert not list(folder.glob(f"*{UNFINISHED}"))
        with silence():
            assert reopened(folder, model, 0).stats().hits == 3

    assert succeeded(in_child(train))
    if why.read_text():
        pytest.skip(why.read_text())
    assert not list(folder.iterdir()), "it was that process's own"


def test_killed_at_any_moment_it_still_opens(tmp_path) -> None:
    model = fused("bert")
    seeds = range(40)
    batches = [batch_of("bert", seed=seed) for seed in seeds]

    def write() -> None:
        cache = cache_in("disk", tmp_path, 200 * MB)
        model.set_source_cache(cache)
        while True:
            for batch in batches:
                model(**batch)
                cache.flush()
            time.sleep(10)

    found, last = [], 0
    for attempt in range(12):
        pid = in_child(write)
        time.sleep(0.03 + 0.017 * attempt)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it was still at work"
        for path in shards(tmp_path):
            safetensors.safe_open(path, "pt")
        with silence():
            cache = cache_in("disk", tmp_path, 200 * MB)
            cache.bind(model.get_base_model())
        entries = cache.stats().entries["disk"]
        assert entries >= last and entries % 3 == 0, "what was published is never lost, and whole"
        found.append(entries)
        last = entries
    assert found[-1] > 0
    with silence():
        done = found[-1] // 3
        assert reopened(tmp_path, model, *range(min(done, 5))).stats().hits == 3 * min(done, 5)


@pytest.mark.parametrize("stage", ["begun", "half written", "not synced", "not named"])
def test_killed_at_each_step_of_writing_it_still_opens(stage, tmp_path, monkeypatch) -> None:
    from flare.source_cache import shards as module

    model = fused("bert")
    published(tmp_path, model, 0)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        if stage == "begun":
            monkeypatch.setattr(module.fcntl, "flock", die)
        elif stage == "half written":
            monkeypatch.setattr(module, "bytes", die, raising=False)  # what fills up the first entry
        elif stage == "not synced":
            monkeypatch.setattr(module.os, "fsync", die)
        else:
            monkeypatch.setattr(module.Path, "rename", die)
        published(tmp_path, model, 1)

    assert os.waitpid(in_child(write), 0)[1] == signal.SIGKILL
    assert len(shards(tmp_path)) == 1 and len(list(tmp_path.glob(f"*{UNFINISHED}"))) == 1
    with silence():
        assert reopened(tmp_path, model, 0, 1).stats().hits == 3


def test_what_a_killed_process_left_is_cleared_away_and_a_living_ones_is_not(tmp_path) -> None:
    import fcntl

    model = fused("bert")
    dead, alive = (tmp_path / f"source-states-{name}{UNFINISHED}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with silence():
            reopened(tmp_path, model, 0)
        assert alive.exists() and not dead.exists()


def test_two_processes_share_a_directory(tmp_path) -> None:
    model = fused("bert")
    shared, own = range(3), {"a": range(3, 8), "b": range(8, 13)}

    def worker(name: str) -> Any:
        def work() -> None:
            cache = cache_in("disk", tmp_path, 10 * MB)
            model.set_source_cache(cache)
            with silence():
                for seed in (*shared, *own[name]):
                    model(**batch_of("bert", seed=seed))
                    cache.flush()

        return work

    pids = [in_child(worker(name)) for name in own]
    assert [succeeded(pid) for pid in pids] == [True, True]
    with silence():
        cache = reopened(tmp_path, model, *range(13), budget=10 * MB)
    assert cache.stats().hits == 39


def test_one_process_reads_what_another_has_published_since(tmp_path) -> None:
    model = fused("bert")
    here = cache_in("disk", tmp_path)
    model.set_source_cache(here)
    step(model, batch_of("bert", seed=1))
    pid = in_child(lambda: published(tmp_path, model, 5))
    assert succeeded(pid)
    here.refresh()
    ran = SourceBlocks(model)
    step(model, batch_of("bert", seed=5))
    assert ran.since() == {0} and here.stats().hits == 3


@pytest.mark.parametrize("budget", [MB, 30_000])  # of the smaller one, each row is a file
def test_a_directory_that_is_gone_degrades_with_one_message(budget, tmp_path) -> None:
    import shutil

    model, folder = fused("bert"), tmp_path / "states"
    want = step(model, batch_of("bert"))
    cache = cache_in("disk", folder, budget)
    model.set_source_cache(cache)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="takes no more source states") as said:
        assert_same(step(model, batch_of("bert")), want)
        cache.flush()
        assert_same(step(model, batch_of("bert")), want)
        cache.flush()
    assert len(said) == 1


def test_a_relative_directory_is_where_it_was_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = cache_in("disk", Path("states"))
    model = fused("bert")
    model.set_source_cache(cache)
    step(model, batch_of("bert"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cache.flush()
    assert shards(tmp_path / "states")
    step(model, batch_of("bert"))
    assert cache.stats().hits == 3


# --- the trainer ------------------------------------------------------------------------------------------------------

SEQ2SEQ = {"mt5": FlareSeq2SeqTrainer}


def trained(
    task: str, folder: Path, cache: Any = None, *, model: Any = None, resume: Any = None, **options: Any
) -> tuple[Any, SourceBlocks]:
    from transformers import Seq2SeqTrainingArguments

    from flare.data import FlareDataCollator

    model = model or flare_model(task, lora_alpha=8, source_padding=options.pop("source_padding", "keep"))
    layout = {"bert": "encoder", "llama": "causal", "mt5": "seq2seq"}[task]
    data = Dataset.from_list(rows(task, 10))
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_strategy": "steps"}
    args = arguments(folder, **{**defaults, "logging_steps": 1, **options})
    if task == "mt5":
        args = Seq2SeqTrainingArguments(**{**args.to_dict(), "output_dir": str(folder)})
    # what one padded length is for a run without a cache
    collator = FlareDataCollator(tokenizer(), layout=layout).fitted(data)
    trainer = SEQ2SEQ.get(task, FlareTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_list(rows(task, 4, seed=5)),
        source_cache=cache,
        data_collator=collator if cache is None else FlareDataCollator(tokenizer(), layout=layout),
    )
    ran = SourceBlocks(model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, ran


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("task", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_two_epochs_run_each_source_block_once_per_example(task, padding, tmp_path, capsys) -> None:
    plain, ran = trained(task, tmp_path / "plain", source_padding=padding)
    assert ran.since() == {20}
    cache = flare.SourceStateCache(4 * MB, directory=tmp_path / "states")
    trainer, ran = trained(task, tmp_path / "cached", cache, source_padding=padding)
    assert ran.since() == {10}
    assert len(losses(plain)) == 6
    torch.testing.assert_close(losses(trainer), losses(plain), rtol=1e-5, atol=1e-6)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["source_cache_hit_rate"] for entry in steps] == [0.0] * 3 + [1.0] * 3
    assert all(entry["source_cache_bytes"] > 0 for entry in steps)
    last = trainer.state.log_history[-1]
    assert last["source_cache_hit_rate"] == 0.5 and "train_runtime" in last
    assert isinstance(last["source_cache_seconds_saved"], float)
    first = trainer.evaluate()
    assert ran.since() == {4} and not any("cache" in name for name in first)
    again = trainer.evaluate()
    assert ran.since() == {0}
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert "source_cache: 10 of 20 rows read (50.0%)" in capsys.readouterr().out


def test_a_collator_of_ones_own_is_told_why_nothing_hits(tmp_path) -> None:
    from flare.data import FlareDataCollator

    model = flare_model("bert")
    own = FlareDataCollator(tokenizer())
    trainer = FlareTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=4, per_device_train_batch_size=2),
        train_dataset=Dataset.from_list(rows("bert", 10)),
        data_collator=lambda batch: own(batch),
        source_cache=flare.SourceStateCache(MB),
    )
    with pytest.warns(UserWarning, match="padded to another width") as said:
        trainer.train()
    assert len([one for one in said if "another width" in str(one.message)]) == 1


def test_a_run_that_is_resumed_finds_its_rows(tmp_path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    whole, _ = trained("bert", tmp_path / "whole", **options)
    states = tmp_path / "states"
    trained("bert", tmp_path / "run", cache_in("disk", states), **options)
    cache = cache_in("disk", states)
    resumed, ran = trained("bert", tmp_path / "run", cache, resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert ran.since() == {0} and cache.stats().hit_rate == 1.0
    torch.testing.assert_close(losses(resumed)[-3:], losses(whole)[-3:], rtol=1e-5, atol=1e-6)
    assert cache.stats().seconds_saved is None and "not known" in cache.summary()


def test_a_trainer_without_a_fusing_adapter_is_refused(tmp_path) -> None:
    for model, match in (
        (lora("bert"), "call flare.fast_lora"),
        (flare_model("bert", fusion=None), "no active adapter"),
    ):
        with pytest.raises(ValueError, match=match):
            FlareTrainer(model=model, args=arguments(tmp_path), source_cache=flare.SourceStateCache(MB))


def test_a_base_model_changed_between_runs_is_refused(tmp_path) -> None:
    cache = flare.SourceStateCache(MB)
    trainer, _ = trained("bert", tmp_path, cache)
    trainer.model.get_base_model().bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="bound to another base model"):
        trainer.train()


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_special_tokens_that_the_trainer_takes_from_the_tokenizer_are_no_other_base_model(task, tmp_path) -> None:
    model = flare_model(task)
    model.get_base_model().config.pad_token_id = None
    trainer = FlareTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=2, per_device_train_batch_size=5),
        train_dataset=Dataset.from_list(rows(task, 10)),
        processing_class=tokenizer(),
        source_cache=flare.SourceStateCache(MB),
    )
    trainer.train()
    config = model.get_base_model().config
    assert (config.pad_token_id, config.bos_token_id) == (0, 4)  # the Trainer did take them
    assert trainer.source_cache.stats().hit_rate == 0.5


def test_the_pad_token_that_positions_are_counted_from_is_part_of_the_fingerprint() -> None:
    one, other = (tiny.model("xlmr", pad_token_id=pad).requires_grad_(False) for pad in (1, 0))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)
    one.config.pad_token_id, one.config.eos_token_id = 7, 8
    assert fingerprint(one) == fingerprint(fused("xlmr").get_base_model())


def test_logged_hit_rates_are_of_this_training_alone(tmp_path) -> None:
    cache = flare.SourceStateCache(MB)
    options = {"eval_strategy": "epoch", "num_train_epochs": 3}
    first, _ = trained("bert", tmp_path / "first", cache, **options)
    second, _ = trained("bert", tmp_path / "second", cache, model=flare_model("bert", lora_alpha=8), **options)
    second.train()
    rates = [entry["source_cache_hit_rate"] for entry in first.state.log_history if "source_cache_hit_rate" in entry]
    assert rates == [0.0] * 3 + [1.0] * 6 + [pytest.approx(2 / 3)]
    for entry in second.state.log_history:
        assert entry.get("source_cache_hit_rate", 1.0) == 1.0


def test_an_evaluation_that_casts_the_base_model_does_without_the_cache(tmp_path) -> None:
    trainer, ran = trained("bert", tmp_path, flare.SourceStateCache(MB), bf16_full_eval=True)
    ran.since()
    with pytest.warns(UserWarning, match="bf16_full_eval casts the base model"):
        trainer.evaluate()
    assert ran.since() == {4}
    with pytest.raises(ValueError, match="bound to another base model"):
        trainer.train()
