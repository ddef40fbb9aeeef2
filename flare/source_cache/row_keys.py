"""Compute the cache keys of a batch's rows, and which positions of each row are stored.

A row is one example of a batch: its source text and, if decoder states are required, the text that the decoder reads.

With source_padding="keep" a row's key covers all inputs of the frozen model: ids, mask and token types over the padded
width. With "zero" no adapter reads padding, and tokens do not attend to it, so the key covers the inputs only up to
the last token. For the source text, these start at the first token if the model's positions are relative (rotary
embeddings, T5's bias). Otherwise they start at position 0, because learned position embeddings depend on the absolute
position. For the text of a decoder, they always start at position 0.

A stack is the list of blocks of a decoder-only model, of an encoder, or of a decoder.
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

#: Parts of the names of modules that make hidden states depend on absolute positions.
_ABSOLUTE = ("position_embedding", "embed_position", "wpe")
#: Parts of the names of modules whose positions are relative.
_RELATIVE = ("rotary_emb", "relative_attention_bias")
#: Kinds of rotary frequencies that do not depend on the width of the batch.
_STEADY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
#: Model types whose attention depends on the width: by landmarks, or by a mask that does not remove padding completely.
_ATTENTION_BY_WIDTH = ("nystromformer", "yoso")


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        key: hash of all inputs that the row's states depend on.
        positions: stack -> the stored positions: a slice, or a tensor of indices if the mask has gaps.
        lengths: stack -> number of stored positions.
    """

    key: str
    positions: dict[str, slice | Tensor]
    lengths: dict[str, int]


@dataclass(frozen=True)
class TextColumns:
    """The source texts of a batch, or the texts that the decoder of an encoder-decoder reads.

    Attributes:
        columns: token ids and, if the model reads them, token types; each (B, m) int64.
        mask: (B, m) bool, True at tokens.
        stacks: the stacks that read these texts.
        relative: True if a key without padding starts at the first token; False if every key starts at position 0.
    """

    columns: tuple[np.ndarray, ...]
    mask: np.ndarray
    stacks: tuple[str, ...]
    relative: bool


@dataclass(frozen=True)
class Plan:
    """The required states, and facts about them that are the same for every batch.

    Attributes:
        keys: names of the states, in the order in which an entry stores them.
        visited: names of the states, in the order in which the model computes them.
        stacks: stack -> its number of states, in the order in which an entry stores them.
        of_text: the stacks that read the source text.
        of_decoder: the stacks that read ``decoder_input_ids``.
        places: the states' names as one string.
        device: device on which the model computes the states, or None if there are several.
    """

    keys: tuple[StateKey, ...]
    visited: tuple[StateKey, ...]
    stacks: dict[str, int]
    of_text: tuple[str, ...]
    of_decoder: tuple[str, ...]
    places: str
    device: torch.device | None

    @classmethod
    def of(cls, required: Iterable[StateKey], decoders: Collection[str], model: nn.Module) -> Plan:
        """Return the plan of a model's states; ``decoders``: the stacks that read ``decoder_input_ids``."""
        keys = tuple(sorted(required))
        stacks = Counter(key.stack for key in keys)
        devices = {device_of(model, key) for key in keys}
        return cls(
            keys,
            # the decoder comes last, as in the forward pass; dropout masks are drawn in this order
            tuple(sorted(keys, key=lambda key: (key.stack in decoders, key))),
            dict(stacks),
            tuple(stack for stack in stacks if stack not in decoders),
            tuple(stack for stack in stacks if stack in decoders),
            " ".join(f"{key.stack}:{key.position}" for key in keys),
            devices.pop() if len(devices) == 1 else None,
        )


@dataclass(frozen=True)
class Batch:
    """A batch of texts whose states are required.

    Attributes:
        plan: the required states.
        rows: the Row of each example, in the order of the batch.
        widths: stack -> padded width of its states.
        texts: the columns that the keys are computed from.
        context: a string of everything else that the keys depend on.
    """

    plan: Plan
    rows: list[Row]
    widths: dict[str, int]
    texts: list[TextColumns]
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
        """Return a batch with the keys of its rows. If a column is on a GPU, the host waits for it (:func:`on_host`).

        Args:
            plan: the required states.
            columns: ``input_ids`` (B, m), optionally ``attention_mask`` and ``token_type_ids`` of the same shape; for
                decoder stacks also ``decoder_input_ids`` (B, u) and ``decoder_attention_mask``.
            relative: whether the model's positions are relative (:func:`counts_relatively`).
            zero_pads: whether padding is neither read nor stored.
            dtype: autocast's dtype, or None without autocast.
            width_counts: whether the states depend on the padded width (:func:`needs_width`).
        """
        columns = on_host(columns)
        ids = columns["input_ids"]
        types = [columns["token_type_ids"]] if "token_type_ids" in columns else []
        texts = [_text_columns([ids, *types], columns.get("attention_mask"), plan.of_text, relative)]
        widths = dict.fromkeys(plan.of_text, ids.shape[1])
        if plan.of_decoder:
            ids = columns["decoder_input_ids"]
            texts.append(_text_columns([ids], columns.get("decoder_attention_mask"), plan.of_decoder, False))
            widths |= dict.fromkeys(plan.of_decoder, ids.shape[1])
        width = columns["input_ids"].shape[1] if width_counts else None
        context = f"{plan.places} | {'zero' if zero_pads else 'keep'} | {dtype} | {width} | "
        return cls(plan, make_rows(texts, context, zero_pads), widths, texts, context)

    def content(self, index: int) -> str:
        """Return a hash of a row's tokens and of ``context``, but not of the padding's tokens."""
        digest = hashlib.blake2b(self.context.encode(), digest_size=16)
        for text in self.texts:
            tokens = text.mask[index].nonzero()[0]
            digest.update(_bytes(text, index, *((tokens[0], tokens[-1] + 1) if len(tokens) else (0, 0))))
        return digest.hexdigest()

    def counts(self, row: Row) -> dict[StateKey, int]:
        """Return StateKey -> number of positions of this state that a row stores."""
        return {key: row.lengths[key.stack] for key in self.plan.keys}

    def size(self, row: Row) -> int:
        """Return the number of positions that a row stores, summed over all states."""
        return sum(count * row.lengths[stack] for stack, count in self.plan.stacks.items())


