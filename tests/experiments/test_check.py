"""Tests of `flare check`: it predicts steps and memory of `flare train`, scores the base, and changes no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiment_data import write_bert, write_data
from small_tasks import write_csv

from flare.cli import main
from flare.experiments.check import run
from flare.experiments.check.costs import score_base
from flare.experiments.runs.records import read_metrics
from flare.experiments.tasks.tables import read_table

SIZES = {"train": (0, 20), "valid": (20, 30), "test": (30, 42)}
COMMON = ("--task", "classification", "--max-length", "24", "--batch-size", "8", "--epochs", "2", "--no-progress")


def flare(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data/, a pretrained model in bert/, and a base fine-tuned from it in runs/."""
    root = tmp_path_factory.mktemp("check")
    write_data(root / "data", rows=SIZES)
    write_bert(root / "bert")
    words = ("--model", root / "bert", "--data", root / "data", "--output", root / "runs", "--r", 4)
    assert flare("finetune", *COMMON, *words) == 0
    return root


def files(folder: Path) -> dict[Path, int]:
    """Return the modification time, in nanoseconds, of each file."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_predicted_numbers_match_the_training(place, tmp_path, capsys):
    words = (*COMMON, "--data", place / "data", "--output", place / "runs", "--target", "vemari", "--r", 4)
    words = (*words, "--method", "lora", "flare")
    before = files(place)
    assert flare("check", *words, "--steps", 1, "--json", tmp_path / "check.json") == 0
    assert files(place) == before, "flare check adds and changes no file of data/, bert/ and runs/"
    checked, shown = json.loads((tmp_path / "check.json").read_text()), capsys.readouterr().out
    base = read_metrics(place / "runs" / "base" / "seed-0")
    assert checked["score"]["scores"] == pytest.approx(base.valid) and checked["score"]["rows"] == 10
    data = checked["data"][0]
    assert data["pairs"] == {"train": 20, "valid": 10, "test": 12} and data["left_out"] == []
    first = read_table(place / "data" / "vemari" / "train.csv").rows[0]
    assert data["examples"][0]["id"] == first["id"] and data["examples"][0]["target"]["text"] == first["text"]
    assert f"    vemari: {first['text']}" in shown
    labels = [row["label"] for row in read_table(place / "data" / "vemari" / "test.csv").rows]
    assert data["labels"]["test"] == {name: labels.count(name) for name in data["labels"]["train"]}
    assert flare("train", *words) == 0
    for cost in checked["costs"]:
        run = read_metrics(place / "runs" / "vemari" / cost["method"] / "seed-0")
        assert cost["steps"] == run.steps and cost["error"] is None
        assert cost["peak_bytes"] == pytest.approx(run.peak_bytes, rel=0.02), "both are the peak of a training step"
        assert cost["step_seconds"] > 0 and cost["other_seconds"] > 0
        assert cost["train_seconds"] == pytest.approx(cost["steps"] * cost["step_seconds"])
    assert [cost["method"] for cost in checked["costs"]] == ["lora-r4", "flare-r4"] and checked["runs"] == 1
    capsys.readouterr()
    assert flare("check", *words, "--json", tmp_path / "check.json") == 2
    assert "check.json already exists; name another file" in capsys.readouterr().err


def test_options_of_a_training_do_not_change_the_measurement(place, tmp_path, monkeypatch):
    """The score uses rows from the whole split, because the file may be sorted by label."""
    words = (*COMMON, "--data", place / "data", "--output", place / "runs", "--target", "vemari", "--r", 4)
    words = (*words, "--method", "lora", "--steps", 1, "--score-rows", 4, "--json", tmp_path / "check.json")
    given = ("--eval_strategy", "steps", "--eval_steps", 2, "--report_to", "no-such-logger")
    seen = []
    monkeypatch.setattr(
        run, "score_base", lambda setup, rows, *more: seen.append(rows) or score_base(setup, rows, *more)
    )
    assert flare("check", *words, *given) == 0
    ids = [row["id"] for row in read_table(place / "data" / "english" / "valid.csv").rows]
    assert [pair.target.id for pair in seen[0]] == [ids[index] for index in (0, 2, 5, 7)]
    (cost,) = json.loads((tmp_path / "check.json").read_text())["costs"]
    assert cost["error"] is None and cost["steps"] == 6


def test_reported_lengths_and_vocabulary_match_the_tokenizer(place, tmp_path, capsys):
    from transformers import AutoTokenizer

    words = ("--data", place / "data", "--output", tmp_path, "--model", place / "bert", "--target", "vemari")
    words = (*words, "--steps", 0, "--max-length", 10, "--json", tmp_path / "c.json")
    assert flare("check", *COMMON[:2], "--no-progress", *words) == 0
    checked, shown = json.loads((tmp_path / "c.json").read_text()), capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    for row in checked["data"][0]["lengths"]:
        texts = [one["text"] for one in read_table(place / "data" / row["language"] / f"{row['split']}.csv").rows]
        sizes = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        assert (row["texts"], row["longest"], row["cut"]) == (len(texts), max(sizes), sum(n > 10 for n in sizes))
        assert row["mean"] == pytest.approx(sum(sizes) / len(sizes)) and row["limit"] == 10
    for row in checked["data"][0]["vocabulary"]:
        folder = place / "data" / row["language"]
        texts = [one["text"] for split in SIZES for one in read_table(folder / f"{split}.csv").rows]
        tokens = [token for text in texts for token in tokenizer.tokenize(text)]
        assert row["words"] == sum(len(text.split()) for text in texts) and row["tokens"] == len(tokens)
        assert row["unknown"] == tokens.count(tokenizer.unk_token)
    assert "is not fine-tuned, so its head has random weights" in shown
    assert checked["costs"] == [] and checked["score"] is None
    assert "% of the texts are cut to 10 tokens" in shown


def test_each_problem_in_the_data_is_warned_about(place, tmp_path, capsys):
    """The data have unpaired rows, equal texts in both languages, and test texts that are also training texts.

    They also have a label that no training row has, a label that all training rows have, and words that the tokenizer
    does not know. With --padding max_length, the batches have too much padding.
    """
    for language in ("english", "vemari"):
        for split, (start, end) in {"train": (0, 14), "test": (9, 21)}.items():
            rows = [(i, f"the same {i}", "bad" if i == 20 else "good") for i in range(start, end)]
            rows += [(f"{language}-{split}", "алло", "good")]
            write_csv(tmp_path / "data" / language / f"{split}.csv", rows, ("id", "text", "label"))
    words = ("--data", tmp_path / "data", "--output", tmp_path, "--model", place / "bert", "--target", "vemari")
    words = (*words, "--labels", "good", "bad", "--steps", 0, "--no-progress", "--padding", "max_length")
    assert flare("check", "--task", "classification", *words) == 0
    shown = capsys.readouterr().out.partition("Warnings")[2]
    for line in (
        "train: 1 rows of vemari dropped because no remaining row of english has their id (id vemari-train)",
        "vemari train: 14 of 14 rows have the same text in english; check that each column or folder is the right one",
        "vemari: 5 test texts are also training texts",
        "no training row has the label 'bad', and 1 test rows have it",
        "100 % of the training rows have the label 'good'",
        "of the tokens are unknown to the tokenizer",
        "every batch is padded to 128 tokens, and the longest text has",
    ):
        assert line in shown, shown


def test_check_explains_models_that_are_missing_or_named_twice(place, tmp_path, capsys):
    words = ("--data", place / "data", "--output", tmp_path, "--target", "vemari", *COMMON)
    assert flare("check", *words) == 2
    assert "To check without a base, name the pretrained model with --model" in capsys.readouterr().err
    more = ("--model", place / "bert", "--steps", 1, "--show", 0, "--method", "flare-mt", "--mt-model", tmp_path / "no")
    assert flare("check", *words, *more) == 0
    shown = capsys.readouterr().out
    assert "flare-mt cannot be trained here: --mt-model" in shown and "1 could not be measured" in shown
    assert flare("check", *words, "--model", place / "bert", "--base", "b") == 2
    assert "--model and --base both name the model" in capsys.readouterr().err


def test_label_warnings_of_token_classification_count_words():
    from flare.experiments.check.data import _warn_of_labels

    lines = list(_warn_of_labels("hausa", {"train": {"O": 90, "B-PER": 3}}, "token-classification", rows=9))
    assert lines == ["hausa: 3 training words have the label 'B-PER'"]


def test_label_warnings_of_multi_label_tasks_are_shares_of_the_rows():
    """Two labels that every row has make up 50 % of the labels each."""
    from flare.experiments.check.data import _warn_of_labels

    lines = list(_warn_of_labels("hausa", {"train": {"joy": 50, "anger": 50, "fear": 20}}, "multi-label", rows=50))
    assert [line.partition(", so ")[0] for line in lines] == [
        f"hausa: 100 % of the training rows have the label {label!r}" for label in ("joy", "anger")
    ]
