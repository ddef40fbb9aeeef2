"""`--source-cache`: whether a run keeps its source states between epochs, decided before it begins."""

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

#: The share of free memory that auto gives the states: training's own needs come on top.
AUTO_SHARE = 1 / 4
#: The share that --source-cache on takes without a budget.
_ON_SHARE = 1 / 2


@dataclass(frozen=True)
class CachePlan:
    """The cache of a run (None: off), what run.json says of it, and a line for the user (empty: nothing to say)."""

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
    """Decide about the source cache of one run of a fusing method.

    Under "auto" it is on where every row is read more than once, in one padded width, and all states take at most the
    budget, or a quarter of the free memory. The results are the same with it and without.

    Args:
        mode: "auto", "on" or "off".
        budget: bytes of host memory, or None.
        model: with its adapters.
        collator: of the run.
        rows: with a source: those of training and validation, which are read in every epoch.
        arguments: of the run.
        autocast: dtype of mixed precision, or None.

    Raises:
        UserError: "on", and the source states cannot be kept (the message has the reason).
    """
    rows = [row for row in rows if "source_input_ids" in row]
    facts: dict[str, Any] = {"mode": mode, "on": False}
    if mode == "off" or not rows:
        return CachePlan(None, facts)
    try:
        if _sharded(arguments):  # later, the trainer's own check would end the run in its middle
            raise ValueError("FSDP and DeepSpeed shard the weights that the states are of")
        needed = needed_bytes(model, collator, rows, autocast)
        free = free_bytes(torch.device("cpu"))
        facts |= {"rows": len(rows), "bytes_needed": needed, "bytes_free": free}
        room = budget if budget is not None else int(free * (_ON_SHARE if mode == "on" else AUTO_SHARE))
        why = None if mode == "on" else _not_worth_it(model, collator, arguments) or _too_large(needed, room, budget)
        if why is None:
            cache = SourceStateCache({"host": room})
            model.set_source_cache(cache)
    except ValueError as error:  # states that change: source_dropout, a base that is trained or sharded, ...
        if mode == "on":
            raise UserError(f"--source-cache on: {error}") from error
        why = str(error).removeprefix("source_cache: ")
    if why is not None:
        return CachePlan(None, {**facts, "reason": why}, f"source cache off: {why}")
    note = f"source cache on: {readable(needed)} of source states of {len(rows)} rows, in host memory"
    if needed > room:
        note += f", of which {readable(room)} are kept (--source-cache-budget)"
    return CachePlan(cache, {**facts, "on": True, "budget": room}, note)


def needed_bytes(
    model: Any, collator: FlareDataCollator, rows: Sequence[dict[str, Any]], autocast: torch.dtype | None
) -> int:
    """Bytes of all source states that the adapters read of the rows: layers x positions x width x bytes of a number.

    Equal sources count once, as the cache keeps them. Pads count under source_padding="keep", where they have states.
    """
    request = model.source_request()
    config = request.model.config
    width = (config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size
    dtype = autocast if autocast is not None else next(request.model.parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    steady = collator.layout == "encoder" and collator.padding == "max_length"
    batch = (collator if steady or request.zero_pads else collator.fitted(rows))([dict(rows[0])])
    positions = batch["source_input_ids"].shape[-1]
    answers = batch["source_labels"].shape[1] if "source_labels" in batch else 0
    total, seen = 0, set()
    for row in rows:
        given, labels = row["source_input_ids"], tuple(row.get("source_labels") or ())
        for text in given if isinstance(given[0], list) else [given]:  # a multiple choice has a text for each choice
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
    most = "a quarter of the free memory" if budget is None else "--source-cache-budget"
    return f"its states take {readable(needed)}, and {most} is {readable(room)} (--source-cache on keeps what fits)"


def _not_worth_it(model: Any, collator: FlareDataCollator, arguments: TrainingArguments) -> str | None:
    """Why "auto" leaves it out although it could be on, or None."""
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 1:
        return "every row is read once (one epoch)"
    if process_count() > 1:
        return "rows move between processes from epoch to epoch, and each has a memory of its own"
    if arguments.torch_compile:
        return "a compiled model's graph would break where rows are looked up"
    if model.source_request().zero_pads:
        return None
    if collator.layout == "causal":
        return (
            "prompts are padded on the left, so a row's states depend on its batch (--source-cache on pads all batches "
            "alike)"
        )
    if collator.padding != "max_length":
        return (
            "batches are padded to their longest text, so a row's states depend on its batch (--padding max_length, or "
            "--source-cache on, which pads all batches to one length)"
        )
    return None
