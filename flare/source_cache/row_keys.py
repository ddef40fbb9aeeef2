"""What one row of a batch is called, and which of its positions are stored.

With source_padding="keep" a row is everything the frozen model is given for it: ids, mask and token types over the
whole padded width. With "zero" no adapter reads pads, and tokens do not attend to them: what counts are the positions
from the first that matters to the last token. That is the first token where positions count relatively to each other
(rotary embeddings, T5's bias), else position 0, as a learned position embedding tells one place from another.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..source.states import StateKey

_ABSOLUTE = ("position_embedding", "embed_position", "wpe")
_RELATIVE = ("rotary_emb", "relative_attention_bias")
#: Rotary frequencies that do not depend on the width of the batch.
_STEADY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Row:
    """One row: its name, and per stack the positions (in this batch) that are stored, and how many these are."""

    key: str
    positions: dict[str, slice | Tensor]
    lengths: dict[str, int]


@dataclass(frozen=True)
class TextColumns:
    """One text: its columns (token ids and token types, each (B, m) int64), its mask (B, m) bool, and its stacks."""

    columns: tuple[np.ndarray, ...]
    mask: np.ndarray
    stacks: tuple[str, ...]
    relative: bool


@dataclass(frozen=True)
class Plan:
    """The states that a reading wants, all that depends on them alone.

    keys: in the order of an entry. visited: in the model's order. stacks: how many states each has, in the order of an
    entry. of_text, of_decoder: the stacks by the text that they read. places: the keys as text. device: where the model
    makes the states; None where these are several.
    """

    keys: tuple[StateKey, ...]
    visited: tuple[StateKey, ...]
    stacks: dict[str, int]
    of_text: tuple[str, ...]
    of_decoder: tuple[str, ...]
    places: str
    device: torch.device | None

    @classmethod
    def of(cls, wanted: Iterable[StateKey], decoders: Collection[str], model: nn.Module) -> Plan:
        """Return the plan of the states of a model, given which stacks read ``decoder_input_ids``."""
        keys = tuple(sorted(wanted))
        stacks = Counter(key.stack for key in keys)
        devices = {device_of(model, key) for key in keys}
        return cls(
            keys,
            tuple(sorted(keys, key=lambda key: (key.stack in decoders, key))),  # dropout masks are drawn in this order
            dict(stacks),
            tuple(stack for stack in stacks if stack not in decoders),
            tuple(stack for stack in stacks if stack in decoders),
            " ".join(f"{key.stack}:{key.position}" for key in keys),
            devices.pop() if len(devices) == 1 else None,
        )


@dataclass(frozen=True)
class Batch:
    """A batch of texts whose states are wanted.

    rows: one for each text. widths: stack -> positions of its states. streams, context: what the names are made of.
    """

    plan: Plan
    rows: list[Row]
    widths: dict[str, int]
    streams: list[TextColumns]
    context: str

    @classmethod
    def of(
        cls,
        plan: Plan,
        columns: Mapping[str, Tensor],
        *,
        relative: bool,
        zero_pads: bool,
        dtype: torch.dtype | None,
        width_counts: bool,
    ) -> Batch:
        """Name the rows of a batch. Waits for the device where a column is on one: see :func:`on_host`.

        Args:
            plan: the wanted states.
            columns: ``input_ids`` (B, m), and where there are any ``attention_mask`` and ``token_type_ids`` of the same
                shape; for decoder stacks ``decoder_input_ids`` (B, u) and ``decoder_attention_mask``.
            relative: see :func:`counts_relatively`.
            zero_pads: whether pads are neither read nor stored.
            dtype: autocast's, or None.
            width_counts: see :func:`needs_width`.
        """
        columns = on_host(columns)
        ids = columns["input_ids"]
        types = [columns["token_type_ids"]] if "token_type_ids" in columns else []
        streams = [_stream([ids, *types], columns.get("attention_mask"), plan.of_text, relative)]
        widths = dict.fromkeys(plan.of_text, ids.shape[1])
        if plan.of_decoder:
            ids = columns["decoder_input_ids"]
            streams.append(_stream([ids], columns.get("decoder_attention_mask"), plan.of_decoder, False))
            widths |= dict.fromkeys(plan.of_decoder, ids.shape[1])
        width = columns["input_ids"].shape[1] if width_counts else None
        context = f"{plan.places} | {'zero' if zero_pads else 'keep'} | {dtype} | {width} | "
        return cls(plan, name_rows(streams, context, zero_pads), widths, streams, context)

    def content(self, index: int) -> str:
        """Return a name of a row's tokens alone, which does not depend on how they are padded."""
        name = hashlib.blake2b(self.context.encode(), digest_size=16)
        for stream in self.streams:
            tokens = stream.mask[index].nonzero()[0]
            name.update(_bytes(stream, index, *((tokens[0], tokens[-1] + 1) if len(tokens) else (0, 0))))
        return name.hexdigest()

    def counts(self, row: Row) -> dict[StateKey, int]:
        """Return how many positions of each state a row stores."""
        return {key: row.lengths[key.stack] for key in self.plan.keys}

    def size(self, row: Row) -> int:
        """Return how many positions of all states together a row stores."""
        return sum(count * row.lengths[stack] for stack, count in self.plan.stacks.items())


