"""Test FlareDataCollator: both texts have one width, causal answers start at one index, and invalid input raises."""

from __future__ import annotations

import pytest
import torch
from two_streams import BOS, CLS, PAD, SEP, rows, task_model, tokenizer

from flare.training.collator import FlareDataCollator, layout_of

A, B, C, D, E, F, G, H = range(10, 18)  # names of word ids


def classes() -> list[dict]:
    return [
        {"input_ids": [CLS, A, SEP], "source_input_ids": [CLS, B, C, D, SEP], "labels": 2},
        {"input_ids": [CLS, E, F, SEP], "source_input_ids": [CLS, G, SEP], "labels": 0},
    ]


# --- encoder ----------------------------------------------------------------------------------------------------------


def test_both_texts_are_padded_to_the_longest_text_of_the_batch():
    batch = FlareDataCollator(tokenizer())(classes())
    assert batch["input_ids"].tolist() == [[CLS, A, SEP, PAD, PAD], [CLS, E, F, SEP, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["source_input_ids"].tolist() == [[CLS, B, C, D, SEP], [CLS, G, SEP, PAD, PAD]]
    assert batch["source_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_on_the_left_by_tokenizer_or_by_argument():
    for collator in (
        FlareDataCollator(tokenizer("left")),
        FlareDataCollator(tokenizer("right"), padding_side="left"),
    ):
        batch = collator(classes())
        assert batch["input_ids"].tolist() == [[PAD, PAD, CLS, A, SEP], [PAD, CLS, E, F, SEP]]
        assert batch["source_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_width_is_fixed_or_a_multiple():
    fixed = FlareDataCollator(tokenizer(), padding="max_length", max_length=9)(classes())
    rounded = FlareDataCollator(tokenizer(), pad_to_multiple_of=4)(classes())
    for batch, width in ((fixed, 9), (rounded, 8)):
        assert batch["input_ids"].shape == batch["source_input_ids"].shape == (2, width)
        assert batch["source_attention_mask"].sum() == 8


def test_masks_and_token_types_of_the_rows_are_kept():
    examples = classes()
    for row in examples:
        row["attention_mask"] = [1] * (len(row["input_ids"]) - 1) + [0]
        row["source_attention_mask"] = [0] + [1] * (len(row["source_input_ids"]) - 1)
        row["token_type_ids"] = [0] + [1] * (len(row["input_ids"]) - 1)
        row["source_token_type_ids"] = [0, 1] + [0] * (len(row["source_input_ids"]) - 2)
    batch = FlareDataCollator(tokenizer())(examples)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch["source_attention_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert batch["source_token_type_ids"].tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_labels_per_token_are_padded_with_their_tokens():
    examples = [
        {"input_ids": [CLS, A, SEP], "source_input_ids": [CLS, B, C, SEP], "labels": [-100, 2, -100]},
        {"input_ids": [CLS, A, B, SEP], "source_input_ids": [CLS, C, SEP], "labels": [-100, 0, 1, -100]},
    ]
    right = FlareDataCollator(tokenizer("right"))(examples)
    left = FlareDataCollator(tokenizer("left"))(examples)
    assert right["labels"].tolist() == [[-100, 2, -100, -100], [-100, 0, 1, -100]]
    assert left["labels"].tolist() == [[-100, -100, 2, -100], [-100, 0, 1, -100]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_answer_positions_follow_their_tokens(side: str):
    examples = [
        {"input_ids": [CLS, A, B, SEP], "source_input_ids": [CLS] * 7, "start_positions": 1, "end_positions": 2},
        {"input_ids": [CLS, C, A, D, B, SEP], "source_input_ids": [CLS], "start_positions": 2, "end_positions": 4},
    ]
    batch = FlareDataCollator(tokenizer(side))(examples)
    at = torch.arange(2)
    assert (batch["input_ids"][at, batch["start_positions"]] == A).all()
    assert (batch["input_ids"][at, batch["end_positions"]] == B).all()


def test_label_is_renamed_numbers_are_stacked_and_strings_are_dropped():
    examples = [
        {
            "input_ids": torch.tensor([A, B]),
            "source_input_ids": torch.tensor([C]),
            "label": 1,
            "weight": 0.5,
            "text": "x",
        },
        {"input_ids": torch.tensor([A]), "source_input_ids": torch.tensor([C]), "label": 0, "weight": 2.0, "text": "y"},
    ]
    batch = FlareDataCollator(tokenizer())(examples)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["weight"].tolist() == [0.5, 2.0]
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "source_input_ids",
        "source_attention_mask",
        "labels",
        "weight",
    }
    several = FlareDataCollator(tokenizer())([{**row, "labels": [0.0, 1.0]} for row in classes()])
    assert several["labels"].tolist() == [[0.0, 1.0], [0.0, 1.0]]


# --- causal -----------------------------------------------------------------------------------------------------------


def answers() -> list[dict]:
    return [
        {
            "input_ids": [BOS, A, B, C, D],
            "labels": [-100, -100, -100, C, D],
            "source_input_ids": [BOS, E, F, G, H],
            "source_labels": [-100, -100, -100, -100, H],
        },
        {
            "input_ids": [BOS, A, C],
            "labels": [-100, -100, C],
            "source_input_ids": [BOS, E, G, H],
            "source_labels": [-100, -100, G, H],
        },
    ]


def test_causal_answers_start_at_one_index_in_both_texts():
    batch = FlareDataCollator(tokenizer("left"))(answers())
    assert batch["input_ids"].tolist() == [[PAD, BOS, A, B, C, D], [PAD, PAD, BOS, A, C, PAD]]
    assert batch["labels"].tolist() == [[-100] * 4 + [C, D], [-100] * 4 + [C, -100]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]
    assert batch["source_input_ids"].tolist() == [[BOS, E, F, G, H, PAD], [PAD, PAD, BOS, E, G, H]]
    assert batch["source_attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert "source_labels" not in batch


def test_a_causal_source_without_answer_is_masked_at_the_answer():
    examples = [{k: v for k, v in row.items() if k != "source_labels"} for row in answers()]
    for row in examples:
        row["source_input_ids"] = row["source_input_ids"][:2]
    batch = FlareDataCollator(tokenizer("right"))(examples)  # the layout does not depend on the tokenizer's side
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, D], [PAD, BOS, A, C, PAD]]
    assert batch["source_input_ids"].tolist() == [[PAD, BOS, E, PAD, PAD], [PAD, BOS, E, PAD, PAD]]
    assert batch["source_attention_mask"].tolist() == [[0, 1, 1, 0, 0]] * 2


def test_padding_in_causal_rows_is_removed_before_rows_are_padded():
    examples = answers()
    examples[1]["input_ids"] = [PAD, PAD, BOS, A, C]
    examples[1]["labels"] = [-100, -100, -100, -100, C]
    examples[1]["attention_mask"] = [0, 0, 1, 1, 1]
    examples[0]["attention_mask"] = [1] * 5
    assert torch.equal(
        FlareDataCollator(tokenizer())(examples)["input_ids"], FlareDataCollator(tokenizer())(answers())["input_ids"]
    )


def test_causal_text_without_a_prompt_does_not_predict_its_first_token_from_padding():
    examples = [
        {"input_ids": [BOS, A, B], "labels": [BOS, A, B]},
        {"input_ids": [BOS, A, C], "labels": [-100, -100, C]},
    ]
    batch = FlareDataCollator(tokenizer(), require_source=False)(examples)
    assert batch["input_ids"].tolist() == [[PAD, BOS, A, B], [BOS, A, C, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, A, B], [-100, -100, C, -100]]


def test_causal_fixed_width_pads_prompts_on_the_left():
    batch = FlareDataCollator(tokenizer(), padding="max_length", max_length=8)(answers())
    assert batch["input_ids"].tolist()[0] == [PAD, PAD, PAD, BOS, A, B, C, D]
    assert batch["source_input_ids"].tolist()[1] == [PAD, PAD, PAD, PAD, BOS, E, G, H]


def test_causal_rows_without_labels_are_padded_on_the_left():
    examples = [{k: v for k, v in row.items() if "labels" not in k} for row in answers()]
    batch = FlareDataCollator(tokenizer("right"), layout="causal")(examples)
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, D], [PAD, PAD, BOS, A, C]]
    assert batch["source_input_ids"].tolist() == [[BOS, E, F, G, H], [PAD, BOS, E, G, H]]


def test_causal_truncation_cuts_the_start_of_prompts_and_keeps_the_opening_token():
    aligned = FlareDataCollator(tokenizer(), max_length=5)
    with pytest.raises(ValueError, match=r"longest prompt of the batch has 4 .* longest answer 2"):
        aligned(answers())
    batch = FlareDataCollator(tokenizer(), max_length=5, truncation=True)(answers())
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, D], [PAD, BOS, A, C, PAD]]
    assert batch["source_input_ids"].tolist() == [[BOS, F, G, H, PAD], [PAD, BOS, E, G, H]]
    with pytest.raises(ValueError, match=r"row 0: input_ids: the answer alone has 2 tokens and max_length is 1"):
        FlareDataCollator(tokenizer(), max_length=1, truncation=True)(answers())


