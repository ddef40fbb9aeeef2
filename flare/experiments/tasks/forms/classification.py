"""Forms for model heads that score a whole text: classification, multi-label, regression and multiple choice.

A row holds one text, or a pair of texts, as one token sequence. A multiple-choice row holds one sequence per choice.
The source is encoded in the same way, in columns whose names start with ``source_``. A decoder with such a head reads
the same rows as an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ..data_error import DataError, some_ids
from ..examples import Example, Pair
from ..registry import Task
from .base import Form, Row, as_array

#: A multi-label prediction contains the labels whose probability is higher than this.
THRESHOLD = 0.5


class ClassificationForm(Form):
    """Form of a sequence classification head, which returns logits (rows, number of labels).

    A training row has the columns input_ids, labels (the index of the label) and, with a source, source_input_ids. Rows
    for a pair of texts also have token_type_ids (and source_token_type_ids), if the model reads them.

    Attributes:
        problem_type: value of the model configuration's field of this name, which selects the loss; None: the field is
            not set.
    """

    layout = "encoder"
    auto_class = "AutoModelForSequenceClassification"
    detail_names: tuple[str, ...] = ("probability", "probabilities")
    problem_type: str | None = None

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if len(task.text_columns) > 2:
            raise UserError(
                f"task {task.name}: an encoder reads one text or a pair, but there are {len(task.text_columns)} text "
                f"columns ({', '.join(task.text_columns)}); name one or two with --text-columns"
            )
        if self.problem_type is not None:
            self.model_options["problem_type"] = self.problem_type
        names = task.labels or (task.label_column,)  # a regression has a single output
        self.model_options.update(
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
        )

    def label_of(self, example: Example) -> Any:
        """Return the value of the column ``labels`` for an example."""
        return self._label_index(example.label)

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes = self._encoded_rows(pairs, with_source)
        return [{**row, "labels": self.label_of(pair.target)} for row, pair in zip(rows, pairs, strict=True)], notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to predict from, without labels, and notes."""
        return self._encoded_rows(pairs, with_source)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[Any]:
        """Return the most likely label of each row. If the output is a tuple, its first item must be the logits."""
        assert self.task.labels is not None
        return [self.task.labels[int(index)] for index in self._logits(output, pairs).argmax(-1)]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the probability of the predicted label and of every label by name (softmax of the logits)."""
        assert self.task.labels is not None
        logits = self._logits(output, pairs).astype(np.float64)
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = exponentials / exponentials.sum(-1, keepdims=True)
        return [
            {
                "probability": float(row.max()),
                "probabilities": dict(zip(self.task.labels, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def _logits(self, output: Any, pairs: Sequence[Pair]) -> np.ndarray:
        logits = as_array(output[0] if isinstance(output, (tuple, list)) else output)
        if len(logits) != len(pairs):
            raise ValueError(f"{len(logits)} rows of logits were given for {len(pairs)} pairs")
        return logits

    def _encoded_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows without labels, and notes on truncated texts."""
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            texts = [tuple(row.texts[column] for column in self.task.text_columns) for row in examples]
            encoded, truncated = self._encode_texts(texts)
            for row, columns in zip(rows, encoded, strict=True):
                row.update({prefix + name: column for name, column in columns.items()})
            if truncated:
                what, ids = "source texts" if prefix else "texts", [examples[index].id for index in truncated]
                notes.append(f"{len(ids)} of {len(pairs)} {what} cut to {self.max_length} tokens {some_ids(ids)}")
        return rows, notes

    def _encode_texts(self, texts: Sequence[tuple[str, ...]]) -> tuple[list[Row], list[int]]:
        """Return the token columns of every text or pair of texts, and the indices of the truncated texts or pairs."""
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
            truncated = self.tokenizer(
                *[[column[index] for index in long] for column in columns],
                truncation=True if len(columns) == 1 else "longest_first",
                max_length=self.max_length,
                return_attention_mask=False,
            )
            for place, index in enumerate(long):
                rows[index] = {name: list(truncated[name][place]) for name in names}
        return rows, long


