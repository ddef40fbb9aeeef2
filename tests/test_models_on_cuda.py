"""What only a CUDA device can show of whole models: streams, pinned memory, a host that runs ahead of the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cached_states import MB, SourceBlocks, batch_of, fused, shards, step
from peft import LoraConfig, get_peft_model
from trained import arguments, flare_model
from transformers import XLMRobertaForSequenceClassification
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


# --- steps captured in CUDA graphs ------------------------------------------------------------------------------------

STEPS = 7  # two eager ones, the capture with its replay, and further replays
Made = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def trained(model: Any, batches: list[dict[str, torch.Tensor]], run: Any, *, dtype: torch.dtype | None = None) -> Made:
    """Losses of a loop with AdamW, and the trained parameters behind it."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.01)
    losses = []
    for batch in batches:
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            losses.append(run(batch).detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in weights.items()}


def eagerly(model: Any) -> Any:
    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    return run


def as_repeatable(got: Made, want: Made, again: Made) -> None:
    """Bit-equal where eager steps are, else up to the order of sums that the device leaves open."""
    repeatable = all(torch.equal(*pair) for pair in zip(want[0], again[0], strict=True))
    tolerance = {"rtol": 0, "atol": 0} if repeatable else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, msg=name, **tolerance)


def stock_lora(device: torch.device) -> Any:
    model = get_peft_model(tiny.model("bert"), LoraConfig(r=4, target_modules=["query", "value"]))
    tiny.randomize_lora(model)
    return model.to(device)


def ones(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in batch.items()}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("kind", ["lora", "bert", "llama", "mt5"])
def test_a_captured_step_is_the_eager_one(kind: str, dtype: torch.dtype | None, padded: bool, cuda: Any) -> None:
    """A batch on the host, as a data loader makes it; every step has other values."""

    def make() -> Any:
        return stock_lora(cuda) if kind == "lora" else fused(kind, source_padding="keep").to(cuda)

    family = "bert" if kind == "lora" else kind
    batches = [batch_of(family, seed=seed) for seed in range(STEPS)]
    batches = batches if padded else [ones(batch) for batch in batches]
    if kind == "lora":
        batches = [{name: v for name, v in batch.items() if not name.startswith("source")} for batch in batches]
    there = [on(cuda, batch) for batch in batches]
    eager = []
    for _ in range(2):
        model = make()
        eager.append(trained(model, there, eagerly(model), dtype=dtype))
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graphs")
        got = trained(model, batches, flare.GraphedStep(model), dtype=dtype)
    as_repeatable(got, *eager)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_captured_step_reads_a_warm_cache(tier: str, cuda: torch.device) -> None:
    batches = [batch_of("bert", seed=seed) for seed in range(3)]
    there = [on(cuda, batch) for batch in batches]
    results = []
    for graphed in (False, False, True):
        model, cache = fused("bert").to(cuda), flare.SourceStateCache(64 * MB, tiers=(tier,))
        model.set_source_cache(cache)
        for batch in there:
            model(**batch)  # the first epoch computes the rows
        if not graphed:
            results.append(trained(model, there * 3, eagerly(model)))
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cuda_graphs")
            step = flare.GraphedStep(model, source_cache=cache)
            computed = cache.stats().rows - cache.stats().hits
            results.append(trained(model, batches * 3, step))
        stats = cache.stats()
        assert stats.rows - stats.hits == computed, "every row came from the cache"
    as_repeatable(results[2], results[0], results[1])


def test_every_replay_draws_its_own_dropout_masks(cuda: torch.device) -> None:
    """Of the adapters and of the model: those that eager steps would have drawn."""
    model = fused("bert", lora_dropout=0.3, base={"hidden_dropout_prob": 0.1}).to(cuda)
    batch = batch_of("bert")
    torch.cuda.manual_seed(1)
    step = flare.GraphedStep(model)
    losses = [float(step(batch)) for _ in range(STEPS)]
    assert len(set(losses)) == STEPS
    torch.cuda.manual_seed(1)
    assert float(step(batch)) == pytest.approx(losses[0], rel=1e-4), "a seed reaches the replays"


