"""Test FlareTrainer: source columns, gradients under accumulation, token counts, and the features of the Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trained import TASKS, arguments, flare_model, lora
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from two_streams import rows, tokenizer

from flare import _compat
from flare.training.collator import FlareDataCollator, layout_of
from flare.training.trainer import FlareSeq2SeqTrainer, FlareTrainer


class Gradients(TrainerCallback):
    """Callback that stores the gradients of every step just before the optimizer uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def gradients(
    trainer_class: type,
    model: Any,
    data: list[dict],
    folder: Path,
    micro: int,
    steps: int,
    layout: str | None = None,
    **options: Any,
):
    """Return the gradients and the logged loss of one optimizer step over ``steps`` batches of up to ``micro`` rows."""
    seen = Gradients()
    trainer = trainer_class(
        model=model,
        args=arguments(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_strategy="steps",
            logging_steps=1,
            **options,
        ),
        train_dataset=Dataset.from_list(data),
        # all batches have one width, because it affects the softmax over positions (spans) and the fusion of padding
        data_collator=FlareDataCollator(
            tokenizer(), "max_length", 16, require_source=False, layout=layout or layout_of(model)
        ),
        callbacks=[seen],
    )
    trainer.train()
    (grads,) = seen.steps
    assert grads
    return grads, trainer.state.log_history[0]["loss"]


def distance(grads: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative error over all gradients together."""
    assert grads.keys() == expected.keys()
    difference = sum((grads[n] - expected[n]).square().sum() for n in expected)
    return (difference / sum(g.square().sum() for g in expected.values())).sqrt().item()


def norm(grads: dict[str, torch.Tensor]) -> float:
    return sum(g.square().sum() for g in grads.values()).sqrt().item()


# --- gradient accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TASKS)
def test_accumulation_gives_the_gradient_of_the_large_batch(family: str, tmp_path: Path):
    """The last micro-batch is smaller, and rows have different numbers of labelled tokens."""
    data = rows(family, 7, source=False)
    whole, whole_loss = gradients(FlareTrainer, lora(family), data, tmp_path, micro=7, steps=1)
    parts, parts_loss = gradients(FlareTrainer, lora(family), data, tmp_path, micro=2, steps=4)
    assert distance(parts, whole) < 1e-5
    assert parts_loss == pytest.approx(whole_loss, abs=2e-4)  # the logged value is rounded

    stock_whole, _ = gradients(Trainer, lora(family), data, tmp_path, micro=7, steps=1)
    assert distance(whole, stock_whole) < 1e-6  # without accumulation both trainers agree


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "xlmr", "llama-classes", "mt5"])
def test_stock_trainer_gradients_of_four_micro_batches_are_four_times_too_large(family: str, tmp_path: Path):
    """If this test fails, transformers scales accumulated gradients correctly, and FlareTrainer need not scale them."""
    data = rows(family, 8, source=False)  # micro-batches of equal sizes, so that only the scale differs
    whole, _ = gradients(Trainer, lora(family), data, tmp_path, micro=8, steps=1)
    parts, _ = gradients(Trainer, lora(family), data, tmp_path, micro=2, steps=4)
    assert 3.0 < norm(parts) / norm(whole) < 5.0


@pytest.mark.parametrize("family", ["bert", "bert-spans", "llama"])
def test_accumulation_with_fusing_adapters_gives_the_gradient_of_the_large_batch(family: str, tmp_path: Path):
    data = rows(family, 7)
    whole, _ = gradients(FlareTrainer, flare_model(family), data, tmp_path, micro=7, steps=1)
    parts, _ = gradients(FlareTrainer, flare_model(family), data, tmp_path, micro=2, steps=4)
    assert distance(parts, whole) < 1e-5
    plain, _ = gradients(FlareTrainer, flare_model(family, fusion=None), data, tmp_path, micro=7, steps=1)
    assert distance(whole, plain) > 0.1  # FLARE reads the source, plain LoRA does not


def test_accumulation_is_exact_for_a_causal_model_that_ignores_num_items_in_batch(tmp_path: Path):
    """The loss does not predict the first token of a row, so the label of this token must not be counted."""
    data = rows("llama-text", 7, source=False)

    def model() -> Any:
        causal_model = lora("llama-text")
        stock = causal_model.get_base_model().loss_function
        causal_model.get_base_model().loss_function = lambda num_items_in_batch=None, **kwargs: stock(**kwargs)
        return causal_model

    whole, _ = gradients(FlareTrainer, model(), data, tmp_path, micro=7, steps=1, layout="encoder")
    parts, _ = gradients(FlareTrainer, model(), data, tmp_path, micro=2, steps=4, layout="encoder")
    assert distance(parts, whole) < 1e-5


@pytest.mark.parametrize("family", ["llama", "bert-tokens"])
def test_a_micro_batch_without_labelled_tokens_adds_nothing(family: str, tmp_path: Path):
    data = rows(family, 2, source=False)
    silent = {**data[1], "labels": [-100] * len(data[1]["labels"])}
    options = {"micro": 1, "logging_nan_inf_filter": False}
    one, one_loss = gradients(FlareTrainer, lora(family), data[:1], tmp_path, steps=1, **options)
    both, both_loss = gradients(FlareTrainer, lora(family), [data[0], silent], tmp_path, steps=2, **options)
    assert distance(both, one) < 1e-6
    assert both_loss == pytest.approx(one_loss, abs=2e-4)


def test_the_users_loss_function_gets_the_row_count_of_the_whole_step(tmp_path: Path):
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = FlareTrainer(
        model=lora("bert"),
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1),
        train_dataset=Dataset.from_list(rows("bert", 8, source=False)),
        processing_class=tokenizer(),
        compute_loss_func=loss,
    )
    trainer.train()
    assert counts == [8] * 4


def test_label_smoothing_with_accumulation_gives_the_gradient_of_the_large_batch(tmp_path: Path):
    data = rows("bert", 7, source=False)
    smooth = {"label_smoothing_factor": 0.2}
    whole, _ = gradients(FlareTrainer, lora("bert"), data, tmp_path, micro=7, steps=1, **smooth)
    parts, _ = gradients(FlareTrainer, lora("bert"), data, tmp_path, micro=2, steps=4, **smooth)
    hard, _ = gradients(FlareTrainer, lora("bert"), data, tmp_path, micro=7, steps=1)
    assert distance(parts, whole) < 1e-5 < distance(hard, whole)


# --- columns and collator ---------------------------------------------------------------------------------------------


def spy(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return a list that receives the keyword arguments of every call of a model."""
    calls: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    return calls


@pytest.mark.parametrize("trainer_class", [FlareTrainer, Trainer])
def test_source_columns_reach_the_model_only_with_flare_trainer(trainer_class: type, tmp_path: Path):
    model = flare_model("bert")
    calls = spy(model)
    data = Dataset.from_list([{**row, "text": "left out", "other": 1} for row in rows("bert", 4)])
    trainer = trainer_class(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=4, max_steps=1),
        train_dataset=data,
        **({"processing_class": tokenizer()} if trainer_class is FlareTrainer else {"data_collator": plain_collator()}),
    )
    trainer.train()
    names = {name for name in calls[0] if name.startswith("source_")}
    if trainer_class is Trainer:
        assert names == set()  # the stock Trainer removes the source columns
        return
    assert names == {"source_input_ids", "source_attention_mask"}
    assert calls[0]["source_input_ids"].shape == calls[0]["input_ids"].shape
    assert "other" not in calls[0]  # remove_unused_columns still removes other columns