# --- encoder-decoder --------------------------------------------------------------------------------------------------


def test_seq2seq_labels_have_their_own_width():
    examples = [
        {"input_ids": [A, B, SEP], "source_input_ids": [C, SEP], "labels": [D, SEP], "source_labels": [E, F, G, SEP]},
        {"input_ids": [A, SEP], "source_input_ids": [C, SEP], "labels": [SEP], "source_labels": [SEP]},
    ]
    batch = FlareDataCollator(tokenizer(), layout="seq2seq")(examples)
    assert batch["input_ids"].shape == batch["source_input_ids"].shape == (2, 3)
    assert batch["labels"].tolist() == [[D, SEP, -100, -100], [SEP, -100, -100, -100]]
    assert batch["source_labels"].tolist() == [[E, F, G, SEP], [SEP, -100, -100, -100]]


def test_seq2seq_decoder_inputs_are_padded_with_the_pad_token():
    examples = [
        {"input_ids": [A], "source_input_ids": [C], "labels": [D, E], "source_decoder_input_ids": [PAD, F, G]},
        {"input_ids": [A], "source_input_ids": [C], "labels": [D], "source_decoder_input_ids": [PAD, F]},
    ]
    batch = FlareDataCollator(tokenizer())(examples)
    assert batch["labels"].tolist() == [[D, E, -100], [D, -100, -100]]
    assert batch["source_decoder_input_ids"].tolist() == [[PAD, F, G], [PAD, F, PAD]]


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("bert", "encoder"),
        ("bert-tokens", "encoder"),
        ("llama", "causal"),
        ("llama-classes", "encoder"),
        ("mt5", "seq2seq"),
    ],
)
def test_layout_follows_the_model(family: str, layout: str):
    assert layout_of(task_model(family)) == layout


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "bert-spans", "xlmr", "llama", "llama-classes", "mt5"])
def test_auto_finds_the_layout_of_the_model(family: str):
    examples = rows(family, 6)
    auto = FlareDataCollator(tokenizer())(examples)
    named = FlareDataCollator(tokenizer(), layout=layout_of(task_model(family)))(examples)
    assert auto.keys() == named.keys()
    assert all(torch.equal(auto[name], named[name]) for name in auto)
    assert task_model(family)(**{k: v for k, v in auto.items() if not k.startswith("source_")}).loss.isfinite()


