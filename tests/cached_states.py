"""Models, batches, training steps and caches for tests of the source cache."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import tiny
import torch

import flare
from flare.source.context import THREAD
from flare.source.runtime import runtime_of
from flare.source.source_pass import Preparation
from flare.source_cache.reader import CachedReader
from flare.source_cache.request import SourceRequest

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
    """Return some rows of a batch."""
    return {name: value[list(indices)] for name, value in batch.items()}


class SourceBlocks:
    """Counts the rows that each block of the frozen model has processed in source passes."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        runtime = runtime_of(base)
        self.rows: dict[str, int] = {}
        stacks = {**runtime.map.stacks, **dict.fromkeys(runtime.map.decoders)}
        for stack in stacks:
            for index, block in enumerate(base.get_submodule(stack)):
                block.register_forward_hook(self._count(f"{stack}.{index}"))
                self.rows[f"{stack}.{index}"] = 0

    def _count(self, name: str) -> Any:
        def count(module: Any, args: Any, output: Any) -> None:
            if THREAD.slot.frozen_pass is not None:
                self.rows[name] += len(output if isinstance(output, torch.Tensor) else output[0])

        return count

    def since(self) -> set[int]:
        """Return the set of all blocks' row counts since the last call. It has one element if all blocks agree."""
        counts = set(self.rows.values())
        self.rows = dict.fromkeys(self.rows, 0)
        return counts


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


def assert_same(actual: Any, expected: Any, exact: bool = True) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0 if exact else 1e-5, atol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        atol = 0.0 if exact else 1e-5 * float(grad.abs().max())
        torch.testing.assert_close(actual[1][name], grad, msg=name, rtol=0, atol=atol)


def cache_in(tier: str, folder: Path, budget: int = MB) -> flare.SourceStateCache:
    return flare.SourceStateCache(budget, tiers=(tier,), directory=folder if tier == "disk" else None)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def one_row_bytes() -> int:
    """Return the bytes of the source states of one row of 9 tokens, in all blocks, in float32."""
    return 9 * tiny.LAYERS * tiny.HIDDEN * 4  # a multiple of 64


def published(folder: Path, model: Any, *seeds: int) -> None:
    """Write one shard of the disk cache for the batch of each seed."""
    for seed in seeds:
        cache = cache_in("disk", folder)
        model.set_source_cache(cache)
        model(**batch_of("bert", seed=seed))
        cache.flush()
    model.set_source_cache(None)


def reopened(folder: Path, model: Any, *seeds: int, budget: int = MB) -> flare.SourceStateCache:
    """Open a new cache on a folder, and return it after a training step on the batch of each seed.

    Each step is compared with a step without a cache.
    """
    cache = cache_in("disk", folder, budget)
    batches = [batch_of("bert", seed=seed) for seed in seeds]
    model.set_source_cache(None)
    steps = [step(model, batch) for batch in batches]
    model.set_source_cache(cache)
    for batch, expected in zip(batches, steps, strict=True):
        assert_same(step(model, batch), expected, exact=False)
    return cache


@contextlib.contextmanager
def no_warnings_allowed() -> Any:
    """Raise an error for every UserWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def request_of(model: Any) -> SourceRequest:
    """Return the description of the source states that the model's active adapters read."""
    return model.source_request()  # type: ignore[no-any-return]


def reader_of(model: Any, cache: flare.SourceStateCache, batch: dict[str, torch.Tensor]) -> CachedReader:
    """Return the cache's reader for a batch, as in a source pass."""
    request = request_of(model)
    columns, keys = request.columns(batch, types=True)
    stacks = {key.stack for key in request.keys}
    masks = dict.fromkeys(stacks, columns["attention_mask"])
    if "decoder_attention_mask" in columns:
        masks |= dict.fromkeys(request.decoders, columns.pop("decoder_attention_mask"))
    masks = masks if request.zero_pads else {}
    prepare = Preparation.under_autocast(columns["input_ids"].device)
    return cache.reader(request.model, columns, keys, prepare, masks, request.decoders)
