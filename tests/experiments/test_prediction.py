"""Tests of `flare predict` and FlarePipeline: sources, resuming, formats, adapters outside of runs, and threads."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from experiment_data import write_bert, write_data
from predicting import read_jsonl, rows_of, texts_alone, write_jsonl
from tiny_mt import save_nllb

import flare
from flare.cli import main
from flare.experiments.prediction.input import Input, read_input
from flare.experiments.prediction.output import write_file
from flare.experiments.prediction.pipeline import FlarePipeline
from flare.experiments.prediction.predict_settings import PredictSettings
from flare.experiments.prediction.run import _header, _rows
from flare.experiments.runs.records import read_metrics
from flare.experiments.tasks import get_task
from flare.experiments.translation import Translator
from flare.experiments.translation.provenance import differences
from flare.experiments.utils.errors import UserError

QUICK = ("--batch-size", 4, "--lr", "1e-2", "--no-progress", "--epochs", 1, "--r", 4, "--max-length", 24)
CODES = ("--source-code", "eng_Latn", "--target-code", "ace_Latn")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with a FLARE run in runs/vemari/flare-r4/seed-0, its data, and a translation model in mt/."""
    root = tmp_path_factory.mktemp("prediction")
    write_data(root / "data", valid=False, rows={"train": (0, 16), "test": (16, 36)})
    write_bert(root / "bert")
    save_nllb(root / "mt")
    words = ("--task", "classification", "--data", root / "data", "--output", root / "runs", *QUICK)
    assert run("finetune", "--model", root / "bert", *words) == 0
    assert run("train", "--target", "vemari", "--method", "flare", *words) == 0
    vemari, english = (texts_alone(rows_of(root / "data", language)) for language in ("vemari", "english"))
    write_jsonl(root / "texts.jsonl", vemari)
    write_jsonl(root / "english.jsonl", english)
    return root


@pytest.fixture(scope="module")
def scored(place) -> list[str]:
    """Return the predictions that the run saved for its test rows."""
    return [row["prediction"] for row in read_jsonl(adapter(place) / "predictions-test.jsonl")]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def adapter(place: Path) -> Path:
    return place / "runs" / "vemari" / "flare-r4" / "seed-0"


def predict(place: Path, *words: object) -> int:
    return run("predict", "--adapter", adapter(place), "--no-progress", *words)


def pairs(place: Path) -> tuple[list[str], list[str]]:
    """Return the test texts in the target language, and the same texts in English."""
    return tuple([row["text"] for row in read_jsonl(place / name)] for name in ("texts.jsonl", "english.jsonl"))


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_missing_source_is_an_error_unless_the_flag_no_source_is_given(place, tmp_path, capsys):
    words = ("--input", place / "texts.jsonl", "--output", tmp_path / "out.jsonl")
    assert predict(place, *words) == 2
    err = capsys.readouterr().err
    assert "20 of 20 texts have no source" in err and "--translator" in err and "--no-source" in err
    assert not list(tmp_path.iterdir())
    assert predict(place, *words, "--no-source") == 0
    assert "left out (--no-source)" in capsys.readouterr().out
    without = [row["probability"] for row in read_jsonl(tmp_path / "out.jsonl")]
    assert (
        predict(place, *words[:2], "--source-input", place / "english.jsonl", "--output", tmp_path / "with.jsonl") == 0
    )
    assert [row["probability"] for row in read_jsonl(tmp_path / "with.jsonl")] != pytest.approx(without, rel=1e-4)


def test_texts_without_a_source_are_translated(place, tmp_path, capsys):
    texts, english = pairs(place)
    rows = [{"text": t, "source_text": e if n % 2 else ""} for n, (t, e) in enumerate(zip(texts, english, strict=True))]
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    words = ("--translator", place / "mt", *CODES)
    assert predict(place, "--input", file, "--output", tmp_path / "out.jsonl", *words) == 0
    out = capsys.readouterr().out
    assert f"column source_text for 10 of 20 texts, translated with {place / 'mt'} for 10 of 20" in out
    predictions = read_jsonl(tmp_path / "out.jsonl")
    assert [row["source_text"] for row in predictions[1::2]] == english[1::2]
    translator = Translator(str(place / "mt"), "ace_Latn", "eng_Latn")
    assert [row["source_text"] for row in predictions[::2]] == translator.translate(texts[::2])
    # given these sources, the pipeline makes the same predictions
    assert FlarePipeline(adapter(place))(texts, [row["source_text"] for row in predictions]) == [
        {name: row[name] for name in ("prediction", "probability", "probabilities")} for row in predictions
    ]


