"""Test FLARE on multiple choice: each choice is fused with the source text of the same choice."""

import pytest
import tiny
import torch
import transformers

import flare


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = transformers.BertForMultipleChoice(tiny.config("bert", hidden_dropout_prob=0.0))
    fused = flare.fast_lora(base, r=4).eval()
    tiny.randomize_lora(fused)
    return fused


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    # target and source texts of B=2 rows, n=3 choices, m=7 positions
    ids = torch.randint(2, tiny.VOCAB, (2, 2, 3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 1, 2, 5:] = mask[1, 0, 1, 4:] = 0
    return {
        "input_ids": ids[0],
        "attention_mask": mask[0],
        "source_input_ids": ids[1],
        "source_attention_mask": mask[1],
    }


def one_by_one(model, batch):
    """Return logits (2, 3) of the same texts, run as six rows with one choice each."""
    rows = {name: value.flatten(0, 1)[:, None] for name, value in batch.items()}
    return model(**rows).logits.view(2, 3)


def test_each_choice_is_fused_with_its_source(model, batch):
    logits = model(**batch).logits
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, one_by_one(model, batch))
    swapped = {**batch, "source_input_ids": batch["source_input_ids"].flip(1)}
    assert not torch.allclose(model(**swapped).logits, logits)
    without_masks = {name: value for name, value in batch.items() if not name.endswith("mask")}
    torch.testing.assert_close(model(**without_masks).logits, one_by_one(model, without_masks))


def test_multiple_choice_head_is_trainable_and_the_cache_is_used(model, batch):
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("classifier" in name for name in trained)
    expected = model(**batch).logits
    cache = flare.SourceStateCache(10**8, tiers=("host",))
    model.set_source_cache(cache)
    try:
        for _ in range(2):  # first with a cold cache, then with a warm one
            torch.testing.assert_close(model(**batch).logits, expected)
        assert cache.stats().hits == 6, "the second pass reads every choice of both rows from the cache"
    finally:
        model.set_source_cache(None)


def test_a_source_with_one_text_per_row_raises(model, batch):
    one = {**batch, "source_input_ids": batch["source_input_ids"][:, 0]}
    with pytest.raises(ValueError, match=r"source_input_ids is \(2, 7\): with input_ids \(B, n, m\)"):
        model(**one)


def test_rows_with_different_numbers_of_choices_raise():
    rows = [{"input_ids": [[1, 2], [1, 3]]}, {"input_ids": [[1, 2]]}]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="<pad>")
    with pytest.raises(ValueError, match="different numbers of choices \\(1, 2"):
        flare.FlareDataCollator(tokenizer, require_source=False)(rows)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
