"""Tests of token classification, multiple choice, multi-label classification and regression.

They cover rows, pairs (a target row with its source row), forms and metrics. A form turns pairs into rows for a model,
and the model's output into predictions.
"""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_tasks import byte_tokenizer, word_tokenizer, write_csv, write_jsonl

import flare
from flare.experiments.runs.run_settings import Settings
from flare.experiments.runs.setup import task_of
from flare.experiments.tasks import (
    Answer,
    DataError,
    Example,
    Pair,
    get_task,
    load_pairs,
    make_form,
    metrics,
    read_split,
    resolve_labels,
    write_split,
)
from flare.experiments.tasks import score as score_of
from flare.experiments.tasks.digest import digest_of_rows
from flare.experiments.tasks.forms.tokens import first_tokens_of
from flare.experiments.tasks.label_inference import inferred_tags
from flare.experiments.tasks.row_parsing import examples_from
from flare.experiments.translation.row_texts import prepare_rows, restore_rows
from flare.experiments.utils.errors import UserError

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
CHOICES = {"text_columns": ["passage", "question"], "choice_columns": ["c1", "c2", "c3"]}


def labels_of(rows, task):
    return [row.label for row in examples_from(rows, list(rows[0]), task, "FILE")]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_tags_of_a_file_are_names_or_indices_and_tags_of_the_hub_are_numbers():
    task = get_task("token-classification", labels=TAGS)
    rows = [
        {"tokens": ["Nelson", "Mandela", "came"], "ner_tags": ["B-PER", "I-PER", "O"]},
        {"tokens": ["in", "Lagos"], "ner_tags": [0, 3]},
        {"tokens": '["in", "Lagos"]', "ner_tags": "O B-LOC"},
    ]
    examples = examples_from(rows, ["tokens", "ner_tags"], task, "FILE")
    assert [row.label for row in examples] == [("B-PER", "I-PER", "O"), ("O", "B-LOC"), ("O", "B-LOC")]
    assert examples[0].words == ("Nelson", "Mandela", "came")
    assert examples[0].texts == {"tokens": "Nelson Mandela came"}
    hub = {"tokens": ["in", "Lagos"], "ner_tags": [0, 1]}
    (row,) = examples_from([hub], list(hub), get_task("token-classification"), "HUB", ["O", "B-LOC"].__getitem__)
    assert row.label == ("O", "B-LOC")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "ner_tags has 1 tags, but tokens has 2 words"),
        ({"tokens": ["a"], "ner_tags": ["PER"]}, "'PER'; tags are O, B-TYPE and I-TYPE"),
        (
            {"tokens": ["a"], "ner_tags": [1]},
            "holds numbers; name the tags in the order of their numbers with --labels",
        ),
        ({"words": ["a"]}, "has no column tokens, ner_tags"),
    ],
)
def test_invalid_tags_are_errors(row, error):
    with pytest.raises(DataError, match=error):
        examples_from([row], list(row), get_task("token-classification"), "FILE")


def test_conll_files_are_read(tmp_path):
    (tmp_path / "hausa").mkdir()
    path = tmp_path / "hausa" / "train.txt"
    path.write_text("-DOCSTART- -X- O O\n\nNelson NNP B-PER\nMandela NNP I-PER\n\n\nLagos\tB-LOC\n", encoding="utf-8")
    task = get_task("token-classification")
    examples = read_split(task, tmp_path, "hausa", "train")
    assert [(row.words, row.label) for row in examples] == [
        (("Nelson", "Mandela"), ("B-PER", "I-PER")),
        (("Lagos",), ("B-LOC",)),
    ]
    lines = ("10\u00a0000 O", "\u00a0 O", "Mr\u00a0X\t B-PER ", "\u00a0\tO\r", "\u3000  O")
    path.write_text("\n".join(lines), encoding="utf-8")
    (row,) = read_split(task, tmp_path, "hausa", "train")
    assert row.words == ("10\u00a0000", "\u00a0", "Mr\u00a0X", "\u00a0", "\u3000"), "no other space separates fields"
    assert row.label == ("O", "O", "B-PER", "O", "O")
    path.write_text("Nelson\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.txt, line 1: 'Nelson' has no tag"):
        read_split(task, tmp_path, "hausa", "train")


