"""Models with a head that gives a text, or a pair of texts, a class.

One text, or two as the tokenizer's pair, is one token sequence; the source is made likewise, in the same order.
Decoders with such heads read the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError
from .errors import some_ids
from .examples import Example, Pair
from .form import Form, Row, as_array
from .registry import Task


class ClassificationForm(Form):
    """Logits (N, labels) of a sequence classification head. Rows: input_ids, labels (an index), source_input_ids.

    problem_type: of the model's configuration, which chooses its loss; None: the configuration has none.
    """

    layout = "encoder"
    auto_class = "AutoModelForSequenceClassification"
    problem_type: str | None = None

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if len(task.text_columns) > 2:
            raise UserError(
                f"task {task.name}: an encoder reads one text or a pair, and there are {len(task.text_columns)} text "
                f"columns ({', '.join(task.text_columns)}); name one or two with --text-columns"
            )
        if self.problem_type is not None:
            self.model_options["problem_type"] = self.problem_type
        names = task.labels or (task.label_column,)  # a regression has one number
        self.model_options.update(
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
        )

    def label_of(self, example: Example) -> Any:
        """What ``labels`` of a row holds."""
        return self._label_index(example.label)

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes = self._encoded_rows(pairs, with_source)
        return [{**row, "labels": self.label_of(pair.target)} for row, pair in zip(rows, pairs, strict=True)], notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to predict from, without labels."""
        return self._encoded_rows(pairs, with_source)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[Any]:
        """The likeliest label of each row of logits (N, labels); of a tuple, the first entry."""
        assert self.task.labels is not None
        return [self.task.labels[int(index)] for index in self._logits(output, pairs).argmax(-1)]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the probability of the predicted label, and those of all labels by name: the softmax of the logits."""
        assert self.task.labels is not None
        logits = self._logits(output, pairs).astype(np.float64)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        found = powers / powers.sum(-1, keepdims=True)
        return [
            {
                "probability": float(row.max()),
                "probabilities": dict(zip(self.task.labels, row.tolist(), strict=True)),
            }
            for row in found
        ]

    def _logits(self, output: Any, pairs: Sequence[Pair]) -> np.ndarray:
        logits = as_array(output[0] if isinstance(output, (tuple, list)) else output)
        if len(logits) != len(pairs):
            raise ValueError(f"{len(logits)} rows of logits were given for {len(pairs)} pairs")
        return logits

    def _encoded_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows without labels, and notes on what was cut."""
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            texts = [tuple(row.texts[column] for column in self.task.text_columns) for row in examples]
            encoded, long = self._encode_texts(texts)
            for row, columns in zip(rows, encoded, strict=True):
                row.update({prefix + name: column for name, column in columns.items()})
            if long:
                what, ids = "source texts" if prefix else "texts", [examples[index].id for index in long]
                notes.append(f"{len(ids)} of {len(pairs)} {what} cut to {self.max_length} tokens {some_ids(ids)}")
        return rows, notes

    def _encode_texts(self, texts: Sequence[tuple[str, ...]]) -> tuple[list[Row], list[int]]:
        """Token columns of every text or pair of texts, and the indices of those that were cut."""
        if not texts:
            return [], []
        columns = list(map(list, zip(*texts, strict=True)))
        names = ["input_ids"]
        if len(columns) == 2 and "token_type_ids" in self.tokenizer.model_input_names:
            names.append("token_type_ids")
        encoded = self.tokenizer(*columns, return_attention_mask=False, verbose=False)
        rows = [{name: list(encoded[name][index]) for name in names} for index in range(len(texts))]
        long = [index for index, row in enumerate(rows) if len(row["input_ids"]) > self.max_length]
        if long:
            again = self.tokenizer(
                *[[column[index] for index in long] for column in columns],
                truncation=True if len(columns) == 1 else "longest_first",
                max_length=self.max_length,
                return_attention_mask=False,
            )
            for place, index in enumerate(long):
                rows[index] = {name: list(again[name][place]) for name in names}
        return rows, long
