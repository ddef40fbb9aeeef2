"""Sequence classification heads with several labels at once, or with a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .encoder_form import ClassificationForm
from .errors import DataError
from .examples import Example, Pair

#: A label holds where its probability is higher.
THRESHOLD = 0.5


class MultiLabelForm(ClassificationForm):
    """Logits (N, labels), each label by itself (binary cross-entropy). ``labels`` of a row: zeros and ones."""

    problem_type = "multi_label_classification"

    def label_of(self, example: Example) -> list[float]:
        true = {self._label_index(name) for name in example.label or ()}
        return [float(index in true) for index in range(len(self.task.labels or ()))]

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
        """The labels of each row whose sigmoid is over `THRESHOLD`; none may be."""
        assert self.task.labels is not None
        over = self._logits(output, pairs) > 0  # sigmoid(0) is the threshold
        return [tuple(name for name, holds in zip(self.task.labels, row, strict=True) if holds) for row in over]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the probability of each label by name: the sigmoid of its logit."""
        assert self.task.labels is not None
        probabilities = 1 / (1 + np.exp(-self._logits(output, pairs).astype(np.float64)))
        return [{"probabilities": dict(zip(self.task.labels, row.tolist(), strict=True))} for row in probabilities]


class RegressionForm(ClassificationForm):
    """One number (N, 1), trained by the mean squared error. ``labels`` of a row: a number."""

    problem_type = "regression"

    def label_of(self, example: Example) -> float:
        if example.label is None:
            raise DataError(f"task {self.task.name}: row {example.id} has no number to train on")
        return float(example.label)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[float]:
        """The number of each row."""
        return [float(number) for number in self._logits(output, pairs).reshape(-1)]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        return [{} for _ in pairs]

    def prediction_notes(self, predictions: Sequence[Any]) -> list[str]:
        if len(predictions) < 2 or len(set(predictions)) > 1:
            return []
        return [f"all {len(predictions)} predictions are {predictions[0]:.4g}: a correlation with them counts as 0"]
