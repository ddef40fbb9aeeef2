"""Make batches of source and target texts, in the forms that the benchmarked methods take.

A row is one source text and one target text. In a full row, both texts have m tokens, and there is no attention mask.
In a padded row, each text has between m / 4 and m tokens, padding on the right, and an attention mask. Three eighths of
all positions in a batch of padded rows are padding. The source of a row is about as long as its target.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from shapes import StepShape
from torch import Tensor

_PREFIX = "source_"
#: Id of the pad token of the model families in which this id is not 0.
_PAD = {"xlmr": 1}
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Source and target texts of B rows.

    Attributes:
        pair: arguments with which this package's models are called. The names of the source's arguments begin with
            ``source_``.
    """

    pair: dict[str, Tensor]

    @cached_property
    def target(self) -> dict[str, Tensor]:
        """Return the arguments of a model that reads only the target."""
        return {name: value for name, value in self.pair.items() if not name.startswith(_PREFIX)}

    @cached_property
    def source(self) -> dict[str, Tensor]:
        """Return the arguments of a model that reads only the source; their names have no prefix."""
        return {name.removeprefix(_PREFIX): v for name, v in self.pair.items() if name.startswith(_PREFIX)}

    @cached_property
    def joined(self) -> dict[str, Tensor]:
        """Return source and target concatenated to one text, with padding at its end.

        For a causal model, the labels of the source's positions are -100. The text of a full row has 2m tokens.
        The texts of padded rows have as many positions as the longest of them has tokens.
        """
        source, target = self.source, self.target
        text = {"input_ids": torch.cat([source["input_ids"], target["input_ids"]], dim=1)}
        labels = target["labels"]
        if labels.shape == target["input_ids"].shape:
            text["labels"] = torch.cat([torch.full_like(labels, IGNORED), labels], dim=1)
        if "attention_mask" in target:
            mask = torch.cat([source["attention_mask"], target["attention_mask"]], dim=1)
            order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
            text = {name: value.gather(1, order) for name, value in {**text, "attention_mask": mask}.items()}
        return {"labels": labels, **text}

    @property
    def tokens(self) -> int:
        """Return the number of target tokens without padding."""
        mask = self.pair.get("attention_mask")
        return self.pair["input_ids"].numel() if mask is None else int(mask.sum())


def batch_of(shape: StepShape, device: torch.device) -> Batch:
    """Return a batch of random texts.

    The labels are one class per row (XLM-R), m / 4 decoder tokens per row (mT5), or the tokens of the target with -100
    at padding (all other models).
    """
    size, family, vocabulary = (shape.B, shape.m), shape.model.family, shape.model.vocabulary
    pair = {name: torch.randint(5, vocabulary, size, device=device) for name in ("input_ids", "source_input_ids")}
    if shape.padded:
        lengths = torch.linspace(shape.m, shape.m / 4, shape.B, device=device).round().long()
        neighbours = (torch.arange(shape.B, device=device) ^ 1).clamp(max=shape.B - 1)
        for prefix, row_lengths in (("", lengths), (_PREFIX, lengths[neighbours])):
            mask = torch.arange(shape.m, device=device) < row_lengths[:, None]
            pair[prefix + "input_ids"].masked_fill_(~mask, _PAD.get(family, 0))
            pair[prefix + "attention_mask"] = mask.long()
    if family == "xlmr":
        labels = torch.randint(0, 3, (shape.B,), device=device)
    elif family == "mt5":
        labels = torch.randint(5, vocabulary, (shape.B, shape.m // 4), device=device)
    else:
        labels = pair["input_ids"].clone()
        if shape.padded:
            labels.masked_fill_(pair["attention_mask"] == 0, IGNORED)
    return Batch({**pair, "labels": labels})