def test_inferred_tags_are_completed_to_iob2(tmp_path):
    rows = [Example("1", label=("O", "B-PER", "O", "I-LOC"))]
    assert list(inferred_tags(rows)) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    write_jsonl(tmp_path / "english" / "train.jsonl", [{"tokens": ["a"], "ner_tags": ["B-PER"]}])
    assert resolve_labels(get_task("token-classification"), tmp_path, "english").labels == ("O", "B-PER", "I-PER")
    with pytest.raises(UserError, match="'O' is missing"):
        get_task("token-classification", labels=["B-PER", "I-PER"])


def test_choices_and_their_labels_are_read():
    task = get_task("multiple-choice", **CHOICES, label_column="answer")
    row = {"passage": "p", "question": "q", "c1": "x", "c2": "y", "c3": "z", "answer": "b"}
    listed = {"passage": "p", "question": "q", "choices": ["x", "y", "z"], "answer": 1}
    for one in (row, listed):
        (example,) = examples_from([one], list(one), task, "FILE")
        assert example.label == "B"
        assert example.texts == {"passage": "p", "question": "q", "c1": "x", "c2": "y", "c3": "z"}
    assert labels_of([{**row, "answer": "3"}], replace(task, first_choice=1)) == ["C"]
    with pytest.raises(DataError, match="answer is '3'; accepted: A, B, C, or the choice's number counted from 0"):
        labels_of([{**row, "answer": "3"}], task)
    with pytest.raises(DataError, match="2 choices, but task multiple-choice has 3"):
        labels_of([{**listed, "choices": ["x", "y"]}], task)


def test_sets_of_labels_are_read_from_every_format():
    task = get_task("multi-label", labels=["joy", "anger", "fear"])
    values = ["anger;joy", ["fear"], [0, 2], [0, 1, 0], "[]", ""]
    assert labels_of([{"text": "t", "labels": value} for value in values], task) == [
        ("joy", "anger"),
        ("fear",),
        ("joy", "fear"),
        ("anger",),
        (),
        (),
    ]
    assert labels_of([{"text": "t", "joy": 1, "anger": "0", "fear": 1.0}], task) == [("joy", "fear")]
    with pytest.raises(DataError, match="1 of 1 rows have a label that is not a label of task multi-label: 'sad'"):
        labels_of([{"text": "t", "labels": ["sad"]}], task)


def test_zeros_and_ones_are_one_for_each_label_also_if_the_labels_are_numbers():
    task = get_task("multi-label", labels=["0", "1", "2"])
    assert labels_of([{"text": "t", "0": "0", "1": "1", "2": "0"}], task) == [("1",)]
    values = ["[0, 1, 0]", [0, 0, 0], [0, 2], "1;2"]
    assert labels_of([{"text": "t", "labels": value} for value in values], task) == [("1",), (), ("0", "2"), ("1", "2")]
    two = get_task("multi-label", labels=["0", "1"])
    assert labels_of([{"text": "t", "0": 1, "1": 0}, {"text": "t", "0": 0, "1": 0}], two) == [("0",), ()]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"joy": "0", "anger": "0", "fear": "3"},
            "the column 'fear' holds '3'; the column of a label must hold 1 or 0",
        ),
        ({"joy": "0", "anger": "", "fear": "1"}, "the column 'anger' holds ''"),
        ({"joy": 0, "anger": None, "fear": 1}, "the column 'anger' holds None"),
        ({"labels": "[0, 2, 0]"}, r"labels holds \[0, 2, 0\], in which a number occurs twice; .* for each label \(3\)"),
        ({"labels": [0, 1, 0, 0]}, "a number occurs twice"),
    ],
)
def test_numbers_that_are_not_a_set_of_labels_are_errors(row, error):
    with pytest.raises(DataError, match=error):
        labels_of([{"text": "t", **row}], get_task("multi-label", labels=["joy", "anger", "fear"]))


