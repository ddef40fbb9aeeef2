"""Measure the bottlenecks of an adapter: mean |S| and |T| of every fusing layer, and one layer's S and T by position.

S and T are the rank-r activations that FLARE fuses: the source state and the target state, multiplied by A.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...source.context import THREAD
from ...tuner.layer import FlareLayer, weight_of
from .activations import INSTANCES, Activations, Instance, RowCollector


@dataclass
class _Recorded:
    """The name of one layer's fusion function, and the layer's S and T of every row."""

    fusion: str = ""
    S: RowCollector = field(default_factory=RowCollector)
    T: RowCollector = field(default_factory=RowCollector)


def measure_bottleneck(
    model: Any,
    collator: Any,
    rows: Sequence[dict[str, Any]],
    ids: Sequence[str],
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> tuple[dict[str, list[Any]] | None, Activations | None]:
    """Return mean |S| and |T| of every fusing layer and the first query projection's activations by position.

    Args:
        model: a PEFT model with a fusing adapter.
        collator: the method's collator.
        rows: tokenized rows with a source, as the collator takes them.
        ids: one id per row.
        batch_size: rows per batch.
        autocast: dtype of mixed precision; None: no mixed precision.

    Returns:
        (sizes, activations). sizes is {"layers": [names of the fusing projections in the base model, in the order in
        which they run], "S": [mean |S| of each projection], "T": [mean |T| of each projection]}, or None if no layer
        fused. The means exclude padding tokens. activations is None if the first query projection did not fuse, or if
        its source has no tokens (FLARE MT).
    """
    totals: dict[str, list[float]] = {}  # layer -> [sum of |S|, number of summands, sum of |T|, number of summands]
    masks: dict[str, Tensor | None] = {}
    layers = [module for module in model.modules() if isinstance(module, FlareLayer)]
    first = _first_query([layer.flare_key for layer in layers])
    recorded = _Recorded()

    def recorder(name: str) -> Any:
        def record(module: FlareLayer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x, slot = arguments[0] if arguments else keywords["x"], THREAD.slot
            if slot.met is not None and module in slot.met:
                return  # DeBERTa calls the layer again in the same block, for its relative positions
            for adapter in module.active_here():
                fusion, x_source, S = module.source_of(adapter, slot.context)
                if fusion is None:
                    continue
                A = weight_of(module, adapter).to(x.dtype)
                T = x @ A.T
                S = x_source.to(x.dtype) @ A.T if S is None else S  # type: ignore[union-attr]
                sums = totals.setdefault(name, [0.0, 0.0, 0.0, 0.0])
                for at, value, mask in ((0, S, masks["source"]), (2, T, masks["target"])):
                    sums[at] += _sum(value, mask)
                    sums[at + 1] += _count(value, mask)
                if name == first:
                    recorded.fusion = fusion
                    for stream, value, mask in ((recorded.S, S, masks["source"]), (recorded.T, T, masks["target"])):
                        for row in _rows_of(value, mask):
                            stream.add(row)

        return record

    hooks = [
        layer.register_forward_pre_hook(recorder(layer.flare_key), with_kwargs=True)  # type: ignore[attr-defined]
        for layer in layers
    ]
    texts: list[dict[str, list[int]]] = []
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for begin in range(0, len(rows), batch_size):
            batch = collator(list(rows[begin : begin + batch_size]))
            if len(texts) < INSTANCES:
                texts += _token_ids(batch)
            batch = batch.to(device)
            for name in ("target", "source"):
                mask = batch.get("attention_mask" if name == "target" else "source_attention_mask")
                masks[name] = mask.flatten(0, -2) if mask is not None else None  # multiple choice: one row per choice
            with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not totals:
        return None, None
    sizes: dict[str, list[Any]] = {
        "layers": list(totals),
        "S": [s / count for s, count, _, _ in totals.values()],
        "T": [t / count for _, _, t, count in totals.values()],
    }
    return sizes, _activations(first, recorded, texts[:INSTANCES], ids, collator.tokenizer)


def _first_query(names: Sequence[str]) -> str | None:
    """Return the first name whose last part names a query projection (query, q_proj, q, Wqkv or similar), or None."""
    return next((name for name in names if re.fullmatch(r"(w?q.*|c_attn)", name.rpartition(".")[2].lower())), None)


def _activations(
    layer: str | None, recorded: _Recorded, texts: list[dict[str, list[int]]], ids: Sequence[str], tokenizer: Any
) -> Activations | None:
    if layer is None or not recorded.S.rows or not texts or "source" not in texts[0]:
        return None
    instances = []
    for id, text, S, T in zip(ids, texts, recorded.S.rows, recorded.T.rows, strict=False):
        source, target = (tuple(tokenizer.convert_ids_to_tokens(text[name])) for name in ("source", "target"))
        if len(source) == len(S) and len(target) == len(T):
            instances.append(Instance(str(id), source, target, S, T))
    return Activations(layer, recorded.fusion, recorded.S.averages(), recorded.T.averages(), tuple(instances))


def _rows_of(value: Tensor, mask: Tensor | None) -> list[Any]:
    """Return a batch's rows (tokens, r) without padding, as float32 arrays."""
    value = value.detach().float().cpu()
    if mask is None or mask.shape != value.shape[:2]:
        return [row.numpy() for row in value]
    return [row[real].numpy() for row, real in zip(value, mask.cpu().bool(), strict=True)]


def _token_ids(batch: Any) -> list[dict[str, list[int]]]:
    """Return, for each row of a batch, a dict from stream ("target", "source") to token ids, without padding."""
    streams = {}
    for stream, prefix in (("target", ""), ("source", "source_")):
        if f"{prefix}input_ids" in batch:
            pairs = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool(), strict=True)
            streams[stream] = [row[real].tolist() for row, real in pairs]
    return [{name: rows[index] for name, rows in streams.items()} for index in range(len(streams["target"]))]


def _sum(value: Tensor, mask: Tensor | None) -> float:
    """Return the sum of |value| (B, m, r) without padding.

    The mask is ignored if its shape is not (B, m), as in the decoder of an encoder-decoder model.
    """
    absolute = value.detach().float().abs()
    if mask is not None and mask.shape == absolute.shape[:2]:
        absolute = absolute * mask.unsqueeze(-1)
    return float(absolute.sum())


def _count(value: Tensor, mask: Tensor | None) -> float:
    if mask is not None and mask.shape == value.shape[:2]:
        return float(mask.sum()) * value.shape[-1]
    return float(value.numel())
