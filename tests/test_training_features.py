"""Test mixed precision, GradScaler, checkpointing, gradient accumulation, Liger kernels, and label smoothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer import distance
from trained import arguments, flare_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from two_streams import rows, tokenizer

import flare


def fused(family: str = "llama", **overrides: Any) -> Any:
    model = flare.fast_lora(tiny.model(family), **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def gradients(model: Any, inputs: dict, dtype: torch.dtype | None, scaler: Any = None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**inputs).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    return tiny.gradients(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gradients_are_close_to_float32(family, checkpointing, dtype) -> None:
    """A GradScaler changes only the scale of the gradients, and it skips a step with an infinite gradient."""
    inputs, model = tiny.batch(family), fused(family)
    exact = gradients(model, inputs, None)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    unscaled = gradients(model, inputs, dtype)
    assert all(grad.dtype == torch.float32 for grad in unscaled.values())
    assert distance(unscaled, exact) < bound
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaled = gradients(model, inputs, dtype, scaler)
    scaler.unscale_(optimizer)
    assert distance(tiny.gradients(model), exact) < bound
    assert distance(scaled, {n: g * 2.0**10 for n, g in exact.items()}) < bound
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)
    gradients(model, inputs, dtype, scaler)
    next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def trained(folder: Path, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Train a model for three steps with gradient accumulation, and return its trained parameters."""
    trainer = flare.FlareTrainer(
        model=model,
        args=arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, **options),
        train_dataset=Dataset.from_list(rows("bert", 12)),
        data_collator=flare.FlareDataCollator(tokenizer(), padding="max_length", max_length=12),
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_by_the_trainer_does_not_change_the_weights(use_reentrant, bf16, tmp_path) -> None:
    """Training with checkpointing gives the same weights up to rounding. Training plain LoRA gives other weights."""
    start = {name: p.detach().clone() for name, p in flare_model("bert").named_parameters()}
    model = flare_model("bert")
    parameters = {
        "expected": trained(tmp_path / "a", flare_model("bert"), bf16=bf16),
        "checkpointed": trained(
            tmp_path / "b",
            model,
            bf16=bf16,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        ),
        "plain": trained(tmp_path / "c", flare_model("bert", fusion=None), bf16=bf16),
    }
    assert model.get_base_model().is_gradient_checkpointing
    moved = {which: {name: p - start[name] for name, p in one.items()} for which, one in parameters.items()}
    # reentrant checkpointing computes S in the block together with T, which rounds differently in 16 bits
    bound = 0.01 if bf16 and use_reentrant else 1e-4
    assert distance(moved["checkpointed"], moved["expected"]) < bound
    assert distance(moved["plain"], moved["expected"]) > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA device")
def test_liger_kernels_and_the_adapters_work_together(device) -> None:
    """Liger computes norms, rotary embeddings, MLP and loss; flare_kernels computes the adapters."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    inputs = {name: value.to(device) for name, value in tiny.batch("llama").items()}
    expected_model = fused().to(device)
    expected = expected_model(**inputs)
    expected.loss.backward()
    base = tiny.model("llama")
    liger.apply_liger_kernel_to_llama(model=base)
    model = flare.fast_lora(base, r=5, lora_alpha=7)
    tiny.randomize_lora(model)
    model.to(device)
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)
    assert distance(tiny.gradients(model), tiny.gradients(expected_model)) < 1e-2


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("trainer_class", [flare.FlareTrainer, flare.FlareSeq2SeqTrainer, Seq2SeqTrainer])
def test_label_smoothing_works_for_an_encoder_decoder(trainer_class, source, tmp_path) -> None:
    """With smoothing, the Trainer removes the labels, so the collator must make the decoder's input from the labels."""
    model = flare_model("mt5").eval()
    kind = TrainingArguments if trainer_class is flare.FlareTrainer else Seq2SeqTrainingArguments
    args = kind(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[], remove_unused_columns=False)
    collator_model = model if trainer_class is Seq2SeqTrainer else None
    collator = flare.FlareDataCollator(tokenizer(), layout="seq2seq", require_source=source, model=collator_model)
    trainer = trainer_class(model, args, data_collator=collator)
    batch = trainer.data_collator(rows("mt5", 3, source=source))
    labels = batch["labels"]
    plain = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    expected = LabelSmoother(0.1)(model(**plain), labels)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    trainer.compute_loss(model, dict(batch)).backward()
    assert len(tiny.gradients(model)) == len([p for p in model.parameters() if p.requires_grad])
