"""What all forms have in common: rows for a model from pairs of texts, and predictions and scores from its output.

A form belongs to a task, a tokenizer and a family of models: `.encoder_form`, `causal_form`, `seq2seq_form`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError
from . import metrics
from .errors import DataError, some_ids
from .examples import Example, Pair
from .registry import NAMED, Task

Row = dict[str, Any]
IGNORED = -100


class Form:
    """How a task's examples become model rows, and a model's output predictions.

    layout: the layout of FlareDataCollator.
    auto_class: name of the transformers Auto class that loads a fitting model.
    model_options: its from_pretrained's arguments that the task decides (num_labels, id2label, label2id, ...).
    max_new_tokens: how far to generate; None: the form reads logits.

    Args:
        task: with labels, if it is of a kind that has some.
        tokenizer: a tokenizer without a pad token is given its end token for one, which is noted.
        max_length: the tokens of one text; None: the task's.

    Raises:
        UserError: a task without labels, a tokenizer with neither a pad nor an end token.
    """

    layout: str
    auto_class: str
    max_new_tokens: int | None = None

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        if task.kind in NAMED and task.labels is None:
            raise UserError(
                f"task {task.name}: its labels are not known yet; give labels, or take them from the training rows "
                "(flare.experiments.tasks.resolve_labels)"
            )
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length or task.max_length
        self.model_options: dict[str, Any] = {}
        self.notes: list[str] = []
        if tokenizer.pad_token_id is None:
            self._set_pad_token()

    def _set_pad_token(self) -> None:
        name = type(self.tokenizer).__name__
        if self.tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer ({name}) has neither a pad token nor an end token to pad with; set one, such as "
                'tokenizer.pad_token = "<pad>", and save it with the model'
            )
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model_options["pad_token_id"] = self.tokenizer.pad_token_id  # heads find a text's last token by it
        self.notes.append(f"the tokenizer ({name}) has no pad token; its end token {self.tokenizer.eos_token!r} pads")

    # --- what a family's form does --------------------------------------------------------------------------------

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to train on, for FlareDataCollator of this `layout`.

        Args:
            pairs: rows of the task.
            with_source: whether the rows hold the source text too (``source_input_ids``, ...).

        Returns:
            The rows, and a line for everything that was cut or left out, with counts. Rows may be fewer than pairs.
        """
        raise NotImplementedError

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to predict from, one for each pair, in their order; otherwise as `train_rows`."""
        raise NotImplementedError

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs that `train_rows` makes rows of, in their order."""
        return list(pairs)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[Any]:
        """What is compared with each pair's label or answers, made of a model's output for `eval_rows` of the pairs.

        Args:
            output: logits (encoders) or new token ids (generation); tensors or arrays.
            pairs: the pairs of `eval_rows`.
        """
        raise NotImplementedError

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return what else a model's output says of each pair, by name; JSON values. Arguments as `predictions`."""
        return [{} for _ in pairs]

    def prediction_notes(self, predictions: Sequence[Any]) -> list[str]:
        """What has to be said about predictions, such as how many are no label."""
        labels = self.task.labels
        lost = [text for text in predictions if labels and isinstance(text, str) and text not in labels]
        if not lost:
            return []
        shown = ", ".join(repr(text[:40]) for text in lost[:3])
        return [f"{len(lost)} of {len(predictions)} predictions are no label and count as wrong, such as {shown}"]

    # --- scores ---------------------------------------------------------------------------------------------------

    def scores(self, predictions: Sequence[Any], pairs: Sequence[Pair]) -> dict[str, float]:
        """The task's metrics in percent, the deciding one first. Questions without an accepted answer do not count.

        Raises:
            DataError: no pair has a label or answer to compare with.
            ValueError: not as many predictions as pairs.
        """
        return score(self.task, predictions, [pair.target for pair in pairs])

    # --- for the families -----------------------------------------------------------------------------------------

    def _texts(self, pairs: Sequence[Pair], with_source: bool) -> dict[str, list[Example]]:
        """Prefix of the columns -> examples of one stream."""
        streams = {"": [pair.target for pair in pairs]}
        if with_source:
            sources = [pair.source for pair in pairs if pair.source is not None]
            if len(sources) < len(pairs):
                raise ValueError(
                    f"{len(pairs) - len(sources)} of {len(pairs)} pairs have no source; load them with source_text"
                )
            streams["source_"] = sources
        return streams

    def _label_index(self, label: str | None) -> int:
        assert self.task.labels is not None
        if label not in self.task.labels:
            raise DataError(
                f"task {self.task.name}: the label {label!r} is none of {', '.join(map(repr, self.task.labels))}"
            )
        return self.task.labels.index(label)

    def unanswered(self, pairs: Sequence[Pair]) -> list[str]:
        """Return a note on the questions without an accepted answer, if there are any."""
        ids = [pair.target.id for pair in pairs if self.task.kind == "qa" and not pair.target.answers]
        if not ids:
            return []
        return [f"{len(ids)} of {len(pairs)} questions have no answer to compare with and do not count {some_ids(ids)}"]


def score(task: Task, predictions: Sequence[Any], truth: Sequence[Example]) -> dict[str, float]:
    """As `Form.scores`, without a form."""
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions were given for {len(truth)} rows")
    right = [[answer.text for answer in row.answers] if task.kind == "qa" else row.label for row in truth]
    unknown: tuple[Any, ...] = ([],) if task.kind == "qa" else (None, "")  # no label of several may hold
    known = [index for index, label in enumerate(right) if label not in unknown]
    if not known:
        raise DataError(f"task {task.name}: none of {len(truth)} rows has a label or answer to compare with")
    said, true = [predictions[index] for index in known], [right[index] for index in known]
    found = metrics.of_kind(task.kind, said, true, task.labels)
    return {name: found[name] for name in task.metrics}


def as_array(output: Any) -> np.ndarray:
    """A tensor (bfloat16 too), array or nested list as an array."""
    if hasattr(output, "detach"):
        output = output.detach().cpu()
        output = output.float() if output.is_floating_point() else output
    return np.asarray(output)
