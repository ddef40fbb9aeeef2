"""Tests of the file formats, which all give the same rows and the same errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from experiment_data import write_bert, write_data
from small_tasks import write_csv, write_jsonl

from flare.cli import main
from flare.experiments.runs.records import find_runs
from flare.experiments.tasks import DataError, Example, get_task, has_split, load_pairs, read_split
from flare.experiments.tasks.parallel_table import ParallelColumns
from flare.experiments.tasks.tables import read_table
from flare.experiments.utils.errors import UserError

OWN = get_task("classification")
HEAD = ("id", "text", "label")
ROWS = [
    {"id": "7", "text": 'ein "Satz",\nzwei\tZeilen', "label": "good"},
    {"id": "8", "text": "žluťoučký", "label": "bad"},
]
#: "data.json" is a JSON file with {"data": rows}, "lines.json" a JSON file with one row per line, "shards" two Parquet
#: files, and "saved" a folder that save_to_disk wrote.
FORMATS = ("csv", "tsv", "json", "data.json", "lines.json", "jsonl", "parquet", "shards", "saved")


def write_as(folder: Path, rows: list[dict[str, Any]], form: str, name: str = "train") -> Path:
    """Write rows in one of FORMATS, and return the path of the file (of the last shard) or folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{form.rpartition('.')[2]}"
    if form in ("csv", "tsv"):
        import csv

        head = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if form == "csv" else "\t")
            writer.writerows([head, *([row[key] for key in head if key in row] for row in rows)])
    elif form in ("json", "data.json"):
        path.write_text(json.dumps(rows if form == "json" else {"version": 1, "data": rows}), encoding="utf-8-sig")
    elif form in ("jsonl", "lines.json"):
        write_jsonl(path, rows)
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        if form == "parquet":
            table.to_parquet(path)
        elif form == "saved":
            path = folder / name
            table.save_to_disk(path)
        else:
            for number in range(2):
                path = folder / f"{name}-{number:05d}-of-00002.parquet"
                table.shard(2, number, contiguous=True).to_parquet(path)
    return path


def raises_text(kind: type[Exception], text: str):
    return pytest.raises(kind, match=re.escape(text))


