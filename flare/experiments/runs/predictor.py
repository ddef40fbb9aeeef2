"""Predictions of a model on the rows of a split: logits for encoders, greedy generation for the others."""

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
from .diverged import NoNaN, check_logits

PREDICTIONS = "predictions-test.jsonl"
_POSITIONS = ("start_positions", "end_positions")


@dataclass
class Predictor:
    """Predicts one split, batch after batch; several processes share the batches, and each gets all predictions.

    form: of `flare.experiments.tasks.make_form`.
    collator: of the method.
    pairs, rows: the split, and its rows as the form makes them for evaluation, one for each pair.
    batch_size: rows per batch.
    autocast: dtype of mixed precision, or None.
    name: shown beside the bar; None: no bar.
    share: whether several processes share the batches, which all of them must then predict.
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
        """Predictions, one for each pair: see `Form.predictions`.

        Raises:
            DivergedError: logits that are NaN or infinite.
        """
        found: list[Any] = []
        with counter(self.name, len(self.rows), "row") as bar:
            for predictions in self.batches(model):
                found += predictions
                bar.update(len(predictions))
        return found

    def batches(self, model: Any) -> Iterator[list[Any]]:
        """Yield the predictions of each batch in turn. Raises as a call."""
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
                return list(self.form.predictions(self._written(model, rows, pairs), pairs))

        firsts = range(0, len(self.rows), self.batch_size)
        # the processes of a sharded model run every forward together
        alone = not self.share or is_partitioned(model)
        made = ((first, predicted(first)) for first in firsts) if alone else shared(firsts, predicted)
        model.eval()
        try:
            for _, predictions in made:
                yield predictions
        finally:
            model.train(was_training)

    def scores(self, predictions: Sequence[Any]) -> dict[str, float]:
        """The task's metrics, in percent."""
        return {name: float(value) for name, value in self.form.scores(list(predictions), list(self.pairs)).items()}

    def _read(self, model: Any, rows: list[dict[str, Any]], pairs: list[Pair]) -> list[Any]:
        """From logits (B, labels), of each token (B, m, labels), or of a span head two (B, m)."""
        device = next(model.parameters()).device
        if self.form.auto_class == "AutoModelForTokenClassification":
            batch = self.collator(rows).to(device)
            marks = batch.pop("labels")  # where the words' first tokens stand, not what their tags are
            logits = model(**batch).logits
            check_logits(
                logits.masked_fill((marks == IGNORED).unsqueeze(-1), 0), _ids(pairs)
            )  # the others are not read
            return list(self.form.predictions(logits, pairs, marks))
        if self.form.auto_class != "AutoModelForQuestionAnswering":
            batch = self.collator([_without_answers(row) for row in rows]).to(device)
            logits = model(**batch).logits
            check_logits(logits, _ids(pairs))
            return list(self.form.predictions(logits, pairs))
        # where the collator puts position 0 of a row: padding or a source may stand in front
        batch = self.collator([{**row, **dict.fromkeys(_POSITIONS, 0)} for row in rows]).to(device)
        starts = batch.pop("start_positions").tolist()
        batch.pop("end_positions")
        output = model(**batch)
        for logits in (output.start_logits, output.end_logits):  # what stands on padding is never read
            check_logits(logits.masked_fill(batch["attention_mask"] == 0, 0), _ids(pairs))
        return list(self.form.predictions((output.start_logits, output.end_logits), pairs, starts))

    def _written(self, model: Any, rows: list[dict[str, Any]], pairs: list[Pair]) -> Tensor:
        """New tokens (B, n), padded on the right."""
        batch = self.collator([_without_answers(row) for row in rows]).to(next(model.parameters()).device)
        batch.pop("labels", None)
        begin = batch["input_ids"].shape[1] if self.form.layout == "causal" else 1  # of what is written
        allowed = {}
        if self.form.next_tokens(()) is not None:
            allowed["prefix_allowed_tokens_fn"] = lambda row, ids: self.form.next_tokens(ids[begin:].tolist())
        prepare_generate(model)
        made = model.generate(
            **batch,
            **allowed,
            max_new_tokens=self.form.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([NoNaN(_ids(pairs))]),
            pad_token_id=self.collator.tokenizer.pad_token_id,
        )
        return made[:, begin:]


def write_predictions(path: Path, pairs: Sequence[Pair], predictions: Sequence[Any]) -> None:
    """One line of JSON for each row: id, truth (`Example.label`, or the accepted answers) and prediction."""
    with replacing(path) as file:
        for pair, prediction in zip(pairs, predictions, strict=True):
            row = pair.target
            truth: Any = row.label if row.label is not None else [answer.text for answer in row.answers]
            line = {"id": row.id, "truth": truth, "prediction": prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a predictions file (id, truth, prediction); empty where there is none.

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
                f"{path}, line {number}: not a prediction ({reason(error)}); move the file away to go on without it"
            ) from error
    return rows


def _without_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("labels", "source_labels")}


def _ids(pairs: Sequence[Pair]) -> list[str]:
    return [pair.target.id for pair in pairs]