def plain_collator() -> FlareDataCollator:
    return FlareDataCollator(tokenizer(), require_source=False)


def test_the_users_collator_is_used_and_the_default_collator_fits_the_model(tmp_path: Path):
    args = arguments(tmp_path)
    default = FlareTrainer(model=flare_model("llama"), args=args, processing_class=tokenizer()).data_collator
    assert isinstance(default, FlareDataCollator)
    assert (default.layout, default.require_source) == ("causal", True)
    plain = FlareTrainer(model=lora("bert"), args=args, processing_class=tokenizer()).data_collator
    assert (plain.layout, plain.require_source) == ("encoder", False)

    user_collator = FlareDataCollator(tokenizer(), max_length=16, padding="max_length")
    used_collator = FlareTrainer(flare_model("bert"), args, user_collator, processing_class=tokenizer()).data_collator
    assert (used_collator.max_length, used_collator.layout, user_collator.layout) == (16, "encoder", "auto")

    def function(rows):
        return rows

    assert FlareTrainer(lora("bert"), args, function, processing_class=tokenizer()).data_collator is function
    stock = Trainer(model=lora("bert"), args=args).data_collator
    assert FlareTrainer(model=lora("bert"), args=args).data_collator is stock


def test_rows_without_a_source_raise_for_a_fusing_model(tmp_path: Path):
    trainer = FlareTrainer(
        model=flare_model("bert"),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(rows("bert", 4, source=False)),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match="no row has the column 'source_input_ids'"):
        trainer.train()


def test_source_cache_of_another_type_raises(tmp_path: Path):
    trainer = FlareTrainer(model=lora("bert"), args=arguments(tmp_path), source_cache=None)
    assert isinstance(trainer, Trainer)
    for cache in (True, object()):
        with pytest.raises(ValueError, match=r"source_cache=.*must be a flare.SourceStateCache"):
            FlareTrainer(model=lora("bert"), args=arguments(tmp_path), source_cache=cache)


def test_the_private_methods_of_the_trainer_that_flare_extends_exist():
    for name in _compat.TRAINER_METHODS:
        assert callable(getattr(Trainer, name)), name
    _compat.check_trainer(Trainer)
    with pytest.raises(ImportError, match="_track_num_input_tokens"):
        _compat.check_trainer(object)