def test_strings_without_a_comma_between_them_are_not_a_list():
    """pandas writes an array of strings to a CSV file without commas, and Python would join the strings."""
    task = get_task("multi-label")
    for text in ("['anger' 'joy']", "[\"it's\" 'joy'\n 'x']", "['anger''joy']"):
        with pytest.raises(DataError, match="it must be a list, with commas between its items"):
            labels_of([{"text": "t", "labels": text}], task)
    lists = (["anger"], ["a' 'b", "joy"], ['say "a" "b"', "it's"], ["'", '"', "\\", "c"])
    assert labels_of([{"text": "t", "labels": str(one)} for one in lists], task) == [tuple(one) for one in lists]


def test_a_list_of_two_class_numbers_is_a_list_of_indices(tmp_path):
    """With two labels, [0, 1] of a feature that names its classes means both, whether or not the labels are known."""
    datasets = pytest.importorskip("datasets")
    feature = datasets.Sequence(datasets.ClassLabel(names=["anger", "joy"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": feature})
    rows = {"text": list("abcd"), "labels": [[0, 1], [1], [0], []]}
    (tmp_path / "en").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "en" / "train.parquet")
    for task in (get_task("multi-label"), resolve_labels(get_task("multi-label"), tmp_path, "en")):
        labels = [row.label for row in read_split(task, tmp_path, "en", "train")]
        assert labels == [("anger", "joy"), ("joy",), ("anger",), ()]


def test_a_regression_needs_finite_numbers():
    task = get_task("regression", label_column="score")
    assert labels_of([{"text": "t", "score": "0.5"}], task) == [0.5]
    for wrong in ("", "nan", None, "high"):
        with pytest.raises(DataError, match=r"row 0: score is .*; a regression needs a"):
            labels_of([{"text": "t", "score": wrong}], task)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("regression", {"labels": ["a", "b"]}, "task regression has no labels to name"),
        ("multi-label", {"verbalizer": {"a": "b"}}, "a verbalizer needs a classification task"),
        ("classification", {"choice_columns": ["a", "b"]}, "--choice-columns is for multiple choice"),
        ("multiple-choice", {"choice_columns": ["a"]}, "2 to 26 choice columns"),
        ("token-classification", {"text_columns": ["a", "b"]}, "must be the column of the words"),
        ("regression", {"metric": "accuracy"}, "not a metric of task regression; accepted: pearson, spearman"),
    ],
)
def test_options_that_do_not_fit_the_kind_of_task_are_errors(name, options, error):
    with pytest.raises(UserError, match=error):
        get_task(name, **options)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_only_the_targets_tags_are_used(tmp_path):
    task = get_task("token-classification", labels=TAGS)
    write_jsonl(tmp_path / "hausa" / "test.jsonl", [{"id": "1", "tokens": ["a", "b"], "ner_tags": ["O", "B-PER"]}])
    write_jsonl(tmp_path / "english" / "test.jsonl", [{"id": "1", "tokens": ["c"], "ner_tags": ["B-LOC"]}])
    write_jsonl(tmp_path / "mt" / "hausa-english" / "test.jsonl", [{"id": "1", "text": "c d e"}])
    for options in ({}, {"source_text": "mt", "translations": tmp_path / "mt"}):
        pairs, notes = load_pairs(task, tmp_path, "english", "hausa", "test", **options)
        assert not notes
        assert pairs[0].target.label == ("O", "B-PER")
    assert pairs[0].source.texts == {"tokens": "c d e"}
    assert pairs[0].source.words == ()


