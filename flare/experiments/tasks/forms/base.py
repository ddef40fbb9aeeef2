"""Base class of forms, and helpers that forms share.

A form converts the examples of a task to model rows, and the output of a model to predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ..data_error import DataError, some_ids
from ..examples import Example, Pair
from ..metrics import score
from ..registry import NAMED, Task

Row = dict[str, Any]
#: Label of positions that have no loss.
IGNORED = -100


class Form:
    """Conversion of a task's examples to model rows, and of a model's output to predictions.

    A form belongs to a task, a tokenizer and a family of models.

    Attributes:
        layout: the layout that FlareDataCollator needs for the rows.
        auto_class: name of the transformers Auto class that loads a suitable model.
        model_options: arguments of from_pretrained that the task or the tokenizer determines (num_labels, id2label,
            pad_token_id, ...).
        detail_names: keys of the dicts that `details` returns.
        max_new_tokens: maximum number of tokens to generate; None if the form reads logits.
        notes: notes for the user about the tokenizer.

    Args:
        task: the task. If its kind has named labels, they must be known.
        tokenizer: if it has no pad token, its end token is used instead, with a note.
        max_length: maximum tokens of one text; None: `task.max_length`.

    Raises:
        UserError: the task's labels are not known, or the tokenizer has neither a pad token nor an end token.
    """

    layout: str
    auto_class: str
    detail_names: tuple[str, ...] = ()
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
        # classification heads locate the last token of a text by the pad token
        self.model_options["pad_token_id"] = self.tokenizer.pad_token_id
        self.notes.append(
            f"the tokenizer ({name}) has no pad token; its end token {self.tokenizer.eos_token!r} is used for padding"
        )

    # --- implemented by each form ---------------------------------------------------------------------------------

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to train on, for FlareDataCollator with this `layout`.

        Args:
            pairs: rows of the task.
            with_source: whether to include the source text (``source_input_ids``, ...).

        Returns:
            The rows, and a note with counts for each kind of truncation or omission. There may be fewer rows than
            pairs.
        """
        raise NotImplementedError

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to predict from, one for each pair in order, and notes; see `train_rows`."""
        raise NotImplementedError

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs for which `train_rows` returns rows, in order."""
        return list(pairs)

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[Any]:
        """Return one prediction per pair, which can be compared with the pair's label or answers.

        Args:
            output: the model's output for `eval_rows`: logits (encoders) or new token ids (generation), as tensors or
                arrays.
            pairs: the pairs given to `eval_rows`.
        """
        raise NotImplementedError

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return a dict of further JSON values for each pair, such as probabilities.

        The arguments are the arguments of `predictions`.
        """
        return [{} for _ in pairs]

    def prediction_notes(self, predictions: Sequence[Any]) -> list[str]:
        """Return notes on predictions, such as how many are not a label."""
        labels = self.task.labels
        invalid = [text for text in predictions if labels and isinstance(text, str) and text not in labels]
        if not invalid:
            return []
        shown = ", ".join(repr(text[:40]) for text in invalid[:3])
        return [f"{len(invalid)} of {len(predictions)} predictions are not a label and count as wrong, such as {shown}"]

    # --- shared ---------------------------------------------------------------------------------------------------

    def scores(self, predictions: Sequence[Any], pairs: Sequence[Pair]) -> dict[str, float]:
        """Return the task's metrics of predictions in percent; see `flare.experiments.tasks.score`."""
        return score(self.task, predictions, [pair.target for pair in pairs])

    def unanswered(self, pairs: Sequence[Pair]) -> list[str]:
        """Return a note on the questions without an accepted answer, if there are any."""
        ids = [pair.target.id for pair in pairs if self.task.kind == "qa" and not pair.target.answers]
        if not ids:
            return []
        return [f"{len(ids)} of {len(pairs)} questions have no answer to compare with and do not count {some_ids(ids)}"]

    def _texts(self, pairs: Sequence[Pair], with_source: bool) -> dict[str, list[Example]]:
        """Return {"": target examples} and, if `with_source`, also {"source_": source examples}.

        The keys are the prefixes of the columns in a model row.
        """
        streams = {"": [pair.target for pair in pairs]}
        if with_source:
            sources = [pair.source for pair in pairs if pair.source is not None]
            if len(sources) < len(pairs):
                raise ValueError(
                    f"{len(pairs) - len(sources)} of {len(pairs)} pairs have no source; load the pairs with source_text"
                )
            streams["source_"] = sources
        return streams

    def _label_index(self, label: str | None) -> int:
        assert self.task.labels is not None
        if label not in self.task.labels:
            raise DataError(
                f"task {self.task.name}: the label {label!r} is not one of {', '.join(map(repr, self.task.labels))}"
            )
        return self.task.labels.index(label)


def as_array(output: Any) -> np.ndarray:
    """Return a tensor, array or nested list as a NumPy array. A floating-point tensor becomes float32."""
    if hasattr(output, "detach"):
        output = output.detach().cpu()
        output = output.float() if output.is_floating_point() else output
    return np.asarray(output)