def test_an_interrupted_command_resumes(place, tmp_path, monkeypatch):
    """No saved batch is translated or predicted again, and the output equals the output of an uninterrupted command."""
    few = write_jsonl(tmp_path / "texts.jsonl", read_jsonl(place / "texts.jsonl")[:10])
    words = ("--input", few, "--translator", place / "mt", *CODES, "--batch-tokens", 96, "--batch-size", 4)
    assert predict(place, *words, "--output", tmp_path / "whole.jsonl") == 0
    translated, predicted = Translator.translate_batch, FlarePipeline.batches
    counts = {"translated": 0, "predicted": 0}
    stop = {"translated": 2, "predicted": 0}

    def counted(name: str) -> None:
        if stop.get(name) == counts[name]:
            raise KeyboardInterrupt
        counts[name] += 1

    def translate_batch(self, pieces):
        counted("translated")
        return translated(self, pieces)

    def batches(self, *arguments, **options):
        for batch in predicted(self, *arguments, **options):
            counted("predicted")
            yield batch

    monkeypatch.setattr(Translator, "translate_batch", translate_batch)
    monkeypatch.setattr(FlarePipeline, "batches", batches)
    out = ("--output", tmp_path / "out.jsonl")
    assert predict(place, *words, *out) == 130  # interrupted during translation
    stop = {"predicted": 2}
    assert predict(place, *words, *out) == 130  # interrupted during prediction
    total = counts["translated"]
    assert predict(place, *words, *out, "--max-length", 20) == 2  # resuming with other settings is refused
    stop = {}
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'[{"torn')
    assert predict(place, *words, *out) == 0
    assert total > 2 and counts == {"translated": total, "predicted": 3}  # 10 rows, 4 per batch
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "texts.jsonl", "whole.jsonl"]


def test_options_that_change_predictions_are_compared_before_resuming(place):
    pipeline = FlarePipeline(adapter(place), print_fn=lambda line: None)
    data = SimpleNamespace(rows=[{}], texts=[{"text": "a"}], words=[()], sources=[None])
    saved = _header(pipeline, data)
    for name in ("mt_language", "mt_model", "task", "method", "prompt"):
        pipeline.settings = replace(pipeline.settings, **{name: "x"})
        assert name in {one.partition(":")[0] for one in differences(saved, _header(pipeline, data))}


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"[1]\n", b"[1]"])
def test_a_partial_file_of_the_user_is_not_replaced(content, place, tmp_path, capsys):
    file = tmp_path / "out.jsonl.partial"
    file.write_bytes(content)
    assert predict(place, "--input", place / "texts.jsonl", "--no-source", "--output", tmp_path / "out.jsonl") == 2
    assert "was not written by flare predict" in capsys.readouterr().err and file.read_bytes() == content


def test_an_existing_output_is_not_replaced(place, tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    file.write_text("mine")
    words = ("--input", place / "texts.jsonl", "--source-input", place / "english.jsonl", "--output", file)
    assert predict(place, *words) == 2
    assert "already exists" in capsys.readouterr().err and file.read_text() == "mine"
    assert predict(place, *words, "--overwrite") == 0
    rows = read_jsonl(file)
    assert len(rows) == 20
    # the output may be the next input: its source texts equal those of --source-input
    details = ("prediction", "probability", "probabilities")
    again = write_jsonl(tmp_path / "again.jsonl", [{k: v for k, v in row.items() if k not in details} for row in rows])
    assert predict(place, "--input", again, *words[2:], "--overwrite") == 0 and read_jsonl(file) == rows


# --- formats ----------------------------------------------------------------------------------------------------------


def test_standard_input_and_output_are_json_lines(place, scored, monkeypatch, capsys):
    texts, english = pairs(place)
    lines = [json.dumps({"text": t, "source_text": e}) for t, e in zip(texts, english, strict=True)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "", '{"text": " "}'])))
    assert predict(place, "--input", "-") == 0
    out, err = capsys.readouterr()
    predictions = [json.loads(line) for line in out.splitlines()]
    assert [row["prediction"] for row in predictions] == [*scored, None]
    assert "source: column source_text for all 20 texts" in err and "1 of 21 rows have an empty text" in err


