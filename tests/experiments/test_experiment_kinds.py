"""Tests of token classification, multiple choice, multi-label classification and regression.

Each of these kinds of task is run through flare finetune, train, evaluate and report.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from experiment_data import write_bert, write_llama, write_t5
from predicting import predicts_as_evaluated

from flare import FlareDataCollator, fast_lora
from flare.cli import main
from flare.experiments.demo.corpus import LABELS, make_corpus
from flare.experiments.runs.chance import _at_chance
from flare.experiments.runs.records import find_runs
from flare.experiments.tasks import get_task, load_pairs, make_form, metrics, resolve_labels

ROWS = {"train": (0, 24), "valid": (24, 32), "test": (32, 42)}
QUICK = ("--batch-size", "8", "--lr", "1e-2", "--no-progress", "--epochs", "1", "--r", "4")
CHOICES = ("--choice-columns", *LABELS)
#: Id of a test row.
ODD_ROW = make_corpus(train=42).train[34].id


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with tiny models and, for each kind of task, data made from the demo's corpus."""
    root = tmp_path_factory.mktemp("kinds")
    pairs = make_corpus(train=42).train
    for language, side in (("english", "source"), ("vemari", "target")):
        for split, (first, end) in ROWS.items():
            for kind in ("token-classification", "multiple-choice", "multi-label", "regression"):
                path = root / kind / language / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = [row_of(kind, pair.id, getattr(pair, side), pair.label) for pair in pairs[first:end]]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_bert(root / "bert")
    write_llama(root / "llama")
    write_t5(root / "t5")
    return root


def row_of(kind: str, name: str, text: str, label: str) -> dict[str, object]:
    """Return one row of data for a kind of task, with `name` as its id."""
    words = text.split()
    if kind == "token-classification" and name == ODD_ROW:
        words[2:5] = ["\u00a0", "New York", "New York"]  # splitting the sentence at white space gives other words
    columns = {
        "token-classification": {"tokens": words, "ner_tags": ["B-X", "I-X", *["O"] * (len(words) - 2)]},
        "multiple-choice": {"question": text, **dict.fromkeys(LABELS, "good"), "label": LABELS.index(label)},
        "multi-label": {"text": text, "labels": [label] if int(name[-5:]) % 2 else [label, "even"]},
        "regression": {"text": text, "mark": LABELS.index(label) / 2},
    }
    return {"id": name, **columns[kind]}


@pytest.fixture(autouse=True)
def stand_in_for_seqeval(monkeypatch):
    """If seqeval is not installed, replace its scores by the share of correct tags."""
    if importlib.util.find_spec("seqeval") is not None:
        return

    def share_of_correct_tags(predicted, truth):
        correct = [float(a == b) for p, t in zip(predicted, truth, strict=True) for a, b in zip(p, t, strict=True)]
        return dict.fromkeys(("entity_f1", "entity_precision", "entity_recall"), 100 * sum(correct) / len(correct))

    monkeypatch.setattr(metrics, "check_metric_packages", lambda task: None)
    monkeypatch.setattr("flare.experiments.runs.setup.check_metric_packages", lambda task: None)
    monkeypatch.setattr(metrics, "entity_scores", share_of_correct_tags)


