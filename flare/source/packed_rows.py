"""Checks for packed rows: with a source, a row of the target must not hold several texts.

The source pass reads each row as one text.

Shapes: B rows of a batch, n choices of a row, m positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Keyword arguments that give the boundaries of packed texts.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k", "seq_idx", "seq_lens")
#: Keyword arguments that may show packed texts.
CHECKED_ARGUMENTS = frozenset(("position_ids", *BOUNDARIES))

_REMEDY = (
    "the source pass reads each row of source_input_ids as one text, so packed texts would attend to each other; put "
    "each text into its own row (flare.FlareDataCollator pads them), or leave the source out"
)


def refuse_packed_rows(
    model: nn.Module, source: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ValueError if a row of the target holds several texts.

    FLARE MT, whose ``source_states`` are a tensor, is exempt, because it runs no source pass: it fuses these states
    position by position.

    Raises:
        ValueError: the call has boundaries of packed texts, position_ids that do not increase by one within a row, or
            an attention mask that is neither (B, m) nor, for multiple choice, (B, n, m) like input_ids.
    """
    mask = kwargs.get("attention_mask")
    if len(args) < 2 and CHECKED_ARGUMENTS.isdisjoint(kwargs) and (mask is None or getattr(mask, "ndim", 0) == 2):
        return
    if isinstance(source.get("source_states"), Tensor):
        return
    if len(args) > 1:
        kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    for name in BOUNDARIES:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} (packed texts) cannot be combined with {', '.join(sorted(source))}: {_REMEDY}")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    ids = args[0] if args else kwargs.get("input_ids")
    is_choice_mask = isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape == getattr(ids, "shape", None)
    if mask is not None and not is_choice_mask and not (isinstance(mask, Tensor) and mask.dim() == 2):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {what}, and with a source it must be (B, m). A mask of pairs of positions may "
            f"separate packed texts, and {_REMEDY}"
        )
    if isinstance(positions, Tensor) and restarts(positions, mask):
        raise ValueError(
            f"position_ids do not increase by one within a row, as in packed texts: {_REMEDY}. If they skip padding on "
            "the left, pass attention_mask (B, m)"
        )


@torch.compiler.disable  # the result depends on the tensors' values
def restarts(positions: Tensor, mask: Tensor | None) -> bool:
    """Return whether the position ids of any two adjacent tokens do not increase by exactly one.

    Args:
        positions: position ids (..., m).
        mask: (..., m), nonzero at tokens. None if all positions are tokens.
    """
    jumps = positions.diff(dim=-1) != 1
    if mask is not None:
        tokens = mask.to(jumps.device) != 0
        jumps = jumps & tokens[..., 1:] & tokens[..., :-1]
    return bool(jumps.any())
