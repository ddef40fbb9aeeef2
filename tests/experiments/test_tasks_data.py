"""Tests of reading, writing and pairing the rows of a task, and of the errors for unsuitable data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_tasks import write_csv, write_jsonl

from flare.experiments.tasks import (
    Answer,
    DataError,
    Example,
    Pair,
    align,
    get_task,
    has_split,
    load_pairs,
    read_split,
    resolve_labels,
    write_split,
)
from flare.experiments.utils.errors import UserError

OWN, NUSAX, QA = get_task("classification"), get_task("nusax"), get_task("qa")
HEAD = ("id", "text", "label")


def example(row_id: str, text: str = "x", label: str | None = "positive") -> Example:
    return Example(row_id, {"text": text}, label)


def raises_text(kind: type[Exception], text: str):
    return pytest.raises(kind, match=re.escape(text))


# --- the layout -------------------------------------------------------------------------------------------------------


def test_csv_jsonl_and_parquet_give_equal_rows(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    rows = [("7", 'ein "Satz",\nzwei Zeilen', "good"), ("8", "žluťoučký", "bad")]
    write_csv(tmp_path / "a" / "train.csv", rows, HEAD, encoding="utf-8-sig")
    write_jsonl(tmp_path / "b" / "train.jsonl", [dict(zip(HEAD, row, strict=True)) for row in rows])
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table(dict(zip(HEAD, zip(*rows, strict=True), strict=True))), tmp_path / "c" / "train.parquet")
    a, b, c = (read_split(OWN, tmp_path, name, "train") for name in "abc")
    assert a == b == c == [Example(i, {"text": text}, label) for i, text, label in rows]


def test_answers_are_read_from_every_accepted_format(tmp_path):
    context = "Lake Toba is in Sumatra."
    expected = [Example("1", {"question": "Where?", "context": context}, None, (Answer("Sumatra", 16),))]
    squad = {"text": ["Sumatra"], "answer_start": [16]}
    base = {"id": "1", "question": "Where?", "context": context}
    write_jsonl(tmp_path / "a" / "test.jsonl", [{**base, "answers": squad}])
    head = ("id", "question", "context")
    row = tuple(base.values())
    write_csv(tmp_path / "b" / "test.csv", [(*row, "Sumatra", 16)], (*head, "answer", "answer_start"))
    write_csv(tmp_path / "c" / "test.csv", [(*row, json.dumps(squad))], (*head, "answers"))
    write_csv(tmp_path / "d" / "test.csv", [(*row, "Sumatra")], (*head, "answer"))
    assert all(read_split(QA, tmp_path, name, "test") == expected for name in "abc")
    assert read_split(QA, tmp_path, "d", "test")[0].answers == (Answer("Sumatra", -1),)
    write_csv(tmp_path / "e" / "test.csv", [(*row, "{oops")], (*head, "answers"))
    with raises_text(DataError, "row 0: its answers cannot be read"):
        read_split(QA, tmp_path, "e", "test")


def test_labels_are_names_or_indices(tmp_path):
    write_csv(tmp_path / "l" / "dev.csv", [("1", "a", "2"), ("2", "b", "negative")], HEAD)
    assert [row.label for row in read_split(NUSAX, tmp_path, "l", "valid")] == ["positive", "negative"]
    other = get_task("classification", labels=["no", "yes"], text_columns=["a", "b"], label_column="verdict")
    write_csv(tmp_path / "m" / "train.csv", [("p", "q", "yes")], ("a", "b", "verdict"))
    assert read_split(other, tmp_path, "m", "train") == [Example("#0", {"a": "p", "b": "q"}, "yes")]


def test_labels_are_inferred_from_the_training_rows(tmp_path):
    write_csv(tmp_path / "en" / "train.csv", [(i, "a", label) for i, label in enumerate(("10", "9", "9"))], HEAD)
    assert resolve_labels(OWN, tmp_path, "en").labels == ("9", "10")
    assert resolve_labels(NUSAX, tmp_path, "en") is NUSAX
    # if the labels are numbers, a number in the data is a label and never an index
    write_csv(tmp_path / "ace" / "train.csv", [("1", "a", "9"), ("2", "a", "1")], HEAD)
    with raises_text(
        DataError, "1 of 2 rows have a label that is not a label of task classification: '1' (id 2); accepted: 9, 10"
    ):
        read_split(resolve_labels(OWN, tmp_path, "en"), tmp_path, "ace", "train")
    write_csv(tmp_path / "en" / "train.csv", [("1", "a", "x")], HEAD)
    with raises_text(UserError, "two or more different labels are needed; got 'x'"):
        resolve_labels(OWN, tmp_path, "en")


def test_a_written_split_reads_back_equal(tmp_path):
    rows = [Example("1", {"question": "q", "context": "a\u2028b"}, None, (Answer("a", 0), Answer("b", 2)))]
    write_split(tmp_path / "x" / "train.jsonl", rows, QA)
    assert read_split(QA, tmp_path, "x", "train") == rows
    before = (tmp_path / "x" / "train.jsonl").read_bytes()
    with pytest.raises(KeyError):
        write_split(tmp_path / "x" / "train.jsonl", [*rows, Example("2", {"question": "q"})], QA)
    assert (tmp_path / "x" / "train.jsonl").read_bytes() == before
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["train.jsonl"], "no partial file is left"


# --- errors in files --------------------------------------------------------------------------------------------------


def test_errors_name_what_is_missing(tmp_path):
    write_csv(tmp_path / "ace" / "train.csv", [("1", "a")], ("id", "content"))
    write_csv(tmp_path / "ace" / "valid.csv", [], HEAD)
    write_jsonl(tmp_path / "ace" / "test.jsonl", [])
    for text, language, split in (
        ("no column text, label; it has id, content", "ace", "train"),
        ("valid.csv has no rows; an empty split cannot be used", "ace", "valid"),
        ("test.jsonl has no rows", "ace", "test"),
        ("has no folder 'jav'; its folders: ace", "jav", "train"),
    ):
        with raises_text(DataError, text):
            read_split(NUSAX, tmp_path, language, split)
    with raises_text(DataError, "no column answers (or answer); it has id, content"):
        read_split(get_task("qa", text_columns=["id", "content"]), tmp_path, "ace", "train")
    (tmp_path / "ace" / "valid.csv").unlink()
    with raises_text(DataError, "valid.csv is missing, and so is any other valid split (valid, validation, dev"):
        read_split(NUSAX, tmp_path, "ace", "valid")
    assert has_split(NUSAX, tmp_path, "ace", "train") and not has_split(NUSAX, tmp_path, "ace", "valid")
    with raises_text(UserError, "the split 'eval' is not known; accepted: train, valid, test"):
        read_split(NUSAX, tmp_path, "ace", "eval")
    with raises_text(DataError, "no such folder"):
        read_split(NUSAX, "./nowhere", "ace", "train")
    with raises_text(DataError, "give a folder or a hub id with --data"):
        read_split(OWN, None, "ace", "train")


def test_errors_name_unknown_labels_and_their_rows(tmp_path):
    rows = [(f"n{i}", "a", label) for i, label in enumerate(("positive", "mixed", "3", "", "mixed"))]
    write_csv(tmp_path / "ace" / "train.csv", rows, HEAD)
    with pytest.raises(DataError) as raised:
        read_split(NUSAX, tmp_path, "ace", "train")
    text = str(raised.value)
    assert (
        "4 of 5 rows have a label that is not a label of task nusax: '(empty)', '3', 'mixed' (ids n1, n2, n3, ...)"
        in text
    )
    assert "accepted: negative, neutral, positive, or their indices from 0" in text


def test_unreadable_files_are_errors(tmp_path):
    write_csv(tmp_path / "ace" / "train.csv", [("1", "a", "b")], HEAD)
    (tmp_path / "ace" / "train.jsonl").write_text("{}")
    with raises_text(DataError, "several files for train: train.csv, train.jsonl; keep one of them"):
        read_split(OWN, tmp_path, "ace", "train")
    (tmp_path / "ace" / "valid.jsonl").write_text('{"id": 1, "text": "a", "label": "b"}\n{"id": 2,')
    with raises_text(DataError, "valid.jsonl, line 2: not a JSON object"):
        read_split(OWN, tmp_path, "ace", "valid")
    (tmp_path / "ace" / "test.csv").write_bytes(b"id,text,label\n1,\xff,b\n")
    with raises_text(DataError, "cannot be read as a CSV file in UTF-8"):
        read_split(OWN, tmp_path, "ace", "test")
    (tmp_path / "jav").mkdir()
    (tmp_path / "jav" / "test.parquet").write_bytes(b"PAR1")
    with raises_text(DataError, "cannot be read as a Parquet file"):
        read_split(OWN, tmp_path, "jav", "test")


# --- alignment --------------------------------------------------------------------------------------------------------


def test_rows_without_ids_are_aligned_by_position():
    targets, sources = [example("#0", "a"), example("#1", "b")], [example("#0", "A"), example("#1", "B")]
    pairs, notes = align(targets, sources, target_name="ace", source_name="en", split="train")
    assert [(p.target.texts["text"], p.source.texts["text"]) for p in pairs] == [("a", "A"), ("b", "B")]
    assert notes == ["train: ace and en are aligned by position: they have no id column in common"]
    assert align(targets, [example("x", "A"), example("y", "B")])[0][1].source.texts == {"text": "B"}
    with raises_text(DataError, "train: rows of ace (2) and en (1) cannot be aligned: without an id column"):
        align(targets, sources[:1], target_name="ace", source_name="en", split="train")
    pairs, notes = align(targets, sources[1:], translated=True)
    assert [(p.target.id, p.source.texts["text"]) for p in pairs] == [("#1", "B")], (
        "in translated rows, an id such as #1 is the row's position in the original data"
    )


def test_rows_without_counterpart_are_counted():
    targets = [example(i) for i in ("5", "1", "2", "2", "3", "4")]
    sources = [
        example("1"),
        example("2"),
        example("3", label="negative"),
        example("4", " "),
        example("5"),
        *map(example, "6789"),
    ]
    pairs, notes = align(targets, sources, target_name="ace", source_name="en", split="test")
    assert [pair.target.id for pair in pairs] == ["5", "1"], "pairs are in the order of the target rows"
    assert notes == [
        "test: 2 rows of ace dropped because their ids occur more than once (ids 2, 2)",
        "test: 5 rows of en dropped because no remaining row of ace has their id (ids 2, 6, 7, ...)",
        "test: 1 pairs dropped because their labels differ (id 3)",
        "test: 1 pairs dropped because a text is empty (id 4)",
    ]


def test_data_without_matching_rows_are_an_error():
    with pytest.raises(DataError) as raised:
        align([example("a"), example("b")], [example("c")], target_name="ace", source_name="en", split="train")
    text = str(raised.value)
    assert "train: no row of ace (2 rows) matches a row of en (1 rows); rows are matched by their id" in text
    assert "2 rows of ace dropped because no remaining row of en has their id (ids a, b)" in text


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    data, translations = tmp_path / "data", tmp_path / "mt"
    for language in ("english", "ace"):
        write_csv(data / language / "train.csv", [(i, f"{language} {i}", "positive") for i in range(4)], HEAD)
    write_csv(data / "ace" / "test.csv", [(i, f"ace {i}", "negative") for i in range(3)], HEAD)
    translated = {"english-ace": ("train", (3, 1, 0)), "ace-english": ("test", (0, 2))}
    for name, (split, ids) in translated.items():
        rows = [example(str(i), f"{name} {i}", "positive" if split == "train" else "negative") for i in ids]
        write_split(translations / name / f"{split}.jsonl", rows, NUSAX)
    return data, translations


def texts(pairs: list[Pair]) -> list[tuple[str, str | None]]:
    return [(p.target.texts["text"], p.source.texts["text"] if p.source else None) for p in pairs]


def test_gold_and_translated_texts_come_from_their_folders(folders):
    data, mt = folders
    pairs, notes = load_pairs(NUSAX, data, "english", "ace", "train", limit=2)
    assert texts(pairs) == [("ace 0", "english 0"), ("ace 1", "english 1")]
    assert notes == ["train: the first 2 of 4 rows are used"]
    pairs, notes = load_pairs(NUSAX, data, "english", "ace", "train", source_text=None)
    assert texts(pairs)[0] == ("ace 0", None) and len(pairs) == 4 and notes == []
    pairs, notes = load_pairs(NUSAX, data, "english", "ace", "train", translations=mt, target_text="mt")
    assert texts(pairs) == [(f"english-ace {i}", f"english {i}") for i in (3, 1, 0)]
    assert notes == ["train: 1 rows of english dropped because no remaining row of ace (mt) has their id (id 2)"]
    pairs, notes = load_pairs(NUSAX, data, "english", "ace", "test", translations=mt, source_text="mt")
    assert texts(pairs) == [("ace 0", "ace-english 0"), ("ace 2", "ace-english 2")]
    assert notes == ["test: 1 rows of ace dropped because no remaining row of english (mt) has their id (id 1)"]


def test_error_for_a_missing_translation_gives_the_command(folders):
    data, mt = folders
    with raises_text(
        DataError, "flare translate --task nusax --source ace --target english --splits train --direction to-target"
    ):
        load_pairs(NUSAX, data, "english", "ace", "train", translations=mt, source_text="mt")
    (mt / "ace-english" / "train.partial.jsonl").touch()
    with raises_text(DataError, "it was started but not finished"):
        load_pairs(NUSAX, data, "english", "ace", "train", translations=mt, source_text="mt")
    with raises_text(UserError, "give its folder with --translations"):
        load_pairs(NUSAX, data, "english", "ace", "train", target_text="mt")
    with raises_text(UserError, "got target_text='machine' and source_text='gold'"):
        load_pairs(NUSAX, data, "english", "ace", "train", target_text="machine")
    with raises_text(UserError, "limit must be 1 or more"):
        load_pairs(NUSAX, data, "english", "ace", "train", limit=0)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_tasks_have_the_papers_metrics_and_lengths():
    first = {name: (get_task(name).metrics[0], get_task(name).max_length) for name in ("xnli", "tydiqa", "nusax")}
    assert first == {"xnli": ("accuracy", 128), "tydiqa": ("exact_match", 512), "nusax": ("macro_f1", 128)}
    task = get_task("classification", text_columns=["title", "body"], metric="macro_f1")
    assert task.prompt == "Title: {title}\nBody: {body}\nLabel:" and task.metrics == ("macro_f1", "accuracy")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "nusa"}, "--task 'nusa' is not known; the tasks are nusax, xnli, tydiqa, sib200, "),
        ({"name": "qa", "text_columns": ["text"]}, "of a QA task must be question and context; got 'text'"),
        ({"name": "qa", "labels": ["a", "b"]}, "task qa has answers, not labels"),
        (
            {"name": "nusax", "metric": "f1"},
            "--metric 'f1' is not a metric of task nusax; accepted: accuracy, macro_f1",
        ),
        ({"name": "nusax", "prompt": "Sentiment:"}, "task nusax: the prompt lacks '{text}'"),
        ({"name": "nusax", "labels": ["a", "a"]}, "two or more different labels are needed"),
        (
            {"name": "nusax", "verbalizer": {"negative": "neutral"}},
            "the verbalizer must give every label a different text",
        ),
        ({"name": "nusax", "max_length": 2}, "--max-length must be 4 or more; got 2"),
    ],
)
def test_invalid_task_options_are_refused(options, text):
    with raises_text(UserError, text):
        get_task(**options)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_papers_data_sets_are_read_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, configuration, split, revision="main"):
        calls.append((name, configuration, split, revision))
        if name == "indonlp/NusaX-senti" and revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found nusax.py")
        if split == "valid":
            raise ValueError("unknown split")
        if name == "facebook/xnli":
            rows = {"premise": ["p"], "hypothesis": ["h"], "label": [2]}
            names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
            return datasets.Dataset.from_dict(rows).cast_column("label", names)
        if name == "indonlp/NusaX-senti":
            return datasets.Dataset.from_dict({"id": ["4"], "text": ["t"], "lang": ["ace"], "label": ["neutral"]})
        ids = [f"{language}--{i}-0" for language in ("swahili", "english") for i in range(60)]
        answers = [{"text": ["c"], "answer_start": [0]}] * len(ids)
        return datasets.Dataset.from_dict({"id": ids, "question": ids, "context": ["c"] * len(ids), "answers": answers})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_split(get_task("xnli"), None, "swahili", "valid") == [
        Example("#0", {"premise": "p", "hypothesis": "h"}, "contradiction")
    ]
    assert read_split(get_task("nusax"), None, "acehnese", "test")[0].label == "neutral"
    tydiqa = get_task("tydiqa")
    train, valid, test = (read_split(tydiqa, None, "swh", split) for split in ("train", "valid", "test"))
    assert len(train) + len(valid) == len(test) == 60 and 1 <= len(valid) <= 15
    assert not {row.id for row in train} & {row.id for row in valid}
    assert all(row.id.startswith("swahili-") and row.answers == (Answer("c", 0),) for row in (*train, *valid))
    assert ("facebook/xnli", "sw", "validation", "main") in calls
    assert ("indonlp/NusaX-senti", "ace", "test", "refs/convert/parquet") in calls
    assert calls[-1] == ("google-research-datasets/tydiqa", "secondary_task", "validation", "main")
    notes = load_pairs(tydiqa, None, "english", "swahili", "test", source_text=None)[1]
    assert notes == ["test: the data set has no test split; its validation split is used instead"]
    with raises_text(UserError, "xnli has no Acehnese; it has Arabic (ar), "):
        read_split(get_task("xnli"), None, "acehnese", "train")


@pytest.mark.parametrize(
    "error", [OSError("offline"), ConnectionError("timed out"), ValueError("BuilderConfig 'ace' not found")]
)
def test_a_split_of_the_hub_that_cannot_be_loaded_is_not_a_missing_split(monkeypatch, error):
    """A missing valid split means that the last checkpoint is used, so a failed download must be an error."""
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, configuration, split):
        if split == "train":
            raise ValueError("Unknown split \"train\". Should be one of ['validation'].")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "--data someone/else: neither a folder on this machine nor a data set"
    for read in (read_split, has_split):
        with raises_text(DataError, message):
            read(OWN, "someone/else", "ace", "valid")
    with raises_text(DataError, message):
        read_split(OWN, "someone/else", "ace", "train")
    assert not has_split(OWN, "someone/else", "ace", "train")


def test_a_split_of_the_hub_with_a_wrong_label_exists(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": ["1"], "text": ["x"], "label": ["mixed"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split: rows)
    assert has_split(NUSAX, None, "acehnese", "valid")
    with raises_text(DataError, "have a label that is not a label of task nusax: 'mixed'"):
        read_split(NUSAX, None, "acehnese", "valid")


# --- real data --------------------------------------------------------------------------------------------------------


def test_nusax_is_read_and_aligned_in_nine_languages(nusax):
    languages = sorted(path.name for path in nusax.iterdir() if path.is_dir())
    assert len(languages) == 9
    for language in languages:
        for split, size in {"train": 500, "valid": 100, "test": 400}.items():
            pairs, notes = load_pairs(NUSAX, nusax, "english", language, split)
            assert len(pairs) == size and notes == []
            assert all(pair.source and pair.source.label == pair.target.label for pair in pairs)
