"""What only a CUDA device can show of whole models: streams, pinned memory, a host that runs ahead of the device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cached_states import MB, SourceBlocks, batch_of, fused, shards, step
from trained import arguments, flare_model
from two_streams import rows, tokenizer

import flare
from flare.source.memory import Offload
from flare.source.states import StateKey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ("bert", "llama", "mt5")
#: Cycles for which the device sleeps (some 25 ms), so that the host is far ahead of it.
_AHEAD = 50_000_000


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def close(got: Any, want: Any) -> None:
    """Losses and gradients (see cached_states.step), up to the order of sums that a device leaves open."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, msg=name, rtol=0, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_cpus(family: str, cuda: torch.device) -> None:
    model, batch = fused(family), batch_of(family)
    want = step(model, batch)
    loss, grads = step(model.to(cuda), on(cuda, batch))
    close((loss.cpu(), {name: grad.cpu() for name, grad in grads.items()}), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", ["offload", "recompute"])
def test_every_way_to_wait_has_the_gradients_of_keep(family: str, memory: str, cuda: torch.device) -> None:
    batch = on(cuda, batch_of(family))
    results = []
    for mode in ("keep", memory):
        model = fused(family, source_memory=mode, source_padding="zero").to(cuda)
        torch.cuda._sleep(_AHEAD)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), tiny.gradients(model)))
    close(*results)


def test_offloaded_states_pass_through_two_places_on_the_device(cuda: torch.device) -> None:
    """The host queues all states at once; none is lost, and two and the one being made are all that is there."""
    numbers, count = 8 << 20, 12
    size = 4 * numbers
    sums = torch.zeros(count, device=cuda)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    memory = Offload(cuda)
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    torch.cuda._sleep(_AHEAD)
    for index in range(count):
        memory.put(StateKey("stack", index), torch.full((numbers,), float(index + 1), device=cuda))
    saved = memory.saved()
    assert torch.cuda.max_memory_allocated(cuda) - before <= 3 * size
    assert torch.cuda.memory_allocated(cuda) == before and saved == []
    assert all(held.is_pinned() for held in memory.host.values())

    def visit(key: StateKey, x: torch.Tensor) -> None:
        torch.cuda._sleep(_AHEAD // 10)
        sums[key.position] = x.mean()

    for _ in range(2):  # as with retain_graph=True
        sums.zero_()
        torch.cuda.reset_peak_memory_stats(cuda)
        memory.replayer()(saved, visit)
        assert torch.cuda.max_memory_allocated(cuda) - before <= 3 * size
        assert sums.tolist() == [index + 1.0 for index in range(count)]
    reserved = torch.cuda.memory_reserved(cuda)
    for _ in range(4):  # a stream for each pass would reserve memory of its own
        again = Offload(cuda)
        again.put(StateKey("stack", 0), torch.ones(numbers, device=cuda))
        again.replayer()(again.saved(), lambda key, x: None)
    assert torch.cuda.memory_reserved(cuda) == reserved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_second_epoch_reads_what_the_first_computed(
    family: str, tier: str, cuda: torch.device, tmp_path: Path
) -> None:
    model, batch = fused(family).to(cuda), on(cuda, batch_of(family))
    want = step(model, batch)
    cache = flare.SourceStateCache(64 * MB, tiers=(tier,), directory=tmp_path if tier == "disk" else None)
    model.set_source_cache(cache)
    torch.cuda._sleep(_AHEAD)
    first = step(model, batch)
    cache.flush()  # while the device may still be at the copies
    ran = SourceBlocks(model)
    for found in (first, step(model, batch)):
        close(found, want)
    assert ran.since() == {0} and cache.stats().hits == 3
    if tier == "disk":
        assert len(shards(tmp_path)) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again = flare.SourceStateCache(64 * MB, tiers=(tier,), directory=tmp_path)
            model.set_source_cache(again)
            close(step(model, batch), want)
        assert again.stats().hits == 3
    elif tier == "host":
        assert all(entry.data.is_pinned() for entry in cache._tiers[0].entries.values())


def test_auto_measures_every_tier(cuda: torch.device, tmp_path: Path) -> None:
    model = fused("bert").to(cuda)
    cache = flare.SourceStateCache(64 * MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    batches = [on(cuda, batch_of("bert", seed=seed)) for seed in range(3)]
    found = [step(model, batch) for batch in batches]
    assert set(cache.decisions) == {"device", "host", "disk"} and all(" ms" in why for why in cache.decisions.values())
    found = [step(model, batch) for batch in batches]
    model.set_source_cache(None)
    for batch, one in zip(batches, found, strict=True):
        close(one, step(model, batch))


@pytest.mark.parametrize("way", ["shared", "separate"])
def test_generation_is_the_cpus(way: str, cuda: torch.device) -> None:
    model = fused("llama", source_layer_offset=0).eval()
    prompts = {name: value for name, value in batch_of("llama").items() if name != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1, "source_pass": way}
    want = model.generate(**prompts, **options)
    assert torch.equal(model.to(cuda).generate(**on(cuda, prompts), **options).cpu(), want)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_trainer_with_a_cache(options: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for cache in (None, flare.SourceStateCache(64 * MB)):
        trainer = flare.FlareTrainer(
            model=flare_model("bert", source_padding="zero"),
            args=arguments(
                tmp_path,
                use_cpu=False,
                num_train_epochs=2,
                per_device_train_batch_size=5,
                logging_strategy="steps",
                logging_steps=1,
                dataloader_pin_memory=True,
                **options,
            ),
            train_dataset=rows("bert", 10),
            processing_class=tokenizer(),
            source_cache=cache,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)
    assert trainer.source_cache.stats().hit_rate == 0.5
