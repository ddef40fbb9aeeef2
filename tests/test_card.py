"""The model card: filled in by save_pretrained, written again as long as nobody edited it, and never over a user's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import ModelCard

import flare
from flare.baselines import x_mixup
from flare.experiments.runs.adapter_card import fill_run_card


def saved(folder, family: str = "bert", **fields) -> str:
    flare.fast_lora(tiny.model(family), r=4, **fields).save_pretrained(folder)
    return (folder / "README.md").read_text()


def test_it_says_how_to_load_and_what_is_needed(tmp_path):
    card = saved(tmp_path, fusion="mul", source_layer_offset=0)
    assert "[More Information Needed]" not in card
    for words in (
        "import flare  # registers",
        "KeyError",
        "A source is needed at prediction time",
        "AutoModelForSequenceClassification",
        "| fusion | `mul`: S * T |",
        "| source_layer_offset | 0: block i meets the source's input",
        "source_input_ids=...",
        "- flare-kernels ",
        "- transformers ",
    ):
        assert words in card, words
    assert ModelCard(card).data.library_name == "peft" and "flare" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("made", "words", "absent"),
    [
        (lambda: flare.fast_lora(tiny.model("bert"), r=4, latent_dim=8), "source_states=...", "source_input_ids"),
        (lambda: flare.fast_lora(tiny.model("llama"), r=4, fusion=None), "reads the text alone", "source"),
        (lambda: x_mixup(tiny.model("bert"), r=4), "An X-Mixup adapter", "A FLARE adapter"),
    ],
    ids=["flare-mt", "lora", "x-mixup"],
)
def test_each_kind_has_its_own_words(tmp_path, made, words, absent):
    made().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert words in card and absent not in card


def test_it_follows_the_adapter_until_it_is_edited(tmp_path):
    saved(tmp_path, fusion="add")
    card = saved(tmp_path, fusion="mul")
    assert "`mul`" in card and "`add`" not in card and card == saved(tmp_path, fusion="mul")
    edited = card.replace("THIS_FOLDER", "my/adapter") + "\nTrained on my data.\n"
    (tmp_path / "README.md").write_text(edited)
    again = saved(tmp_path, fusion="add")
    assert ModelCard(again).text.strip() == ModelCard(edited).text.strip()  # PEFT writes the front matter


def test_a_second_adapter_does_not_replace_the_first_s_card(tmp_path):
    model = flare.fast_lora(tiny.model("bert"), r=4, adapter_name="one")
    model.add_adapter("two", flare.FlareConfig(r=8, fusion="mul", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "`add_relu`" in card and "`mul`" not in card


def test_a_run_adds_its_task_and_languages(tmp_path):
    model = flare.fast_lora(tiny.model("bert"), r=4)
    model.save_pretrained(tmp_path)
    record = SimpleNamespace(
        task="nusax",
        method="flare",
        target_language="acehnese",
        source_language="english",
        source_text="mt",
        settings={"labels": ["bad", "good"], "max_length": 48},
    )
    fill_run_card(tmp_path, model, record)
    card = (tmp_path / "README.md").read_text()
    assert "| languages | acehnese, with its source in english |" in card
    assert "| source text in training | machine-translated |" in card and "bad, good" in card
    assert ModelCard(card).data.language == ["ace", "eng"]
