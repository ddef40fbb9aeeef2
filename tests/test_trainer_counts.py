"""Test the tokens and FLOPs that FlareTrainer counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trained import arguments, flare_model
from transformers import Trainer
from two_streams import rows, tokenizer

from flare.training.collator import FlareDataCollator
from flare.training.trainer import FlareTrainer


@pytest.mark.parametrize("mode", ["all", "non_padding", "no"])
def test_tokens_of_both_streams_are_counted(mode: str, tmp_path: Path):
    data = rows("bert", 8)
    trainer = FlareTrainer(
        model=flare_model("bert"),
        args=arguments(
            tmp_path,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            include_num_input_tokens_seen=mode,
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(data),
        data_collator=FlareDataCollator(tokenizer(), padding="max_length", max_length=12),
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    if mode == "no":
        assert "num_input_tokens_seen" not in last and "num_source_input_tokens_seen" not in last
        return
    target = 8 * 12 if mode == "all" else sum(len(row["input_ids"]) for row in data)
    source = 8 * 12 if mode == "all" else sum(len(row["source_input_ids"]) for row in data)
    assert last["num_source_input_tokens_seen"] == trainer.num_source_input_tokens_seen == source
    assert last["num_input_tokens_seen"] == source + target


def test_operations_of_the_source_pass_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches: list[dict[str, torch.Tensor]] = []

    class Recording(FlareTrainer):
        def floating_point_ops(self, inputs):
            batches.append(inputs)
            return super().floating_point_ops(inputs)

    model, calls = flare_model("bert"), []
    count = model.get_base_model().num_parameters
    monkeypatch.setattr(model.get_base_model(), "num_parameters", lambda **options: calls.append(1) or count(**options))
    options = arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=2)
    trainer = Recording(model=model, args=options, train_dataset=rows("bert", 8), processing_class=tokenizer())
    for adapter in (None, "another"):
        if adapter is not None:
            model.add_adapter(adapter, model.peft_config["default"])
        batches.clear(), calls.clear()
        trainer.train()
        assert len(batches) == 6 and len(calls) == 1, "the parameters are counted once per training"
        weights = count(exclude_embeddings=True)
        target = sum(Trainer.floating_point_ops(trainer, batch) for batch in batches)
        # per token and weight, the target counts 6 (forward and backward), and the source 2 (forward)
        source = 2 * weights * sum(batch["source_input_ids"].numel() for batch in batches)
        assert trainer.state.total_flos == target + source and source > 0
