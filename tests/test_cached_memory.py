"""Test that training with a source cache gives the gradients of source_memory="keep" without a cache.

The modes are "keep", "offload" and "recompute". No unnecessary source pass may run.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import distributed_training
import pytest
import tiny
import torch
import torch.distributed as dist
import two_processes
from states_alive import StatesAlive
from test_source_memory import FAMILIES, assert_close, assert_same, gradients, inputs_of, model_of, offload_anywhere  # noqa: F401
from torch.nn.parallel import DistributedDataParallel

import flare
from flare.experiments.measure import count_calls, saved_bytes
from flare.source.source_pass import Preparation
from flare.source_cache import CachedReader

MODES = ("keep", "offload", "recompute")
ROW = 9 * tiny.LAYERS * tiny.HIDDEN * 4  # bytes of the states of one row of BERT or Llama, padding included


def cache_of(nbytes: int = 1 << 20, folder: Path | None = None) -> flare.SourceStateCache:
    tiers = ("device",) if folder is None else ("disk",)
    return flare.SourceStateCache(nbytes, tiers=tiers, directory=folder)


def accumulated(model: Any, *batches: Any) -> dict[str, torch.Tensor]:
    """Return the sum of the gradients of several batches, each with a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    for inputs in batches:
        model(**inputs).loss.backward()
    return tiny.gradients(model)


