"""Collate rows of two texts into batches: the target text of any transformers task, and its source text.

Element-wise fusion pairs position j of the target with position j of the source, so both texts are padded to ONE width.
For causal language models, the answers of both texts also start at the same index. (The authors' release aligns the end
of a source prompt with the end of the target's answer, which shifts the two prompts against each other.)

Shapes: B rows, m the common width of both texts, u the common width of decoder sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from .choices import batch_of_choices, choices_of, split_choices
from .row_checks import LABEL_NAMES, all_have, check_beginnings, check_vocabulary, first_special, read_rows
from .texts import (
    NO_STATE,
    Text,
    column_names,
    has_token_labels,
    is_list_column,
    layout_of_rows,
    stack_column,
    stack_states,
)

LAYOUTS = ("auto", "encoder", "causal", "seq2seq")

#: Columns of the answer span in the source. FlareTrainer keeps them if the adapter reads them
#: (flare.baselines.x_mixup).
SOURCE_POSITIONS = ("source_start_positions", "source_end_positions")
_POSITIONS = ("start_positions", "end_positions")
_DECODER_IDS = ("decoder_input_ids", "source_decoder_input_ids")
_DECODER_COLUMNS = ("labels", "source_labels", *_DECODER_IDS)


def layout_of(model: Any) -> str:
    """Return the layout of a model's batches, from its class: "seq2seq", "causal", or "encoder" for all others."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if "ForConditionalGeneration" in name:
        return "seq2seq"
    return "causal" if "ForCausalLM" in name or "LMHeadModel" in name else "encoder"