@pytest.mark.parametrize("column", ["tokens", "text"])
def test_a_translated_sentence_has_no_words(tmp_path, column):
    """The column of the words may have the name of the column that holds the translated sentence."""
    task = get_task("token-classification", labels=TAGS, text_columns=[column])
    write_jsonl(tmp_path / "hausa" / "test.jsonl", [{"id": "1", column: ["a", "b"], "ner_tags": ["O", "B-PER"]}])
    (row,) = read_split(task, tmp_path, "hausa", "test")
    assert row == Example("1", {column: "a b"}, ("O", "B-PER"), words=("a", "b"))
    examples, _ = restore_rows(prepare_rows([row], task, "drop"), ["x y z"])
    (tmp_path / "hausa-english").mkdir()
    write_split(tmp_path / "hausa-english" / "test.jsonl", examples, task)
    (read,) = read_split(task, tmp_path, "hausa-english", "test")
    assert (read.texts, read.words, read.label) == ({column: "x y z"}, (), None)


def test_rows_without_words_keep_their_digest():
    """Digests in the run.json of earlier versions must stay valid."""
    row = Example("1", {"text": "t"}, "a")
    assert digest_of_rows([row]) == "4354c15b9c3d0543e364c36b72baed0558cd46c6dc21d397eef190ee2f5c7f91"
    assert digest_of_rows([replace(row, words=("t",))]) != digest_of_rows([row])


# --- forms ------------------------------------------------------------------------------------------------------------


def test_only_a_words_first_token_is_labelled():
    tokenizer = byte_tokenizer(cls_token="<s>")
    task = get_task("token-classification", labels=TAGS)
    form = make_form(task, tokenizer, "encoder", 12)
    target = Example("1", {"tokens": "ab c def"}, ("O", "B-PER", "I-PER"), words=("ab", "c", "def"))
    source = Example("1", {"tokens": "xyz"})
    rows, notes = form.train_rows([Pair(target, source)], with_source=True)
    # <s> a b ' ' c ' ' d e f: each byte is a token, so a word's first token is its first byte
    assert rows[0]["labels"] == [-100, 0, -100, -100, 1, -100, 2, -100, -100]
    assert len(rows[0]["source_input_ids"]) == 4
    assert not notes
    cut = replace(target, texts={"tokens": "ab c defghijk"}, words=("ab", "c", "defghijk", "l"))
    cut = replace(cut, texts={"tokens": "ab c defghijk l"}, label=("O", "B-PER", "I-PER", "O"))
    rows, notes = form.eval_rows([Pair(cut)], with_source=False)
    assert rows[0]["labels"].count(0) == 3 and len(rows[0]["input_ids"]) == 12
    assert "words without a token" in notes[-1]


def test_first_tokens_of_words():
    # a token that holds a word and the space before it belongs to the word; a token that is only the space does not
    assert first_tokens_of(["ab", "cd"], [(0, 0), (0, 2), (2, 5), (0, 0)]) == [1, 2]
    assert first_tokens_of(["ab", "cd"], [(0, 2), (2, 3), (3, 4), (4, 5)]) == [0, 2]
    # a word that the tokenizer drops, and a token that spans two words
    assert first_tokens_of(["ab", "\u200b", "cd"], [(0, 2), (5, 7)]) == [0, None, 1]
    assert first_tokens_of(["ab", "cd"], [(0, 5)]) == [0, None]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("joined", [False, True])
def test_tags_are_read_at_the_collated_positions(side, joined):
    tokenizer = byte_tokenizer(cls_token="<s>")
    form = make_form(get_task("token-classification", labels=TAGS), tokenizer, "encoder", 16)
    pairs = [
        Pair(Example("1", {"tokens": "ab c"}, ("B-PER", "O"), words=("ab", "c")), Example("1", {"tokens": "x"})),
        Pair(Example("2", {"tokens": "d"}, ("B-LOC",), words=("d",)), Example("2", {"tokens": "xyz zyx"})),
    ]
    rows, _ = form.eval_rows(pairs, with_source=True)
    kind = flare.baselines.InputFusionCollator if joined else flare.FlareDataCollator
    batch = kind(tokenizer, layout="encoder", padding_side=side)(rows)
    logits = torch.zeros(*batch["input_ids"].shape, len(TAGS))
    for row, word in ((0, "ab"), (0, "c"), (1, "d")):  # the logits of a word's first byte give its tag
        byte = tokenizer(word)["input_ids"][1]
        at = (batch["input_ids"][row] == byte).nonzero()[-1]
        logits[row, at, {"ab": 1, "c": 0, "d": 3}[word]] = 1
    assert form.predictions(logits, pairs, batch["labels"]) == [("B-PER", "O"), ("B-LOC",)]


