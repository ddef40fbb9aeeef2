"""Test whole models on a CUDA device, for behaviour that a CPU does not have.

Such behaviour comes from streams, pinned memory, CUDA graphs, and a host that runs ahead of the device.
"""

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
#: Number of clock cycles (about 25 ms) for which the device sleeps, so that the host runs far ahead of the device.
_AHEAD = 50_000_000


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def assert_steps_close(actual: Any, expected: Any) -> None:
    """Assert that two results of `cached_states.step` (loss, gradients) are equal up to rounding.

    A device may add the terms of a sum in any order.
    """
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, msg=name, rtol=0, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_step_on_the_cpu(family: str, cuda: torch.device) -> None:
    model, batch = fused(family), batch_of(family)
    expected = step(model, batch)
    loss, grads = step(model.to(cuda), on(cuda, batch))
    assert_steps_close((loss.cpu(), {name: grad.cpu() for name, grad in grads.items()}), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", ["offload", "recompute"])
def test_every_source_memory_gives_the_gradients_of_keep(family: str, memory: str, cuda: torch.device) -> None:
    batch = on(cuda, batch_of(family))
    results = []
    for mode in ("keep", memory):
        model = fused(family, source_memory=mode, source_padding="zero").to(cuda)
        torch.cuda._sleep(_AHEAD)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), tiny.gradients(model)))
    assert_steps_close(*results)


