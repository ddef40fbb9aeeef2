"""Predict the rows of a split, from the logits of a model with a head or by greedy generation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ...source.fsdp import is_partitioned, prepare_generate
from ..tasks import Pair
from ..tasks.forms.base import IGNORED
from ..utils.atomic_files import replacing
from ..utils.errors import UserError, reason
from ..utils.json_files import parsed
from ..utils.processes import shared
from ..utils.progress import counter
from .diverged import CheckLogits, check_logits

PREDICTIONS = "predictions-test.jsonl"
_POSITIONS = ("start_positions", "end_positions")


@dataclass
class Predictor:
    """Predictor of one split, batch by batch. Several processes share the batches; each gets all predictions.

    form: result of `flare.experiments.tasks.make_form`.
    collator: the method's collator.
    pairs: the target rows of the split, each with its source row if there is one.
    rows: for each pair, its model row from the form's `eval_rows`.
    batch_size: rows per batch.
    autocast: dtype of mixed precision; None: no mixed precision.
    name: label of the progress bar; None: no bar.
    share: whether all processes share the batches. If so, every process must call the predictor.
    """

    form: Any
    collator: Any
    pairs: Sequence[Pair]
    rows: Sequence[dict[str, Any]]
    batch_size: int
    autocast: torch.dtype | None = None
    name: str | None = None
    share: bool = True

    def __call__(self, model: Any) -> list[Any]:
        """Return the predictions, one for each pair; see `Form.predictions`.

        Raises:
            DivergedError: logits are NaN or infinite.
        """
        predictions: list[Any] = []
        with counter(self.name, len(self.rows), "row") as bar:
            for batch in self.batches(model):
                predictions += batch
                bar.update(len(batch))
        return predictions

    def batches(self, model: Any) -> Iterator[list[Any]]:
        """Yield the predictions of each batch.

        Raises:
            DivergedError: logits are NaN or infinite.
        """
        was_training, device = model.training, next(model.parameters()).device
        half: Any = contextlib.nullcontext()
        if self.autocast is not None:
            half = torch.autocast(device.type, self.autocast)

        def predicted(first: int) -> list[Any]:
            pairs = list(self.pairs[first : first + self.batch_size])
            rows = list(self.rows[first : first + self.batch_size])
            with torch.no_grad(), half:
                if self.form.layout == "encoder":
                    return self._read(model, rows, pairs)
                return list(self.form.predictions(self._generate(model, rows, pairs), pairs))

        firsts = range(0, len(self.rows), self.batch_size)
        # a sharded model needs all processes in every forward pass, so the batches cannot be divided
        alone = not self.share or is_partitioned(model)
        results = ((first, predicted(first)) for first in firsts) if alone else shared(firsts, predicted)
        model.eval()
        try:
            for _, predictions in results:
                yield predictions
        finally:
            model.train(was_training)

    def scores(self, predictions: Sequence[Any]) -> dict[str, float]:
        """Return the task's metrics, in percent."""
        return {name: float(value) for name, value in self.form.scores(list(predictions), list(self.pairs)).items()}

    def _read(self, model: Any, rows: list[dict[str, Any]], pairs: list[Pair]) -> list[Any]:
        """Return a batch's predictions from the logits of a head.

        For B rows of m tokens, the logits are (B, labels), (B, choices) for multiple choice, (B, m, labels) for tags of
        tokens, or two tensors (B, m) for the start and end of an answer.
        """
        device = next(model.parameters()).device
        if self.form.auto_class == "AutoModelForTokenClassification":
            batch = self.collator(rows).to(device)
            first_tokens = batch.pop("labels")  # only the positions of the words' first tokens are used
            logits = model(**batch).logits
            ignored = (first_tokens == IGNORED).unsqueeze(-1)
            check_logits(logits.masked_fill(ignored, 0), _ids(pairs))
            return list(self.form.predictions(logits, pairs, first_tokens))
        if self.form.auto_class != "AutoModelForQuestionAnswering":
            batch = self.collator([_without_answers(row) for row in rows]).to(device)
            logits = model(**batch).logits
            check_logits(logits, _ids(pairs))
            return list(self.form.predictions(logits, pairs))
        # the collator shifts answer positions by the number of tokens in front of the row, so 0 becomes the row's start
        batch = self.collator([{**row, **dict.fromkeys(_POSITIONS, 0)} for row in rows]).to(device)
        starts = batch.pop("start_positions").tolist()
        batch.pop("end_positions")
        output = model(**batch)
        for logits in (output.start_logits, output.end_logits):  # logits of padding are never used
            check_logits(logits.masked_fill(batch["attention_mask"] == 0, 0), _ids(pairs))
        return list(self.form.predictions((output.start_logits, output.end_logits), pairs, starts))

    def _generate(self, model: Any, rows: list[dict[str, Any]], pairs: list[Pair]) -> Tensor:
        """Return the generated tokens (B, n), padded on the right."""
        batch = self.collator([_without_answers(row) for row in rows]).to(next(model.parameters()).device)
        batch.pop("labels", None)
        begin = batch["input_ids"].shape[1] if self.form.layout == "causal" else 1  # index of the first new token
        allowed = {}
        if self.form.next_tokens(()) is not None:
            allowed["prefix_allowed_tokens_fn"] = lambda row, ids: self.form.next_tokens(ids[begin:].tolist())
        prepare_generate(model)
        tokens = model.generate(
            **batch,
            **allowed,
            max_new_tokens=self.form.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([CheckLogits(_ids(pairs))]),
            pad_token_id=self.collator.tokenizer.pad_token_id,
        )
        return tokens[:, begin:]


def write_predictions(path: Path, pairs: Sequence[Pair], predictions: Sequence[Any]) -> None:
    """Write one line of JSON per row: its id, its truth (the label, or the accepted answers) and its prediction."""
    with replacing(path) as file:
        for pair, prediction in zip(pairs, predictions, strict=True):
            row = pair.target
            truth: Any = row.label if row.label is not None else [answer.text for answer in row.answers]
            line = {"id": row.id, "truth": truth, "prediction": prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a predictions file (id, truth, prediction); empty if the file does not exist.

    Raises:
        UserError: a line is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = parsed(line)
            rows.append({name: row[name] for name in ("id", "truth", "prediction")})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a prediction ({reason(error)}); move the file away to continue without it"
            ) from error
    return rows


def _without_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("labels", "source_labels")}


def _ids(pairs: Sequence[Pair]) -> list[str]:
    return [pair.target.id for pair in pairs]
