"""Test that rows and tokenizers that do not fit the model are reported, for the target and the source."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import small_tasks
import tiny
import transformers
from datasets import Dataset
from experiment_data import write_bert, write_data
from trained import arguments, flare_model
from two_streams import rows, tokenizer

from flare.cli import main
from flare.training.collator import FlareDataCollator
from flare.training.row_checks import broken_by, vocabulary_of, wrong_tokenizer
from flare.training.trainer import FlareTrainer


def train(folder: Path, data: list[dict], **options) -> None:
    FlareTrainer(
        flare_model("bert"), arguments(folder, max_steps=1), train_dataset=Dataset.from_list(data), **options
    ).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_input_ids": []}, "row 0: source_input_ids is empty; leave such rows out"),
        ({"input_ids": []}, "row 0: input_ids is empty"),
        ({"source_input_ids": "a text"}, "row 0: source_input_ids must be a list of token ids, got 'a text'"),
        ({"source_input_ids": ["a", "text"]}, "source_input_ids must be a list of token ids"),
        ({"labels": "positive"}, "row 0: labels is the text 'positive', and models are trained on numbers"),
        ({"source_input_ids": [1, 10**6]}, "row 0: source_input_ids holds the id 1000000, and the model's vocab"),
        ({"input_ids": [1, 10**6]}, "row 0: input_ids holds the id 1000000"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_rows_raise(tmp_path, change, message):
    row = {"input_ids": [1, 2], "source_input_ids": [2, 3], "labels": 0, **change}
    with pytest.raises(ValueError) as error:
        train(tmp_path, [row], processing_class=tokenizer())
    assert message in str(error.value), error.value
    if "labels" in change:
        for name in ("label", "labels"):
            with pytest.raises(ValueError, match="label2id"):
                FlareDataCollator(tokenizer())([{**row, name: "positive"}])


def test_a_trainer_without_a_tokenizer_accepts_only_rows_of_one_length(tmp_path):
    ragged = [{"input_ids": [5] * n, "source_input_ids": [6] * n, "labels": 0} for n in (2, 3, 4, 5)]
    with pytest.raises(ValueError, match="pass processing_class=tokenizer to FlareTrainer"):
        train(tmp_path, ragged)
    with pytest.raises(ValueError, match="label2id"):
        train(tmp_path, [{**row, "labels": "positive"} for row in ragged])
    train(tmp_path, [{**row, "input_ids": [5, 6], "source_input_ids": [6, 7]} for row in ragged])  # all of one length


def test_a_tokenizer_of_another_model_warns(tmp_path):
    model = flare_model("bert")
    assert vocabulary_of(model) == model.config.vocab_size
    word_tokenizer = tokenizer()
    model.config.pad_token_id = word_tokenizer.pad_token_id
    assert wrong_tokenizer(word_tokenizer, model) is None
    model.config.eos_token_id, word_tokenizer.eos_token = (
        [word_tokenizer.pad_token_id, word_tokenizer.unk_token_id],
        word_tokenizer.unk_token,
    )
    assert wrong_tokenizer(word_tokenizer, model) is None, (
        "eos_token_id may be a list; the tokenizer's end token must be in it"
    )
    model.config.pad_token_id = word_tokenizer.pad_token_id + 1
    with pytest.warns(UserWarning, match=r"has pad_token_id \d+ \(the model has \d+\), so it may belong to"):
        FlareTrainer(model, arguments(tmp_path), processing_class=word_tokenizer)
    word_tokenizer.add_special_tokens({"pad_token": "<new>"})
    while len(word_tokenizer) <= model.config.vocab_size:
        word_tokenizer.add_special_tokens({"pad_token": f"<new {len(word_tokenizer)}>"})
    with pytest.warns(UserWarning, match=r"pad_token_id \d+, and the model.s vocabulary has .*resize_token_embeddings"):
        FlareTrainer(model, arguments(tmp_path), processing_class=word_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        good = rows("bert", 4)
        assert FlareDataCollator(tokenizer(), vocab_size=vocabulary_of(model))(good)["input_ids"].shape[0] == 4


@pytest.mark.parametrize(("family", "kind"), [("xlmr", "pad"), ("llama", "eos"), ("mt5", "eos")])
def test_special_tokens_that_change_results_are_reported(family, kind):
    """A pad token can shift the model's positions. A model does not stop at the end token of another tokenizer."""
    model, word_tokenizer = tiny.model(family), tokenizer()
    for name in ("pad", "eos"):
        token_id = getattr(model.config, f"{name}_token_id") or 0
        setattr(word_tokenizer, f"{name}_token", word_tokenizer.convert_ids_to_tokens(token_id))
    assert broken_by(word_tokenizer, model) is None
    setattr(
        word_tokenizer,
        f"{kind}_token",
        word_tokenizer.convert_ids_to_tokens(getattr(model.config, f"{kind}_token_id") + 1),
    )
    assert f"belongs to another model: its {kind}_token_id is" in str(broken_by(word_tokenizer, model))
    if kind == "eos":
        model.generation_config.eos_token_id = [word_tokenizer.eos_token_id]
        assert broken_by(word_tokenizer, model) is None and "eos" not in str(wrong_tokenizer(word_tokenizer, model))
    bert = tiny.model("bert")
    bert.config.eos_token_id = 0
    assert broken_by(word_tokenizer, bert) is None, "BERT masks padding, counts positions from 0, and does not generate"


def test_a_source_from_another_tokenizer_warns():
    word_tokenizer = small_tasks.word_tokenizer("a b c d")
    first = word_tokenizer("a")["input_ids"][0]
    good = {"input_ids": word_tokenizer("a b")["input_ids"], "source_input_ids": word_tokenizer("c d")["input_ids"]}
    collate = FlareDataCollator(word_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([good, {**good, "input_ids": [4, 5]}])  # a target without special tokens does not cause a warning
    with pytest.warns(UserWarning, match=rf"row 1: input_ids begins with the special token {first}, and source_"):
        collate([good, {**good, "source_input_ids": [5, 6]}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([{**good, "source_input_ids": [5, 6]}])  # warned only once


def test_a_model_folder_with_another_models_tokenizer_is_refused(tmp_path, capsys):
    write_data(tmp_path / "data")
    write_bert(tmp_path / "bert")
    large = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    large.add_tokens([f"word{i}" for i in range(3)])
    shutil.copytree(tmp_path / "bert", tmp_path / "odd")
    large.save_pretrained(tmp_path / "odd")
    words = ("finetune", "--task", "classification", "--model", tmp_path / "odd", "--data", tmp_path / "data")
    more = ("--output", tmp_path / "runs", "--max-length", "24", "--no-progress", "--rows", "8")
    assert main([str(word) for word in (*words, *more)]) == 2
    assert "so it belongs to another model" in capsys.readouterr().err
