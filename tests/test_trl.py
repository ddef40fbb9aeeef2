"""Test fast_lora with TRL's SFTTrainer and the arguments that docs/index.md names."""

from __future__ import annotations

import datasets
import pytest
import tiny
import tokenizers
import transformers

import flare
from flare.source.context import THREAD

trl = pytest.importorskip("trl", reason="TRL is not installed")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer_feeds_both_streams(gradient_checkpointing, tmp_path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    rows = [
        {"input_ids": [3 + i % 5, 4, 5, 6, 7], "labels": [-100, -100, 5, 6, 7], "source_input_ids": [9, 8 + i % 4, 7]}
        for i in range(8)
    ]
    model = flare.fast_lora(tiny.model("llama"), r=4)
    base = model.get_base_model()
    has_source = []
    tiny.block_list(base)[0].register_forward_hook(lambda *_: has_source.append(THREAD.slot.forward is not None))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_checkpointing=gradient_checkpointing,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=flare.FlareDataCollator(tokenizer, layout="causal"),
    ).train()
    assert has_source[:2] == [False, True], "the source pass runs first, then the target pass with its states"
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    assert moved, "B started at zero and must have been trained"
