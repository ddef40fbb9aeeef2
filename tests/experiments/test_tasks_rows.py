"""Tests of invalid rows and labels: before training starts, an error names the row and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_data import write_bert, write_data
from small_tasks import write_csv, write_jsonl

from flare.cli import main
from flare.experiments.demo import DemoError
from flare.experiments.demo.real_data import load_parallel
from flare.experiments.prediction.input import _texts as prediction_texts
from flare.experiments.tasks import DataError, Example, align, get_task, read_split, resolve_labels
from flare.experiments.tasks.cell_parsing import text_of
from flare.experiments.tasks.reading import shown_labels

OWN = get_task("classification")
HEAD = ("id", "text", "label")
MANY = ["positive"] * 6 + ["negative"] * 5


def write(folder: Path, text: str, language: str = "ace", name: str = "train.csv") -> Path:
    (folder / language).mkdir(exist_ok=True)
    (folder / language / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text,label\n1,a,x\n2,b, c,y\n3,d,e,x\n", "line 3: 4 fields, but the head has 3 (id, text, label); 1 more"),
        ('id,text,label\n1,"a\nb",x\n2,b\n', "line 4: 2 fields, but the head has 3"),
        ('id,text,label\n1,"a,x\n2,b,y\n', "cannot be read as a CSV file"),
        ("id,text,text,label\n1,a,b,x\n", "the column 'text' occurs more than once in the head"),
        ("id;text;label\n1;a;x\n", "separated by commas; its head is 'id;text;label'"),
        ("id,text,label\n1,a,x\n2,b,y\n1,c,x\n", "row 2 (counted from 0): row 0 has the same id '1'"),
        ("id,text,label\n1,a,x\n ,b,y\n", "row 1 (counted from 0) has no id"),
        ("ID,text,label\n1,a,x\n", "its column 'ID' looks like an id column"),
        ("row_id,text,label\n1,a,x\n", "its column 'row_id' looks like an id column"),
    ],
)  # fmt: skip
def test_invalid_csv_rows_are_refused(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_split(OWN, tmp_path, "ace", "train")
    assert message in str(error.value), error.value


def test_values_of_the_wrong_type_are_refused(tmp_path):
    for row, message in (
        ({"text": "a", "label": ["x", "y"]}, "row 1: label holds a list (['x', 'y']); a row has one label"),
        ({"text": ["a", "b"], "label": "x"}, "row 1: text holds a list (['a', 'b']); it must be a text"),
        ({"text": {"a": 1}, "label": "x"}, "row 1: text holds a dict"),
    ):
        write_jsonl(tmp_path / "ace" / "train.jsonl", [{"text": "a", "label": "x"}, row])
        with pytest.raises(DataError) as error:
            read_split(OWN, tmp_path, "ace", "train")
        assert message in str(error.value), error.value
    write(tmp_path, "[" * 100_000, name="train.jsonl")
    with pytest.raises(DataError, match="line 1"):
        read_split(OWN, tmp_path, "ace", "train")
    write_jsonl(tmp_path / "ace" / "train.jsonl", [{"id": 1.0, "text": float("nan"), "label": 1.0}])
    assert read_split(OWN, tmp_path, "ace", "train") == [Example("1", {"text": ""}, "1")]


@pytest.mark.parametrize(
    ("cell", "text"), [(3, "3"), (-0.5, "-0.5"), (1e20, "1e+20"), (True, "True"), (float("nan"), "")]
)
def test_numbers_are_texts_in_task_data_but_not_in_prediction_input(cell, text):
    assert text_of(cell, "FILE, row 0: title") == text
    with pytest.raises(DataError, match=rf"FILE, row 0: title holds a {type(cell).__name__} .*; it must be a text"):
        prediction_texts({"title": cell}, {"text": "title"}, OWN, "FILE, row 0")


def test_word_lists_are_texts_in_prediction_input_but_not_in_task_data():
    assert prediction_texts({"tokens": ["a", "b"]}, {"tokens": "tokens"}, OWN, "FILE, row 0") == ({"tokens": "a b"}, ())
    with pytest.raises(DataError, match="FILE, row 0: text holds a list"):
        text_of(["a", "b"], "FILE, row 0: text")


def test_half_a_character_is_refused():
    assert text_of("\U0001f3f3 é", "FILE, row 0: text") == "\U0001f3f3 é"
    with pytest.raises(DataError, match=r"FILE, row 0: text holds half a character \(a lone surrogate\)"):
        text_of("a\ud83c", "FILE, row 0: text")


def test_other_cells_are_read_equally_in_task_data_and_prediction_input():
    for cell, text in (("NA", "NA"), ("3", "3"), (None, "")):
        assert text_of(cell, "FILE, row 0: title") == text
        assert prediction_texts({"title": cell}, {"text": "title"}, OWN, "FILE, row 0") == ({"text": text}, ())
    for cell in ([1, 2], {"a": 1}, b"a"):
        for read in (
            lambda value: text_of(value, "FILE, row 0: title"),
            lambda value: prediction_texts({"title": value}, {"text": "title"}, OWN, "FILE, row 0"),
        ):
            with pytest.raises(DataError, match=r"FILE, row 0: title holds a .*; it must be a text"):
                read(cell)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [*MANY, "postive"],
            "row 11 (counted from 0, id 11): the label 'postive' occurs in one row only; did you mean 'positive'?",
        ),
        (
            [*MANY, "Positive", "Positive"],
            "row 11 (counted from 0, id 11): the label 'Positive' (2 rows) differs from 'positive' (6 rows)",
        ),
        (["0.5", "1", "2.25"], "row 0 (counted from 0, id 0): the label '0.5' is a number with a fraction"),
        ([str(i) for i in range(12)], "occurs in one row only; so do 11 more labels."),
    ],
)
def test_suspicious_inferred_labels_are_errors(tmp_path, labels, message):
    for language in ("english", "ace"):
        for split in ("train", "test"):
            write_csv(tmp_path / language / f"{split}.csv", [(i, "a", label) for i, label in enumerate(labels)], HEAD)
    with pytest.raises(DataError) as error:
        resolve_labels(OWN, tmp_path, "english")
    assert message in str(error.value), error.value
    with pytest.raises(DemoError) as demo_error:
        load_parallel(str(tmp_path), "english", "ace")
    assert message in str(demo_error.value)
    task = get_task("classification", labels=list(dict.fromkeys(labels)))
    assert len(read_split(task, tmp_path, "english", "train")) == len(labels), "labels given by the user are accepted"


def test_inferred_labels_are_shown_before_training(tmp_path, capsys):
    rows = [(i, "a", label) for i, label in enumerate(["neutral"] * 3 + ["good"] * 11)]
    write_csv(tmp_path / "english" / "train.csv", rows, HEAD)
    task, table = shown_labels(OWN, tmp_path, "english")
    assert task.labels == ("good", "neutral")
    assert [line.split() for line in table[1:]] == [
        ["index", "label", "rows"],
        ["0", "good", "11"],
        ["1", "neutral", "3"],
    ]
    assert shown_labels(task, tmp_path, "english")[1] == []
    (tmp_path / "ner" / "english").mkdir(parents=True)
    (tmp_path / "ner" / "english" / "train.jsonl").write_text('{"id": 0, "tokens": ["in", "Lagos"], "tags": "O B-LOC"}')
    table = shown_labels(get_task("token-classification", label_column="tags"), tmp_path / "ner", "english")[1]
    assert [line.split() for line in table[1:3]] == [["index", "label", "words"], ["0", "O", "1"]]

    data, model = write_data(tmp_path / "data"), write_bert(tmp_path / "bert")
    words = ("finetune", "--task", "classification", "--data", data, "--model", model, "--output", tmp_path / "runs")
    quick = ("--max-length", "24", "--no-progress", "--epochs", "1", "--r", "4", "--rows", "8", "--no-keep-checkpoints")
    assert main([str(word) for word in (*words, *quick)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("labels, taken from the english training rows"))
    shown = [line.split() for line in lines[head + 2 : head + 5]]
    assert [row[0] for row in shown] == ["0", "1", "2"] and sum(int(row[2]) for row in shown) == 48
    assert not any("english train" in line or "seconds" in line for line in lines[:head]), (
        "the labels are shown before training"
    )


def test_ids_that_look_like_positions_are_ids():
    one, other = (Example(f"#{i}", {"text": text}, "x") for i, text in enumerate("ab"))
    pairs, _ = align([one, other], [other, one])
    assert [pair.target.id == pair.source.id for pair in pairs] == [True, True]


def test_error_for_a_missing_split_lists_the_files(tmp_path):
    write(tmp_path, "", name="train.xlsx")
    with pytest.raises(DataError, match=r"files in the folder: train\.xlsx"):
        read_split(OWN, tmp_path, "ace", "train")