def on_host(columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return integer columns on the CPU: those that are there as they are, the others by one copy and one wait.

    The copy is queued behind what the device has been given so far, so the host waits for that. A caller that has the
    columns on the host (``SourceStateCache.lookup``, or ``reader(..., host=)``) does not wait.
    """
    moving = {name: column for name, column in columns.items() if column.device.type == "cuda"}
    if not moving:
        return {name: column if column.device.type == "cpu" else column.cpu() for name, column in columns.items()}
    flat = torch.cat([(column != 0 if "mask" in name else column).flatten().long() for name, column in moving.items()])
    arrived = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flat.device))
    event.synchronize()
    parts = arrived.split([column.numel() for column in moving.values()])
    return {**columns, **{name: part.view(moving[name].shape) for name, part in zip(moving, parts, strict=True)}}


def _stream(columns: list[Tensor], mask: Tensor | None, stacks: tuple[str, ...], relative: bool) -> TextColumns:
    arrays = tuple(column.detach().long().numpy() for column in columns)
    seen = np.ones(arrays[0].shape, dtype=bool) if mask is None else (mask.detach() != 0).numpy()
    return TextColumns(arrays, seen, stacks, relative)


def device_of(model: nn.Module, key: StateKey) -> torch.device:
    """Return where the model makes a state."""
    blocks = model.get_submodule(key.stack)
    return next(blocks[max(key.position - 1, 0)].parameters()).device  # type: ignore[index]


def accepts_types(model: nn.Module) -> bool:
    """Return whether the backbone takes token types."""
    backbone: Any = getattr(model, "base_model", model)
    return "token_type_ids" in inspect.signature(backbone.forward).parameters


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


def name_rows(streams: list[TextColumns], context: str, zero_pads: bool) -> list[Row]:
    """Return a Row for every row of a batch.

    Args:
        streams: the texts that the wanted states depend on.
        context: whatever else they depend on (states, compute dtype, padding), but for the base model.
        zero_pads: whether pads are neither read nor stored.
    """
    begin = hashlib.blake2b(context.encode(), digest_size=16)
    bounds = [_bounds(stream.mask) for stream in streams]
    rows = []
    for index in range(len(streams[0].mask)):
        key = begin.copy()
        positions: dict[str, slice | Tensor] = {}
        lengths: dict[str, int] = {}
        for stream, (firsts, ends, counts) in zip(streams, bounds, strict=True):
            first, end, stored = 0, stream.mask.shape[1], stream.mask.shape[1]
            if zero_pads:
                first, end, stored = firsts[index], ends[index], counts[index]
            key.update(_bytes(stream, index, first if stream.relative else 0, end))
            where: slice | Tensor = slice(first, end)
            if stored != end - first:
                where = torch.from_numpy(stream.mask[index].nonzero()[0])
            for stack in stream.stacks:
                positions[stack], lengths[stack] = where, stored
        rows.append(Row(key.hexdigest(), positions, lengths))
    return rows


def _bounds(mask: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """The first token of each row, the position after its last, and its number of tokens; zeros where it has none."""
    counts = mask.sum(1)
    some = counts > 0
    ends = mask.shape[1] - mask[:, ::-1].argmax(1)
    return (mask.argmax(1) * some).tolist(), (ends * some).tolist(), counts.tolist()


def _bytes(stream: TextColumns, index: int, first: int, end: int) -> bytes:
    """The columns and the mask of a span; its length first, so that no two rows can read alike."""
    parts = [column[index, first:end].tobytes() for column in (*stream.columns, stream.mask)]
    return f"{len(stream.columns)} {end - first} ".encode() + b"".join(parts)