def checkpointed(model: Any, reentrant: bool) -> None:
    """Enable gradient checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.usefixtures("offload_anywhere")
def test_gradients_with_a_cache_equal_keep_without_a_cache(family, padding, memory) -> None:
    """With the cache filled, gradients of one batch are equal bit for bit, with and without checkpointing.

    Sums of the gradients of two batches are equal up to the order of addition, also while the cache is being filled.
    """
    options = {"source_padding": padding, "lora_dropout": 0.3}
    first, second = inputs_of(family), inputs_of(family, seed=1)
    keep, other = model_of(family, "keep", **options).train(), model_of(family, memory, **options).train()
    cache = cache_of()
    other.set_source_cache(cache)
    expected = gradients(keep, first, second)
    for hits in (0, 6):
        assert_close(gradients(other, first, second), expected)
        assert cache.stats().hits == hits
    for one in (first, second):
        assert_same(gradients(other, one), gradients(keep, one))
    assert_close(accumulated(other, first, second), accumulated(keep, first, second))
    # under reentrant checkpointing every mode becomes "keep", except "offload", which offload_anywhere forces
    for reentrant in (False,) if memory == "offload" else (False, True):
        for model in (keep, other):
            checkpointed(model, reentrant)
        assert_same(gradients(other, first), gradients(keep, first))
    stats = cache.stats()
    assert stats.entries == {"device": 6} and stats.rows - stats.hits == 6


@pytest.mark.parametrize(
    ("memory", "budget", "executions"),
    [("keep", 3 * ROW, (2, 1)), ("recompute", 3 * ROW, (2, 1)), ("keep", 0, (2, 2)), ("recompute", 0, (3, 3))],
    ids=str,
)
def test_block_executions_depend_on_the_cached_rows(memory, budget, executions) -> None:
    """If all rows fit in the cache, the second step runs no source pass, and "recompute" computes no row again.

    If no row fits, every step with "recompute" runs the source pass twice.
    """
    inputs = inputs_of("llama")
    model, expected = model_of("llama", memory), gradients(model_of("llama", "keep"), inputs)
    model.set_source_cache(cache_of(budget))
    for step_executions in executions:
        with count_calls(tiny.block_list(model.get_base_model())) as calls:
            assert_same(gradients(model, inputs), expected)
        assert calls.total == step_executions * tiny.LAYERS


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_that_did_not_fit_are_recomputed_in_their_batch(family) -> None:
    """One of three rows fits in the cache. "recompute" runs the source pass for the whole batch again.

    So its gradients equal the gradients of "keep" bit for bit.
    """
    inputs, grads = inputs_of(family), []
    for memory in ("keep", "recompute"):
        model = model_of(family, memory)
        model.set_source_cache(cache_of(ROW))
        grads.append([gradients(model, inputs), gradients(model, inputs, inputs)])
    assert_same(grads[1][0], grads[0][0])
    assert_close(grads[1][1], grads[0][1])


def test_an_entry_damaged_between_forward_and_backward_is_recomputed(tmp_path) -> None:
    inputs = inputs_of("bert")
    expected = gradients(model_of("bert", "keep"), inputs)
    model, cache = model_of("bert", "recompute"), cache_of(folder=tmp_path)
    model.set_source_cache(cache)
    gradients(model, inputs)
    cache.flush()
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    assert cache.stats().hits == 3
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="checksum of an entry does not match"):
        loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("tier", ["device", "disk"])
@pytest.mark.parametrize("memory", ["keep", "recompute", "inference"])
def test_states_copied_from_a_warm_cache_are_at_most_one_per_block(memory, tier, tmp_path, monkeypatch) -> None:
    """Of the states copied out of the cache, "keep" has one per block in memory, and the other modes at most two."""
    alive = StatesAlive()
    for layers in (2, 6):
        model = model_of("llama", "recompute" if memory == "recompute" else "keep", base={"num_hidden_layers": layers})
        cache = cache_of(folder=tmp_path / str(layers) if tier == "disk" else None)
        model.set_source_cache(cache)
        inputs = inputs_of("llama")
        gradients(model, inputs)
        cache.flush()
        alive.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Preparation, "__call__", alive.preparing())
            patch.setattr(CachedReader, "warm", alive.warming())
            if memory == "inference":
                with torch.no_grad():
                    model(**inputs)
            else:
                loss = model(**inputs).loss
                gc.collect()
                assert alive.now == (layers if memory == "keep" else 0)
                loss.backward()
        assert max(alive.counts) == layers if memory == "keep" else max(alive.counts) <= 2
        assert cache.stats().hits == 3


def test_a_cache_does_not_change_the_saved_bytes() -> None:
    """ "keep" saves the states of all blocks, and "recompute" the token ids. A cache does not change this."""
    inputs = inputs_of("llama")
    states = tiny.LAYERS * inputs["source_input_ids"].numel() * tiny.HIDDEN * 4
    saved: dict[tuple[str, bool], int] = {}
    for memory in ("keep", "recompute"):
        for warm in (False, True):
            model = model_of("llama", memory)
            if warm:
                model.set_source_cache(cache_of())
                gradients(model, inputs)
            with saved_bytes(ignore=[model.parameters(), inputs]) as counted:
                loss = model(**inputs).loss
            del loss
            saved[memory, warm] = counted.total
    assert saved["keep", True] == saved["keep", False]
    assert saved["recompute", True] == saved["recompute", False] == saved["keep", False] - states


def train_with_a_shared_cache(rank: int, folder: Path, memory: str) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Run three epochs of one step each. The ranks swap their batches after each epoch.

    Return each step's gradients and the number of times that it ran the whole stack of blocks.
    """
    model = distributed_training.fused("llama", source_memory=memory)
    cache = cache_of(folder=folder)
    model.set_source_cache(cache)
    ddp_model = DistributedDataParallel(model)
    grads, executions = [], []
    for epoch in range(3):
        cache.refresh()
        model.zero_grad(set_to_none=True)
        with count_calls(tiny.block_list(model.get_base_model())) as calls:
            ddp_model(**distributed_training.batch("llama", (rank + epoch) % two_processes.WORLD)).loss.backward()
        grads.append(tiny.gradients(model))
        executions.append(calls.total // tiny.LAYERS)
        cache.flush()
        dist.barrier()
    return grads, executions


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_two_ranks_share_a_directory(memory, tmp_path) -> None:
    """Each rank reads rows that the other rank has stored. One process with both batches gives equal gradients."""
    (tmp_path / "run").mkdir()
    folder = tmp_path / "states"
    expected = distributed_training.train(None, "none", "llama")
    for actual, executions in two_processes.run(tmp_path / "run", train_with_a_shared_cache, folder, memory):
        distributed_training.check(actual, expected * 3, memory)
        assert executions == [2, 1, 1]
    assert len(list(folder.iterdir())) == 2
