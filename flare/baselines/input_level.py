"""Input-level fusion, the paper's strongest baseline: plain LoRA on one text, the source followed by the target.

If source and target have up to m tokens each, the joined text has up to 2m tokens, while FLARE reads two texts of m
tokens. Input-level fusion therefore needs more time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BatchEncoding

from ..training.collator import FlareDataCollator, layout_of
from ..training.row_checks import read_rows
from ..training.texts import Text
from .lora import plain_lora

if TYPE_CHECKING:
    import peft


def max_positions(model: Any) -> int | None:
    """Return the number of tokens that a model has positions for, or None for relative positions without a limit (T5).

    In models like RoBERTa the positions up to and including the padding index cannot be used and are not counted.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unusable = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unusable
    if getattr(model.config, "position_biased_input", True) is False:  # DeBERTa: relative positions only
        return None
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


@dataclass
class InputFusionCollator(FlareDataCollator):
    """Data collator that joins source and target into one text.

        model = flare.baselines.input_fusion(model, max_length=128, r=64)
        collate = flare.baselines.InputFusionCollator.for_model(model, tokenizer, max_length=128)
        flare.FlareTrainer(model, args, train_dataset=rows, data_collator=collate).train()

    It takes the rows and options of :class:`flare.FlareDataCollator`. The output is a BatchEncoding without
    ``source_*`` keys: ``input_ids`` and ``attention_mask`` (B, up to 2m; with ``padding="max_length"`` exactly 2m), and
    ``labels``.

    - Both texts are joined as ``[CLS] source [SEP] target [SEP]`` and padded as one. If both begin with the same
      special token (CLS or BOS), this token is dropped from the target.
    - ``labels`` are the target's labels: one class, or one label per token, with -100 on the source.
      ``start_positions`` and ``end_positions`` are shifted with the target.
    - Causal rows become source prompt, target prompt, target answer. The source's answer is left out, and only the
      target's answer has labels. An instruction in the prompts appears twice, because the collator cannot tell it from
      the text. To avoid this, write one prompt for both texts with `flare.experiments.tasks.JoinedForm`, as
      `flare train --method input-fusion` does, and use FlareDataCollator.

    Args:
        max_length: m, the largest number of tokens of each text, as for FLARE.
        max_positions: the number of tokens that the model has positions for (see :func:`max_positions`). A wider batch
            raises an error.
        token_types: True adds ``token_type_ids``, 0 for the source and 1 for the target. False adds none; use it for
            models with a single token type. Default: True if the tokenizer's ``model_input_names`` contain
            ``token_type_ids``. :meth:`for_model` sets this from the model's config instead.

    Raises:
        ValueError: an error of FlareDataCollator, or ``max_positions`` is less than 2m or than the width of a batch.
    """

    max_positions: int | None = None
    token_types: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_types is None:
            self.token_types = "token_type_ids" in self.tokenizer.model_input_names
        if self.max_positions is not None and self.max_length is not None and 2 * self.max_length > self.max_positions:
            raise ValueError(
                f"max_length={self.max_length} per text makes batches of {2 * self.max_length} tokens, but the model "
                f"has only {self.max_positions} positions; use max_length={self.max_positions // 2} or less"
            )

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any, **options: Any) -> InputFusionCollator:
        """Return a collator with the model's positions, token types and layout; ``options`` are further arguments."""
        defaults = {
            "max_positions": max_positions(model),
            "token_types": getattr(model.config, "type_vocab_size", 0) > 1,
            "layout": layout_of(model),
        }
        return cls(tokenizer, **{**defaults, **options})

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Return a batch of joined texts. If the rows have no source, the texts are the targets alone."""
        read = read_rows(rows)
        if any("source_states" in row for row in read):
            raise ValueError(
                "source_states: input-level fusion joins two texts, so rows need the source's token ids; pass "
                "source_input_ids"
            )
        layout = self._layout(read)
        targets, sources = self._texts(read, layout)
        if sources:
            joined = [self._join(s, t, layout) for s, t in zip(sources, targets, strict=True)]
        else:
            joined = targets
        target_rows = [{name: value for name, value in row.items() if not name.startswith("source_")} for row in read]
        batch = self._batch(target_rows, {"": joined}, layout, None if self.max_length is None else 2 * self.max_length)
        width = batch["input_ids"].shape[1]
        if self.max_positions is not None and width > self.max_positions:
            raise ValueError(
                f"source and target together are {width} tokens wide, but the model has only {self.max_positions} "
                f"positions; pass truncation=True and max_length={self.max_positions // 2} to the collator, or use "
                "shorter texts"
            )
        return batch

    def _join(self, source: Text, target: Text, layout: str) -> Text:
        """Return source and target as one text, with labels -100 on the source."""
        if layout == "causal":
            source.keep(range(source.split))  # keep the prompt, drop the answer
        first = source.columns["input_ids"][:1]
        openings = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
        drop = int(bool(first) and first == target.columns["input_ids"][:1] and first[0] in openings)
        start, length = len(source), len(target) - drop
        columns = {name: source.columns[name] + target.columns[name][drop:] for name in ("input_ids", "attention_mask")}
        if "labels" in target.columns:
            columns["labels"] = [self.label_pad_token_id] * start + target.columns["labels"][drop:]
        if self.token_types:
            columns["token_type_ids"] = [0] * start + [1] * length
        if layout == "causal":
            split = start + max(target.split - drop, 0)
        else:
            split = start + length if self.padding_side == "left" else 0
        return Text(columns, split, target_offset=start - drop)


def input_fusion(
    model: Any, config: peft.LoraConfig | None = None, *, max_length: int | None = None, **overrides: Any
) -> peft.PeftModel:
    """Return a model with plain LoRA adapters for the batches of :class:`InputFusionCollator`.

    Args:
        model: a transformers model (modified in place) or a PEFT LoRA model.
        config: a FlareConfig, a peft.LoraConfig or None.
        max_length: m, the number of tokens of each text. If given, the model must have positions for 2m tokens.
        **overrides: fields of FlareConfig, such as ``r`` or ``lora_alpha``.

    Raises:
        ValueError: the model has fewer than 2m positions, or ``fusion`` is not None.
    """
    limit = max_positions(model)
    if max_length is not None and limit is not None and 2 * max_length > limit:
        raise ValueError(
            f"max_length={max_length} per text needs {2 * max_length} positions, and {type(model).__name__} has "
            f"{limit}; use max_length={limit // 2} or less, or a model that reads longer texts"
        )
    return plain_lora(model, config, **overrides)
