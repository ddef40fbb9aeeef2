"""Decide before a run whether to cache its source states between epochs (`--source-cache`).

An adapter fuses the source states: the hidden states of the source texts in the frozen model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ...source_cache import SourceStateCache
from ...source_cache.entries import aligned
from ...source_cache.memory import free_bytes
from ...source_cache.meter import readable
from ...training.collator import FlareDataCollator
from ..utils.errors import UserError
from ..utils.processes import process_count

#: Share of the free host memory that ``--source-cache auto`` may use if no budget is given.
AUTO_SHARE = 1 / 4
#: Share of the free host memory that ``--source-cache on`` may use if no budget is given.
_ON_SHARE = 1 / 2


@dataclass(frozen=True)
class CachePlan:
    """Whether a run caches its source states.

    cache: the source cache; None if the run has no cache.
    facts: the value of "source_cache" in run.json (`RunRecord.data`).
    note: note for the user; empty if there is nothing to say.
    """

    cache: SourceStateCache | None
    facts: dict[str, Any]
    note: str = ""


def plan_cache(
    mode: str,
    budget: int | None,
    model: Any,
    collator: FlareDataCollator,
    rows: Sequence[dict[str, Any]],
    arguments: TrainingArguments,
    autocast: torch.dtype | None,
) -> CachePlan:
    """Decide whether one run of a fusing method gets a source cache, and if so, set the cache on the model.

    "auto" turns the cache on if the states can be cached, all of them fit into the budget (default: a quarter of the
    free memory), a row's states do not depend on the other rows of its batch, the training may have more than one
    epoch, only one process trains, and the model is not compiled. Then the results are the same with and without the
    cache.

    Args:
        mode: "auto", "on" or "off".
        budget: bytes of host memory for the cache; None: a share of the free memory.
        model: the model with its adapters.
        collator: the run's collator.
        rows: the rows that are read in every epoch: the training rows and, for an encoder, the validation rows.
        arguments: the run's training arguments.
        autocast: dtype of mixed precision; None: no mixed precision.

    Raises:
        UserError: mode is "on", and the source states cannot be cached (the message gives the reason).
    """
    rows = [row for row in rows if "source_input_ids" in row]
    facts: dict[str, Any] = {"mode": mode, "on": False}
    if mode == "off" or not rows:
        return CachePlan(None, facts)
    try:
        if _sharded(arguments):  # the trainer's own check comes too late, after the run has started
            raise ValueError("FSDP and DeepSpeed shard the weights that compute the states")
        needed = needed_bytes(model, collator, rows, autocast)
        free = free_bytes(torch.device("cpu"))
        facts |= {"rows": len(rows), "bytes_needed": needed, "bytes_free": free}
        room = budget if budget is not None else int(free * (_ON_SHARE if mode == "on" else AUTO_SHARE))
        why = None if mode == "on" else _not_worth_it(model, collator, arguments) or _too_large(needed, room, budget)
        if why is None:
            cache = SourceStateCache({"host": room})
            model.set_source_cache(cache)
    except ValueError as error:  # for example, with source_dropout the states change in each epoch
        if mode == "on":
            raise UserError(f"--source-cache on: {error}") from error
        why = str(error).removeprefix("source_cache: ")
    if why is not None:
        return CachePlan(None, {**facts, "reason": why}, f"source cache off: {why}")
    note = f"source cache on: {readable(needed)} of source states of {len(rows)} rows, in host memory"
    if needed > room:
        note += f"; the cache keeps at most {readable(room)} (--source-cache-budget)"
    return CachePlan(cache, {**facts, "on": True, "budget": room}, note)


def needed_bytes(
    model: Any, collator: FlareDataCollator, rows: Sequence[dict[str, Any]], autocast: torch.dtype | None
) -> int:
    """Return the bytes that the cache needs for all source states of the rows.

    A text takes layers x positions x width x bytes per number. In an encoder-decoder, the decoder's states of the
    source answer are added. The sum is rounded up to a multiple of 64 bytes. Equal sources count once, because the
    cache stores them once. With source_padding="keep" the states of padding count too, because they are cached.
    """
    request = model.source_request()
    config = request.model.config
    width = (config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size
    dtype = autocast if autocast is not None else next(request.model.parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    one_width = collator.layout == "encoder" and collator.padding == "max_length"
    batch = (collator if one_width or request.zero_pads else collator.fitted(rows))([dict(rows[0])])
    positions = batch["source_input_ids"].shape[-1]
    answers = batch["source_labels"].shape[1] if "source_labels" in batch else 0
    total, seen = 0, set()
    for row in rows:
        source_ids, labels = row["source_input_ids"], tuple(row.get("source_labels") or ())
        texts = source_ids if isinstance(source_ids[0], list) else [source_ids]  # multiple choice has a text per choice
        for text in texts:
            ids = tuple(text)
            if (ids, labels) in seen:
                continue
            seen.add((ids, labels))
            tokens, written = (len(ids), len(labels)) if request.zero_pads else (positions, answers)
            counted = len(request.keys) * tokens + (len(request.decoder_keys) * written if answers else 0)
            total += aligned(counted * width * dtype.itemsize)
    return total


def _sharded(arguments: TrainingArguments) -> bool:
    fsdp = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    return bool(fsdp or arguments.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true")


def _too_large(needed: int, room: int, budget: int | None) -> str | None:
    if needed <= room:
        return None
    limit = "a quarter of the free memory" if budget is None else "--source-cache-budget"
    return (
        f"the source states take {readable(needed)}, more than {limit} ({readable(room)}); --source-cache on stores "
        "the states that fit"
    )


def _not_worth_it(model: Any, collator: FlareDataCollator, arguments: TrainingArguments) -> str | None:
    """Return why "auto" does not use a cache that would work, or None if "auto" uses it."""
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 1:
        return "every row is read once (one epoch)"
    if process_count() > 1:
        return "each process has its own cache, and rows move between processes from epoch to epoch"
    if arguments.torch_compile:
        return "looking up rows would break the graph of the compiled model"
    if model.source_request().zero_pads:
        return None
    if collator.layout == "causal":
        return (
            "prompts are padded on the left, so a row's states depend on its batch (--source-cache on pads all batches "
            "to one length)"
        )
    if collator.padding != "max_length":
        return (
            "batches are padded to their longest text, so a row's states depend on its batch (--padding max_length, or "
            "--source-cache on, which pads all batches to one length)"
        )
    return None