def test_csv_with_labels_is_scored(place, tmp_path, capsys):
    rows = rows_of(place / "data", "vemari")
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "english", "label"])
        for row, english in zip(rows, pairs(place)[1], strict=True):
            writer.writerow([row["text"], english, row["label"]])
    columns = ("--text-columns", "sentence", "--source-columns", "english")
    assert predict(place, "--input", tmp_path / "in.csv", *columns, "--output", tmp_path / "out.csv") == 0
    scores = read_metrics(adapter(place)).test["translate-train"]
    assert f"accuracy {scores['accuracy']:.1f}, macro_f1 {scores['macro_f1']:.1f}" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    for row in predictions:
        shares = {label: float(row[f"probability_{label}"]) for label in labels}
        assert sum(shares.values()) == pytest.approx(1) and max(shares, key=shares.get) == row["prediction"]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"sentence": "a"}], (), "no column text; it has sentence"),
        ([{"text": 3}], (), "holds a int"),
        ([{"text": "a", "prediction": 1}], ("--no-source",), "has a column prediction"),
        ([{"text": "a", "probability": 1}], ("--no-source",), "has a column probability"),
        ([{"text": "a", "probability_neutral": 1}], ("--no-source", "--output", "out.csv"), "a column probability_neu"),
        ([{"text": "a", "source_text": "x"}] * 20, ("--source-input", "english.jsonl"), "has a column source_text"),
        ([{"text": "a"}], ("--source-input", "english.jsonl"), "20 rows and --input has 1 row"),
        ([{"text": "a"}], ("--labels", "a", "b"), "this is saved in .*run.json"),
        ([{"text": "a"}], ("--translator", "mt"), "vemari"),
        ([{"text": "a"}], ("--translator", "mt", "--no-source"), "exclude each other"),
        ([], (), "has no rows"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:20],
)
def test_errors_name_the_cause(place, tmp_path, monkeypatch, capsys, rows, words, message):
    monkeypatch.chdir(place)
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    assert predict(place, "--input", file, *words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_standard_output_reads_each_prediction_once():
    """The time per row must not grow with the number of rows before it."""

    class Counted(list):
        read = 0

        def __getitem__(self, key):
            items = super().__getitem__(key)
            Counted.read += len(items)
            return items

        def __iter__(self):
            for item in super().__iter__():
                Counted.read += 1
                yield item

    data = SimpleNamespace(rows=[{"text": str(n)} for n in range(9)], columns={})
    with_text = [0, 1, 3, 4, 5, 7]  # the other rows have an empty text
    done = Counted({"prediction": n} for n in with_text)
    rows = [_rows(data, [None] * 9, with_text, done, first, first + 3) for first in (0, 3, 6)]
    assert [row["prediction"] for batch in rows for row in batch] == [0, 1, None, 3, 4, 5, None, 7, None]
    assert Counted.read == len(done)


def test_tuples_are_json_in_csv(tmp_path):
    write_file(tmp_path / "out.csv", [{"id": "1", "prediction": ("health", "sport")}])
    assert (tmp_path / "out.csv").read_text() == 'id,prediction\n1,"[""health"", ""sport""]"\n'


# --- rows and columns of the input ------------------------------------------------------------------------------------


def read(folder: Path, task: str, rows: Any, sources: Any = None, **options: Any) -> Input:
    """Return the input of `flare predict` from rows, or from a file."""
    files = {"input": rows, "source_input": sources}
    for name, content in files.items():
        if isinstance(content, list):
            files[name] = write_jsonl(folder / f"{name}.jsonl", content)
    paths = {name: None if file is None else str(file) for name, file in files.items()}
    return read_input(PredictSettings(adapter="x", **paths), get_task(task, **options))


@pytest.mark.parametrize(
    ("task", "ids", "options"),
    [
        ("classification", ("id",), {}),
        ("sib200", ("index_id",), {}),
        ("sib200", ("id",), {}),  # a file of the user
        ("classification", ("link", "number"), {"id_columns": ("link", "number")}),
    ],
)
def test_rows_of_two_files_are_matched_by_the_ids_of_the_task(tmp_path, task, ids, options):
    def rows(side: str, order: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{**dict.fromkeys(ids, n), "text": f"{side} {n}"} for n in order]

    texts = [*rows("target", (0, 1, 2)), {"text": "no id"}]
    sources = read(tmp_path, task, texts, rows("source", (2, 0, 1, 3)), **options).sources
    assert sources == [{"text": "source 0"}, {"text": "source 1"}, {"text": "source 2"}, None]
    with pytest.raises(UserError, match=f"row 2 .*has no {' and '.join(ids)}, .*give every row an id"):
        read(tmp_path, task, texts, [*rows("source", (0, 1)), {"text": "no id"}], **options)


def test_rows_are_matched_by_position_only_if_no_ids_contradict_it(tmp_path):
    texts = [{"uid": n, "text": f"target {n}"} for n in range(3)]
    for name, order in (("uid", (0, 1, 2)), ("uid", ("a", "b", "c")), ("number", (2, 1, 0))):
        sources = [{name: n, "text": f"source {n}"} for n in order]
        assert read(tmp_path, "classification", texts, sources).sources == [{"text": f"source {n}"} for n in order]
    with pytest.raises(UserError, match="Rename both columns to id"):
        read(tmp_path, "classification", texts, [{"sentence_id": n, "text": "a"} for n in (1, 0, 2)])


def test_lists_are_read_as_in_training(tmp_path):
    words = ["New York", "\u00a0", "a"]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["tokens"], [json.dumps(words)], [str(words)], ["[1] two  words"]])
    for rows in (tmp_path / "in.csv", [{"tokens": words}, {"tokens": words}, {"tokens": "[1] two  words"}]):
        data = read(tmp_path, "token-classification", rows, rows)
        assert data.words == [tuple(words), tuple(words), ("[1]", "two", "words")]
        assert data.texts[0] == data.sources[0] == {"tokens": " ".join(words)}
    (tmp_path / "broken.csv").write_text('tokens\n"[""a"", "\n')
    with pytest.raises(UserError, match=r"row 0: tokens holds .*must be a list"):
        read(tmp_path, "token-classification", tmp_path / "broken.csv")
    texts = {"question": "q", **{f"choice{n}": letter for n, letter in enumerate("abcd", 1)}}
    sources = {f"source_{name}": text for name, text in texts.items()}
    lists = {"question": "q", "choices": list("abcd"), "source_question": "q", "source_choices": list("abcd")}
    for row in ({**texts, **sources}, lists, {**lists, "choices": "a;b;c;d"}):
        data = read(tmp_path, "multiple-choice", [{**row, "label": "B"}])
        assert data.texts == data.sources == [texts] and list(data.columns.values()) == list(sources)
        assert data.truth[0].label == "B" and data.truth[0].texts == texts
    with pytest.raises(UserError, match="3 choices, but task multiple-choice has 4"):
        read(tmp_path, "multiple-choice", [{"question": "q", "choices": list("abc")}])