def test_target_rows_without_words_are_errors():
    form = make_form(get_task("token-classification", labels=TAGS), word_tokenizer("a"), "encoder")
    with pytest.raises(DataError, match="1 of 1 rows have no words with tags"):
        form.train_rows([Pair(Example("1", {"tokens": "a"}))], with_source=False)


def test_each_choice_is_encoded_with_its_passage_and_question():
    tokenizer = word_tokenizer("p q x y z P Q X Y Z")
    task = get_task("multiple-choice", **CHOICES)
    form = make_form(task, tokenizer, "encoder")
    columns = ("passage", "question", "c1", "c2", "c3")
    pair = Pair(
        Example("1", dict(zip(columns, "pqxyz", strict=True)), "B"),
        Example("1", dict(zip(columns, "PQXYZ", strict=True)), "B"),
    )
    rows, _ = form.train_rows([pair], with_source=True)
    assert tokenizer.batch_decode(rows[0]["input_ids"]) == [f"<s> p </s> q {c} </s>" for c in "xyz"]
    assert tokenizer.batch_decode(rows[0]["source_input_ids"]) == [f"<s> P </s> Q {c} </s>" for c in "XYZ"]
    assert rows[0]["labels"] == 1
    batch = flare.FlareDataCollator(tokenizer, layout="encoder")(rows * 2)
    assert batch["input_ids"].shape == batch["source_attention_mask"].shape == (2, 3, 6)
    assert batch["labels"].tolist() == [1, 1]
    assert form.predictions(torch.tensor([[0.0, 1.0, 0.5]]), [pair]) == ["B"]


def test_a_generated_choice_is_one_of_the_letters():
    tokenizer = byte_tokenizer(merges=[("Ġ", "A"), ("Ġ", "B"), ("Ġ", "C")])
    task = get_task("multiple-choice", **CHOICES, max_length=96)
    form = make_form(task, tokenizer, "causal")
    texts = {"passage": "long " * 30, "question": "q", "c1": "x", "c2": "y", "c3": "z"}
    rows, notes = form.train_rows([Pair(Example("1", texts, "B"), Example("1", texts, "B"))], with_source=True)
    prompt = tokenizer.decode(
        [i for i, label in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True) if label < 0]
    )
    assert prompt.endswith("\nQuestion: q\nA: x\nB: y\nC: z\nAnswer:")  # only the passage is truncated
    assert len(rows[0]["input_ids"]) <= 96 and "cut to prompts" in notes[0]
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "ABC"]
    assert form.next_tokens([]) == sorted(letters)
    assert form.next_tokens([letters[1]]) == [tokenizer.eos_token_id]
    both = flare.experiments.tasks.JoinedForm(form)
    assert both.prompt.count("Answer:") == 1 and both.prompt.count("\nA: ") == 2
    assert both.next_tokens([]) == sorted(letters)


