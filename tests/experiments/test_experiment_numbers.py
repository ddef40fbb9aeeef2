"""Tests of which rows are scored, of runs that get no score, and of data that change after a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from experiment_data import ROWS, write_bert, write_data
from safetensors.torch import load_file, save_file

from flare.cli import main
from flare.experiments.report import write_report
from flare.experiments.report.collect import ReportError, collect
from flare.experiments.report.conditions import warnings
from flare.experiments.runs import predictor
from flare.experiments.runs.chance import chance_notes
from flare.experiments.runs.diverged import CheckLogits, check_logits
from flare.experiments.runs.evaluate import _Evaluation
from flare.experiments.runs.records import STALE, read_metrics, read_record, write_metrics, write_record
from flare.experiments.runs.run_settings import EvaluateSettings
from flare.experiments.utils.errors import DivergedError, UserError

QUICK = ("--batch-size", 8, "--lr", 1e-2, "--no-progress", "--epochs", 1, "--r", 4)
LENGTH = ("--max-length", 28)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with a model in bert/, questions in qa/, texts with labels in data/, and two fine-tuned bases.

    The base in qa-runs/ is fine-tuned on the questions, the base in runs/ on the texts with labels.
    """
    root = tmp_path_factory.mktemp("numbers")
    write_data(root / "data", rows={"train": (0, 16), "valid": (16, 24), "test": (24, 36)})
    for language, word in (("english", "river"), ("vemari", "goats")):
        write_questions(root / "qa" / language, word)
    write_bert(root / "bert")
    for task, data, runs in (("qa", "qa", "qa-runs"), ("classification", "data", "runs")):
        words = ("--task", task, "--data", root / data, "--output", root / runs, "--model", root / "bert", *LENGTH)
        assert flare("finetune", *words, *QUICK) == 0
    return root


