"""Tests of the tasks whose data are on the hub, with fake data sets that have the hub's columns and feature types."""

from __future__ import annotations

import re
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Sequence, Value
from small_tasks import word_tokenizer, write_csv

from flare.cli import main
from flare.experiments.runs.defaults import ModelKind, paper_recipe
from flare.experiments.tasks import (
    DATA_SETS,
    TASKS,
    DataError,
    Example,
    Pair,
    get_task,
    has_split,
    language,
    load_pairs,
    make_form,
    nllb_code,
    read_split,
)
from flare.experiments.tasks.reading import all_targets
from flare.experiments.utils.errors import UserError

TEXT, NUMBER = Value("string"), Value("int64")
NLI = ClassLabel(names=["entailment", "neutral", "contradiction"])
SENTIMENT = ClassLabel(names=["negative", "neutral", "positive"])
TOPICS = ["business", "entertainment", "health", "politics", "religion", "sports", "technology"]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-DATE", "I-DATE"]
CONLL_TAGS = [*TAGS[:7], "B-MISC", "I-MISC"]
WORDS = {"id": TEXT, "tokens": Sequence(TEXT)}

#: Features of each data set by its hub id, in the order that the data set has on the hub.
HUB: dict[str, dict[str, Any]] = {
    "indonlp/NusaX-senti": {"id": TEXT, "text": TEXT, "lang": TEXT, "label": SENTIMENT},
    "facebook/xnli": {"premise": TEXT, "hypothesis": TEXT, "label": NLI},
    "Davlan/sib200": {"index_id": NUMBER, "category": TEXT, "text": TEXT},
    "masakhane/masakhanews": {
        "label": ClassLabel(names=TOPICS),
        "headline": TEXT,
        "text": TEXT,
        "headline_text": TEXT,
        "url": TEXT,
    },
    "masakhane/afrixnli": {"premise": TEXT, "hypothesis": TEXT, "label": NLI},
    "facebook/belebele": {
        "link": TEXT,
        "question_number": NUMBER,
        "flores_passage": TEXT,
        "question": TEXT,
        **{f"mc_answer{i}": TEXT for i in (1, 2, 3, 4)},
        "correct_answer_num": TEXT,
        "dialect": TEXT,
        "ds": Value("timestamp[s]"),
    },
    "masakhane/masakhaner2": {**WORDS, "ner_tags": Sequence(ClassLabel(names=TAGS))},
    "eriktks/conll2003": {
        **WORDS,
        "pos_tags": Sequence(NUMBER),
        "chunk_tags": Sequence(NUMBER),
        "ner_tags": Sequence(ClassLabel(names=CONLL_TAGS)),
    },
}
SPLITS = {"masakhane/afrixnli": {"validation", "test"}, "facebook/belebele": {"test"}}


def row_of(hub_id: str, configuration: str, number: int) -> dict[str, Any]:
    """Return one row of a fake data set. Texts without a fixed value name their column, configuration and row."""

    def value(name: str, feature: Any) -> Any:
        fixed = {"category": "travel", "correct_answer_num": "3", "index_id": number + 100, "link": "https://w/1"}
        fixed |= {"question_number": number + 1, "ds": 0, "id": str(number)}
        if name in fixed:
            return fixed[name]
        if isinstance(feature, ClassLabel):
            return 2
        if name == "tokens":
            return [configuration, "Mandela", "ran"]
        if name.endswith("_tags"):
            return [0, 1, 7]
        return f"{name} {configuration} {number}"

    return {name: value(name, feature) for name, feature in HUB[hub_id].items()}


