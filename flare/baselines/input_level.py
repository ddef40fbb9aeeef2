"""Input-level fusion (the paper's strongest baseline): source and target as one text, read by plain LoRA.

The text is twice as wide as FLARE's two streams, which is where its cost in time and memory comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BatchEncoding

from ..training.collator import FlareDataCollator, Text
from ..training.row_checks import read_rows
from .lora import plain_lora

if TYPE_CHECKING:
    import peft


def max_positions(model: Any) -> int | None:
    """The longest text a model has positions for, or None where positions are relative and unlimited (T5).

    RoBERTa-like models lose the positions up to and including their padding index.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            lost = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - lost
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


@dataclass
class InputFusionCollator(FlareDataCollator):
    """Makes one text of source + target from the rows that FlareDataCollator takes, with the same options.

    ``max_length`` is m, the limit of each text, as for FLARE; the batch is up to 2m wide (with ``padding="max_length"``
    exactly 2m). The tokens of both texts stand next to each other: ``[CLS] source [SEP] target [SEP]``, padded as one
    text. The target's opening special token (CLS or BOS) is dropped where the source begins with the same.
    ``labels`` stay those of the target: one class, or one per token with -100 on the source; ``start_positions`` and
    ``end_positions`` move along with the target. Causal rows read source prompt, target prompt, target answer; the
    source's answer is left out, and only the target's answer has labels. The collator cannot know where a prompt's
    instruction begins, so the instruction would appear twice. For rows with prompts use
    `flare.experiments.tasks.JoinedForm`, which writes one prompt of both texts (as `flare train --method input-fusion`
    does), and FlareDataCollator. The output has no ``source_*`` key.

    Args:
        max_positions: the longest text the model can read (see :func:`max_positions`); wider batches are an error.
        token_types: True gives ``token_type_ids`` 0 for the source and 1 for the target, False none. Default: True
            where the tokenizer lists ``token_type_ids`` among its inputs. A model with one token type needs False;
            :meth:`for_model` looks it up.

    Raises:
        ValueError: as FlareDataCollator, and for batches wider than ``max_positions``.
    """

    max_positions: int | None = None
    token_types: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_types is None:
            self.token_types = "token_type_ids" in self.tokenizer.model_input_names
        if self.max_positions is not None and self.max_length is not None and 2 * self.max_length > self.max_positions:
            raise ValueError(
                f"max_length={self.max_length} per text makes batches of {2 * self.max_length} tokens, and the model "
                f"has positions for {self.max_positions}; use max_length={self.max_positions // 2} or less"
            )

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any, **options: Any) -> InputFusionCollator:
        """A collator that knows the model's positions, token types and layout; ``options`` as for the class."""
        from ..training.collator import layout_of

        known = {
            "max_positions": max_positions(model),
            "token_types": getattr(model.config, "type_vocab_size", 0) > 1,
            "layout": layout_of(model),
        }
        return cls(tokenizer, **{**known, **options})

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """One batch of single texts."""
        read = read_rows(rows)
        layout = self._layout(read)
        targets, sources = self._texts(read, layout)
        if sources:
            joined = [self._join(s, t, layout) for s, t in zip(sources, targets, strict=True)]
        else:
            joined = targets
        rest = [{name: value for name, value in row.items() if not name.startswith("source_")} for row in read]
        batch = self._batch(rest, {"": joined}, layout, None if self.max_length is None else 2 * self.max_length)
        width = batch["input_ids"].shape[1]
        if self.max_positions is not None and width > self.max_positions:
            raise ValueError(
                f"source and target together are {width} tokens wide, and the model has positions for "
                f"{self.max_positions}; use truncation=True, max_length={self.max_positions // 2} or shorter texts"
            )
        return batch

    def _join(self, source: Text, target: Text, layout: str) -> Text:
        """Source and target as one text; columns that only the target has are -100 on the source."""
        if layout == "causal":
            source.keep(range(source.split))  # the prompt
        first = source.columns["input_ids"][:1]
        openings = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
        drop = int(bool(first) and first == target.columns["input_ids"][:1] and first[0] in openings)
        at, length = len(source), len(target) - drop
        columns = {name: source.columns[name] + target.columns[name][drop:] for name in ("input_ids", "attention_mask")}
        if "labels" in target.columns:
            columns["labels"] = [self.label_pad_token_id] * at + target.columns["labels"][drop:]
        if self.token_types:
            columns["token_type_ids"] = [0] * at + [1] * length
        if layout == "causal":
            split = at + max(target.split - drop, 0)
        else:
            split = at + length if self.padding_side == "left" else 0
        return Text(columns, split, target_offset=at - drop)


def input_fusion(
    model: Any, config: peft.LoraConfig | None = None, *, max_length: int | None = None, **overrides: Any
) -> peft.PeftModel:
    """Plain LoRA for batches of :class:`InputFusionCollator`.

    Args:
        model: as for :func:`plain_lora`.
        config: as for :func:`plain_lora`.
        max_length: m, the tokens of each text; given, the model must have positions for 2m.
        **overrides: as for :func:`plain_lora`.

    Raises:
        ValueError: a model with fewer than 2m positions; an override ``fusion``.
    """
    limit = max_positions(model)
    if max_length is not None and limit is not None and 2 * max_length > limit:
        raise ValueError(
            f"max_length={max_length} per text needs {2 * max_length} positions, and {type(model).__name__} has "
            f"{limit}; use max_length={limit // 2} or less, or a model that reads longer texts"
        )
    return plain_lora(model, config, **overrides)