# --- features of the Trainer ---------------------------------------------------------------------------------------


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def training(folder: Path, model: Any, **options: Any) -> FlareTrainer:
    """Return a trainer for six steps that evaluates and saves a checkpoint after every second step."""
    args = arguments(
        folder,
        per_device_train_batch_size=4,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        include_num_input_tokens_seen="all",
        **options,
    )
    return FlareTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows("bert", 16)),
        eval_dataset=Dataset.from_list(rows("bert", 8, seed=1)),
        data_collator=FlareDataCollator(tokenizer(), padding="max_length", max_length=12),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path):
    uninterrupted = training(tmp_path / "a", flare_model("bert", lora_dropout=0.2))
    before = weights(uninterrupted.model)
    uninterrupted.train()
    expected, tokens = weights(uninterrupted.model), uninterrupted.num_source_input_tokens_seen
    assert any(not torch.equal(before[n], expected[n]) for n in expected if "lora_A" in n)
    assert tokens == 6 * 4 * 12
    assert {"eval_loss", "eval_accuracy"} <= uninterrupted.evaluate().keys()

    state = json.loads((tmp_path / "a/checkpoint-2/trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == 2 * 2 * 4 * 12
    resumed = training(tmp_path / "a", flare_model("bert", lora_dropout=0.2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert resumed.state.global_step == 6
    assert resumed.num_source_input_tokens_seen == tokens
    for name, value in weights(resumed.model).items():
        torch.testing.assert_close(value, expected[name], msg=name, rtol=0, atol=0)

    resumed.train()  # another training starts counting from zero
    assert resumed.num_source_input_tokens_seen == tokens


def test_a_resumed_checkpoint_without_source_tokens_counts_from_zero(tmp_path: Path):
    first = training(tmp_path, flare_model("bert"))
    first.train()
    file = tmp_path / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"].pop("SourceTokens")
    file.write_text(json.dumps(state))
    again = training(tmp_path, flare_model("bert"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.num_source_input_tokens_seen == 2 * 4 * 12


def test_load_best_model_at_end_restores_the_best_weights(tmp_path: Path):
    class Spoil(TrainerCallback):
        """Make the model worse after every step from the third on; the first evaluation follows step 2."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.best = weights(model)
            if state.global_step > 2:
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p.add_(3 * torch.randn_like(p))

    spoil = Spoil()
    trainer = training(tmp_path, flare_model("bert"), load_best_model_at_end=True, metric_for_best_model="loss")
    trainer.add_callback(spoil)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, spoil.best[name], msg=name)


def test_seq2seq_trainer_passes_source_labels_to_the_model(tmp_path: Path):
    model = lora("mt5")
    calls = spy(model)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    data = Dataset.from_list(rows("mt5", 8))
    trainer = FlareSeq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )
    assert isinstance(trainer, Seq2SeqTrainer) and isinstance(trainer, FlareTrainer)
    assert trainer.data_collator.layout == "seq2seq"
    trainer.train()
    assert {"source_input_ids", "source_attention_mask", "source_labels"} <= calls[0].keys()
    assert calls[0]["source_labels"].shape == calls[0]["labels"].shape
    assert trainer.evaluate()["eval_loss"] > 0


def test_seq2seq_trainer_generates_without_a_source(tmp_path: Path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=5,
    )
    trainer = FlareSeq2SeqTrainer(model=lora("mt5"), args=args, processing_class=tokenizer())
    output = trainer.predict(Dataset.from_list(rows("mt5", 3, source=False)))
    assert output.predictions.shape[0] == 3


@pytest.mark.parametrize("decoder", [True, False])
def test_seq2seq_trainer_generates_with_the_source(tmp_path: Path, decoder: bool):
    """Predictions equal the output of model.generate. If the rows have source_labels, the decoder fuses too."""
    model = flare_model("mt5")
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        per_device_eval_batch_size=3,
        predict_with_generate=True,
        generation_max_length=5,
    )
    all_rows = rows("mt5", 3)
    given_rows = all_rows if decoder else [{k: v for k, v in row.items() if k != "source_labels"} for row in all_rows]
    trainer = FlareSeq2SeqTrainer(model=model, args=args, processing_class=tokenizer())
    predictions = trainer.predict(Dataset.from_list(given_rows)).predictions
    batch = trainer.data_collator(given_rows)
    assert ("source_labels" in batch) == decoder
    text = {name: batch[name] for name in batch if name != "labels"}
    expected = model.eval().generate(**text, max_length=5)
    assert torch.equal(torch.as_tensor(predictions)[:, : expected.shape[1]], expected)
    if decoder:
        start = torch.zeros(3, 1, dtype=torch.long)
        text = {name: value for name, value in text.items() if name != "source_labels"}
        assert torch.equal(model.generate(**text, source_decoder_input_ids=start, max_length=5), expected)
    plain = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=5)
    assert not torch.equal(plain, expected)
