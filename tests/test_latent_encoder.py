"""Test flare.LatentEncoder, which runs the encoder of a translation model. FLARE MT reads its states as the source."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from two_streams import tokenizer

import flare

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghij"]
TEXTS = ["ab cd", "e", "fgh ij a"]


def nllb_tokenizer() -> Any:
    return transformers.NllbTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)},
        merges=[],
        src_lang="eng_Latn",
        additional_special_tokens=["eng_Latn", "ace_Latn"],
    )


def m2m100(task: str = "ForConditionalGeneration") -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "max_position_embeddings": 32, "vocab_size": 18, "pad_token_id": 1}
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_layers": 2, f"{stack}_attention_heads": 2, f"{stack}_ffn_dim": 16}
    return getattr(transformers, f"M2M100{task}")(transformers.M2M100Config(**sizes))


@pytest.fixture
def mt() -> flare.LatentEncoder:
    return flare.LatentEncoder(m2m100(), nllb_tokenizer(), language="ace_Latn")


def states_by_hand(mt: flare.LatentEncoder, text: str, model: Any) -> torch.Tensor:
    """Return the states (length, 16) of one text. Language tag and end token are added by hand."""
    tag, end = mt.tokenizer.convert_tokens_to_ids(["ace_Latn", "</s>"])
    words = mt.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model.get_encoder()(input_ids=torch.tensor([[tag, *words, end]])).last_hidden_state[0]


def test_states_in_a_batch_equal_the_states_of_each_text_alone(mt) -> None:
    assert mt.latent_dim == 16
    model = m2m100().eval()
    expected = [states_by_hand(mt, text, model) for text in TEXTS]
    for side in ("right", "left"):
        actual = mt(TEXTS, length=14, padding_side=side)
        assert actual["source_states"].shape == (3, 14, 16) and actual["source_attention_mask"].shape == (3, 14)
        for states, mask, expected_states in zip(*actual.values(), expected, strict=True):
            assert mask.sum() == len(expected_states) and mask[0 if side == "right" else -1] == 1
            torch.testing.assert_close(states[mask.bool()], expected_states)
            assert not states[~mask.bool()].any()
    rows = mt.rows(TEXTS)["source_states"]
    for row, expected_states in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(row), expected_states)
    cut = mt(TEXTS, length=4)["source_attention_mask"]
    assert cut.shape == (3, 4) and not mt.encoder.training
    assert mt.tokenizer.src_lang == "eng_Latn", "the tokenizer keeps its own language tag"
    other = flare.LatentEncoder(m2m100(), nllb_tokenizer(), language="eng_Latn")(TEXTS, length=14)
    assert not torch.allclose(other["source_states"][0], actual["source_states"][0], atol=1e-3)


def test_the_encoder_loads_by_name_and_may_be_an_encoder_only_model(tmp_path) -> None:
    m2m100().save_pretrained(tmp_path)
    nllb_tokenizer().save_pretrained(tmp_path)
    by_name = flare.LatentEncoder(str(tmp_path), language="ace_Latn")
    from_objects = flare.LatentEncoder(m2m100(), nllb_tokenizer(), language="ace_Latn")
    torch.testing.assert_close(by_name(TEXTS)["source_states"], from_objects(TEXTS)["source_states"])
    bert = tiny.model("bert").eval()
    encoder = flare.LatentEncoder(bert, tokenizer())
    texts = ["w5 w6 w7", "w8"]
    ids = tokenizer()(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = bert.bert(ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
    actual = encoder(texts)
    torch.testing.assert_close(actual["source_states"], expected * ids["attention_mask"].unsqueeze(-1))


@pytest.mark.parametrize("layout", ["encoder", "causal"])
def test_rows_are_collated_to_one_length_and_train_the_projection(layout, mt, tmp_path) -> None:
    """Target texts and source states are padded to one length.

    For "encoder", the result of a row must not depend on the other rows of its batch.
    """
    target_tokenizer = tokenizer()
    words = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [21]]
    data: dict[str, list] = {"input_ids": words, **mt.rows(TEXTS)}
    data["labels"] = [0, 1, 2] if layout == "encoder" else [[-100] * (len(w) - 1) + w[-1:] for w in words]
    collator = flare.FlareDataCollator(target_tokenizer, layout=layout)
    rows = list(Dataset.from_dict(data))
    batch = collator(rows)
    m = batch["input_ids"].shape[1]
    assert batch["source_states"].shape == (3, m, 16) and "source_input_ids" not in batch
    for row, (states, mask) in enumerate(zip(batch["source_states"], batch["source_attention_mask"], strict=True)):
        torch.testing.assert_close(states[mask.bool()], torch.as_tensor(data["source_states"][row]))
        assert not states[~mask.bool()].any()
    model = flare.fast_lora(tiny.model("bert" if layout == "encoder" else "llama"), r=4, latent_dim=mt.latent_dim)
    tiny.randomize_lora(model)
    if layout == "encoder":
        together = model(**batch).logits
        for index, row in enumerate(rows):
            torch.testing.assert_close(model(**collator([row])).logits[0], together[index], rtol=1e-5, atol=1e-6)
    model(**batch).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "latent_proj" in name)


def test_wrong_arguments_are_refused(mt) -> None:
    cases = [
        ({"language": "xx_Latn"}, r"language='xx_Latn': NllbTokenizer has no such tag"),
        ({}, r"language is missing: NllbTokenizer writes a language tag \(now 'eng_Latn'\)"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            flare.LatentEncoder(m2m100(), nllb_tokenizer(), **options)
    with pytest.raises(ValueError, match="writes no language tag; leave it out"):
        flare.LatentEncoder(tiny.model("bert"), tokenizer(), language="ace_Latn")
    with pytest.raises(ValueError, match="tokenizer is missing"):
        flare.LatentEncoder(m2m100())
    with pytest.raises(TypeError, match="texts must be a list of strings"):
        mt("ab")
    with pytest.raises(ValueError, match="padding_side='both'"):
        mt(TEXTS, padding_side="both")
    rows = [{"input_ids": [5], "source_states": torch.zeros(1, d)} for d in (3, 4)]
    with pytest.raises(ValueError, match=r"source_states have different widths: \[3, 4\]"):
        flare.FlareDataCollator(tokenizer())(rows)


def test_states_above_the_memory_limit_are_read_from_an_unnamed_file(mt, tmp_path, monkeypatch) -> None:
    from flare.experiments.runs import latent_rows

    texts = [" ".join(TEXTS[: 1 + index % 3]) for index in range(40)]
    rows = [{"labels": index} for index in range(40)]
    rows_in_memory = latent_rows.add_states(rows, texts, mt, tmp_path / "run", None)
    monkeypatch.setattr(latent_rows, "IN_MEMORY", rows_in_memory[0]["source_states"].nbytes)
    before = len(os.listdir("/proc/self/fd"))
    rows_from_file = latent_rows.add_states(rows, texts, mt, tmp_path / "run", None)
    assert len(os.listdir("/proc/self/fd")) <= before + 1 and not list((tmp_path / "run").iterdir())
    for row, expected in zip(rows_from_file, rows_in_memory, strict=True):
        assert row["labels"] == expected["labels"] and (row["source_states"] == expected["source_states"]).all()
    assert flare.FlareDataCollator(tokenizer())([{"input_ids": [5, 6, 7], **rows_from_file[1]}])["source_states"].any()