@pytest.fixture
def hub(monkeypatch) -> list[tuple[str, str, str]]:
    """Replace datasets.load_dataset by the fakes; return the list of its calls."""
    calls = []

    def load_dataset(hub_id: str, configuration: str, split: str, **_: Any) -> datasets.Dataset:
        calls.append((hub_id, configuration, split))
        if split not in SPLITS.get(hub_id, {"train", "validation", "test"}):
            raise ValueError(f"Unknown split {split!r}")
        rows = [row_of(hub_id, configuration, number) for number in range(2)]
        return datasets.Dataset.from_list(rows, features=Features(HUB[hub_id]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def raises_text(kind: type[Exception], text: str):
    return pytest.raises(kind, match=re.escape(text))


def second_row(task: str, name: str, split: str = "test") -> Example:
    return read_split(get_task(task), None, name, split)[1]


def test_rows_of_classification_data_sets_are_read(hub):
    assert second_row("sib200", "acehnese", "train") == Example("101", {"text": "text ace_Latn 1"}, "travel")
    assert second_row("sib200", "min_Arab").texts == {"text": "text min_Arab 1"}, (
        "a tag of FLORES-200 that NLLB does not have"
    )
    assert second_row("masakhanews", "swahili", "valid") == Example(
        "#1", {"headline": "headline swa 1", "text": "text swa 1"}, "health"
    )
    assert second_row("afrixnli", "oromo") == Example(
        "#1", {"premise": "premise orm 1", "hypothesis": "hypothesis orm 1"}, "contradiction"
    )
    assert (
        second_row("nusax", "madurese").texts == {"text": "text mad 1"}
        and second_row("xnli", "chinese").label == "contradiction"
    )
    assert hub[-1] == ("facebook/xnli", "zh", "test")


def test_rows_of_multiple_choice_and_token_classification_are_read(hub):
    example = second_row("belebele", "yoruba")
    assert example.id == "https://w/1-2" and example.label == "C"
    assert list(example.texts) == ["flores_passage", "question", *(f"mc_answer{i}" for i in (1, 2, 3, 4))]
    assert example.texts["mc_answer3"] == "mc_answer3 yor_Latn 1"
    example = second_row("masakhaner2", "kiswahili", "train")
    assert example == Example(
        "1", {"tokens": "swa Mandela ran"}, ("O", "B-PER", "B-DATE"), (), ("swa", "Mandela", "ran")
    )


def test_english_rows_can_come_from_another_data_set(hub):
    assert second_row("afrixnli", "english", "train").texts["premise"] == "premise en 1"
    assert second_row("afrixnli", "english", "test").texts["premise"] == "premise eng 1"
    conll = second_row("masakhaner2", "english", "train")
    assert conll.label == ("O", "B-PER", "O"), "the tags of type MISC become O"
    assert hub == [
        ("facebook/xnli", "en", "train"),
        ("masakhane/afrixnli", "eng", "test"),
        ("eriktks/conll2003", "conll2003", "train"),
    ]
    notes = load_pairs(get_task("afrixnli"), None, "english", "english", "train", source_text=None)[1]
    assert notes == ["train: English rows come from XNLI (facebook/xnli)"]
    notes = load_pairs(get_task("afrixnli"), None, "english", "hausa", "test")[1]
    assert notes == ["test: hausa and english are aligned by position: they have no id column in common"]


def test_missing_splits_are_errors(hub):
    with raises_text(DataError, "masakhane/afrixnli has no train split, only valid, test: translate the English rows"):
        second_row("afrixnli", "hausa", "train")
    with raises_text(DataError, "facebook/belebele has no train split, only test: put your own rows"):
        second_row("belebele", "english", "train")
    assert not has_split(get_task("belebele"), None, "english", "valid") and has_split(
        get_task("sib200"), None, "en", "valid"
    )


@pytest.mark.parametrize("task", ["masakhanews", "masakhaner2", "tydiqa"])
def test_languages_that_are_not_parallel_are_not_paired(hub, task):
    """MasakhaNER 2 numbers the rows of every language from 0, so pairing by id would seem to work."""
    with raises_text(
        DataError, "its yoruba and english rows are not translations of each other. Use machine-translated text"
    ):
        load_pairs(get_task(task), None, "english", "yoruba", "train")


def test_every_language_is_in_the_table(hub):
    """Every language of the data sets is in the language table; three languages have no NLLB tag."""
    lacking = set()
    for data in DATA_SETS.values():
        for code in data.codes or ():
            assert data.configuration(language(code).name) == code
            if language(code).nllb is None:
                lacking.add(code)
                with raises_text(UserError, f"NLLB has no {language(code).name}"):
                    nllb_code(code)
    assert lacking == {"bbc", "bbj", "pcm"}
    assert [nllb_code(code) for code in ("orm", "lug", "twi", "nya", "zul")] == [
        *("gaz_Latn", "lug_Latn", "twi_Latn", "nya_Latn", "zul_Latn")
    ]
    assert {task.hub_id for task in TASKS.values() if task.hub_id} == set(DATA_SETS)
    with raises_text(UserError, "masakhane/masakhanews has no Wolof; it has Amharic (amh), English (eng), "):
        second_row("masakhanews", "wolof")
    with raises_text(UserError, "Davlan/sib200 names its languages by FLORES-200 tags, and Madurese has no tag"):
        second_row("sib200", "madurese")


def test_tasks_have_their_metrics_lengths_and_learning_rates():
    first = {name: (TASKS[name].metrics[0], TASKS[name].max_length) for name in TASKS if TASKS[name].hub_id}
    assert first == {
        "nusax": ("macro_f1", 128),
        "xnli": ("accuracy", 128),
        "tydiqa": ("exact_match", 512),
        "sib200": ("accuracy", 128),
        "masakhanews": ("macro_f1", 256),
        "afrixnli": ("accuracy", 128),
        "belebele": ("accuracy", 512),
        "masakhaner2": ("entity_f1", 128),
    }
    rates = {
        name: paper_recipe(ModelKind("encoder", "xlm-roberta"), name).training["learning_rate"]
        for name in ("afrixnli", "sib200", "masakhaner2")
    }
    assert rates == {"afrixnli": 2e-5, "sib200": 2e-4, "masakhaner2": 2e-4}


@pytest.mark.parametrize("task", ["sib200", "masakhanews", "afrixnli", "belebele", "masakhaner2"])
def test_forms_accept_the_rows(hub, task):
    """A form accepts the rows of each data set, both as target and as source."""
    if task == "masakhaner2":
        pytest.importorskip("seqeval")
    definition = get_task(task)
    rows = read_split(definition, None, "yoruba", "test")
    form = make_form(definition, word_tokenizer("text yor Mandela ran"), "encoder")
    model_rows, _ = form.train_rows([Pair(row, row) for row in rows], with_source=True)
    assert len(model_rows) == 2 and {"input_ids", "source_input_ids", "labels"} <= set(model_rows[0])


def test_target_all_selects_the_languages_of_the_data(hub, tmp_path):
    targets, notes = all_targets(get_task("nusax"), None, "english")
    assert len(targets) == 10 and "toba_batak" not in targets and "madurese" in targets
    assert notes[0] == "--target all leaves out languages without an NLLB tag: toba_batak"
    assert len(all_targets(get_task("xnli"), None, "english")[0]) == 14
    assert len(all_targets(get_task("tydiqa"), None, "english")[0]) == 8
    with raises_text(UserError, "--target all: Davlan/sib200 has 205 languages; name the languages you want"):
        all_targets(get_task("sib200"), None, "english")
    for name in ("english", "ace", "ban"):
        write_csv(tmp_path / name / "test.csv", [], ("id",))
    (tmp_path / "english-ace").mkdir()
    assert all_targets(get_task("nusax"), tmp_path, "english")[0] == ["ace", "ban"]
    with raises_text(UserError, "has no language except english"):
        all_targets(get_task("nusax"), tmp_path / "ban", "english")


def test_help_lists_the_data_sets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for task in TASKS.values():
        if task.hub_id:
            assert f"{task.name} {task.hub_id}: {', '.join(task.text_columns)} -> " in shown
    assert "masakhaner2: tokens -> ner_tags; entity_f1; train, valid, test; English train, valid, test from" in shown
    assert "eriktks/conll2003; languages are not translations of each other; bam bbj" in shown
    assert "correct_answer_num; accuracy; test; 122 languages, named by FLORES-200's tags" in shown
