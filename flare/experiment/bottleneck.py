"""How large the two streams are where they meet: mean |S| and |T| in every fusing layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..source.context import THREAD
from ..tuner.layer import FlareLayer, weight_of


def bottleneck_sizes(
    model: Any, collator: Any, rows: Sequence[dict[str, Any]], batch_size: int, autocast: torch.dtype | None = None
) -> dict[str, list[Any]] | None:
    """Mean |S| and |T| over the rows' real tokens, for every layer that fused; None where none did.

    Args:
        model: a PEFT model with a fusing adapter.
        collator, rows: batches with a source.

    Returns:
        {"layers": [the projections' names in the base model], "S": [...], "T": [...]}, in the model's order.
    """
    found: dict[str, list[float]] = {}
    masks: dict[str, Tensor | None] = {}

    def meeting(name: str) -> Any:
        def before(module: FlareLayer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else keywords["x"]
            for adapter in module.active_here():
                fusion, x_source, S = module.source_of(adapter, THREAD.slot.context)
                if fusion is None:
                    continue
                A = weight_of(module, adapter).to(x.dtype)
                T = x @ A.T
                S = x_source.to(x.dtype) @ A.T if S is None else S  # type: ignore[union-attr]
                sums = found.setdefault(name, [0.0, 0.0, 0.0, 0.0])
                for at, value, mask in ((0, S, masks["source"]), (2, T, masks["target"])):
                    sums[at] += _sum(value, mask)
                    sums[at + 1] += _count(value, mask)

        return before

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FlareLayer)]
    hooks = [
        module.register_forward_pre_hook(meeting(module.flare_key), with_kwargs=True)  # type: ignore[attr-defined]
        for _, module in layers
    ]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            batch = collator(list(rows[first : first + batch_size])).to(device)
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
        return None
    return {
        "layers": list(found),
        "S": [s / count for s, count, _, _ in found.values()],
        "T": [t / count for _, _, t, count in found.values()],
    }


def _sum(value: Tensor, mask: Tensor | None) -> float:
    """Sum of |value| (B, m, r) over real positions; a mask of another width (a decoder's layers) is no mask of it."""
    absolute = value.detach().float().abs()
    if mask is not None and mask.shape == absolute.shape[:2]:
        absolute = absolute * mask.unsqueeze(-1)
    return float(absolute.sum())


def _count(value: Tensor, mask: Tensor | None) -> float:
    if mask is not None and mask.shape == value.shape[:2]:
        return float(mask.sum()) * value.shape[-1]
    return float(value.numel())
