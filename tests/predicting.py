"""Rows of a test split as input of `flare predict`, and a check of its predictions against `flare evaluate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from flare.cli import main
from flare.experiments.prediction.pipeline import FlarePipeline
from flare.experiments.runs.records import Run


def rows_of(data: Path, language: str) -> list[dict[str, Any]]:
    """Return the test rows of a language, from test.jsonl or, if there is none, from test.csv."""
    path = data / language / "test.jsonl"
    if path.is_file():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with (data / language / "test.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_alone(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without labels and answers."""
    return [{name: value for name, value in row.items() if name not in ("label", "answers")} for row in rows]


def predicts_as_evaluated(run: Run, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Assert that `flare predict`, given rows without labels, gives the run's stored predictions. Return its output."""
    texts = write_jsonl(folder / f"{run.record.variant}.jsonl", texts_alone(rows_of(data, "vemari")))
    english = write_jsonl(folder / "english.jsonl", texts_alone(rows_of(data, "english")))
    output = folder / f"{run.record.variant}-out.jsonl"
    words = ("predict", "--adapter", run.folder, "--input", texts, "--source-input", english, "--output", output)
    assert main([str(word) for word in (*words, "--no-progress")]) == 0
    predicted = read_jsonl(output)
    scored = read_jsonl(run.folder / "predictions-test.jsonl")
    assert [(str(row["id"]), row["prediction"]) for row in predicted] == [
        (row["id"], row["prediction"]) for row in scored
    ]
    details = FlarePipeline(run.folder, print_fn=lambda line: None).trained.setup.form.detail_names
    assert set(details) == predicted[0].keys() - rows_of(data, "vemari")[0].keys() - {"prediction"} - {
        name for name in predicted[0] if name.startswith("source_")
    }
    for row in predicted:
        if row.get("start") is not None:
            assert row["context"][row["start"] : row["end"]] == row["prediction"] and 0 < row["probability"] <= 1
    return predicted
