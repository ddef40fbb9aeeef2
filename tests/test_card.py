"""The model card: save_pretrained fills it in, rewrites its own unedited card, and never replaces a user's card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import ModelCard

import flare
from flare.baselines import x_mixup
from flare.experiments.runs.adapter_card import fill_run_card


def saved(folder, family: str = "bert", **fields) -> str:
    """Save a new adapter and return the text of its card."""
    flare.fast_lora(tiny.model(family), r=4, **fields).save_pretrained(folder)
    return (folder / "README.md").read_text()


def test_card_describes_loading_and_inputs(tmp_path):
    card = saved(tmp_path, fusion="mul", source_layer_offset=0)
    assert "[More Information Needed]" not in card
    for words in (
        "import flare  # registers",
        "KeyError",
        "A source is needed at prediction time",
        "AutoModelForSequenceClassification",
        "| fusion | `mul`: S * T |",
        "| source_layer_offset | 0: block i fuses with the source's input",
        "source_input_ids=...",
        "- flare-kernels ",
        "- transformers ",
    ):
        assert words in card, words
    assert ModelCard(card).data.library_name == "peft" and "flare" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("make", "words", "absent"),
    [
        (lambda: flare.fast_lora(tiny.model("bert"), r=4, latent_dim=8), "source_states=...", "source_input_ids"),
        (lambda: flare.fast_lora(tiny.model("llama"), r=4, fusion=None), "reads only the input text", "source"),
        (lambda: x_mixup(tiny.model("bert"), r=4), "An X-Mixup adapter", "A FLARE adapter"),
    ],
    ids=["flare-mt", "lora", "x-mixup"],
)
def test_card_describes_the_kind_of_adapter(tmp_path, make, words, absent):
    make().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert words in card and absent not in card


def test_card_is_rewritten_until_it_is_edited(tmp_path):
    saved(tmp_path, fusion="add")
    card = saved(tmp_path, fusion="mul")
    assert "`mul`" in card and "`add`" not in card and card == saved(tmp_path, fusion="mul")
    edited = card.replace("THIS_FOLDER", "my/adapter") + "\nTrained on my data.\n"
    (tmp_path / "README.md").write_text(edited)
    again = saved(tmp_path, fusion="add")
    assert ModelCard(again).text.strip() == ModelCard(edited).text.strip()  # PEFT writes the front matter


def test_second_adapter_does_not_replace_the_first_card(tmp_path):
    model = flare.fast_lora(tiny.model("bert"), r=4, adapter_name="one")
    model.add_adapter("two", flare.FlareConfig(r=8, fusion="mul", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "`add_relu`" in card and "`mul`" not in card


def test_card_of_a_run_has_task_and_languages(tmp_path):
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