class MultiLabelForm(ClassificationForm):
    """Form of a head that predicts a set of labels, trained by binary cross-entropy for each label.

    The head returns logits (rows, number of labels). The column ``labels`` holds 0.0 or 1.0 for each label.
    """

    problem_type = "multi_label_classification"
    detail_names = ("probabilities",)

    def label_of(self, example: Example) -> list[float]:
        true = {self._label_index(name) for name in example.label or ()}
        return [float(index in true) for index in range(len(self.task.labels or ()))]

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
        """Return the labels of each row whose probability (sigmoid of the logit) is higher than `THRESHOLD`."""
        assert self.task.labels is not None
        positive = self._logits(output, pairs) > 0  # sigmoid(0) is the threshold
        return [tuple(name for name, holds in zip(self.task.labels, row, strict=True) if holds) for row in positive]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the probability of each label by name (sigmoid of its logit)."""
        assert self.task.labels is not None
        probabilities = 1 / (1 + np.exp(-self._logits(output, pairs).astype(np.float64)))
        return [{"probabilities": dict(zip(self.task.labels, row.tolist(), strict=True))} for row in probabilities]


class RegressionForm(ClassificationForm):
    """Form of a head that predicts a number, trained by the mean squared error.

    The head returns one number per row, with shape (rows, 1). The column ``labels`` holds the number.
    """

    problem_type = "regression"
    detail_names = ()

    def label_of(self, example: Example) -> float:
        if example.label is None:
            raise DataError(f"task {self.task.name}: row {example.id} has no number to train on")
        return float(example.label)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[float]:
        """Return the predicted number of each row."""
        return [float(number) for number in self._logits(output, pairs).reshape(-1)]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        return [{} for _ in pairs]

    def prediction_notes(self, predictions: Sequence[Any]) -> list[str]:
        if len(predictions) < 2 or len(set(predictions)) > 1:
            return []
        return [
            f"all {len(predictions)} predictions are equal (about {predictions[0]:.4g}): a correlation with them "
            "counts as 0"
        ]


class ChoiceForm(ClassificationForm):
    """Form of a multiple-choice head, which returns logits (rows, number of choices).

    The columns input_ids and source_input_ids hold one token sequence per choice, which encodes a pair of texts. If the
    task has one context column, the first text is the context and the second text is the choice. If the task has
    several context columns, the first text joins all of them except the last column, and the second text is the last
    column (a question), followed by the choice. Choice i of the target is fused with choice i of the source.
    """

    auto_class = "AutoModelForMultipleChoice"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        Form.__init__(self, task, tokenizer, max_length)
        if tokenizer.cls_token_id is None and tokenizer.bos_token_id is None:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) has no opening token (cls_token or bos_token), which a "
                "multiple-choice head reads; set one"
            )

    def _encoded_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        n = len(self.task.choice_columns)
        for prefix, examples in self._texts(pairs, with_source).items():
            texts = [self._text_pair(row, choice) for row in examples for choice in range(n)]
            encoded, truncated = self._encode_texts(texts)
            for index, row in enumerate(rows):
                choices = encoded[n * index : n * (index + 1)]
                row.update({prefix + name: [choice[name] for choice in choices] for name in choices[0]})
            if truncated:
                what = "source texts" if prefix else "texts"
                ids = list(dict.fromkeys(examples[index // n].id for index in truncated))
                notes.append(
                    f"{len(ids)} of {len(pairs)} {what} cut to {self.max_length} tokens per choice {some_ids(ids)}"
                )
        return rows, notes

    def _text_pair(self, example: Example, choice: int) -> tuple[str, str]:
        *first, last = (example.texts[column] for column in self.task.context_columns)
        text = example.texts[self.task.choice_columns[choice]]
        return (" ".join(first), f"{last} {text}") if first else (last, text)
