"""Test the warm read of SourceStateCache: if all rows of a batch are cached, their states are read in one call.

A reader passes the states of a batch to a visitor one by one. The reader's method ``warm`` returns all states together,
or None if a row is missing.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from typing import Any

import pytest
import tiny
import torch
import transformers
from cached_states import (
    FAMILIES,
    MB,
    assert_same,
    batch_of,
    cache_in,
    fused,
    one_row_bytes,
    reader_of,
    request_of,
    step,
    take,
)

import flare
from flare.source.hooks import runtime_of
from flare.source.source_pass import Preparation
from flare.source_cache import cache as cache_module
from flare.source_cache import reader as reader_module
from flare.source_cache import shards as shards_module


def needs_cuda(test: Any) -> Any:
    """Mark a test for CUDA devices only."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(absent(test))


SOURCE = ("source_input_ids", "source_attention_mask", "source_labels")


def visited(reader: Any) -> dict[Any, torch.Tensor]:
    """Return the states that a reader passes to a visitor."""
    states: dict[Any, torch.Tensor] = {}
    reader(states.__setitem__)
    return states


def filled(model: Any, cache: flare.SourceStateCache, *batches: Any) -> flare.SourceStateCache:
    """Store the states of the batches' rows in a cache, and return the cache."""
    for batch in batches:
        visited(reader_of(model, cache, batch))
    cache.flush()
    return cache


def lookup_model(model: Any) -> Any:
    """Return an object with the only method of the model that ``lookup`` calls."""
    return types.SimpleNamespace(source_request=lambda: request_of(model))


