"""What one row of a batch is called, and which of its positions are stored.

With source_padding="keep" a row is everything the frozen model is given for it: ids, mask and token types over the
whole padded width. With "zero" no adapter reads pads, and tokens do not attend to them: what counts are the positions
from the first that matters to the last token. That is the first token where positions count relatively to each other
(rotary embeddings, T5's bias), else position 0, as a learned position embedding tells one place from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..source.states import StateKey

_ABSOLUTE = ("position_embedding", "embed_position", "wpe")
_RELATIVE = ("rotary_emb", "relative_attention_bias")
#: Rotary frequencies that do not depend on the width of the batch.
_STEADY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Row:
    """One row: its name, that of its tokens alone, and per stack the positions (in this batch) that are stored."""

    key: str
    content: str
    positions: dict[str, slice | Tensor]
    lengths: dict[str, int]


@dataclass(frozen=True)
class Stream:
    """Token ids (B, m), mask and further columns (B, m) of one text, on the CPU, and the stacks that read it."""

    columns: tuple[Tensor, ...]
    mask: Tensor
    stacks: tuple[str, ...]
    relative: bool


def counts_relatively(model: nn.Module) -> bool:
    """Whether moving a text along the positions leaves its hidden states as they are, up to rounding."""
    backbone: Any = getattr(model, "base_model", model)
    parts = {path.rpartition(".")[2] for path, _ in backbone.named_modules()}
    if any(mark in part for part in parts for mark in _ABSOLUTE) or _in_chunks(getattr(model, "config", None)):
        return False
    return any(mark in part for part in parts for mark in _RELATIVE)


def _in_chunks(config: Any) -> bool:
    """Whether attention stops at places that are counted from the first position."""
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(text, name, None) for name in ("attention_chunk_size", "encoder_attention_type"))


def needs_width(model: nn.Module) -> bool:
    """Whether hidden states depend on the width of the batch even without pads: rotary frequencies that follow it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope: Any = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", "default") not in _STEADY_ROPE for kind in kinds)


def name_rows(streams: Iterable[Stream], context: str, zero_pads: bool) -> list[Row]:
    """A Row for every row of a batch.

    Args:
        streams: the texts that the wanted states depend on.
        context: whatever else they depend on (states, compute dtype, padding), but for the base model.
        zero_pads: whether pads are neither read nor stored.
    """
    streams = list(streams)
    count = len(streams[0].mask)
    return [_name(streams, index, context, zero_pads) for index in range(count)]


def _name(streams: list[Stream], index: int, context: str, zero_pads: bool) -> Row:
    key = hashlib.blake2b(context.encode(), digest_size=16)
    content = key.copy()
    positions: dict[str, slice | Tensor] = {}
    lengths: dict[str, int] = {}
    for stream in streams:
        mask = stream.mask[index]
        tokens = mask.nonzero().flatten()
        first, end = (int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0)
        text = _bytes(stream, index, slice(first, end))
        content.update(text)
        if not zero_pads:
            key.update(_bytes(stream, index, slice(0, len(mask))))
            where: slice | Tensor = slice(0, len(mask))
            stored = len(mask)
        else:
            key.update(text if stream.relative else _bytes(stream, index, slice(0, end)))
            where = slice(first, end) if len(tokens) == end - first else tokens
            stored = len(tokens)
        positions |= dict.fromkeys(stream.stacks, where)
        lengths |= dict.fromkeys(stream.stacks, stored)
    return Row(key.hexdigest(), content.hexdigest(), positions, lengths)


def _bytes(stream: Stream, index: int, span: slice) -> bytes:
    """The columns and the mask of a span; its length first, so that no two rows can read alike."""
    parts = [column[index, span].to(torch.int64).contiguous().numpy().tobytes() for column in stream.columns]
    parts.append((stream.mask[index, span] != 0).contiguous().numpy().tobytes())
    return f"{len(stream.columns)} {span.stop - span.start} ".encode() + b"".join(parts)


def context_of(wanted: Iterable[StateKey], zero_pads: bool, dtype: torch.dtype | None, width: int | None) -> str:
    """What a row's states depend on beside its tokens and the base model; ``dtype`` is autocast's, or None."""
    places = " ".join(f"{key.stack}:{key.position}" for key in sorted(wanted))
    return f"{places} | {'zero' if zero_pads else 'keep'} | {dtype} | {width} | "
