"""Test that packed rows (several texts in one row) are refused if there is a source.

Unknown arguments whose names begin with source_ are refused, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from cached_states import batch_of, fused

import flare
from flare.baselines import x_mixup

#: Positions of one text per row, and of two texts that are packed into one row.
COUNTED = torch.arange(9).expand(3, 9)
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]).expand(3, 9)


def inputs_of(family: str, **changes: Any) -> dict[str, Any]:
    inputs = {**batch_of(family), **changes}
    return {name: value for name, value in inputs.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": None, "position_ids": PACKED}, "position_ids do not increase by one .*its own row"),
        ({"position_ids": PACKED}, "position_ids do not increase by one"),
        ({"position_ids": PACKED[:1]}, "position_ids do not increase by one"),
        ({"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 5, 9])}, r"cu_seq_lens_q \(packed texts\)"),
        ({"attention_mask": torch.ones(3, 1, 9, 9).bool().tril()}, r"attention_mask is of shape \(3, 1, 9, 9\)"),
        ({"attention_mask": {"full_attention": torch.ones(3, 9)}}, "attention_mask is a dict"),
    ],
    ids=["positions", "positions and mask", "one row of positions", "boundaries", "four dimensions", "dict"],
)
@pytest.mark.parametrize("training", [True, False])
def test_packed_rows_next_to_a_source_are_refused(changes, message, training) -> None:
    model = fused("llama").train(training)
    with pytest.raises(ValueError, match=message):
        model(**inputs_of("llama", **changes))
    plain = {n: v for n, v in inputs_of("llama", **changes).items() if not n.startswith("source_")}
    if not isinstance(changes.get("attention_mask"), dict):
        model(**plain)  # without a source, packed rows are left to the model


def test_packed_rows_next_to_source_states_are_refused() -> None:
    model, inputs = fused("llama"), inputs_of("llama", attention_mask=None, position_ids=PACKED)
    states = model.encode_source(inputs.pop("source_input_ids"), inputs.pop("source_attention_mask"))
    with pytest.raises(ValueError, match="position_ids do not increase by one"):
        model(**inputs, source_states=states)


def test_position_ids_without_a_keyword_are_checked() -> None:
    inputs = batch_of("llama")
    source = {name: value for name, value in inputs.items() if name.startswith("source_")}
    with pytest.raises(ValueError, match="position_ids do not increase by one"):
        fused("llama").base_model.model(inputs["input_ids"], None, PACKED, **source)


def test_consecutive_positions_are_accepted() -> None:
    """Padding before or after the text may have any position ids."""
    model, inputs = fused("llama").eval(), inputs_of("llama")
    mask = inputs["attention_mask"]
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=COUNTED).logits, expected)
    # rotary embeddings depend only on differences of positions
    actual = model(**inputs, position_ids=counted).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    fused("bert")(**inputs_of("bert", position_ids=COUNTED))


def test_flare_mt_reads_states_by_position() -> None:
    model = fused("llama", latent_dim=8)
    plain = {n: v for n, v in inputs_of("llama", attention_mask=None).items() if not n.startswith("source_")}
    states = torch.randn(3, 9, 8)
    a = model(**plain, position_ids=PACKED, source_states=states).logits
    b = model(**plain, position_ids=PACKED, source_states=states.flip(1)).logits
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("name", ["source_position_ids", "source_inputs_ids", "source_attention_masks"])
@pytest.mark.parametrize("fusion", ["add_relu", None])
@pytest.mark.parametrize("family", ["bert", "llama", "mt5"])
def test_an_unknown_argument_is_named(family, fusion, name) -> None:
    model = fused(family, fusion=fusion).eval()
    with pytest.raises(TypeError, match=f"{name} is not an argument of .*For.*: .*source_input_ids, source_att"):
        model(**batch_of(family), **{name: COUNTED})
    with pytest.raises(TypeError, match=name):
        model.base_model.model(**batch_of(family), **{name: COUNTED})
    if family != "bert":
        with pytest.raises(TypeError, match=name):
            model.generate(**tiny.batch(family), **{name: COUNTED}, max_new_tokens=2)


def test_x_mixup_refuses_packed_rows() -> None:
    model = x_mixup(tiny.model("llama"), r=4)
    with pytest.raises(TypeError, match="source_position_ids is not an argument"):
        model(**batch_of("llama"), source_position_ids=COUNTED)
    with pytest.raises(ValueError, match="position_ids do not increase by one"):
        model(**batch_of("llama"), position_ids=PACKED)


def test_the_model_refuses_packed_rows_from_the_collator() -> None:
    """`flare.FlareDataCollator` does not remove unknown columns, so the model gets them."""
    from flare.experiments.demo.base_model import build_tokenizer

    rows = [{"input_ids": [5, 6, 7], "source_input_ids": [5, 6, 8], "source_position_ids": [0, 1, 0]}]
    batch = flare.FlareDataCollator(build_tokenizer(), layout="causal")(rows)
    with pytest.raises(TypeError, match="source_position_ids"):
        fused("llama")(**batch)


def test_the_most_similar_name_is_suggested() -> None:
    with pytest.raises(TypeError, match=r"source_atention_mask is not .*; did you mean 'source_attention_mask'\?"):
        fused("bert")(**batch_of("bert"), source_atention_mask=COUNTED)


def test_lookup_refuses_packed_rows() -> None:
    """`SourceStateCache.lookup` gets a batch before the model does, so it makes the same checks."""
    model, inputs = fused("llama"), inputs_of("llama")
    cache = flare.SourceStateCache(1 << 20)
    model.set_source_cache(cache)
    model(**inputs)
    assert cache.lookup(model, inputs) is not None
    wrong = {("source_attention_msk" if n == "source_attention_mask" else n): v for n, v in inputs.items()}
    with pytest.raises(TypeError, match=r"source_attention_msk is not .*did you mean 'source_attention_mask'"):
        cache.lookup(model, wrong)
    with pytest.raises(ValueError, match="position_ids do not increase by one"):
        cache.lookup(model, {**inputs, "position_ids": PACKED})


def test_generate_refuses_packed_prompts() -> None:
    inputs = {name: value for name, value in inputs_of("llama", position_ids=PACKED).items() if name != "labels"}
    with pytest.raises(ValueError, match="position_ids do not increase by one"):
        fused("llama").eval().generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("kind", "column", "value", "message"),
    [
        ("list", "source_input_id", [5, 6], "'source_input_id' is not read.*did you mean 'source_input_ids'"),
        ("evaluated", "source_inputs_ids", [5, 6], "'source_inputs_ids' is not read.*did you mean 'source_input_ids'"),
        (
            "dataset",
            "source_position_ids",
            [0, 1],
            "'source_position_ids' is not read, and remove_unused_columns would",
        ),
        ("dataset", "source_text", "a text", None),
        ("list", "source_id", 7, None),
    ],
)
def test_the_trainer_does_not_drop_misspelt_columns(kind, column, value, message, tmp_path) -> None:
    from datasets import Dataset
    from trained import arguments
    from two_streams import tokenizer

    row = {"input_ids": [5, 6, 7], "source_input_ids": [5, 6, 8], "labels": 1}
    data = [{**row, column: value}] * 2
    dataset = Dataset.from_list(data) if kind != "list" else data
    trainer = flare.FlareTrainer(
        fused("bert"), arguments(tmp_path, max_steps=1), train_dataset=dataset, processing_class=tokenizer()
    )
    call = (lambda: trainer.evaluate(dataset)) if kind == "evaluated" else trainer.train
    if message is None:
        call()
        return
    with pytest.raises(ValueError, match=message):
        call()