def stored(model: Any, key: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which positions of a state the cache stores, as a bool tensor: (B, m), or (B, u) for a decoder."""
    zero = model.peft_config["default"].source_padding == "zero"
    if key.stack in runtime_of(model.get_base_model()).map.decoders:
        return torch.ones(batch["source_labels"].shape, dtype=torch.bool)
    return batch["source_attention_mask"] != 0 if zero else torch.ones_like(batch["source_input_ids"]) != 0


def with_holes(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch whose source mask has gaps in the last row and is 0 in the first row."""
    mask = batch["source_attention_mask"].clone()
    mask[-1] = torch.arange(mask.shape[1]) % 3 != 1
    mask[0] = 0
    return {**batch, "source_attention_mask": mask}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that positions that are never written are detected."""
    plain = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.usefixtures("poisoned")
def test_a_warm_batch_equals_the_visited_states_bit_for_bit(family, padding, tier, tmp_path) -> None:
    """The batch has rows of two other batches in another order, one row twice, gaps, and a row without tokens."""
    model = fused(family, source_padding=padding)
    first, second = batch_of(family), with_holes(batch_of(family, seed=4))
    cache = filled(model, cache_in(tier, tmp_path), first, second)
    batch = {n: torch.cat([first[n][[2, 0]], second[n][[2, 0, 1, 2]]]) for n in SOURCE if n in first}
    reader = reader_of(model, cache, batch)
    rows = cache.stats().rows
    actual = reader.warm()
    assert actual is not None and cache.stats().rows == rows + 6
    expected = visited(reader)
    assert cache.stats().rows == rows + 6, "a second read, as in a backward pass, is not counted"
    assert list(actual) == list(expected)
    for key, state in actual.items():
        where = stored(model, key, batch)
        assert state.shape == expected[key].shape and state.dtype == expected[key].dtype and state.is_contiguous()
        assert torch.equal(state[where], expected[key][where]) and not state[~where].any()


def test_a_batch_may_have_rows_of_several_tiers(tmp_path) -> None:
    model, batch = fused("bert"), batch_of("bert")
    budget = {"device": one_row_bytes(), "host": one_row_bytes(), "disk": MB}
    cache = filled(model, flare.SourceStateCache(budget, directory=tmp_path), batch)
    assert cache.stats().entries == {"device": 1, "host": 1, "disk": 1}
    actual = reader_of(model, cache, batch).warm()
    expected = visited(reader_of(model, cache, batch))
    assert actual is not None and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_columns_on_the_host_are_read_in_place_of_the_inputs() -> None:
    """The reader's inputs are on the meta device, so only the caller's columns on the CPU have token ids to read."""
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, flare.SourceStateCache(MB), batch)
    request = request_of(model)
    columns, keys = request.columns(batch, types=True)
    inputs = {name: column.to("meta") for name, column in columns.items()}
    actual = cache.reader(request.model, inputs, keys, Preparation(), host=columns).warm()
    expected = reader_of(model, cache, batch).warm()
    assert actual is not None and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_batch_with_a_missing_row_is_not_warm(monkeypatch) -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, flare.SourceStateCache(MB), take(batch, 0, 2))
    reader = reader_of(model, cache, batch)
    before = cache.stats()
    assert reader.warm() is None and cache.lookup(lookup_model(model), batch) is None
    assert cache.stats() == before, "rows are counted only when the missing row is computed"
    visited(reader)
    assert (cache.stats().rows, cache.stats().hits) == (before.rows + 3, before.hits + 2)
    assert reader_of(model, cache, batch).warm() is not None
    monkeypatch.setattr(cache, "undecided", True)
    assert reader_of(model, cache, batch).warm() is None, "every row is computed until tiers='auto' has decided"


def test_a_missing_row_is_detected_before_any_row_is_read_from_disk(tmp_path, monkeypatch) -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, cache_in("disk", tmp_path), take(batch, 0, 1))
    monkeypatch.setattr(shards_module, "checksum", lambda _: pytest.fail("a row was read"))
    assert reader_of(model, cache, batch).warm() is None


def test_a_damaged_row_on_disk_is_computed(tmp_path) -> None:
    model, batch = fused("bert"), batch_of("bert")
    filled(model, cache_in("disk", tmp_path), batch)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="checksum of an entry does not match"):
        assert reader_of(model, cache_in("disk", tmp_path), batch).warm() is None


def test_the_plan_of_blocks_on_several_devices_has_no_device() -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, flare.SourceStateCache(MB), batch)
    plan = reader_of(model, cache, batch).batch.plan
    assert plan.device == torch.device("cpu")
    base = model.get_base_model()
    base.bert.encoder.layer[1].to("meta")
    assert type(plan).of(plan.keys, (), base).device is None


def calls_of(layers: int) -> int:
    """Return the number of Python and C calls in one warm ``lookup`` of a model with ``layers`` blocks."""
    config = tiny.config("xlmr", num_hidden_layers=layers)
    model = flare.fast_lora(transformers.XLMRobertaForSequenceClassification(config), r=4)
    batch = batch_of("xlmr")
    cache = filled(model, flare.SourceStateCache(8 * MB), batch)
    request, count = request_of(model), 0
    model = types.SimpleNamespace(source_request=lambda: request)

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    cache.lookup(model, batch)
    sys.setprofile(profile)
    try:
        states = cache.lookup(model, batch)
    finally:
        sys.setprofile(None)
    assert states is not None and len(states) == layers
    return count


def test_calls_of_a_warm_read_hardly_grow_with_depth() -> None:
    """Each further block adds at most three calls to a read.

    The number of calls that compare weights, look up rows and copy rows does not depend on the number of blocks.
    """
    few, many = calls_of(4), calls_of(12)
    assert (many - few) / 8 <= 3, (few, many)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_a_warm_read_of_a_batch_on_the_host_does_not_wait_for_a_device(family, padding, monkeypatch) -> None:
    model, batch = fused(family, source_padding=padding), with_holes(batch_of(family))
    cache = filled(model, flare.SourceStateCache(MB), batch)
    for name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))
    assert reader_of(model, cache, batch).warm() is not None
    assert cache.lookup(lookup_model(model), batch) is not None


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("autocast", [False, True])
def test_looked_up_states_replace_a_source(family, padding, autocast) -> None:
    model, batch = fused(family, source_padding=padding), batch_of(family)
    bf16 = torch.bfloat16
    with torch.autocast("cpu", bf16, enabled=autocast):
        expected = step(model, batch)
        cache = filled(model, flare.SourceStateCache(MB), batch)
    if autocast:
        assert cache.lookup(lookup_model(model), batch) is None, "without autocast, rows have other keys"
    with torch.inference_mode():
        states = cache.lookup(lookup_model(model), batch, dtype=bf16 if autocast else None)
    assert states is not None and cache.stats().hits == 3
    assert states.attention_mask is batch["source_attention_mask"]
    target = {name: value for name, value in batch.items() if not name.startswith("source_")}
    with torch.autocast("cpu", bf16, enabled=autocast):
        assert_same(step(model, {**target, "source_states": states}), expected)
        assert cache.lookup(lookup_model(model), batch) is not None


def test_lookup_finds_states_of_an_encoder_alone_and_with_its_decoder() -> None:
    model, batch = fused("mt5"), batch_of("mt5")
    encoder = {name: value for name, value in batch.items() if name != "source_labels"}
    cache = filled(model, flare.SourceStateCache(MB), batch, encoder)
    for columns, count in ((encoder, tiny.LAYERS), (batch, tiny.LAYERS + 2)):
        states = cache.lookup(lookup_model(model), columns)
        expected = visited(reader_of(model, cache, columns))
        assert states is not None and len(states) == count and states.shape == columns["source_input_ids"].shape
        assert all(torch.equal(states.states[key], expected[key]) for key in expected)


def test_a_mask_of_ones_and_no_mask_give_the_same_keys() -> None:
    model, batch = fused("bert"), batch_of("bert")
    whole = {**batch, "source_attention_mask": torch.ones_like(batch["source_input_ids"])}
    cache = filled(model, flare.SourceStateCache(MB), whole)
    for columns in (whole, {**whole, "source_attention_mask": None}):
        states = cache.lookup(lookup_model(model), columns)
        assert states is not None and states.attention_mask is None


def test_errors_of_lookup_name_the_argument(monkeypatch) -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, flare.SourceStateCache(MB), batch)
    with pytest.raises(TypeError, match=r"model must have FLARE adapters.*got BertForSequenceClassification"):
        cache.lookup(tiny.model("bert"), batch)
    with pytest.raises(TypeError, match=r"source_input_ids must be an integer tensor \(B, m\), got NoneType"):
        cache.lookup(lookup_model(model), {"input_ids": batch["input_ids"]})
    for name in ("source_attention_mask", "source_token_type_ids"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 4\), expected.*\(3, 9\)"):
            cache.lookup(lookup_model(model), {**batch, name: batch["source_input_ids"][:, :4]})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured.*SourceStateCache.lookup before"):
        cache.lookup(lookup_model(model), batch)


# --- changes of the base model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["window", "rope", "another config", "module", "merged", "buffer"])
def test_a_changed_model_is_detected(change) -> None:
    model, batch = fused("mistral"), batch_of("llama")
    base = model.get_base_model()
    base.model.register_buffer("scale", torch.ones(1))
    cache = filled(model, flare.SourceStateCache(MB), batch)
    reader = reader_of(model, cache, batch)
    assert reader.warm() is not None
    match = "another base model"
    if change == "window":
        base.config.sliding_window = 3
    elif change == "rope":
        base.config.rope_parameters["rope_theta"] = 77.0
    elif change == "another config":
        base.config = tiny.config("mistral", rms_norm_eps=1e-3)
    elif change == "module":
        base.model.layers[1].mlp = tiny.model("mistral", seed=5).requires_grad_(False).model.layers[1].mlp
    elif change == "buffer":
        base.model.scale = torch.full((1,), 2.0)
    else:
        model.add_adapter("plain", flare.FlareConfig(r=2, fusion=None, target_modules=["v_proj"]))
        model.merge_adapter(["plain"])
        match = "an adapter is merged"
    with pytest.raises(ValueError, match=match):
        reader_of(model, cache, batch)
    with pytest.raises(ValueError, match=match):
        cache.lookup(lookup_model(model), batch)
    if change == "window":
        base.config.sliding_window = tiny.config("mistral").sliding_window
        assert reader_of(model, cache, batch).warm() is not None


def test_irrelevant_changes_do_not_read_the_weights_again(monkeypatch) -> None:
    model, batch = fused("bert"), batch_of("bert")
    cache = filled(model, flare.SourceStateCache(MB), batch)
    monkeypatch.setattr(cache_module, "fingerprint", lambda _: pytest.fail("all weights were read"))
    base = model.get_base_model()
    base.config.use_cache, base.config.pad_token_id = False, 5
    assert reader_of(model, cache, batch).warm() is not None
    model.add_adapter("other", flare.FlareConfig(r=2, target_modules=["value", "dense"], task_type="SEQ_CLS"))
    model.delete_adapter("other")
    assert reader_of(model, cache, batch).warm() is not None


def test_a_cache_keeps_no_model_alive() -> None:
    model = fused("bert")
    cache = filled(model, flare.SourceStateCache(MB), batch_of("bert"))
    reference = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert reference() is None and cache.stats().entries["device"] == 3


# --- CUDA streams, replaced by logging objects ------------------------------------------------------------------------


class FakeStream:
    """A stream that logs its operations; all streams share one log."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append("off")

    def record_event(self) -> Any:
        return types.SimpleNamespace(synchronize=lambda: self.log.append("the host waits"))

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_rows_in_host_memory_are_copied_on_a_separate_stream(monkeypatch) -> None:
    """FakeStream logs the order of operations on a CPU. The host may run two reads ahead, and then waits."""
    model, batch = fused("mt5", source_padding="zero"), batch_of("mt5")
    cache = filled(model, cache_in("host", None), batch)
    reader, log = reader_of(model, cache, batch), []
    expected = reader.warm()
    computing, copying = FakeStream("computing", log), FakeStream("copying", log)
    copy = reader_module.copy_each
    monkeypatch.setattr(reader_module, "_fill_on_cpu", reader_module._fill_on_cuda)
    monkeypatch.setattr(reader_module, "copy_each", lambda *args: (log.append(f"{len(args[0])} copies"), copy(*args)))
    monkeypatch.setattr(reader_module, "_copy_stream", functools.cache(reader_module._CopyStream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"kept for {stream.name}"))
    one = ["on copying", "6 copies", "off", "computing waits for copying", "kept for computing", "kept for computing"]
    for wait in ([], [], ["the host waits"], ["the host waits"]):
        actual = reader.warm()
        assert log == wait + one and actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
        log.clear()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_rows_are_copied_on_a_separate_stream_without_a_wait(tier, padding, tmp_path) -> None:
    """States that are looked up while the device is busy are correct, and the host does not wait for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    model, batch = fused("llama", source_padding=padding).to(device), with_holes(batch_of("llama"))
    moved = {name: value.to(device) for name, value in batch.items()}
    cache = filled(model, cache_in(tier, tmp_path), moved)
    expected = {key: state.clone() for key, state in visited(reader_of(model, cache, moved)).items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):  # buffers are freed and allocated again while work on them is still queued
            torch.cuda._sleep(10_000_000)
            states = cache.lookup(lookup_model(model), batch)
            assert states is not None
            sums = {key: state.double().sum() for key, state in states.states.items()}
            copies = {key: state.clone() for key, state in states.states.items()}
            del states
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for key, state in copies.items():
        where = stored(model, key, batch).to(device)
        assert state.device == device and torch.equal(state[where], expected[key][where]) and not state[~where].any()
        assert torch.equal(sums[key], state.double().sum())


@needs_cuda
def test_ids_on_the_device_give_the_same_keys() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, batch = fused("mt5", source_padding="zero").to(device), batch_of("mt5")
    moved = {name: value.to(device) for name, value in batch.items()}
    cache = filled(model, flare.SourceStateCache(MB), moved)
    on_host, on_device = cache.lookup(lookup_model(model), batch), cache.lookup(lookup_model(model), moved)
    assert on_host is not None and on_device is not None
    assert all(torch.equal(one, other) for one, other in zip(on_host, on_device, strict=True))