# --- errors -----------------------------------------------------------------------------------------------------------


def without(name: str, index: int | None = None) -> list[dict]:
    return [{k: v for k, v in row.items() if k != name or index not in (None, i)} for i, row in enumerate(classes())]


def test_a_missing_source_raises_unless_require_source_is_false():
    with pytest.raises(ValueError, match=r"no row has the column 'source_input_ids'.*remove_unused_columns"):
        FlareDataCollator(tokenizer())(without("source_input_ids"))
    plain = FlareDataCollator(tokenizer(), require_source=False)(without("source_input_ids"))
    assert set(plain) == {"input_ids", "attention_mask", "labels"}
    for require in (True, False):
        with pytest.raises(ValueError, match=r"row 1 of the batch has no column 'source_input_ids'"):
            FlareDataCollator(tokenizer(), require_source=require)(without("source_input_ids", 1))


def test_latent_states_replace_a_source_text():
    examples = [
        {**row, "source_states": [[0.5, 1.0]] * 3, "source_attention_mask": [1, 1, 0]}
        for row in without("source_input_ids")
    ]
    batch = FlareDataCollator(tokenizer())(examples)
    assert batch["source_states"].shape == (*batch["input_ids"].shape, 2) == (2, 4, 2)
    assert batch["source_attention_mask"].tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": [1, 1]}, r"row \d: attention_mask has 2 entries, input_ids has \d"),
        ({"source_attention_mask": [1]}, r"row 0: source_attention_mask has 1 entries, source_input_ids has 5"),
        ({"start_positions": 9, "end_positions": 9}, r"row 0: start_positions=9 is outside its 3 input_ids"),
        ({"source_labels": 1}, r"row 0: source_labels are for causal and encoder-decoder rows"),
        ({"names": [[1], [2, 3]]}, r"column 'names' cannot be stacked"),
    ],
)
def test_invalid_columns_raise(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FlareDataCollator(tokenizer())([{**row, **change} for row in classes()])


def test_columns_missing_in_some_rows_raise():
    for name in ("labels", "weight"):
        examples = [{**row, "weight": 1.0} for row in classes()]
        del examples[1][name]
        with pytest.raises(ValueError, match=rf"row 1 of the batch has no column '{name}'"):
            FlareDataCollator(tokenizer())(examples)
    with pytest.raises(ValueError, match=r"row 0 has no column 'input_ids'"):
        FlareDataCollator(tokenizer())(without("input_ids"))
    with pytest.raises(ValueError, match="no rows"):
        FlareDataCollator(tokenizer())([])


def test_long_texts_raise_or_are_truncated():
    with pytest.raises(ValueError, match=r"row 0: source_input_ids has 5 tokens and max_length is 4.*truncation=True"):
        FlareDataCollator(tokenizer(), max_length=4)(classes())
    batch = FlareDataCollator(tokenizer(), max_length=4, truncation=True)(classes())
    assert batch["source_input_ids"].tolist() == [[CLS, B, C, SEP], [CLS, G, SEP, PAD]]
    spans = [{"input_ids": [CLS, A, B, C, SEP], "source_input_ids": [A], "start_positions": 1, "end_positions": 3}]
    with pytest.raises(ValueError, match=r"would cut off the answer \(end_positions=3\)"):
        FlareDataCollator(tokenizer(), max_length=4, truncation=True)(spans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "widest"}, r"padding='widest' is not known; use 'longest' or 'max_length'"),
        ({"padding": "max_length"}, r"needs max_length"),
        ({"truncation": True}, r"truncation=True needs max_length"),
        ({"max_length": 10, "pad_to_multiple_of": 8}, r"max_length=10 is not a multiple of pad_to_multiple_of=8"),
        ({"layout": "prefix"}, r"layout='prefix' is not known"),
        ({"padding_side": "top"}, r"padding_side='top' is not known"),
    ],
)
def test_invalid_options_raise(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FlareDataCollator(tokenizer(), **options)


def test_a_tokenizer_without_pad_token_raises():
    with pytest.raises(ValueError, match=r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        FlareDataCollator(tokenizer(pad=False))


@pytest.mark.parametrize("task", ["bert", "llama", "mt5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fitted_collator_pads_a_row_alike_in_every_batch(task: str, side: str):
    """A fitted collator gives every batch the width that one batch of all rows would have."""
    data = rows(task, 7)
    layout = {"bert": "encoder", "llama": "causal", "mt5": "seq2seq"}[task]
    loose = FlareDataCollator(tokenizer(side), layout=layout)
    fitted = loose.fitted(data)
    together = fitted(data)
    assert {name: value.shape for name, value in together.items()} == {
        name: value.shape for name, value in loose(data).items()
    }
    for index, row in enumerate(data):
        alone = fitted([row])
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][index]), name
    assert any(loose([row])["input_ids"].shape != together["input_ids"][:1].shape for row in data)


def test_a_fitted_collator_respects_max_length():
    data = rows("llama", 7)
    wide = FlareDataCollator(tokenizer(), layout="causal").fitted(data)(data)["input_ids"].shape[1]
    limited = FlareDataCollator(tokenizer(), layout="causal", max_length=wide - 1)
    fitted = limited.fitted(data)
    widths = [fitted([row])["input_ids"].shape[1] for row in data]
    assert max(widths) == wide - 1
    assert widths.count(wide - 1) > 3, "most rows have the full width"
