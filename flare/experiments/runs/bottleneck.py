"""What the two streams hold where they meet: mean |S| and |T| of every fusing layer, and one layer by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...source.context import THREAD
from ...tuner.layer import FlareLayer, weight_of
from .activations import INSTANCES, Activations, Instance, Sums


@dataclass
class _Watched:
    """The layer that is looked at by position: sums of both streams, and the first rows themselves."""

    fusion: str = ""
    S: Sums = field(default_factory=Sums)
    T: Sums = field(default_factory=Sums)


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
        collator, rows: batches with a source.
        ids: of the rows, one each.
        batch_size: rows per batch.
        autocast: dtype of mixed precision, or None.

    Returns:
        {"layers": [the projections' names in the base model], "S": [...], "T": [...]} over the rows' real tokens, in
        the model's order, or None where no layer fused; and the activations, or None where the first query projection
        did not fuse or reads no text of its own (FLARE MT's states have no tokens).
    """
    found: dict[str, list[float]] = {}
    masks: dict[str, Tensor | None] = {}
    layers = [module for module in model.modules() if isinstance(module, FlareLayer)]
    first = _first_query([layer.flare_key for layer in layers])
    watched = _Watched()

    def meeting(name: str) -> Any:
        def before(module: FlareLayer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x, slot = arguments[0] if arguments else keywords["x"], THREAD.slot
            if slot.met is not None and module in slot.met:
                return  # its second call, which is not of the tokens
            for adapter in module.active_here():
                fusion, x_source, S = module.source_of(adapter, slot.context)
                if fusion is None:
                    continue
                A = weight_of(module, adapter).to(x.dtype)
                T = x @ A.T
                S = x_source.to(x.dtype) @ A.T if S is None else S  # type: ignore[union-attr]
                sums = found.setdefault(name, [0.0, 0.0, 0.0, 0.0])
                for at, value, mask in ((0, S, masks["source"]), (2, T, masks["target"])):
                    sums[at] += _sum(value, mask)
                    sums[at + 1] += _count(value, mask)
                if name == first:
                    watched.fusion = fusion
                    for stream, value, mask in ((watched.S, S, masks["source"]), (watched.T, T, masks["target"])):
                        for row in _rows_of(value, mask):
                            stream.add(row)

        return before

    hooks = [
        layer.register_forward_pre_hook(meeting(layer.flare_key), with_kwargs=True)  # type: ignore[attr-defined]
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
                masks[name] = mask.flatten(0, -2) if mask is not None else None  # choices are rows in the model
            with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not found:
        return None, None
    sizes: dict[str, list[Any]] = {
        "layers": list(found),
        "S": [s / count for s, count, _, _ in found.values()],
        "T": [t / count for _, _, t, count in found.values()],
    }
    return sizes, _activations(first, watched, texts[:INSTANCES], ids, collator.tokenizer)


def _first_query(names: Sequence[str]) -> str | None:
    """The first query projection in the model's order, by the last part of its name (query, q_proj, q, Wqkv)."""
    return next((name for name in names if re.fullmatch(r"(w?q.*|c_attn)", name.rpartition(".")[2].lower())), None)


def _activations(
    layer: str | None, watched: _Watched, texts: list[dict[str, list[int]]], ids: Sequence[str], tokenizer: Any
) -> Activations | None:
    if layer is None or not watched.S.rows or not texts or "source" not in texts[0]:
        return None
    instances = []
    for id, text, S, T in zip(ids, texts, watched.S.rows, watched.T.rows, strict=False):
        source, target = (tuple(tokenizer.convert_ids_to_tokens(text[name])) for name in ("source", "target"))
        if len(source) == len(S) and len(target) == len(T):
            instances.append(Instance(str(id), source, target, S, T))
    return Activations(layer, watched.fusion, watched.S.averages(), watched.T.averages(), tuple(instances))


def _rows_of(value: Tensor, mask: Tensor | None) -> list[Any]:
    """A batch's rows (tokens, r) as float32 arrays without padding."""
    value = value.detach().float().cpu()
    if mask is None or mask.shape != value.shape[:2]:
        return [row.numpy() for row in value]
    return [row[kept].numpy() for row, kept in zip(value, mask.cpu().bool(), strict=True)]


def _token_ids(batch: Any) -> list[dict[str, list[int]]]:
    """The token ids of both streams of each row, without padding."""
    streams = {}
    for stream, prefix in (("target", ""), ("source", "source_")):
        if f"{prefix}input_ids" in batch:
            pairs = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool(), strict=True)
            streams[stream] = [row[kept].tolist() for row, kept in pairs]
    return [{name: rows[index] for name, rows in streams.items()} for index in range(len(streams["target"]))]


def _sum(value: Tensor, mask: Tensor | None) -> float:
    """Sum of |value| (B, m, r) over real positions; a mask of another width (a decoder's layers) does not match it."""
    absolute = value.detach().float().abs()
    if mask is not None and mask.shape == absolute.shape[:2]:
        absolute = absolute * mask.unsqueeze(-1)
    return float(absolute.sum())


def _count(value: Tensor, mask: Tensor | None) -> float:
    if mask is not None and mask.shape == value.shape[:2]:
        return float(mask.sum()) * value.shape[-1]
    return float(value.numel())
