"""Warn if a fine-tuned base scores no better than chance on its source language."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from .predictor import PREDICTIONS, read_predictions
from .records import read_run


def chance_notes(folder: Path) -> list[str]:
    """Return a list with one note if a fine-tuned base is at chance level on its source language, else an empty list.

    The base is at chance level if its score is this low:
        accuracy: at most one standard error above the accuracy of always predicting the most frequent label. If the
            true labels are unknown, all labels count as equally frequent.
        exact match: 0, with an F1 below 5.
        entity F1: 0, the score of predicting no entity.
        micro F1 (multi-label): at most the highest micro F1 that predicting one set of labels (possibly the empty set)
            for every row can reach.
        Pearson: at most one standard error above 0, the correlation of unrelated numbers.
    """
    run = read_run(folder)
    tested = run.metrics.test.get("source-language")
    scores = tested or run.metrics.valid
    truths = [row["truth"] for row in read_predictions(folder / PREDICTIONS)] if tested else []
    rows = len(truths) or run.record.data.get("valid") or 0
    shown = _at_chance(scores, truths, rows, len(run.record.settings.get("labels") or ()) or 2)
    if shown is None:
        return []
    return [
        f"the base {folder} is at chance level on {run.record.source_language} ({shown}), so adapters on it learn the "
        "task from the start, or not at all; run flare finetune --no-resume with more --epochs or another --lr"
    ]


def _at_chance(scores: dict[str, float], truths: list[Any], rows: int, labels: int) -> str | None:
    """Return the scores in words if they are at chance level, else None.

    Args:
        scores: metric -> percent.
        truths: true labels of the scored rows, in the form of `Example.label`; empty if they are unknown.
        rows: number of scored rows.
        labels: number of labels of the task.
    """
    if "exact_match" in scores:
        low = scores["exact_match"] == 0 and scores.get("f1", 0) < 5
        return f"exact match {scores['exact_match']:.1f}, F1 {scores.get('f1', 0):.1f}" if low else None
    if "entity_f1" in scores:
        return "entity F1 0.0" if scores["entity_f1"] == 0 else None
    if "micro_f1" in scores:
        best = _best_constant_f1(truths)
        return (
            f"micro F1 {scores['micro_f1']:.1f}; always the same labels: {best:.1f}"
            if scores["micro_f1"] <= best
            else None
        )
    if "pearson" in scores:
        error = 100 / math.sqrt(rows - 1) if rows > 1 else 0.0
        return (
            f"Pearson {scores['pearson']:.1f}; one standard error: {error:.1f}" if scores["pearson"] <= error else None
        )
    if "accuracy" not in scores:
        return None
    counts = Counter(map(str, truths))
    share = max(counts.values()) / len(truths) if truths else 1 / labels
    error = math.sqrt(share * (1 - share) / rows) if rows else 0.0
    if scores["accuracy"] > 100 * (share + error):
        return None
    return f"accuracy {scores['accuracy']:.1f}; always the most frequent label: {100 * share:.1f}"


def _best_constant_f1(truths: list[Any]) -> float:
    """Return the highest micro F1, in percent, that predicting one set of labels for all rows can reach.

    The best set consists of the n most frequent labels for some n.
    """
    counts = sorted(Counter(label for row in truths for label in row).values(), reverse=True)
    total = sum(counts)
    scores = [200 * sum(counts[:n]) / (n * len(truths) + total) for n in range(1, len(counts) + 1)]
    return max(scores, default=0.0)
