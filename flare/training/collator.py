"""Batches of two texts: the target-language rows of any transformers task, with their source-language counterpart.

Element-wise fusion pairs position j of one stream with position j of the other, so both texts are padded to ONE width.
For causal language models the answers also start at one index in both streams (the release right-aligns a prompt-only
source with a prompt-and-answer target, which shifts the two by the length of the answer).

Shapes: B rows, m the common width of both texts, u the common width of decoder sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchEncoding

from .choices import batch_of_choices, choices_of, split_choices
from .row_checks import LABEL_NAMES, all_have, check_beginnings, check_vocabulary, first_special, read_rows

LAYOUTS = ("auto", "encoder", "causal", "seq2seq")

# What FlareDataCollator reads or makes for the source; a Trainer has to keep these columns.
SOURCE_COLUMNS = (
    "source_input_ids",
    "source_attention_mask",
    "source_token_type_ids",
    "source_labels",
    "source_decoder_input_ids",
    "source_states",
)
# A span's place in the source; a Trainer keeps them where the adapter reads them (flare.baselines.x_mixup).
SOURCE_POSITIONS = ("source_start_positions", "source_end_positions")
_POSITIONS = ("start_positions", "end_positions")
_NO_STATE = -1  # the id of a position without a state, among those of FLARE MT's states: -2, -3, ...
_DECODER_IDS = ("decoder_input_ids", "source_decoder_input_ids")
_DECODER_COLUMNS = ("labels", "source_labels", *_DECODER_IDS)


def layout_of(model: Any) -> str:
    """The layout of a model's batches, from its class: "seq2seq", "causal" or (anything with a task head) "encoder"."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if "ForConditionalGeneration" in name:
        return "seq2seq"
    return "causal" if "ForCausalLM" in name or "LMHeadModel" in name else "encoder"


@dataclass
class Text:
    """One text of one row: columns of one length, cut in two at ``split``.

    What stands before ``split`` is padded on its left, what follows on its right, so that ``split`` falls on the same
    index in every text of a batch. Padding on the right alone is ``split = 0``, on the left alone ``split = len``.
    """

    columns: dict[str, list[Any]]
    split: int
    moved: int = 0  # how far the target's first token stands from the start of the text

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def keep(self, indices: Iterable[int]) -> None:
        """Keep only these positions of every column."""
        chosen = list(indices)
        self.columns = {name: [column[i] for i in chosen] for name, column in self.columns.items()}


