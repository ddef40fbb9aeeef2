"""Predictions of a model on the rows of a split: logits for encoders, greedy generation for the others."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..tasks import Pair

_NONE = -100.0  # what the form of spans takes for no position
_POSITIONS = ("start_positions", "end_positions")


@dataclass
class Predictor:
    """Predicts one split, batch after batch.

    form: of `flare.tasks.make_form`.
    collator: of the method.
    pairs, rows: the split, and its rows as the form makes them for evaluation, one for each pair.
    batch_size: rows per batch.
    autocast: dtype of mixed precision, or None.
    name: shown beside the bar; None: no bar.
    """

    form: Any
    collator: Any
    pairs: Sequence[Pair]
    rows: Sequence[dict[str, Any]]
    batch_size: int
    autocast: torch.dtype | None = None
    name: str | None = None

    def __call__(self, model: Any) -> list[str]:
        """Predictions, one for each pair: names of labels, or answers."""
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        found: list[str] = []
        half: Any = contextlib.nullcontext()
        if self.autocast is not None:
            half = torch.autocast(device.type, self.autocast)
        bar = tqdm(total=len(self.rows), desc=self.name, unit="row", disable=self.name is None, leave=False)
        try:
            with torch.no_grad(), half, bar:
                for first in range(0, len(self.rows), self.batch_size):
                    pairs = list(self.pairs[first : first + self.batch_size])
                    rows = list(self.rows[first : first + self.batch_size])
                    output = self._logits(model, rows) if self.form.layout == "encoder" else self._written(model, rows)
                    found += self.form.predictions(output, pairs)
                    bar.update(len(rows))
        finally:
            model.train(was_training)
        return found

    def scores(self, predictions: Sequence[str]) -> dict[str, float]:
        """The task's metrics, in percent."""
        return {name: float(value) for name, value in self.form.scores(list(predictions), list(self.pairs)).items()}

    def _logits(self, model: Any, rows: list[dict[str, Any]]) -> Any:
        """Logits (B, labels), or of a span head two (B, m) in the target row's own positions."""
        device = next(model.parameters()).device
        if self.form.auto_class != "AutoModelForQuestionAnswering":
            batch = self.collator(rows).to(device)
            batch.pop("labels", None)
            return model(**batch).logits.float()
        # position 0 of the row, where the collator puts it: padding or a source may stand in front
        batch = self.collator([{**row, **dict.fromkeys(_POSITIONS, 0)} for row in rows]).to(device)
        moved = batch.pop("start_positions")
        batch.pop("end_positions")
        output = model(**batch)
        width = max(len(row["input_ids"]) for row in rows)
        places = moved[:, None] + torch.arange(width, device=device)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
        outside = torch.arange(width, device=device) >= lengths[:, None]

        def own(logits: Tensor) -> Tensor:
            inside = places.clamp(0, logits.shape[1] - 1)
            return logits.float().gather(1, inside).masked_fill(outside, _NONE)

        return own(output.start_logits), own(output.end_logits)

    def _written(self, model: Any, rows: list[dict[str, Any]]) -> Tensor:
        """New tokens (B, n), padded on the right."""
        batch = self.collator([_without_answers(row) for row in rows]).to(next(model.parameters()).device)
        batch.pop("labels", None)
        made = model.generate(
            **batch,
            max_new_tokens=self.form.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.collator.tokenizer.pad_token_id,
        )
        return made[:, batch["input_ids"].shape[1] :] if self.form.layout == "causal" else made[:, 1:]


def write_predictions(path: Path, pairs: Sequence[Pair], predictions: Sequence[str]) -> None:
    """One line of JSON for each row: id, truth (a label, or the accepted answers) and prediction."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        for pair, prediction in zip(pairs, predictions, strict=True):
            row = pair.target
            truth: Any = row.label if row.label is not None else [answer.text for answer in row.answers]
            line = {"id": row.id, "truth": truth, "prediction": prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def _without_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("labels", "source_labels")}