def test_offloaded_states_use_two_buffers_on_the_device(cuda: torch.device) -> None:
    """The host queues all states before the device has copied the first one, and no state is lost.

    The device never holds more than three states: one in each of two buffers, and the state that is being computed.
    """
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
    assert all(state.is_pinned() for state in memory.host.values())

    def visit(key: StateKey, x: torch.Tensor) -> None:
        torch.cuda._sleep(_AHEAD // 10)
        sums[key.position] = x.mean()

    for _ in range(2):  # twice, as in a second backward pass after retain_graph=True
        sums.zero_()
        torch.cuda.reset_peak_memory_stats(cuda)
        memory.replayer()(saved, visit)
        assert torch.cuda.max_memory_allocated(cuda) - before <= 3 * size
        assert sums.tolist() == [index + 1.0 for index in range(count)]
    reserved = torch.cuda.memory_reserved(cuda)
    for _ in range(4):  # if each pass had its own stream, it would reserve its own memory
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
    expected = step(model, batch)
    cache = flare.SourceStateCache(64 * MB, tiers=(tier,), directory=tmp_path if tier == "disk" else None)
    model.set_source_cache(cache)
    torch.cuda._sleep(_AHEAD)
    first = step(model, batch)
    cache.flush()  # the device may not have finished the copies
    source_blocks = SourceBlocks(model)
    for result in (first, step(model, batch)):
        assert_steps_close(result, expected)
    assert source_blocks.since() == {0} and cache.stats().hits == 3
    if tier == "disk":
        assert len(shards(tmp_path)) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            reopened = flare.SourceStateCache(64 * MB, tiers=(tier,), directory=tmp_path)
            model.set_source_cache(reopened)
            assert_steps_close(step(model, batch), expected)
        assert reopened.stats().hits == 3
    elif tier == "host":
        assert all(entry.data.is_pinned() for entry in cache._tiers[0].entries.values())


def test_auto_measures_every_tier(cuda: torch.device, tmp_path: Path) -> None:
    model = fused("bert").to(cuda)
    cache = flare.SourceStateCache(64 * MB, tiers="auto", directory=tmp_path)
    model.set_source_cache(cache)
    batches = [on(cuda, batch_of("bert", seed=seed)) for seed in range(3)]
    [step(model, batch) for batch in batches]  # fills the cache
    assert set(cache.decisions) == {"device", "host", "disk"} and all(" ms" in why for why in cache.decisions.values())
    results = [step(model, batch) for batch in batches]
    model.set_source_cache(None)
    for batch, result in zip(batches, results, strict=True):
        assert_steps_close(result, step(model, batch))


@pytest.mark.parametrize("way", ["shared", "separate"])
def test_generation_equals_the_generation_on_the_cpu(way: str, cuda: torch.device) -> None:
    model = fused("llama", source_layer_offset=0).eval()
    prompts = {name: value for name, value in batch_of("llama").items() if name != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1, "source_pass": way}
    expected = model.generate(**prompts, **options)
    assert torch.equal(model.to(cuda).generate(**on(cuda, prompts), **options).cpu(), expected)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_training_with_a_cache_gives_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
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

STEPS = 7  # two eager steps, one step that is captured and replayed, and further replays
#: The losses of a training loop, and the trained parameters after it.
Trained = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def trained(
    model: Any, batches: list[dict[str, torch.Tensor]], run: Any, *, dtype: torch.dtype | None = None
) -> Trained:
    """Train with AdamW; return the losses and the trained parameters. ``run(batch)`` computes loss and gradients."""
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


def assert_as_equal_as_eager_runs(actual: Trained, eager: Trained, eager_again: Trained) -> None:
    """Assert bit equality if two eager runs are bit-equal, and equality up to rounding otherwise."""
    repeatable = all(torch.equal(*pair) for pair in zip(eager[0], eager_again[0], strict=True))
    tolerance = {"rtol": 0, "atol": 0} if repeatable else {"rtol": 1e-3, "atol": 1e-4}
    for loss, eager_loss in zip(actual[0], eager[0], strict=True):
        torch.testing.assert_close(loss, eager_loss, **tolerance)
    for name, value in eager[1].items():
        torch.testing.assert_close(actual[1][name], value, msg=name, **tolerance)


def stock_lora(device: torch.device) -> Any:
    model = get_peft_model(tiny.model("bert"), LoraConfig(r=4, target_modules=["query", "value"]))
    tiny.randomize_lora(model)
    return model.to(device)


def without_padding(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with masks of ones."""
    return {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in batch.items()}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("kind", ["lora", "bert", "llama", "mt5"])
def test_a_captured_step_equals_the_eager_step(kind: str, dtype: torch.dtype | None, padded: bool, cuda: Any) -> None:
    """The captured step gets batches on the host, as a data loader makes them. Every step gets a different batch."""

    def make() -> Any:
        return stock_lora(cuda) if kind == "lora" else fused(kind, source_padding="keep").to(cuda)

    family = "bert" if kind == "lora" else kind
    batches = [batch_of(family, seed=seed) for seed in range(STEPS)]
    batches = batches if padded else [without_padding(batch) for batch in batches]
    if kind == "lora":
        batches = [{name: v for name, v in batch.items() if not name.startswith("source")} for batch in batches]
    on_device = [on(cuda, batch) for batch in batches]
    eager = []
    for _ in range(2):
        model = make()
        eager.append(trained(model, on_device, eagerly(model), dtype=dtype))
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graphs")
        actual = trained(model, batches, flare.GraphedStep(model), dtype=dtype)
    assert_as_equal_as_eager_runs(actual, *eager)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_captured_step_reads_a_warm_cache(tier: str, cuda: torch.device) -> None:
    batches = [batch_of("bert", seed=seed) for seed in range(3)]
    on_device = [on(cuda, batch) for batch in batches]
    results = []
    for graphed in (False, False, True):
        model, cache = fused("bert").to(cuda), flare.SourceStateCache(64 * MB, tiers=(tier,))
        model.set_source_cache(cache)
        for batch in on_device:
            model(**batch)  # computes the source states of all rows
        if not graphed:
            results.append(trained(model, on_device * 3, eagerly(model)))
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cuda_graphs")
            step = flare.GraphedStep(model, source_cache=cache)
            computed = cache.stats().rows - cache.stats().hits
            results.append(trained(model, batches * 3, step))
        stats = cache.stats()
        assert stats.rows - stats.hits == computed, "a row was computed again"
    assert_as_equal_as_eager_runs(results[2], results[0], results[1])


def test_every_replay_draws_its_own_dropout_masks(cuda: torch.device) -> None:
    """The adapters and the model itself have dropout. The random seed determines the masks of a replay."""
    model = fused("bert", lora_dropout=0.3, base={"hidden_dropout_prob": 0.1}).to(cuda)
    batch = batch_of("bert")
    torch.cuda.manual_seed(1)
    step = flare.GraphedStep(model)
    losses = [float(step(batch)) for _ in range(STEPS)]
    assert len(set(losses)) == STEPS
    torch.cuda.manual_seed(1)
    assert float(step(batch)) == pytest.approx(losses[0], rel=1e-4), "the seed has no effect on replays"


def test_graphs_of_several_shapes_share_memory_and_gradients(cuda: torch.device) -> None:
    model, eager_model = fused("bert").to(cuda), fused("bert").to(cuda)
    batches = [batch_of("bert", B=B, m=m) for B, m in [(3, 9), (2, 30), (5, 17)]]
    step = flare.GraphedStep(model, max_graphs=3)
    memory = []
    for _ in range(6):
        for batch in batches:  # gradients accumulate over all shapes
            step(batch)
        torch.cuda.synchronize()
        memory.append((torch.cuda.memory_allocated(cuda), torch.cuda.memory_reserved(cuda)))
    run = eagerly(eager_model)
    for batch in batches * 6:
        run(on(cuda, batch))
    assert_steps_close((torch.zeros(()), tiny.gradients(model)), (torch.zeros(()), tiny.gradients(eager_model)))
    assert memory[3] == memory[4] == memory[5]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_that_cannot_be_captured_runs_eagerly(dropout: float, cuda: torch.device) -> None:
    """A step on a batch of length 6 waits for the device, so its capture fails in the middle.

    After the failure, gradients, random numbers, the allocator and other graphs are correct.
    """
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
    # this holds with dropout too, because replays draw the random numbers that eager steps would draw
    assert_as_equal_as_eager_runs(results[2], results[0], results[1])


def kernels(run: Any) -> tuple[Counter[str], float]:
    """Return how often a call launches each kernel, and for how many seconds the device was busy."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(event.name for event in events), sum(event.self_device_time_total for event in events) / 1e6


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["lora", "keep"])
def test_a_replay_launches_the_attention_kernels_of_an_eager_step(
    kind: str, padded: bool, cuda: torch.device, record_property: Any
) -> None:
    """The model has four blocks with the sizes of XLM-R Large, and runs under bf16 autocast.

    The test also reports the ratio of wall time to device-busy time, for eager steps and for replays.
    """
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
    on_device = on(cuda, batch if padded else {name: v for name, v in batch.items() if not name.endswith("mask")})
    eager, step = eagerly(model), flare.GraphedStep(model)

    def run_eager() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            eager(on_device)

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
def test_training_with_captured_steps_gives_the_same_losses(
    options: dict[str, Any], cached: bool, tmp_path: Path
) -> None:
    """The training accumulates and clips gradients, and the last batch of an epoch is smaller than all others."""
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
            warnings.filterwarnings("error", "cuda_graphs: (?!source_cache does not return all states)")
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)
