"""Models with a head that gives a text, or a pair of texts, a class.

One text, or two as the tokenizer's pair, is one token sequence; the source is made likewise, in the same order.
Decoders with such heads read the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .errors import some_ids
from .examples import Example, Pair
from .form import Form, Row, as_array
from .registry import Task


class ClassificationForm(Form):
    """Logits (N, labels) of a sequence classification head. Rows: input_ids, labels (an index), source_input_ids."""

    layout = "encoder"
    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if len(task.text_columns) > 2:
            raise UserError(
                f"task {task.name}: an encoder reads one text or a pair, and there are {len(task.text_columns)} text "
                f"columns ({', '.join(task.text_columns)}); name one or two with --text-columns"
            )
        assert task.labels is not None
        self.model_options.update(
            num_labels=len(task.labels),
            id2label=dict(enumerate(task.labels)),
            label2id={label: index for index, label in enumerate(task.labels)},
        )

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        labels = [self._label_index(pair.target.label) for pair in pairs]
        rows, notes = self.eval_rows(pairs, with_source)
        return [{"labels": label, **row} for label, row in zip(labels, rows, strict=True)], notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to predict from, without labels."""
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            encoded, cut = self._encode(examples)
            for row, columns in zip(rows, encoded, strict=True):
                row.update({prefix + name: column for name, column in columns.items()})
            if cut:
                what = "source texts" if prefix else "texts"
                notes.append(f"{len(cut)} of {len(pairs)} {what} cut to {self.max_length} tokens {some_ids(cut)}")
        return rows, notes

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[str]:
        """The likeliest label of each row of logits (N, labels); of a tuple, the first entry."""
        assert self.task.labels is not None
        return [self.task.labels[int(index)] for index in _logits(output, pairs).argmax(-1)]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the probability of the predicted label, and those of all labels by name: the softmax of the logits."""
        logits = _logits(output, pairs).astype(np.float64)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        found = powers / powers.sum(-1, keepdims=True)
        return [
            {
                "probability": float(row.max()),
                "probabilities": dict(zip(self.task.labels or (), row.tolist(), strict=True)),
            }
            for row in found
        ]

    def _encode(self, examples: Sequence[Example]) -> tuple[list[Row], list[str]]:
        """Token columns of every example, and the ids of those that were cut."""
        if not examples:
            return [], []
        texts = [[row.texts[column] for row in examples] for column in self.task.text_columns]
        names = ["input_ids"]
        if len(texts) == 2 and "token_type_ids" in self.tokenizer.model_input_names:
            names.append("token_type_ids")
        encoded = self.tokenizer(*texts, return_attention_mask=False, verbose=False)
        rows = [{name: list(encoded[name][index]) for name in names} for index in range(len(examples))]
        long = [index for index, row in enumerate(rows) if len(row["input_ids"]) > self.max_length]
        if long:
            again = self.tokenizer(
                *[[column[index] for index in long] for column in texts],
                truncation=True if len(texts) == 1 else "longest_first",
                max_length=self.max_length,
                return_attention_mask=False,
            )
            for place, index in enumerate(long):
                rows[index] = {name: list(again[name][place]) for name in names}
        return rows, [examples[index].id for index in long]


def _logits(output: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Logits (N, labels) of N pairs; of a tuple, the first entry."""
    logits = as_array(output[0] if isinstance(output, (tuple, list)) else output)
    if len(logits) != len(pairs):
        raise ValueError(f"{len(logits)} rows of logits were given for {len(pairs)} pairs")
    return logits