def test_class_names_of_a_parquet_file_are_the_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["positive", "neutral", "negative"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 2]}, features=features)
    rows.to_parquet(str(tmp_path / "in.parquet"))
    truth = read(tmp_path, "nusax", tmp_path / "in.parquet").truth
    assert [row.label for row in truth] == ["positive", "negative"]


def test_labels_are_read_without_the_id_column_of_the_run(tmp_path):
    data = read(tmp_path, "classification", [{"text": "a", "label": "b"}], id_columns=["uid"])
    assert data.truth[0].label == "b" and data.ids == ["#0"] and not data.notes


# --- adapters outside of runs -----------------------------------------------------------------------------------------


def test_a_copied_adapter_predicts_without_and_with_its_run_json(place, scored, tmp_path):
    """Without the run.json, the labels come from the base's configuration."""
    shutil.copytree(adapter(place) / "adapter", tmp_path / "adapter")
    shutil.copytree(place / "runs" / "base" / "seed-0", tmp_path / "base")
    lines: list[str] = []
    alone = FlarePipeline(tmp_path / "base", tmp_path / "adapter", max_length=24, print_fn=lines.append)
    assert [one["prediction"] for one in alone(*pairs(place))] == scored
    assert "assuming flare on classification with the labels" in lines[0]
    shutil.copytree(adapter(place), tmp_path / "run")
    moved = FlarePipeline(tmp_path / "base", tmp_path / "run", print_fn=lambda line: None)
    assert [one["prediction"] for one in moved(*pairs(place))] == scored


