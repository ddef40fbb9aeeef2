"""Test FlareTrainer with a source cache: several epochs, resuming, logged hit rates, and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cached_states import FAMILIES, MB, SourceBlocks, cache_in
from datasets import Dataset
from trained import arguments, flare_model, lora
from two_streams import rows, tokenizer

import flare
from flare.training.trainer import FlareSeq2SeqTrainer, FlareTrainer

SEQ2SEQ = {"mt5": FlareSeq2SeqTrainer}


def trained(
    task: str, folder: Path, cache: Any = None, *, model: Any = None, resume: Any = None, **options: Any
) -> tuple[Any, SourceBlocks]:
    from transformers import Seq2SeqTrainingArguments

    from flare.training.collator import FlareDataCollator

    model = model or flare_model(task, lora_alpha=8, source_padding=options.pop("source_padding", "keep"))
    layout = {"bert": "encoder", "llama": "causal", "mt5": "seq2seq"}[task]
    data = Dataset.from_list(rows(task, 10))
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_strategy": "steps"}
    args = arguments(folder, **{**defaults, "logging_steps": 1, **options})
    if task == "mt5":
        args = Seq2SeqTrainingArguments(**{**args.to_dict(), "output_dir": str(folder)})
    # a trainer with a cache pads all batches to one length; without a cache, ``fitted`` sets the same length
    collator = FlareDataCollator(tokenizer(), layout=layout).fitted(data)
    trainer = SEQ2SEQ.get(task, FlareTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_list(rows(task, 4, seed=5)),
        source_cache=cache,
        data_collator=collator if cache is None else FlareDataCollator(tokenizer(), layout=layout),
    )
    ran = SourceBlocks(model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, ran


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("task", FAMILIES)
@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_two_epochs_run_each_source_block_once_per_example(task, padding, tmp_path, capsys) -> None:
    plain, ran = trained(task, tmp_path / "plain", source_padding=padding)
    assert ran.since() == {20}
    cache = flare.SourceStateCache(4 * MB, directory=tmp_path / "states")
    trainer, ran = trained(task, tmp_path / "cached", cache, source_padding=padding)
    assert ran.since() == {10}
    assert len(losses(plain)) == 6
    torch.testing.assert_close(losses(trainer), losses(plain), rtol=1e-5, atol=1e-6)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["source_cache_hit_rate"] for entry in steps] == [0.0] * 3 + [1.0] * 3
    assert all(entry["source_cache_bytes"] > 0 for entry in steps)
    last = trainer.state.log_history[-1]
    assert last["source_cache_hit_rate"] == 0.5 and "train_runtime" in last
    assert isinstance(last["source_cache_seconds_saved"], float)
    first = trainer.evaluate()
    assert ran.since() == {4} and not any("cache" in name for name in first)
    again = trainer.evaluate()
    assert ran.since() == {0}
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert "source_cache: 10 of 20 rows not computed (50.0%)" in capsys.readouterr().out


def test_a_custom_collator_gets_a_warning_about_the_padded_width(tmp_path) -> None:
    from flare.training.collator import FlareDataCollator

    model = flare_model("bert")
    custom_collator = FlareDataCollator(tokenizer())
    trainer = FlareTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=4, per_device_train_batch_size=2),
        train_dataset=Dataset.from_list(rows("bert", 10)),
        data_collator=lambda batch: custom_collator(batch),
        source_cache=flare.SourceStateCache(MB),
    )
    with pytest.warns(UserWarning, match="padded to another width") as caught:
        trainer.train()
    assert len([one for one in caught if "another width" in str(one.message)]) == 1


def test_a_resumed_run_finds_its_rows(tmp_path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    whole, _ = trained("bert", tmp_path / "whole", **options)
    states = tmp_path / "states"
    trained("bert", tmp_path / "run", cache_in("disk", states), **options)
    cache = cache_in("disk", states)
    resumed, ran = trained("bert", tmp_path / "run", cache, resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert ran.since() == {0} and cache.stats().hit_rate == 1.0
    torch.testing.assert_close(losses(resumed)[-3:], losses(whole)[-3:], rtol=1e-5, atol=1e-6)
    assert cache.stats().seconds_saved is None and "not known" in cache.summary()


def test_a_trainer_without_a_fusing_adapter_is_refused(tmp_path) -> None:
    for model, match in (
        (lora("bert"), "call flare.fast_lora"),
        (flare_model("bert", fusion=None), "no active adapter"),
    ):
        with pytest.raises(ValueError, match=match):
            FlareTrainer(model=model, args=arguments(tmp_path), source_cache=flare.SourceStateCache(MB))


def test_a_base_model_changed_between_runs_is_refused(tmp_path) -> None:
    cache = flare.SourceStateCache(MB)
    trainer, _ = trained("bert", tmp_path, cache)
    trainer.model.get_base_model().bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="bound to another base model"):
        trainer.train()


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_special_tokens_copied_from_the_tokenizer_keep_the_cache_valid(task, tmp_path) -> None:
    model = flare_model(task)
    model.get_base_model().config.pad_token_id = None
    trainer = FlareTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=2, per_device_train_batch_size=5),
        train_dataset=Dataset.from_list(rows(task, 10)),
        processing_class=tokenizer(),
        source_cache=flare.SourceStateCache(MB),
    )
    trainer.train()
    config = model.get_base_model().config
    assert (config.pad_token_id, config.bos_token_id) == (0, 4)  # the Trainer has copied the ids from the tokenizer
    assert trainer.source_cache.stats().hit_rate == 0.5


def test_logged_hit_rates_cover_only_the_current_run(tmp_path) -> None:
    cache = flare.SourceStateCache(MB)
    options = {"eval_strategy": "epoch", "num_train_epochs": 3}
    first, _ = trained("bert", tmp_path / "first", cache, **options)
    second, _ = trained("bert", tmp_path / "second", cache, model=flare_model("bert", lora_alpha=8), **options)
    second.train()
    rates = [entry["source_cache_hit_rate"] for entry in first.state.log_history if "source_cache_hit_rate" in entry]
    assert rates == [0.0] * 3 + [1.0] * 6 + [pytest.approx(2 / 3)]
    for entry in second.state.log_history:
        assert entry.get("source_cache_hit_rate", 1.0) == 1.0


def test_an_evaluation_that_casts_the_base_model_does_not_use_the_cache(tmp_path) -> None:
    trainer, ran = trained("bert", tmp_path, flare.SourceStateCache(MB), bf16_full_eval=True)
    ran.since()
    with pytest.warns(UserWarning, match="bf16_full_eval casts the base model"):
        trainer.evaluate()
    assert ran.since() == {4}
    with pytest.raises(ValueError, match="bound to another base model"):
        trainer.train()