def write_questions(folder: Path, word: str, unanswered: tuple[int, ...] = ()) -> None:
    """Write question data of one language. The test rows with the numbers in `unanswered` have no answer."""
    folder.mkdir(parents=True)
    for split, count in {"train": 16, "valid": 8, "test": 8}.items():
        lines = []
        for row in range(count):
            context = f"the {word} {'old ' * (row % 3)}was near the house"
            texts = [] if split == "test" and row in unanswered else ["near the house"]
            answers = {"text": texts, "answer_start": [context.index("near")] * len(texts)}
            lines.append({"id": str(row), "question": "where", "context": context, "answers": answers})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(place, tmp_path) -> Path:
    """Return a folder of runs that holds only the fine-tuned classifier."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def flare(*words: object) -> int:
    return main([str(word) for word in words])


def train(place: Path, runs: Path, *more: object) -> int:
    words = ("train", "--task", "classification", "--data", place / "data", "--output", runs, "--target", "vemari")
    return flare(*words, *LENGTH, *QUICK, *more)


# --- translate-test of questions --------------------------------------------------------------------------------------


def test_translate_test_scores_only_questions_with_an_answer_in_the_source_language(place, tmp_path, capsys):
    """A question whose answer was lost in translation is not scored, and a note counts such questions.

    `flare translate` puts marks around each answer, and the answer is lost if the translation loses its marks.
    """
    shutil.copytree(place / "qa-runs", tmp_path / "runs")
    write_questions(tmp_path / "mt" / "vemari-english", "river", unanswered=(2, 5))
    words = ("evaluate", "--output", tmp_path / "runs", "--target", "vemari", "--setting", "translate-test")
    words += ("--source-text", "mt", "--no-progress", "--translations", tmp_path / "mt")
    assert flare(*words) == 0
    folder = tmp_path / "runs" / "vemari" / "translate-test-mt-source" / "seed-0"
    lines = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "3", "4", "6", "7"]
    record = read_record(folder)
    assert record.data["test"] == 6
    assert any("2 of 8 test questions have no answer in english" in note for note in record.data["notes"])
    correct = sum(line["prediction"] in line["truth"] for line in lines)
    assert read_metrics(folder).test["translate-test"]["exact_match"] == pytest.approx(100 * correct / 6)

    shutil.rmtree(tmp_path / "mt")
    write_questions(tmp_path / "mt" / "vemari-english", "river", unanswered=tuple(range(8)))
    capsys.readouterr()
    assert flare(*words, "--no-resume") != 0
    assert "8 of 8 test questions have no answer in english" in capsys.readouterr().err


# --- runs without a score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "flare"])
def test_a_training_that_diverges_is_an_error_without_a_score(place, runs, capsys, method):
    assert train(place, runs, "--method", method, "--lr", 1e30, "--max_grad_norm", 0) != 0
    error = capsys.readouterr().err
    assert "vemari" in error and ("NaN or infinite" in error or "the loss is" in error) and "smaller --lr" in error
    assert not list((runs / "vemari").rglob("metrics.json"))
    (record,) = (runs / "vemari").rglob("run.json")
    assert read_record(record.parent).status == "diverged", "the report lists the run"
    capsys.readouterr()
    assert flare("evaluate", "--output", runs, "--setting", "translate-train", "--no-progress") == 0
    assert "diverged (its weights, losses or logits are not finite), skipped" in capsys.readouterr().out
    assert train(place, runs, "--method", method) == 0
    assert "restarted with the current settings" in capsys.readouterr().out
    assert read_record(record.parent).done


def test_nan_weights_are_an_error_in_evaluate_and_get_no_score_in_the_report(place, runs, capsys):
    assert train(place, runs, "--method", "lora", "flare", "--save_strategy", "epoch") == 0
    folder = runs / "vemari" / "flare-r4" / "seed-0"
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight * float("nan") for name, weight in weights.items()}, path, {"format": "pt"})
    words = ("evaluate", "--output", runs, "--setting", "translate-train", "--no-resume", "--no-progress")
    capsys.readouterr()
    assert flare(*words) != 0
    assert "logits of 12 rows are NaN or infinite" in capsys.readouterr().err
    collected = collect([runs])
    assert [entry.label for entry in collected.groups[0].entries] == ["lora-r4"]
    assert any("diverged" in line and str(folder) in line for line in collected.unfinished)
    # a diverged run made by an older version of flare may have a score; then only its log shows that it diverged
    log = runs / "vemari" / "lora-r4" / "seed-0" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "loss": 0.0, "grad_norm": NaN}\n')
    with pytest.raises(ReportError, match="diverged, its gradient is not finite"):
        collect([runs])


def test_logits_that_overflow_in_evaluate_leave_a_finished_run_unchanged(place, runs, capsys, monkeypatch):
    """With finite weights, only the evaluation overflows, for instance in float16 on another GPU."""
    assert train(place, runs, "--method", "lora") == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(predictor, "check_logits", lambda logits, ids: check_logits(logits * torch.inf, ids))
    assert flare("evaluate", "--output", runs, "--setting", "translate-train", "--no-resume", "--no-progress") == 2
    assert "logits are NaN or infinite although all weights are finite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_generating_from_nan_logits_is_an_error():
    scores = torch.tensor([[0.0, -torch.inf], [1.0, torch.nan]])
    with pytest.raises(DivergedError, match=r"logits of 1 rows are NaN or infinite \(id b\)"):
        CheckLogits(["a", "b"])(torch.zeros(2, 1), scores)
    assert CheckLogits(["a"])(torch.zeros(1, 1), scores[:1]) is not None


def test_a_base_at_chance_level_is_noted_before_training_adapters(place, runs, capsys):
    base = runs / "base" / "seed-0"
    lines = [json.loads(line) for line in (base / "predictions-test.jsonl").read_text().splitlines()]
    truths = [line["truth"] for line in lines]
    metrics = read_metrics(base)
    share = 100 * max(map(truths.count, truths)) / len(truths)
    metrics.test["source-language"] = {"accuracy": 99.0, "macro_f1": 99.0}
    write_metrics(base, metrics)
    assert chance_notes(base) == []
    metrics.test["source-language"] = {"accuracy": share, "macro_f1": 17.3}
    write_metrics(base, metrics)
    capsys.readouterr()
    assert train(place, runs, "--method", "lora") == 0
    out = capsys.readouterr().out
    assert "is at chance level on english" in out and out.index("chance level") < out.index("lora-r4 seed 0:")
    assert any("chance level" in line for line in warnings(collect([runs]).groups[0]))


# --- data that change after a run -------------------------------------------------------------------------------------


@pytest.fixture
def data(place, tmp_path) -> Path:
    shutil.copytree(place / "data", tmp_path / "data")
    return tmp_path / "data"


def change(path: Path) -> None:
    """Add a word to the text of one row. The ids and the number of rows do not change."""
    lines = path.read_text().splitlines()
    row = lines[3].split(",")
    row[1] += " goats"
    path.write_text("\n".join([*lines[:3], ",".join(row), *lines[4:]]) + "\n")


def test_changed_rows_prevent_resuming_and_are_noted_at_existing_scores(place, runs, data, capsys):
    words = ("--data", data, "--method", "flare", "--keep-checkpoints")
    assert train(place, runs, *words) == 0
    folder = runs / "vemari" / "flare-r4" / "seed-0"
    record = read_record(folder)
    assert set(record.data["digest"]) == {f"{split}{text}" for split in ROWS for text in ("", "/gold")}
    assert len(set(record.data["digest"].values())) == 6
    versions = record.environment["versions"]
    assert {"bitsandbytes", "datasets", "numpy", "safetensors", "cuda"} <= set(versions)

    before = (data / "english" / "test.csv").read_text()
    change(data / "english" / "test.csv")
    capsys.readouterr()
    assert train(place, runs, *words) == 0
    note = "vemari flare-r4 seed 0: its results are of other data: the test/gold rows have changed since"
    assert note in capsys.readouterr().out and note in read_record(folder).data["notes"]
    assert note in warnings(collect([runs]).groups[0])
    evaluate = ("evaluate", "--output", runs, "--setting", "translate-train", "--no-progress")
    assert flare(*evaluate) == 0 and note in capsys.readouterr().out
    assert flare(*evaluate, "--no-resume") == 0
    assert note not in read_record(folder).data["notes"]
    (data / "english" / "test.csv").write_text(before)
    assert flare(*evaluate) == 0 and note in read_record(folder).data["notes"]
    assert flare(*evaluate, "--no-resume") == 0

    record = read_record(folder)
    record.status = "running"
    write_record(folder, record)
    change(data / "vemari" / "train.csv")
    capsys.readouterr()
    assert train(place, runs, *words) != 0
    error = capsys.readouterr().err
    assert (
        "the train rows have changed since this run began, so it cannot be resumed" in error and "--no-resume" in error
    )
    assert train(place, runs, *words, "--no-resume") == 0


@pytest.mark.parametrize("first", ["gold", "mt"])
def test_scores_with_two_source_texts_have_their_own_digests(place, runs, data, tmp_path, first):
    """The translated source lacks the last row, and the target texts change between the two scores."""
    assert train(place, runs, "--data", data, "--method", "flare") == 0
    folder = runs / "vemari" / "flare-r4" / "seed-0"
    shutil.copytree(data / "english", tmp_path / "mt" / "vemari-english")
    translated = tmp_path / "mt" / "vemari-english" / "test.csv"
    translated.write_text("\n".join(translated.read_text().splitlines()[:-1]) + "\n")
    words = ("evaluate", "--output", runs, "--setting", "translate-train", "--no-progress")
    words += ("--translations", tmp_path / "mt", "--source-text")

    def stale(*texts: str) -> list[str]:
        assert flare(*words, *texts) == 0
        return [note.partition(" of other data: ")[2] for note in read_record(folder).data["notes"] if STALE in note]

    assert stale("mt") == stale("gold", "mt") == []
    metrics = read_metrics(folder)
    del metrics.test["translate-train/mt"]
    write_metrics(folder, metrics)
    change(data / "vemari" / "test.csv")
    second = "mt" if first == "gold" else "gold"
    assert stale(first, second) == ["the test rows have changed since"]
    change(data / "vemari" / "test.csv")
    assert set(stale("gold", "mt")) == {f"the {split} rows have changed since" for split in ("test", "test-mt")}


def test_a_run_that_was_trained_again_is_not_scored_with_its_old_settings(place, runs):
    assert train(place, runs, "--method", "lora") == 0
    folder = runs / "vemari" / "lora-r4" / "seed-0"
    settings = EvaluateSettings(output=runs, setting=("translate-train",), resume=False, progress=False)
    evaluation = _Evaluation(settings, print)  # reads the record
    newer = read_record(folder)
    newer.date, newer.training_arguments["learning_rate"] = "2100-01-01T00:00:00+00:00", 0.5
    write_record(folder, newer)
    with pytest.raises(UserError, match=f"{folder}: the run was trained again meanwhile; run flare evaluate again"):
        evaluation.run()
    assert read_record(folder) == newer


# --- base and adapters on equal rows ----------------------------------------------------------------------------------


def test_the_base_is_scored_on_the_rows_of_the_adapters(place, runs, data, capsys):
    """Two of 12 test rows have no source, so FLARE is scored on 10. Before FLARE is trained, zero-shot uses all 12."""
    lines = (data / "english" / "test.csv").read_text().splitlines()
    (data / "english" / "test.csv").write_text("\n".join(lines[:-2]) + "\n")
    words = ("evaluate", "--output", runs, "--target", "vemari", "--data", data, "--no-progress")
    assert flare(*words, "--setting", "zero-shot") == 0
    folder = runs / "vemari" / "zero-shot" / "seed-0"
    assert read_record(folder).data["test"] == 12
    assert train(place, runs, "--data", data, "--method", "flare") == 0
    # the zero-shot score on 12 rows is shown in a separate table
    labels_by_rows = {group.rows: [entry.label for entry in group.entries] for group in collect([runs]).groups}
    assert labels_by_rows == {
        "": ["flare-r4"],
        "scores of the base on test rows on which no adapter was scored": ["zero-shot"],
    }
    assert (
        write_report([runs], runs / "report", print_fn=lambda line: None)
        .read_text()
        .count("on which no adapter was scored")
        > 1
    )
    shutil.rmtree(runs / "report")
    capsys.readouterr()
    assert flare(*words, "--setting", "zero-shot") == 0
    assert "its results are of other data: the test rows have changed since" in capsys.readouterr().out
    assert flare(*words, "--setting", "zero-shot", "--no-resume") == 0
    assert "2 of 12 test rows are left out: no adapter was scored on them" in capsys.readouterr().out
    ids = [
        [json.loads(line)["id"] for line in (one / "predictions-test.jsonl").read_text().splitlines()]
        for one in (folder, runs / "vemari" / "flare-r4" / "seed-0")
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 10
    assert len(collect([runs]).groups) == 1