def test_shapes_share_memory_and_gradients(cuda: torch.device) -> None:
    model, want = fused("bert").to(cuda), fused("bert").to(cuda)
    batches = [batch_of("bert", B=B, m=m) for B, m in [(3, 9), (2, 30), (5, 17)]]
    step = flare.GraphedStep(model, max_graphs=3)
    held = []
    for _ in range(6):
        for batch in batches:  # gradients accumulate over all shapes
            step(batch)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(cuda), torch.cuda.memory_reserved(cuda)))
    run = eagerly(want)
    for batch in batches * 6:
        run(on(cuda, batch))
    close((torch.zeros(()), tiny.gradients(model)), (torch.zeros(()), tiny.gradients(want)))
    assert held[3] == held[4] == held[5]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_that_waits_for_the_device_goes_on_eagerly(dropout: float, cuda: torch.device) -> None:
    """The capture fails in the middle: gradients, random numbers, allocator and other graphs are right behind it."""
    results = []
    batches = [batch_of("bert", m=m, seed=seed) for seed, m in enumerate([9, 9, 9, 9, 6, 6, 6, 6, 9, 6, 9, 6])]
    for graphed in (False, False, True):
        model = fused("bert", lora_dropout=dropout).to(cuda)

        def waits(batch: dict[str, torch.Tensor], model: Any = model) -> torch.Tensor:
            loss = model(**batch).loss
            if batch["input_ids"].shape[1] == 6:
                assert loss.item() > 0
            loss.backward()
            return loss

        torch.cuda.manual_seed(5)
        if graphed:
            with pytest.warns(UserWarning, match="a step could not be captured"):
                results.append(trained(model, batches, flare.GraphedStep(model, waits)))
        else:
            results.append(trained(model, [on(cuda, batch) for batch in batches], waits))
    as_repeatable(results[2], results[0], results[1])  # with dropout too: replays go on with the same random numbers


def kernels(run: Any) -> tuple[Counter[str], float]:
    """The kernels that a call launches, and the seconds for which the device was busy."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(event.name for event in events), sum(event.self_device_time_total for event in events) / 1e6


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["lora", "keep"])
def test_attention_runs_its_eager_kernels_in_a_replay(
    kind: str, padded: bool, cuda: torch.device, record_property: Any
) -> None:
    """XLM-R Large's shape, four blocks in bf16; wall over device-busy time is reported for both ways."""
    config = tiny.config("xlmr", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=4)
    config.max_position_embeddings, config.vocab_size = 514, 250002
    torch.manual_seed(0)
    model = flare.fast_lora(XLMRobertaForSequenceClassification(config), r=64, source_memory="keep").to(cuda)
    tiny.randomize_lora(model)
    mask = torch.ones(16, 512, dtype=torch.long)
    if padded:
        mask[::2, 400:] = 0
    batch = {"input_ids": torch.randint(5, 1000, (16, 512)), "attention_mask": mask, "labels": torch.zeros(16).long()}
    if kind == "keep":
        batch |= {"source_input_ids": batch["input_ids"].flip(1), "source_attention_mask": mask}
    there = on(cuda, batch if padded else {name: v for name, v in batch.items() if not name.endswith("mask")})
    eager, step = eagerly(model), flare.GraphedStep(model)

    def run_eager() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            eager(there)

    def run_graph() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            step(batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graphs")
        for run in (run_graph, run_graph, run_graph, run_graph, run_eager, run_eager):
            run()
    attention = {}
    for name, run in (("eager", run_eager), ("graph", run_graph)):
        launched, busy = kernels(run)
        words = ("flash", "fmha", "attention", "softmax", "cudnn")
        attention[name] = Counter({k: n for k, n in launched.items() if any(word in k.lower() for word in words)})
        start = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / 10
        record_property(f"{name}_wall_over_busy", wall / busy)
        print(f"{kind}, padded {padded}, {name}: wall {wall * 1e3:.2f} ms, device busy {busy * 1e3:.2f} ms")
    assert attention["graph"] == attention["eager"] and sum(attention["eager"].values()) >= 4


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_the_trainer_with_captured_steps(options: dict[str, Any], cached: bool, tmp_path: Path) -> None:
    """Accumulation, clipping, and batches of one shape but for the last of an epoch."""
    losses = []
    for graphed in (False, True):
        trainer = flare.FlareTrainer(
            model=flare_model("bert"),
            args=arguments(
                tmp_path,
                use_cpu=False,
                num_train_epochs=6,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_grad_norm=0.5,
                logging_strategy="steps",
                logging_steps=1,
                **options,
            ),
            train_dataset=rows("bert", 22),
            data_collator=flare.FlareDataCollator(tokenizer(), "max_length", 16),
            source_cache=flare.SourceStateCache(64 * MB) if cached else None,
            cuda_graphs=graphed,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cuda_graphs: (?!source_cache has not all rows)")
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)
