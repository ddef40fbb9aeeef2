"""Test the baselines: plain LoRA equals PEFT's LoRA, and input-level fusion joins source and target into one text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_models import BASES
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import TrainingArguments
from two_streams import BOS, CLS, PAD, SEP, rows, task_model, tokenizer

from flare.baselines import InputFusionCollator, input_fusion, max_positions, plain_lora
from flare.training.collator import FlareDataCollator
from flare.training.trainer import FlareTrainer

A, B, C, D, E, F, G, H = range(10, 18)


def classes() -> list[dict]:
    """Return two rows of a classification task."""
    return [
        {"input_ids": [CLS, A, SEP], "source_input_ids": [CLS, B, C, D, SEP], "labels": 2},
        {"input_ids": [CLS, E, F, SEP], "source_input_ids": [CLS, G, SEP], "labels": 0},
    ]


# --- plain LoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "xlmr", "llama"])
def test_plain_lora_equals_peft(family: str):
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    task = TaskType.CAUSAL_LM if family == "llama" else TaskType.SEQ_CLS
    ours = plain_lora(task_model(family), r=4, lora_alpha=8)
    theirs = get_peft_model(task_model(family), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task))
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items() if "lora_" in name}
    assert set(state) == {name for name in ours.state_dict() if "lora_" in name}
    ours.load_state_dict(state, strict=False)
    theirs.load_state_dict(state, strict=False)
    batch = FlareDataCollator(tokenizer(), require_source=False)(rows(family, 4, source=False))
    torch.testing.assert_close(ours.eval()(**batch).logits, theirs.eval()(**batch).logits)
    assert not ours.fast_lora_report().fused


def test_plain_lora_does_not_fuse():
    with pytest.raises(ValueError, match=r"plain_lora does not fuse.*flare\.fast_lora"):
        plain_lora(task_model("bert"), fusion="add")
    assert plain_lora(task_model("bert"), fusion=None, r=4).peft_config["default"].fusion is None


# --- input-level fusion -----------------------------------------------------------------------------------------------


def test_source_and_target_are_joined():
    batch = InputFusionCollator(tokenizer(), token_types=True)(classes())
    assert batch["input_ids"].tolist() == [[CLS, B, C, D, SEP, A, SEP], [CLS, G, SEP, E, F, SEP, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert not [name for name in batch if name.startswith("source_")]
    assert "token_type_ids" not in InputFusionCollator(tokenizer(), token_types=False)(classes())


def test_the_fixed_width_is_twice_max_length():
    batch = InputFusionCollator(tokenizer("left"), padding="max_length", max_length=6)(classes())
    assert batch["input_ids"].tolist()[0] == [PAD] * 5 + [CLS, B, C, D, SEP, A, SEP]
    assert batch["input_ids"].shape == (2, 12)
    with pytest.raises(ValueError, match=r"row 0: source_input_ids has 5 tokens and max_length is 4"):
        InputFusionCollator(tokenizer(), max_length=4)(classes())
    cut = InputFusionCollator(tokenizer(), max_length=4, truncation=True)(classes())
    assert cut["input_ids"].tolist()[0] == [CLS, B, C, SEP, A, SEP]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_per_token_and_answer_positions_move_with_the_target(side: str):
    spans = [
        {"input_ids": [CLS, A, B, SEP], "source_input_ids": [CLS, C, SEP], "start_positions": 1, "end_positions": 2},
        {"input_ids": [C, A, D, B], "source_input_ids": [CLS, E, F, SEP], "start_positions": 1, "end_positions": 3},
    ]
    batch = InputFusionCollator(tokenizer(side))(spans)
    at = torch.arange(2)
    assert (batch["input_ids"][at, batch["start_positions"]] == A).all()
    assert (batch["input_ids"][at, batch["end_positions"]] == B).all()

    tagged = [{"input_ids": [CLS, A, B, SEP], "source_input_ids": [CLS, C, SEP], "labels": [-100, 2, 1, -100]}]
    batch = InputFusionCollator(tokenizer(side))(tagged)
    assert batch["input_ids"].tolist() == [[CLS, C, SEP, A, B, SEP]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 2, 1, -100]]


def test_causal_rows_put_the_source_prompt_before_the_target_prompt():
    causal_rows = [
        {
            "input_ids": [BOS, A, B, C, D],
            "labels": [-100, -100, -100, C, D],
            "source_input_ids": [BOS, E, F, G, H],
            "source_labels": [-100, -100, -100, -100, H],
        },
        {
            "input_ids": [BOS, A, C],
            "labels": [-100, -100, C],
            "source_input_ids": [BOS, E, H],
            "source_labels": [-100, -100, H],
        },
    ]
    batch = InputFusionCollator(tokenizer(), token_types=False)(causal_rows)
    assert batch["input_ids"].tolist() == [[BOS, E, F, G, A, B, C, D], [PAD, PAD, PAD, BOS, E, A, C, PAD]]
    assert batch["labels"].tolist() == [[-100] * 6 + [C, D], [-100] * 6 + [C, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [0, 0, 0, 1, 1, 1, 1, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_batches_of_encoder_decoders_have_labels_and_no_source_columns():
    batch = InputFusionCollator(tokenizer(), token_types=False, layout="seq2seq")(rows("mt5", 3))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert task_model("mt5")(**batch).loss.isfinite()


def test_rows_without_a_source_raise_if_a_source_is_required():
    target_rows = [{k: v for k, v in row.items() if k != "source_input_ids"} for row in classes()]
    with pytest.raises(ValueError, match="no row has the column 'source_input_ids'"):
        InputFusionCollator(tokenizer())(target_rows)
    plain = InputFusionCollator(tokenizer(), require_source=False)(target_rows)
    assert plain["input_ids"].tolist() == [[CLS, A, SEP, PAD], [CLS, E, F, SEP]]


# --- what the model can read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("xlmr", 63), ("llama", 64), ("mt5", None)])
def test_max_positions_are_the_longest_text_of_a_model(family: str, limit: int | None):
    """This XLM-R has a table of 64 positions, of which one is reserved for padding."""
    model = task_model(family)
    assert max_positions(model) == limit
    if family == "xlmr":
        assert model(torch.full((1, limit), A)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), A))


def test_relative_positions_of_mdeberta_have_no_limit():
    base = BASES["mdeberta"]
    model = replace(base, changes={**base.changes, "max_position_embeddings": 16}).make()
    assert max_positions(model) is None
    assert model(torch.full((1, 40), A)).logits.isfinite().all()
    with_positions = replace(base, changes={**base.changes, "position_biased_input": True}).make()
    assert max_positions(with_positions) == 64


def test_input_fusion_raises_for_too_few_positions_and_for_states():
    with pytest.raises(ValueError, match=r"max_length=33 per text needs 66 positions.* has 64; use max_length=32"):
        input_fusion(task_model("bert"), max_length=33)
    model = input_fusion(task_model("bert"), max_length=32, r=4)
    assert model.peft_config["default"].fusion is None
    with pytest.raises(ValueError, match=r"max_length=33 per text makes batches of 66 tokens"):
        InputFusionCollator(tokenizer(), max_length=33, max_positions=64)
    states = [{"input_ids": [CLS, A, SEP], "source_states": torch.randn(2, 4), "labels": 1}]
    with pytest.raises(ValueError, match=r"source_states: input-level fusion joins two texts.*pass source_input_ids"):
        InputFusionCollator(tokenizer())(states)
    with pytest.raises(ValueError, match=r"together are 7 tokens wide, but the model has only 6 positions"):
        InputFusionCollator(tokenizer(), max_positions=6)(classes())


def test_collator_for_a_model_gets_its_settings_from_the_model():
    model = task_model("xlmr")
    collator = InputFusionCollator.for_model(model, tokenizer(), max_length=16)
    assert (collator.max_positions, collator.token_types, collator.layout) == (63, False, "encoder")
    assert model(**collator(rows("xlmr", 3))).loss.isfinite()
    assert InputFusionCollator.for_model(task_model("bert"), tokenizer()).token_types
    through_peft = InputFusionCollator.for_model(plain_lora(task_model("llama"), r=4), tokenizer())
    assert (through_peft.max_positions, through_peft.layout) == (64, "causal")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_flare_trainer_trains_input_fusion_and_uses_the_source(family: str, tmp_path: Path):
    model = input_fusion(task_model(family), max_length=16, r=4)
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", max_steps=2
    )
    data = rows(family, 8)
    collator = InputFusionCollator.for_model(model, tokenizer(), max_length=16)
    FlareTrainer(model=model, args=args, train_dataset=Dataset.from_list(data), data_collator=collator).train()
    other = [{**row, "source_input_ids": [row["source_input_ids"][0], *row["source_input_ids"][:0:-1]]} for row in data]
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model(**collator(data)).logits, model(**collator(other)).logits)