# --- one split of one language ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, form):
    write_as(tmp_path / "ace", ROWS, form)
    assert has_split(OWN, tmp_path, "ace", "train") and not has_split(OWN, tmp_path, "ace", "test")
    expected = [Example(row["id"], {"text": row["text"]}, row["label"]) for row in ROWS]
    assert read_split(OWN, tmp_path, "ace", "train") == expected
    write_csv(tmp_path / "ace" / "train.csv", [], HEAD) if form != "csv" else write_jsonl(
        tmp_path / "ace" / "train.jsonl", []
    )
    with raises_text(DataError, "several files for train"):
        read_split(OWN, tmp_path, "ace", "train")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_same_checks(tmp_path, form):
    """In every format, the error messages name the row or the column, and the reason."""
    good = [{"id": str(i), "text": "a", "label": "xy"[i % 2]} for i in range(12)]
    cases = {
        "row 2 (counted from 0): row 0 has the same id '0'": [*good[:2], {**good[2], "id": "0"}],
        "row 1 (counted from 0) has no id": [good[0], {**good[1], "id": " "}],
        "its column 'row_id' looks like an id column": [{"row_id": i, "text": "a", "label": "x"} for i in "12"],
        "has no column text; it has id, content, label": [{"id": i, "content": "a", "label": "x"} for i in "12"],
        "1 of 2 rows have a label that is not a label of task classification: '(empty)' (id 1)": [
            good[0],
            {**good[1], "label": ""},
        ],
    }
    for number, (message, rows) in enumerate(cases.items()):
        write_as(tmp_path / str(number), rows, form)
        with raises_text(DataError, message):
            read_split(OWN, tmp_path, str(number), "train")
    from flare.experiments.tasks import resolve_labels

    write_as(tmp_path / "alone", [{**good[0], "label": "xx"}, *good[1:]], form)
    with raises_text(DataError, "row 0 (counted from 0, id 0): the label 'xx' occurs in one row only"):
        resolve_labels(OWN, tmp_path, "alone")


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "data.json", "lines.json", "jsonl"])
def test_a_row_with_a_missing_field_is_refused(tmp_path, form):
    """Parquet files and saved data sets are not tested, because their rows always have every column."""
    rows = [ROWS[1], {"id": "9", "text": "b"}, {"id": "10", "text": "c"}]
    write_as(tmp_path / "ace", rows, form)
    message = (
        "line 3: 2 fields, but the head has 3" if form in ("csv", "tsv") else "row 1 (counted from 0): it has no 'l"
    )
    with raises_text(DataError, message) as raised:
        read_split(OWN, tmp_path, "ace", "train")
    assert "1 more" in str(raised.value)
    # columns that the task does not need may be missing
    write_as(tmp_path / "other", [{**ROWS[0], "url": "u"}, ROWS[1]], "jsonl")
    assert len(read_split(OWN, tmp_path, "other", "train")) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.tsv", "id,text,label\n1,a,x\n", "fields must be separated by tabs; its head is 'id,text,label'"),
        ("train.tsv", "id\ttext\ttext\n", "the column 'text' occurs more than once in the head"),
        ("train.tsv", 'id\ttext\tlabel\n1\t"a\tx\n2\tb\n', "cannot be read as a TSV file in UTF-8"),
        ("train.json", "[{]", "cannot be read as JSON"),
        ("train.json", '{"rows": []}', 'must hold a list of rows, or {"data": [rows]}; it holds an object with rows'),
        ("train.json", '[{"text": "a"}, "b"]', "row 1 (counted from 0): it must be an object; it is 'b'"),
        ("train.json", '[{"text": "a", "text": "b"}]', "the key 'text' occurs twice"),
        ("train.jsonl", '{"text": "a", "text": "b"}', "line 1: not a JSON object in UTF-8 (the key 'text' occurs"),
        ("train.parquet", "no", "cannot be read as a Parquet file"),
        ("train-00000-of-00002.parquet", "no", "1 of 2 shards are missing, such as train-00001-of-00002.parquet"),
        ("train/state.json", "{}", "has several files for train: "),
        (
            "train-00000-of-00001.csv",
            "id,text,label\n1,a,x\n",
            "several files for train: train-00000-of-00001.csv, train-00000-of-00002.csv; keep one of them",
        ),
    ],
)
def test_unreadable_files_are_errors(tmp_path, name, text, message):
    (tmp_path / "ace" / "train").mkdir(parents=True)
    (tmp_path / "ace" / name).write_text(text)
    if name == "train-00000-of-00001.csv":
        for number in (0, 1):
            (tmp_path / "ace" / f"train-{number:05d}-of-00002.csv").write_text(text)
    if name == "train/state.json":
        (tmp_path / "ace" / "train" / "dataset_info.json").write_text("{}")
        with raises_text(DataError, "cannot be read as a data set written by save_to_disk"):
            read_split(OWN, tmp_path, "ace", "train")
        (tmp_path / "ace" / "train.csv").write_text("")
    with raises_text(DataError, message):
        read_split(OWN, tmp_path, "ace", "train")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (('"Good" he said', '"so', "b"), "they are not balanced"),
        (('"I came early.', 'Nobody was there."', "b"), "a quotation spans several rows"),
    ],
)
def test_quotation_marks_of_a_tsv_file_without_quoting_are_text(tmp_path, texts, reason):
    path = tmp_path / "train.tsv"
    lines = [f"{number}\t{text}\tx" for number, text in enumerate(texts)]
    path.write_text("\n".join(["id\ttext\tlabel", *lines]) + "\n")
    with pytest.warns(UserWarning, match=f"quotation marks are read as text, because {reason}"):
        assert tuple(row["text"] for row in read_table(path).rows) == texts


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_class_numbers_are_read_by_name(tmp_path, form):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    rows = rows.cast_column(
        "label", datasets.ClassLabel(names=["positive", "negative"])
    )  # another order than in the task
    folder = tmp_path / "ace"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet") if form == "parquet" else rows.save_to_disk(folder / "train")
    examples = read_split(get_task("nusax"), tmp_path, "ace", "train")
    assert [row.label for row in examples] == ["negative", "positive"]


def test_the_id_column_can_have_another_name(tmp_path):
    for language in ("en", "ace"):
        write_csv(
            tmp_path / language / "train.csv", [("b", language, "x"), ("a", language, "y")], ("uid", "text", "label")
        )
    task = get_task("classification", id_columns=["uid"], labels=["x", "y"])
    pairs, notes = load_pairs(task, tmp_path, "en", "ace", "train")
    assert [(pair.target.id, pair.source.id) for pair in pairs] == [("b", "b"), ("a", "a")] and notes == []
    with raises_text(DataError, "has no column key; it has uid, text, label"):
        read_split(get_task("classification", id_columns=["key"]), tmp_path, "en", "train")


# --- columns of both languages side by side ---------------------------------------------------------------------------

BOTH = [
    {"key": str(i), "en": f"en {i}", "ace": f"ace {i}", "jav": f"jav {i}", "topic": "xy"[i % 2], "split": split}
    for i, split in enumerate(("train", "train", "dev", "Test", "test"))
]
TASK = get_task("classification", id_columns=["key"], label_column="topic", labels=["x", "y"])


@pytest.mark.parametrize("form", FORMATS)
def test_columns_of_both_languages_are_read_from_one_table(tmp_path, form):
    path = write_as(tmp_path, BOTH, form, name="all")
    data = ParallelColumns(path, "english", ("en",), ("{language}",))
    pairs, notes = load_pairs(TASK, data, "english", "jav", "test")
    assert [(p.target.id, p.target.texts, p.source.texts, p.target.label) for p in pairs] == [
        ("3", {"text": "jav 3"}, {"text": "en 3"}, "y"),
        ("4", {"text": "jav 4"}, {"text": "en 4"}, "x"),
    ]
    assert notes == [] and has_split(TASK, data, "ace", "valid") and len(read_split(TASK, data, "ace", "train")) == 2
    # one file per split gives the same rows
    for split in ("train", "test"):
        rows = [{k: v for k, v in row.items() if k != "split"} for row in BOTH if row["split"].lower() == split]
        write_as(tmp_path / "splits", rows, form, name=split)
    again = ParallelColumns(tmp_path / "splits", "english", ("en",), ("jav",))
    assert load_pairs(TASK, again, "english", "javanese", "test") == (pairs, [])
    assert not has_split(TASK, again, "javanese", "valid")