def test_multi_label_and_regression_forms_make_rows_and_predictions():
    tokenizer = word_tokenizer("a b")
    several = make_form(get_task("multi-label", labels=["joy", "anger"]), tokenizer, "encoder")
    pairs = [Pair(Example("1", {"text": "a"}, ("anger",))), Pair(Example("2", {"text": "b"}, ()))]
    rows, _ = several.train_rows(pairs, with_source=False)
    assert [row["labels"] for row in rows] == [[0.0, 1.0], [0.0, 0.0]]
    assert several.model_options["problem_type"] == "multi_label_classification"
    assert several.predictions(torch.tensor([[0.1, 2.0], [-1.0, 0.0]]), pairs) == [("joy", "anger"), ()]

    number = make_form(get_task("regression"), tokenizer, "encoder")
    rows, _ = number.train_rows([Pair(Example("1", {"text": "a"}, 2.5))], with_source=False)
    assert rows[0]["labels"] == 2.5
    assert (number.model_options["problem_type"], number.model_options["num_labels"]) == ("regression", 1)
    assert number.predictions(np.array([[0.25], [0.25]]), pairs) == [0.25, 0.25]
    assert "all 2 predictions are equal (about 0.25)" in number.prediction_notes([0.25, 0.25])[0]


@pytest.mark.parametrize("kind", ["token-classification", "multi-label", "regression"])
def test_kinds_that_generated_text_cannot_answer_need_a_head(kind):
    with pytest.raises(
        UserError, match=rf"task {kind} \({kind}\) needs a model with a head.*--form encoder \(AutoModelFor"
    ):
        make_form(get_task(kind), byte_tokenizer(), "causal")


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_entity_scores_equal_values_computed_by_hand():
    pytest.importorskip("seqeval.metrics", exc_type=ImportError)
    task = get_task("token-classification", labels=TAGS)
    truth = [Example("1", label=("B-PER", "I-PER", "O", "B-LOC")), Example("2", label=("B-LOC", "O"))]
    predictions = [("B-PER", "I-PER", "O", "O"), ("B-LOC", "I-LOC")]
    # one entity is correct, two are predicted, and three are true
    assert score_of(task, predictions, truth) == pytest.approx(
        {"entity_f1": 40.0, "entity_precision": 50.0, "entity_recall": 100 / 3}
    )


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("token-classification", "seqeval"),
        ("classification", "scikit-learn"),
        ("multi-label", "scikit-learn"),
        ("regression", "scipy"),
    ],
)
def test_a_missing_metric_package_is_named_with_its_install_command(monkeypatch, kind, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        score_of(get_task(kind), ["x"], [Example("1", label="x")])
    with pytest.raises(UserError, match=f"pip install {package}"):
        task_of(Settings(task=kind))  # this error comes before training
    assert score_of(get_task("qa"), ["x"], [Example("1", answers=(Answer("x"),))])["f1"] == 100, (
        "QA metrics need no package"
    )


def test_multi_label_f1_equals_values_computed_by_hand():
    task = get_task("multi-label", labels=["a", "b", "c"])
    truth = [Example("1", label=("a",)), Example("2", label=("a", "b")), Example("3", label=())]
    predictions = [("a", "b"), ("a",), ("c",)]
    # a: 2 correct, 2 predicted, 2 true. b: 0 correct, 1 predicted, 1 true. c: 0 correct, 1 predicted, 0 true.
    # In total: 2 correct, 4 predicted, 3 true.
    assert score_of(task, predictions, truth) == pytest.approx({"micro_f1": 100 * 4 / 7, "macro_f1": 100 / 3})


def test_correlations_equal_values_computed_by_hand():
    assert metrics.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(100)
    assert metrics.pearson([1, 2, 4], [3, 1, 2]) == pytest.approx(100 * -1 / math.sqrt(14 / 3 * 2))
    assert metrics.spearman([1, 10, 100, 1000], [0.1, 0.2, 0.4, 0.3]) == pytest.approx(80)
    assert metrics.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(100 * 1.5 / math.sqrt(1.5 * 2))  # ranks 1.5, 1.5, 3
    assert metrics.pearson([1, 1], [1, 2]) == 0


def test_a_number_is_read_from_a_csv_file(tmp_path):
    write_csv(tmp_path / "english" / "test.csv", [["1", "t", "-0.5"]], ["id", "text", "label"])
    assert read_split(get_task("regression"), tmp_path, "english", "test")[0].label == -0.5