def flare(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("kind", "model", "methods", "more"),
    [
        ("token-classification", "bert", ("flare", "input-fusion", "x-mixup"), ()),
        ("multiple-choice", "bert", ("flare", "input-fusion"), CHOICES),
        ("multiple-choice", "llama", ("flare",), CHOICES),
        ("multiple-choice", "t5", ("flare",), CHOICES),
        ("multi-label", "bert", ("flare",), ()),
        ("regression", "bert", ("flare",), ("--label-column", "mark")),
    ],
)
def test_every_kind_is_trained_scored_and_reported(place, tmp_path, capsys, kind, model, methods, more):
    runs = tmp_path / "runs"
    words = ("--task", kind, "--data", place / kind, "--output", runs, "--max-length", 28, *QUICK, *more)
    if model != "bert":
        words = (*words, "--max-length", 48)
    assert flare("finetune", "--model", place / model, *words) == 0
    assert flare("train", "--target", "vemari", "--method", *methods, *words) == 0
    trained = {run.record.method: run for run in find_runs(runs) if run.record.kind == "train"}
    before = {method: run.metrics.test["translate-train"] for method, run in trained.items()}
    assert trained["flare"].metrics.bottleneck  # FLARE read the source texts
    lines = (trained["flare"].folder / "predictions-test.jsonl").read_text()
    assert flare("evaluate", "--setting", "translate-train", "--output", runs, "--no-progress", "--no-resume") == 0
    again = {run.record.method: run.metrics.test for run in find_runs(runs) if run.record.kind == "train"}
    assert {method: scores["translate-train"] for method, scores in again.items()} == before
    assert (trained["flare"].folder / "predictions-test.jsonl").read_text() == lines
    capsys.readouterr()
    assert flare("evaluate", "--setting", "zero-shot", "translate-test", "--output", runs, "--no-progress") == 0
    refused = "translate-test is skipped for task token-classification" in capsys.readouterr().out
    assert refused == (kind == "token-classification")
    assert flare("report", runs, "--output", tmp_path / "report") == 0
    for method in ("flare", "input-fusion") if "input-fusion" in methods else ("flare",):
        predicts_as_evaluated(trained[method], place / kind, tmp_path)
        # texts_alone leaves out the column label only
        assert ("scores against the labels" in capsys.readouterr().out) == (kind != "multiple-choice")


def test_tags_are_trained_and_predicted_at_the_same_tokens(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    task = resolve_labels(get_task("token-classification"), place / "token-classification", "english")
    form = make_form(task, tokenizer, "encoder", 24)
    pairs, _ = load_pairs(task, place / "token-classification", "english", "vemari", "test")
    torch.manual_seed(0)
    base = transformers.AutoModelForTokenClassification.from_pretrained(place / "bert", **form.model_options)
    model = fast_lora(base, r=8)
    collate = FlareDataCollator(tokenizer, layout="encoder", padding_side="left")
    batch = collate(form.train_rows(pairs, with_source=True)[0])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = collate(form.eval_rows(pairs, with_source=True)[0])
    marks = batch.pop("labels")
    assert set(marks.unique().tolist()) == {-100, 0}
    predictions = form.predictions(model.eval()(**batch).logits, pairs, marks)
    assert predictions == [pair.target.label for pair in pairs]


def test_unsupported_combinations_of_kind_and_method_are_refused(place, tmp_path, capsys):
    words = ("--output", tmp_path / "runs", "--max-length", 28, *QUICK)
    choice = ("--task", "multiple-choice", "--data", place / "multiple-choice", *CHOICES, *words)
    mixup = ("train", "--base", place / "bert", "--target", "vemari", "--method", "x-mixup", *choice)
    tags = ("--task", "token-classification", "--data", place / "token-classification", *words)
    translate = ("translate", "--task", "token-classification", "--data", place / "token-classification")
    for command, error in (
        (mixup, "--method x-mixup: it reads one text per row"),
        (
            ("finetune", "--model", place / "llama", *tags),
            "needs a model with a head and cannot be answered by generated text",
        ),
        (
            (*translate, "--source", "english", "--target", "vemari", "--model", place / "bert"),
            "translate the target's sentences into the source language (--direction to-source)",
        ),
    ):
        assert flare(*command) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "truths", "chance"),
    [
        ({"entity_f1": 0.0}, [], True),
        ({"entity_f1": 0.5}, [], False),
        # always predicting "a" gives 2 correct labels of 3 predicted and 3 true labels: micro F1 is 66.67
        ({"micro_f1": 66.6}, [["a"], ["a"], ["b"]], True),
        ({"micro_f1": 66.7}, [["a"], ["a"], ["b"]], False),
        ({"pearson": 9.0}, [0.5] * 101, True),
        ({"pearson": 11.0}, [0.5] * 101, False),
        ({"accuracy": 50.0}, ["A", "B"], True),
    ],
)
def test_scores_at_chance_level_are_recognised(scores, truths, chance):
    assert (_at_chance(scores, truths, len(truths), 2) is not None) == chance