def test_an_adapter_saved_by_a_script_predicts(place, tmp_path):
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification.from_pretrained(place / "bert", num_labels=3)
    model = flare.fast_lora(base, r=4).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not name its 3 labels; give them with --labels"):
        FlarePipeline(tmp_path)
    options = {"max_length": 24, "print_fn": lambda line: None}
    with pytest.raises(UserError, match=r"the adapter cannot be used .*size mismatch"):
        FlarePipeline(tmp_path, labels=["a", "b"], **options)
    predict = FlarePipeline.from_pretrained(tmp_path, labels=["a", "b", "c"], **options)
    texts, english = pairs(place)
    tokenizer = predict.trained.setup.tokenizer
    rows = [
        {"input_ids": tokenizer(t)["input_ids"], "source_input_ids": tokenizer(e)["input_ids"]}
        for t, e in zip(texts[:4], english[:4], strict=True)
    ]
    with torch.no_grad():
        expected = model(**flare.FlareDataCollator(tokenizer)(rows)).logits.softmax(-1)
    predictions = predict(texts[:4], english[:4])
    torch.testing.assert_close(torch.tensor([list(one["probabilities"].values()) for one in predictions]), expected)


def test_folders_that_cannot_predict_are_refused(place, tmp_path):
    for folder, message in (
        (place / "runs", "name one of the runs in it: .*flare-r4"),
        (place / "runs" / "base" / "seed-0", "a run of flare finetune"),
        (tmp_path, "holds neither run.json nor adapter_config.json"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            FlarePipeline(folder)


# --- Python -----------------------------------------------------------------------------------------------------------


def test_the_pipeline_predicts_in_python(place, scored):
    predict = FlarePipeline.from_pretrained(adapter(place), print_fn=lambda line: None)
    texts, english = pairs(place)
    assert [one["prediction"] for one in predict(texts, english)] == scored
    assert predict(texts[0], english[0])["prediction"] == scored[0]
    assert predict([" "], [None]) == [{"prediction": None}] and predict([]) == []
    with pytest.raises(UserError, match="1 of 2 texts have no source"):
        predict(texts[:2], [english[0], None])
    with pytest.raises(ValueError, match="1 source texts were given for 2 texts"):
        predict(texts[:2], english[:1])
    with pytest.raises(TypeError, match="text 0 must be a text; got int"):
        predict([3])
    with pytest.raises(TypeError, match="unexpected"):
        FlarePipeline(adapter(place), colour="red")


def test_a_translating_pipeline_returns_the_source(place):
    codes = {"source_code": "eng_Latn", "target_code": "ace_Latn"}
    predict = FlarePipeline(adapter(place), translator=str(place / "mt"), print_fn=lambda line: None, **codes)
    texts, english = pairs(place)
    predictions = predict(texts[:2], [english[0], None])
    assert "source" not in predictions[0] and predictions[1]["source"] == predict.translator.translate([texts[1]])[0]


def test_threads_share_a_pipeline(place):
    predict = FlarePipeline(adapter(place), print_fn=lambda line: None)
    rows = list(zip(*pairs(place), strict=True))
    alone = [predict(*row) for row in rows]
    start = threading.Barrier(4)

    def worker(number: int) -> list[dict[str, Any]]:
        start.wait()
        return [predict(*row) for row in rows[number::4]]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(worker, range(4)))
    assert together == [alone[number::4] for number in range(4)]
