"""Rows that hold several packed texts: refused next to a source, which would be read as one text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Keyword arguments that say where packed texts begin and end.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k", "seq_idx", "seq_lens")
#: Keyword arguments that have to be looked at.
LOOKED_AT = frozenset(("position_ids", *BOUNDARIES))

_WAY_OUT = (
    "the source pass reads each row of source_input_ids as one text, so packed texts would mix there; give each text a "
    "row of its own (flare.FlareDataCollator pads them), or leave the source out"
)


def refuse_packed_rows(
    model: nn.Module, source: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ValueError where a row of the target holds several texts. Not for FLARE MT, which reads states by position.

    Raises:
        ValueError: boundaries of packed texts, position_ids that begin again, or an attention mask that is not (B, m).
    """
    mask = kwargs.get("attention_mask")
    if len(args) < 2 and LOOKED_AT.isdisjoint(kwargs) and (mask is None or getattr(mask, "ndim", 0) == 2):
        return
    if isinstance(source.get("source_states"), Tensor):
        return
    if len(args) > 1:
        kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    for name in BOUNDARIES:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} (packed texts) cannot be combined with {', '.join(sorted(source))}: {_WAY_OUT}")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    ids = args[0] if args else kwargs.get("input_ids")
    of_choices = isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape == getattr(ids, "shape", None)
    if mask is not None and not of_choices and not (isinstance(mask, Tensor) and mask.dim() == 2):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {what}, and next to a source it must be (B, m): a mask of pairs of positions may keep "
            f"packed texts apart, and {_WAY_OUT}"
        )
    if isinstance(positions, Tensor) and begins_again(positions, mask):
        raise ValueError(
            f"position_ids do not count up by one within a row, as those of packed texts: {_WAY_OUT}. Where they count "
            "from behind padding on the left, pass attention_mask (B, m)"
        )


@torch.compiler.disable  # it reads values
def begins_again(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether positions (..., m) of neighbouring tokens differ by anything but one; mask (..., m) is 1 at tokens."""
    jumps = positions.diff(dim=-1) != 1
    if mask is not None:
        tokens = mask.to(jumps.device) != 0
        jumps = jumps & tokens[..., 1:] & tokens[..., :-1]
    return bool(jumps.any())