def on_host(columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return integer columns on the CPU. Columns on a GPU are moved with one copy, for which the host waits.

    The copy is queued after all work that was launched before, so the host waits for this work too. To
    avoid the wait, pass CPU tensors to ``SourceStateCache.lookup``, or host copies to its ``reader`` as ``host``.
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


def _text_columns(columns: list[Tensor], mask: Tensor | None, stacks: tuple[str, ...], relative: bool) -> TextColumns:
    arrays = tuple(column.detach().long().numpy() for column in columns)
    is_token = np.ones(arrays[0].shape, dtype=bool) if mask is None else (mask.detach() != 0).numpy()
    return TextColumns(arrays, is_token, stacks, relative)


def device_of(model: nn.Module, key: StateKey) -> torch.device:
    """Return the device on which the model computes a state."""
    blocks = model.get_submodule(key.stack)
    return next(blocks[max(key.position - 1, 0)].parameters()).device  # type: ignore[index]


def accepts_types(model: nn.Module) -> bool:
    """Return whether the backbone takes token types."""
    backbone: Any = getattr(model, "base_model", model)
    return "token_type_ids" in inspect.signature(backbone.forward).parameters


def counts_relatively(model: nn.Module) -> bool:
    """Return whether a text keeps its hidden states, up to rounding, when all its positions are shifted."""
    backbone: Any = getattr(model, "base_model", model)
    parts = {path.rpartition(".")[2] for path, _ in backbone.named_modules()}
    if any(mark in part for part in parts for mark in _ABSOLUTE) or _in_chunks(getattr(model, "config", None)):
        return False
    return any(mark in part for part in parts for mark in _RELATIVE)


def _in_chunks(config: Any) -> bool:
    """Return whether attention has chunks whose boundaries depend on absolute positions."""
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(text, name, None) for name in ("attention_chunk_size", "encoder_attention_type"))


def needs_width(model: nn.Module) -> bool:
    """Return whether hidden states depend on the batch's width: by rotary frequencies, attention or convolutions."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope: Any = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return (
        any(kind.get("rope_type", "default") not in _STEADY_ROPE for kind in kinds)
        or getattr(text, "model_type", None) in _ATTENTION_BY_WIDTH
        or any(_reads_later_positions(path, module) for path, module in model.named_modules())
    )


def _reads_later_positions(path: str, module: nn.Module) -> bool:
    """Return whether a module is a convolution in a block that reads later positions, and thus padding on the right.

    Causal convolutions are padded by their kernel's size - 1, and patch embeddings are not padded.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or not any(part.isdigit() for part in path.split(".")):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and max(module.kernel_size) > 1
    return any(0 < pad < size - 1 for pad, size in zip(module.padding, module.kernel_size, strict=True))


def make_rows(texts: list[TextColumns], context: str, zero_pads: bool) -> list[Row]:
    """Return a Row for every row of a batch.

    Args:
        texts: the texts that the required states depend on.
        context: a string of everything else that the keys depend on (names of the states, compute dtype, padding). The
            base model is not part of a key.
        zero_pads: whether padding is neither read nor stored.
    """
    prefix = hashlib.blake2b(context.encode(), digest_size=16)
    bounds = [_bounds(text.mask) for text in texts]
    rows = []
    for index in range(len(texts[0].mask)):
        key = prefix.copy()
        positions: dict[str, slice | Tensor] = {}
        lengths: dict[str, int] = {}
        for text, (firsts, ends, counts) in zip(texts, bounds, strict=True):
            first, end, stored = 0, text.mask.shape[1], text.mask.shape[1]
            if zero_pads:
                first, end, stored = firsts[index], ends[index], counts[index]
            key.update(_bytes(text, index, first if text.relative else 0, end))
            where: slice | Tensor = slice(first, end)
            if stored != end - first:
                where = torch.from_numpy(text.mask[index].nonzero()[0])
            for stack in text.stacks:
                positions[stack], lengths[stack] = where, stored
        rows.append(Row(key.hexdigest(), positions, lengths))
    return rows


def _bounds(mask: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """Return lists of each row's first token position, end (last token position + 1) and number of tokens.

    All three are 0 for a row without tokens.
    """
    counts = mask.sum(1)
    has_tokens = counts > 0
    ends = mask.shape[1] - mask[:, ::-1].argmax(1)
    return (mask.argmax(1) * has_tokens).tolist(), (ends * has_tokens).tolist(), counts.tolist()


def _bytes(text: TextColumns, index: int, first: int, end: int) -> bytes:
    """Return the bytes of the columns and the mask from position ``first`` to ``end``.

    They begin with the number of columns and the length, so that different rows give different bytes.
    """
    parts = [column[index, first:end].tobytes() for column in (*text.columns, text.mask)]
    return f"{len(text.columns)} {end - first} ".encode() + b"".join(parts)