@dataclass
class FlareDataCollator:
    """Data collator that pads target and source texts of any task to one width.

        collate = flare.FlareDataCollator(tokenizer, max_length=128, truncation=True)
        batch = collate(
            [
                {"input_ids": [0, 5, 6, 2], "source_input_ids": [0, 7, 2], "labels": 1},
                {"input_ids": [0, 5, 2], "source_input_ids": [0, 8, 9, 7, 2], "labels": 0},
            ]
        )
        batch["input_ids"].shape  # (2, 5), and so are source_input_ids and both masks

    **Input.** A row has ``input_ids`` and ``source_input_ids``. Its labels are ``labels``, or ``start_positions`` and
    ``end_positions``; a row may have none. Optional columns: ``attention_mask``, ``token_type_ids``,
    ``source_attention_mask``, ``source_token_type_ids``, ``source_labels``, ``decoder_input_ids``,
    ``source_decoder_input_ids``, and, for the baseline X-Mixup (flare.baselines.x_mixup), the source's answer span
    (``source_start_positions``, ``source_end_positions``). A missing mask means all ones. In FLARE MT, the variant that
    reads the encoder states of a translation model, rows have ``source_states`` (length, latent_dim) from
    flare.LatentEncoder in place of ``source_input_ids``.

    **Output.** A BatchEncoding of tensors: ``input_ids``, ``attention_mask``, ``source_input_ids`` and
    ``source_attention_mask``, and the token types if rows have them, all (B, m) int64. ``labels`` are (B) with one
    number per row, (B, k) with a vector of k numbers per row, (B, m) with one label per token or, for encoder-decoders,
    (B, u) together with ``source_labels`` (B, u). FLARE MT: ``source_states`` (B, m, latent_dim), float32, in place of
    ``source_input_ids``. Other numeric columns are stacked, and columns of strings are dropped.

    **Multiple choice.** ``input_ids``, ``source_input_ids``, their masks and token types are lists of n texts, and
    ``labels`` is the index of the correct text. Tensors are (B, n, m), ``labels`` (B). Every choice has its own source
    text.

    **Layouts:**

    - encoder: both texts are padded on ``padding_side``. ``labels`` are one class, one vector, or one label per token.
      With padding on the left, ``start_positions`` and ``end_positions`` move with their tokens.
    - causal: a row is a prompt followed by an answer. ``labels`` are -100 on the prompt; a row without labels is all
      prompt. Prompts are padded on the left and answers on the right, so that the answers of both texts start at the
      same index. ``source_labels`` mark the source's answer in the same way and are not passed to the model. Without
      ``source_labels`` the source is all prompt, and its mask is 0 at the positions of the answers.
    - seq2seq: both texts are padded on ``padding_side``. ``labels`` and ``source_labels`` are padded on the right to
      their own common width.

    Args:
        tokenizer: provides the pad token, the padding side and the special tokens.
        padding: "longest" (or True) pads to the longest target or source text in the batch, "max_length" to max_length.
        max_length: the largest width of a batch. A longer row raises an error if ``truncation`` is False.
        pad_to_multiple_of: round the width up to a multiple of this number.
        truncation: cut long texts at their end (a final special token is kept), and causal prompts at their start (a
            first special token is kept).
        padding_side: "left" or "right"; default: the tokenizer's. Not used by causal rows.
        layout: one of ``LAYOUTS``. "auto" looks at labels that are lists of integers. If one of them is not as long as
            the row's ``input_ids``, the layout is "seq2seq". If all entries are -100 or the input id at the same
            position, it is "causal". Otherwise, and without such lists, it is "encoder". FlareTrainer sets the layout
            from the model. Without FlareTrainer, pass "seq2seq" yourself, because the labels of an encoder-decoder can
            happen to be as long as its inputs.
        require_source: False accepts rows without ``source_input_ids`` and makes a batch without a source from them.
        label_pad_token_id: the value of padding in labels.
        widths: three minimum numbers of columns of a batch: before the aligned index, from the aligned index on, and in
            the decoder's sequences. :meth:`fitted` computes them. The aligned index is where the answers of causal rows
            start. For other rows it is the start of texts that are padded on the right, and the end of texts that are
            padded on the left. max_length takes precedence over the first two numbers.
        vocab_size: a token id at or above this number raises an error. FlareTrainer sets it to the model's number of
            embeddings.
        model: for layout "seq2seq": the model that makes ``decoder_input_ids`` from the labels, as in
            DataCollatorForSeq2Seq. Needed when a Trainer removes the labels (label_smoothing_factor); FlareTrainer then
            sets it.

    Raises:
        ValueError: the tokenizer has no pad token, an option is unknown, rows have no source, columns have different
            lengths, a text is too long, or truncation would cut off an answer.
    """

    tokenizer: Any
    padding: bool | str = "longest"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    truncation: bool = False
    padding_side: str | None = None
    layout: str = "auto"
    require_source: bool = True
    label_pad_token_id: int = -100
    widths: tuple[int, int, int] | None = None
    vocab_size: int | None = None
    model: Any = field(default=None, repr=False)
    # True after the warning about a source from another tokenizer
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.padding is True:
            self.padding = "longest"
        if self.padding not in ("longest", "max_length"):
            raise ValueError(f"padding={self.padding!r} is not known; use 'longest' or 'max_length'")
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding='max_length' needs max_length, the width of every batch")
        if self.max_length is None and self.truncation:
            raise ValueError("truncation=True needs max_length, the number of tokens to keep")
        if self.max_length is not None and self.pad_to_multiple_of and self.max_length % self.pad_to_multiple_of:
            raise ValueError(
                f"max_length={self.max_length} is not a multiple of pad_to_multiple_of={self.pad_to_multiple_of}, "
                "so padding would exceed it; make max_length a multiple or leave pad_to_multiple_of out"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not known; use one of {', '.join(map(repr, LAYOUTS))}")
        if self.padding_side is None:
            self.padding_side = self.tokenizer.padding_side
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} is not known; use 'left' or 'right'")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"tokenizer ({type(self.tokenizer).__name__}) has no pad token, which texts of different lengths "
                "need; set one first, such as tokenizer.pad_token = tokenizer.eos_token"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Collate rows into one batch; see the class."""
        n = choices_of(rows)
        return self._collate(rows) if n is None else batch_of_choices(rows, n, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        read = read_rows(rows)
        layout = self._layout(read)
        targets, sources = self._texts(read, layout)
        texts = {"": targets, "source_": sources} if sources else {"": targets}
        return self._batch(read, texts, layout, self.max_length)

    def fitted(self, rows: Iterable[Mapping[str, Any]]) -> FlareDataCollator:
        """Return a collator whose batches all have the width that one batch of all these rows would have.

        A row then has the same padding in every batch. Under source_padding="keep" a SourceStateCache needs this to
        find its rows again.
        """
        left = right = decoder = 0
        for row in rows:
            n = choices_of([row])
            read = read_rows([row] if n is None else split_choices([row], n))
            layout = self._layout(read)
            targets, sources = self._texts(read, layout)
            left = max([left, *(text.split for text in targets + sources)])
            right = max([right, *(len(text) - text.split for text in targets + sources)])
            if layout == "seq2seq":
                decoder = max([decoder, *(len(read[0][n]) for n in _DECODER_COLUMNS if is_list_column(read, n))])
        return replace(self, widths=(left, right, decoder))

    # --- reading rows -------------------------------------------------------------------------------------------------

    def _layout(self, rows: list[dict[str, Any]]) -> str:
        return layout_of_rows(rows) if self.layout == "auto" else self.layout

    def _texts(self, rows: list[dict[str, Any]], layout: str) -> tuple[list[Text], list[Text]]:
        """Return the target texts and the source texts (empty without a source), cut to at most max_length tokens."""
        with_source = self._with_source(rows)
        targets = [self._text(row, index, "", layout) for index, row in enumerate(rows)]
        sources = [self._text(row, index, "source_", layout) for index, row in enumerate(rows)] if with_source else []
        if with_source and not self._warned:
            self._warned = check_beginnings(rows, first_special(self.tokenizer))
        if not with_source and all_have(rows, "source_states"):
            sources = [self._latent_text(row, index, layout) for index, row in enumerate(rows)]
        return targets, sources

    def _with_source(self, rows: list[dict[str, Any]]) -> bool:
        if all_have(rows, "source_input_ids"):
            return True
        if self.require_source and not all("source_states" in row for row in rows):
            raise ValueError(
                f"no row has the column 'source_input_ids' (they have {sorted(rows[0])}). Tokenise the source-language "
                "text into that column. If the data set has it, the Trainer dropped it: use FlareTrainer or set "
                "remove_unused_columns=False. For a batch without a source pass require_source=False to the collator"
            )
        return False

    def _text(self, row: dict[str, Any], index: int, prefix: str, layout: str) -> Text:
        ids = row[f"{prefix}input_ids"]
        if self.vocab_size is not None:
            check_vocabulary(ids, self.vocab_size, index, f"{prefix}input_ids")
        columns = {"input_ids": ids, "attention_mask": row.get(f"{prefix}attention_mask", [1] * len(ids))}
        if f"{prefix}token_type_ids" in row:
            columns["token_type_ids"] = row[f"{prefix}token_type_ids"]
        labels = row.get(f"{prefix}labels")
        if layout == "causal" and labels is not None:
            if not isinstance(labels, list):
                raise ValueError(
                    f"row {index}: {prefix}labels is one number; layout='causal' needs one label per token"
                )
            columns["labels"] = labels
        elif layout == "encoder" and isinstance(labels, list) and not prefix and has_token_labels(labels, ids):
            columns["labels"] = labels
        for name, column in columns.items():
            if len(column) != len(ids):
                raise ValueError(
                    f"row {index}: {prefix}{name} has {len(column)} entries, {prefix}input_ids has {len(ids)}; "
                    "they must be equally long"
                )
        if prefix and layout == "encoder" and "source_labels" in row:
            raise ValueError(
                f"row {index}: source_labels are for causal and encoder-decoder rows; this batch has layout='encoder'. "
                "Drop the column, or pass the correct layout if layout='auto' chose 'encoder'"
            )
        split = 0 if self.padding_side == "right" else len(ids)
        text = Text(columns, split)
        if layout == "causal":
            text.strip_padding()
            labels = text.columns.get("labels", [])
            if labels:  # the first token has no predecessor, and the padding before it must not predict it
                labels = text.columns["labels"] = [-100, *labels[1:]]
            text.split = next((i for i, label in enumerate(labels) if label != -100), len(text))
        self._fit(text, row, index, prefix, layout)
        return text

    def _latent_text(self, row: dict[str, Any], index: int, layout: str) -> Text:
        """Return FLARE MT's states of one row as a text of ids: the id of state i is -2 - i, which no token has."""
        states = row["source_states"]
        if not isinstance(states, Tensor) or states.dim() != 2:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"row {index}: source_states is {shape}, expected numbers of shape (length, latent_dim)")
        text = {"source_input_ids": [-2 - position for position in range(len(states))]}
        if "source_attention_mask" in row:
            text["source_attention_mask"] = row["source_attention_mask"]
        return self._text(text, index, "source_", layout)

    def _fit(self, text: Text, row: dict[str, Any], index: int, prefix: str, layout: str) -> None:
        """Truncate one text to max_length.

        Raises:
            ValueError: the text is too long and ``truncation`` is False, its answer would be cut off, or an answer
                position is not in the text.
        """
        length, limit = len(text), self.max_length
        positions = SOURCE_POSITIONS if prefix else _POSITIONS
        for name in positions:
            if name in row and not 0 <= row[name] < length:
                raise ValueError(f"row {index}: {name}={row[name]} is outside its {length} {prefix}input_ids")
        if limit is None or length <= limit:
            return
        if not self.truncation:
            raise ValueError(
                f"row {index}: {prefix}input_ids has {length} tokens and max_length is {limit}; tokenise with "
                f"truncation=True, max_length={limit}, or pass truncation=True to the collator"
            )
        if layout == "causal":
            self._cut_prompt(text, text.split - (length - limit), f"row {index}: {prefix}input_ids")
            return
        closing = text.columns["input_ids"][-1] in self.tokenizer.all_special_ids
        end = limit - 1 if closing else limit
        cut = [name for name in positions if row.get(name, 0) >= end]
        if cut:
            raise ValueError(
                f"row {index}: truncation to max_length={limit} would cut off the answer "
                f"({', '.join(f'{name}={row[name]}' for name in cut)}); drop such rows or raise max_length"
            )
        text.keep([*range(end), length - 1] if closing else range(end))
        text.split = min(text.split, limit)

    def _cut_prompt(self, text: Text, keep: int, what: str) -> None:
        """Cut a causal prompt to ``keep`` tokens: its first token, if that is special, and its end. Keep the answer."""
        if keep < 0:
            raise ValueError(
                f"{what}: the answer alone has {len(text) - text.split} tokens and max_length is {self.max_length}; "
                "shorten the answer or raise max_length"
            )
        opening = keep > 0 and text.columns["input_ids"][0] in self.tokenizer.all_special_ids
        removed = text.split - keep
        start = removed + 1 if opening else removed
        text.keep([*([0] if opening else []), *range(start, len(text))])
        text.split = keep

    # --- making tensors -----------------------------------------------------------------------------------------------

    def _batch(
        self, rows: list[dict[str, Any]], texts: dict[str, list[Text]], layout: str, max_length: int | None
    ) -> BatchEncoding:
        all_texts = [text for stream in texts.values() for text in stream]
        left, right = self._width(all_texts, layout, max_length)
        fills = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
            "labels": self.label_pad_token_id,
        }
        batch: dict[str, Tensor] = {}
        for prefix, stream in texts.items():
            columns = [text.columns for text in stream]
            for name in column_names(columns):
                if prefix and name == "labels":
                    continue  # source_labels only mark the source's answer; the model does not take them
                all_have(columns, name, prefix)
                if prefix and name == "input_ids" and "source_input_ids" not in rows[0]:
                    ids = torch.tensor([text.padded(name, NO_STATE, left, right) for text in stream])
                    batch["source_states"] = stack_states(rows, ids)
                    continue
                batch[prefix + name] = torch.tensor([text.padded(name, fills[name], left, right) for text in stream])
        for names, prefix in ((_POSITIONS, ""), (SOURCE_POSITIONS, "source_")):
            for name in names:
                if prefix in texts and all_have(rows, name):
                    shifts = [text.target_offset + left - text.split for text in texts[prefix]]
                    batch[name] = torch.tensor([row[name] + by for row, by in zip(rows, shifts, strict=True)])
        batch.update(self._decoder_columns(rows, layout))
        used = {*batch, *LABEL_NAMES[1:], "source_labels"}
        for name in column_names(rows):
            if name not in used and not any(isinstance(row.get(name), str) for row in rows):
                all_have(rows, name)
                batch[name] = stack_column(rows, name)
        return BatchEncoding(batch)

    def _width(self, texts: list[Text], layout: str, max_length: int | None) -> tuple[int, int]:
        """Return the number of columns before the aligned index, and from the aligned index on."""
        left = max(text.split for text in texts)
        right = max(len(text) - text.split for text in texts)
        if max_length is not None and left + right > max_length:
            # Only causal rows can be too long here: one row has the longest prompt, and another the longest answer.
            if not self.truncation:
                raise ValueError(
                    f"the longest prompt of the batch has {left} tokens and the longest answer {right} tokens. Prompts "
                    f"and answers are padded separately, to {left + right} tokens, but max_length is {max_length}; "
                    "raise max_length, or pass truncation=True to cut prompts"
                )
            left = max_length - right
            for text in texts:
                if text.split > left:
                    self._cut_prompt(text, left, "a causal row")
        left, right = self._widened(left, right, max_length)
        width = left + right
        if self.padding == "max_length" and max_length is not None:
            width = max_length
        elif self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        on_the_left = layout == "causal" or self.padding_side == "left"
        return (width - right, right) if on_the_left else (left, width - left)

    def _widened(self, left: int, right: int, max_length: int | None) -> tuple[int, int]:
        """Return the numbers of columns raised to ``widths``.

        If the second number does not fit into max_length, neither is raised; the first is raised as far as it fits.
        """
        if self.widths is None:
            return left, right
        wider = max(right, self.widths[1])
        room = self.widths[0] if max_length is None else min(self.widths[0], max_length - wider)
        fits = max_length is None or left + wider <= max_length
        return (max(left, room), wider) if fits else (left, right)

    def _decoder_columns(self, rows: list[dict[str, Any]], layout: str) -> dict[str, Tensor]:
        """Return labels, source_labels and the decoders' inputs, padded on the right to one width."""
        if layout != "seq2seq":
            return {}
        fills = dict.fromkeys(("labels", "source_labels"), self.label_pad_token_id)
        fills |= dict.fromkeys(_DECODER_IDS, self.tokenizer.pad_token_id)
        present = [n for n in fills if all_have(rows, n) and is_list_column(rows, n)]
        width = max((len(row[name]) for row in rows for name in present), default=0)
        width = max(width, self.widths[2]) if self.widths is not None and present else width
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        columns = {
            name: torch.tensor([row[name] + [fills[name]] * (width - len(row[name])) for row in rows])
            for name in present
        }
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "labels" in columns and "decoder_input_ids" not in columns:
            columns["decoder_input_ids"] = shift(labels=columns["labels"])
        return columns