@dataclass
class FlareDataCollator:
    """Pads target and source rows of any task to one width and makes tensors of them.

    A row holds ``input_ids``, ``labels`` (or ``start_positions`` and ``end_positions``, or none) and
    ``source_input_ids``; ``attention_mask``, ``token_type_ids``, their ``source_`` twins, ``source_labels`` and
    ``source_decoder_input_ids`` are used where present, as are ``source_start_positions`` and ``source_end_positions``
    (X-Mixup). Masks left out are ones. FLARE MT: ``source_states`` (length, latent_dim) of a row (flare.LatentEncoder)
    stand for ``source_input_ids`` and are padded as these would be.

    Out comes a BatchEncoding of int64 tensors: ``input_ids``, ``attention_mask``, ``source_input_ids``,
    ``source_attention_mask``, all (B, m); ``labels`` (B), (B, m) or, for encoder-decoders, (B, u) together with
    ``source_labels`` (B, u). Numeric columns of other names are stacked, strings are left out.

    Multiple choice: ``input_ids``, ``source_input_ids`` and their masks and types are lists of n texts, ``labels`` the
    index of the right one; tensors are (B, n, m), ``labels`` (B). Each choice has a source text of its own.

    Layouts:
        encoder: both texts padded on ``padding_side``; ``labels`` may be one class, one vector or one list per token.
            ``start_positions`` and ``end_positions`` follow their tokens when padding stands on the left.
        causal: rows are prompt + answer with ``labels`` -100 on the prompt (no labels: all prompt). Prompts are padded
            on the left, answers on the right, so answers start at one index in both streams. ``source_labels`` mark
            the source's answer in the same way; without them the source is all prompt, and masked where answers stand.
            ``source_labels`` are not passed on.
        seq2seq: both texts padded on ``padding_side``; ``labels`` and ``source_labels`` padded on the right to one
            width of their own.

    Args:
        tokenizer: gives pad token, padding side and special tokens.
        padding: "longest" (or True): the longest text of either stream in the batch; "max_length": always max_length.
        max_length: the widest batch allowed; longer rows are an error, or are cut with ``truncation=True``.
        pad_to_multiple_of: rounds the width up.
        truncation: cut long texts: at their end (a closing special token stays), causal prompts at their start.
        padding_side: "left" or "right"; default: the tokenizer's. Causal rows have both.
        layout: one of ``LAYOUTS``. "auto" looks at the labels: lists as long as ``input_ids`` that repeat them are
            causal, others as long are one label per token, lists of other lengths are seq2seq. FlareTrainer asks the
            model instead; by hand, name the layout for seq2seq, where labels may by chance be as long as the inputs.
        require_source: False makes a plain batch of rows without ``source_input_ids`` instead of an error.
        label_pad_token_id: what padding of labels holds.
        widths: least columns of every batch: before the index at which answers start (or texts end, padded on the
            left), from it on, and of decoder sequences. ``fitted`` finds those under which all batches are alike.
        vocab_size: token ids from this one on are an error; FlareTrainer sets it to the model's.
        model: layout "seq2seq": the model that makes ``decoder_input_ids`` of the labels, as DataCollatorForSeq2Seq's;
            needed where a Trainer takes the labels away (label_smoothing_factor). FlareTrainer sets it then.

    Raises:
        ValueError: a tokenizer without pad token, an unknown option, rows without a source, columns of different
            lengths, texts that are too long, answers that truncation would cut off.
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
    _mixed: bool = field(default=False, init=False, repr=False, compare=False)  # warned of a second tokenizer

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
                f"max_length={self.max_length} is no multiple of pad_to_multiple_of={self.pad_to_multiple_of}: "
                "padding would pass it; make max_length a multiple or leave pad_to_multiple_of out"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not known; use one of {', '.join(map(repr, LAYOUTS))}")
        if self.padding_side is None:
            self.padding_side = self.tokenizer.padding_side
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} is not known; use 'left' or 'right'")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"tokenizer ({type(self.tokenizer).__name__}) has no pad token, which batches of unequal texts need; "
                "set one first, such as tokenizer.pad_token = tokenizer.eos_token"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Collate rows (see the class) into one batch."""
        n = choices_of(rows)
        return self._collate(rows) if n is None else batch_of_choices(rows, n, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        read = read_rows(rows)
        layout = self._layout(read)
        targets, sources = self._texts(read, layout)
        texts = {"": targets, "source_": sources} if sources else {"": targets}
        return self._batch(read, texts, layout, self.max_length)

    def fitted(self, rows: Iterable[Mapping[str, Any]]) -> FlareDataCollator:
        """The same collator, but every batch as wide as one of all these rows would be: each row looks the same in any
        batch, which is what a SourceStateCache finds rows by under source_padding="keep".
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
                decoder = max([decoder, *(len(read[0][n]) for n in _DECODER_COLUMNS if _is_list(read, n))])
        return replace(self, widths=(left, right, decoder))

    # --- reading rows -------------------------------------------------------------------------------------------------

    def _layout(self, rows: list[dict[str, Any]]) -> str:
        if self.layout != "auto":
            return self.layout
        labelled = [row for row in rows if isinstance(row.get("labels"), list)]
        if not labelled or any(isinstance(value, float) for value in labelled[0]["labels"]):
            return "encoder"
        if any(len(row["labels"]) != len(row["input_ids"]) for row in labelled):
            return "seq2seq"
        repeated = all(
            label in (-100, token)
            for row in labelled
            for label, token in zip(row["labels"], row["input_ids"], strict=True)
        )
        return "causal" if repeated else "encoder"

    def _texts(self, rows: list[dict[str, Any]], layout: str) -> tuple[list[Text], list[Text]]:
        """Both streams' texts, each no longer than max_length; the second list is empty for a plain batch."""
        with_source = self._with_source(rows)
        targets = [self._text(row, index, "", layout) for index, row in enumerate(rows)]
        sources = [self._text(row, index, "source_", layout) for index, row in enumerate(rows)] if with_source else []
        if with_source and not self._mixed:
            self._mixed = check_beginnings(rows, first_special(self.tokenizer))
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
                "remove_unused_columns=False. For a batch without source pass require_source=False to the collator"
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
                raise ValueError(f"row {index}: {prefix}labels is one number; layout='causal' needs one per token")
            columns["labels"] = labels
        elif layout == "encoder" and isinstance(labels, list) and not prefix and _per_token(labels, ids):
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
                "Drop the column, or name the layout if 'auto' took it for another"
            )
        split = 0 if self.padding_side == "right" else len(ids)
        text = Text(columns, split)
        if layout == "causal":
            _strip_padding(text)
            labels = text.columns.get("labels", [])
            if labels:  # a first token is never predicted, but would be, from a pad, once padding stands before it
                labels = text.columns["labels"] = [-100, *labels[1:]]
            text.split = next((i for i, label in enumerate(labels) if label != -100), len(text))
        self._fit(text, row, index, prefix, layout)
        return text

    def _latent_text(self, row: dict[str, Any], index: int, layout: str) -> Text:
        """FLARE MT's states of one row as a text, whose ids -2, -3, ... stand for its states (no token has such)."""
        states = row["source_states"]
        if not isinstance(states, Tensor) or states.dim() != 2:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"row {index}: source_states is {shape}, expected numbers of shape (length, latent_dim)")
        text = {"source_input_ids": [-2 - position for position in range(len(states))]}
        if "source_attention_mask" in row:
            text["source_attention_mask"] = row["source_attention_mask"]
        return self._text(text, index, "source_", layout)

    def _fit(self, text: Text, row: dict[str, Any], index: int, prefix: str, layout: str) -> None:
        """Bring one text down to max_length, or say that it is too long."""
        length, limit = len(text), self.max_length
        positions = SOURCE_POSITIONS if prefix else _POSITIONS
        for name in positions:
            if name in row and not 0 <= row[name] < length:
                raise ValueError(f"row {index}: {name}={row[name]} is no position of its {length} {prefix}input_ids")
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
        kept = limit - 1 if closing else limit
        cut = [name for name in positions if row.get(name, 0) >= kept]
        if cut:
            raise ValueError(
                f"row {index}: truncation to max_length={limit} would cut off the answer "
                f"({', '.join(f'{name}={row[name]}' for name in cut)}); drop such rows or raise max_length"
            )
        text.keep([*range(kept), length - 1] if closing else range(kept))
        text.split = min(text.split, limit)

    def _cut_prompt(self, text: Text, keep: int, what: str) -> None:
        """Keep the last ``keep`` tokens of a causal prompt (and its opening special token), and the whole answer."""
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
        every = [text for stream in texts.values() for text in stream]
        left, right = self._width(every, layout, max_length)
        fills = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
            "labels": self.label_pad_token_id,
        }
        batch: dict[str, Tensor] = {}
        for prefix, stream in texts.items():
            columns = [text.columns for text in stream]
            for name in _names(columns):
                if prefix and name == "labels":
                    continue  # used above, but no argument of the model
                all_have(columns, name, prefix)
                if prefix and name == "input_ids" and "source_input_ids" not in rows[0]:
                    placed = torch.tensor([_place(text, name, _NO_STATE, left, right) for text in stream])
                    batch["source_states"] = _states(rows, placed)
                    continue
                batch[prefix + name] = torch.tensor([_place(text, name, fills[name], left, right) for text in stream])
        for name in _POSITIONS:
            if all_have(rows, name):
                moved = [text.moved + left - text.split for text in texts[""]]
                batch[name] = torch.tensor([row[name] + by for row, by in zip(rows, moved, strict=True)])
        for name in SOURCE_POSITIONS:
            if "source_" in texts and all_have(rows, name):
                moved = [left - text.split for text in texts["source_"]]
                batch[name] = torch.tensor([row[name] + by for row, by in zip(rows, moved, strict=True)])
        batch.update(self._decoder_columns(rows, layout))
        taken = {*batch, *LABEL_NAMES[1:], "source_labels"}
        for name in _names(rows):
            if name not in taken and not any(isinstance(row.get(name), str) for row in rows):
                all_have(rows, name)
                batch[name] = _stack(rows, name)
        return BatchEncoding(batch)

    def _width(self, texts: list[Text], layout: str, max_length: int | None) -> tuple[int, int]:
        """Columns before and after the common index."""
        left = max(text.split for text in texts)
        right = max(len(text) - text.split for text in texts)
        if max_length is not None and left + right > max_length:
            # Only causal rows come here: one has the longest prompt, another the longest answer.
            if not self.truncation:
                raise ValueError(
                    f"the longest prompt of the batch has {left} tokens and the longest answer {right}: aligned they "
                    f"need {left + right}, max_length is {max_length}; raise it or pass truncation=True to cut prompts"
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
        """With ``widths``: as many columns, as far as max_length has room for them beside this batch's own."""
        if self.widths is None:
            return left, right
        wider = max(right, self.widths[1])
        room = self.widths[0] if max_length is None else min(self.widths[0], max_length - wider)
        fits = max_length is None or left + wider <= max_length
        return (max(left, room), wider) if fits else (left, right)

    def _decoder_columns(self, rows: list[dict[str, Any]], layout: str) -> dict[str, Tensor]:
        """labels and source_labels, or the decoders' inputs, padded on the right to one width."""
        if layout != "seq2seq":
            return {}
        fills = dict.fromkeys(("labels", "source_labels"), self.label_pad_token_id)
        fills |= dict.fromkeys(_DECODER_IDS, self.tokenizer.pad_token_id)
        present = [n for n in fills if all_have(rows, n) and _is_list(rows, n)]
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


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column of any row, once."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_list(rows: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), list) for row in rows)


def _per_token(labels: list[Any], ids: list[int]) -> bool:
    """Whether a list of labels belongs to the tokens; floats are targets of regression or of several labels at once."""
    return len(labels) == len(ids) and not any(isinstance(label, float) for label in labels)


def _strip_padding(text: Text) -> None:
    """Take padding off both ends: a causal row is laid out anew, and old padding would come between the parts."""
    real = [i for i, m in enumerate(text.columns["attention_mask"]) if m]
    if real and real[-1] - real[0] + 1 < len(text):
        text.keep(range(real[0], real[-1] + 1))


def _place(text: Text, name: str, fill: int, left: int, right: int) -> list[Any]:
    column = text.columns[name]
    return [fill] * (left - text.split) + column + [fill] * (right - (len(column) - text.split))


def _states(rows: list[dict[str, Any]], placed: Tensor) -> Tensor:
    """FLARE MT's states (B, m, latent_dim) by their ids (B, m), zero where there is none."""
    widths = {row["source_states"].shape[-1] for row in rows}
    if len(widths) > 1:
        raise ValueError(f"source_states have different widths: {sorted(widths)}; they must come from one MT encoder")
    ended = [F.pad(row["source_states"], (0, 0, 0, 1)) for row in rows]  # -1 is the zero behind the last state
    return torch.stack([states[-2 - ids] for states, ids in zip(ended, placed, strict=True)])


def _stack(rows: list[dict[str, Any]], name: str) -> Tensor:
    try:
        return torch.tensor([row[name] for row in rows])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"column {name!r} cannot be stacked into one tensor ({error!r}): its rows must be numbers of one shape. "
            "Drop the column or pad it first"
        ) from error