def test_columns_of_a_pair_of_texts_are_read_in_both_languages(tmp_path):
    rows = [{"p_en": "p", "h_en": "h", "p_sw": "P", "h_sw": "H", "label": "neutral"}]
    write_as(tmp_path, rows, "tsv", name="test")
    data = ParallelColumns(tmp_path, "english", ("p_en", "h_en"), ("p_sw", "h_sw"))
    pairs, _ = load_pairs(get_task("xnli"), data, "english", "swahili", "test")
    assert pairs[0].target.texts == {"premise": "P", "hypothesis": "H"}
    assert pairs[0].source.texts == {"premise": "p", "hypothesis": "h"}
    with raises_text(
        UserError, "task xnli has 2 text columns (premise, hypothesis); got 1 for the swahili text (p_sw)"
    ):
        read_split(get_task("xnli"), ParallelColumns(tmp_path, "english", None, ("p_sw",)), "swahili", "test")


def test_errors_of_parallel_columns_name_the_reason(tmp_path):
    path = write_as(tmp_path, BOTH, "csv", name="all")
    data = ParallelColumns(path, "english", ("en",), ("{language}",))
    for message, task, place, language in (
        ("has no column ban; it has key, en, ace, jav, topic, split", TASK, data, "ban"),
        ("--source-column is missing: name the column of", TASK, ParallelColumns(path, "english"), "english"),
        ("the answers of a qa task are parts of each language's text", get_task("qa"), data, "ace"),
        ("no such file or folder", TASK, ParallelColumns(tmp_path / "no.csv", "english", ("en",)), "english"),
    ):
        with raises_text(UserError, message):
            read_split(task, place, language, "train")
    with raises_text(DataError, "this is one file; name its columns with --source-column and --target-column"):
        read_split(TASK, path, "ace", "train")
    write_as(tmp_path, [{**BOTH[0], "split": "eval"}], "csv", name="odd")
    with raises_text(
        DataError, "row 0 (counted from 0): its split is 'eval'; accepted: train, valid, validation, dev, test"
    ):
        read_split(TASK, ParallelColumns(tmp_path / "odd.csv", "english", ("en",), None), "english", "train")
    write_as(tmp_path, [{k: v for k, v in BOTH[0].items() if k != "split"}], "csv", name="none")
    with raises_text(DataError, "is one table without a column 'split'"):
        read_split(TASK, ParallelColumns(tmp_path / "none.csv", "english", ("en",), None), "english", "train")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_finetune_train_and_evaluate_read_one_table(tmp_path, capsys):
    """The scores from the table equal the scores from the same rows in one folder per language."""
    sizes = {"train": (0, 16), "valid": (16, 24), "test": (24, 36)}
    write_data(tmp_path / "folders", rows=sizes)
    write_bert(tmp_path / "bert")
    rows = []
    for split in sizes:
        english, vemari = (
            read_table(tmp_path / "folders" / name / f"{split}.csv").rows for name in ("english", "vemari")
        )
        rows += [
            {"uid": en["id"], "en": en["text"], "vem": ve["text"], "mood": en["label"], "split": split}
            for en, ve in zip(english, vemari, strict=True)
        ]
    table = write_as(tmp_path, rows, "tsv", name="all")
    config = tmp_path / "columns.yaml"
    config.write_text("source_column: en\ntarget-column: [vem]\nid_column: uid\nlabel_column: mood\n")
    common = ("--task", "classification", "--max-length", "24", "--batch-size", "16", "--r", "4", "--epochs", "1")
    scores = []
    for number, place in enumerate((("--data", table, "--config", config), ("--data", tmp_path / "folders"))):
        runs = tmp_path / str(number)
        words = (*common, *place, "--lr", "1e-2", "--no-progress", "--output", runs)
        assert main([str(w) for w in ("finetune", *words, "--model", tmp_path / "bert")]) == 0
        assert main([str(w) for w in ("train", *words, "--target", "vemari")]) == 0
        # the columns are not given again: evaluate reads them from the runs
        assert main([str(w) for w in ("evaluate", "--output", runs, "--no-progress")]) == 0
        scores.append({str(run.folder.relative_to(runs)): run.metrics.test for run in find_runs(runs)})
    assert scores[0] == scores[1] and len(scores[0]) == 4
    capsys.readouterr()
    assert main(["train", "--task", "nusax", "--target", "a", "--target-column", "b"]) == 2
    assert "--source-column and --target-column need a table: name it with --data" in capsys.readouterr().err
    words = ["train", *common, "--output", str(tmp_path / "0"), "--data", str(table), "--config", str(config)]
    assert main([*words, "--target", "a", "b"]) == 2
    assert "--target-column vem is the column of one language, but --target names 2" in capsys.readouterr().err
