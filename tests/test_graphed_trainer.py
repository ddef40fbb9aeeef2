"""Test FlareTrainer(cuda_graphs=True) on a CPU: captured steps give the results of the normal training loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import CpuRecorder
from torch import nn
from trained import arguments, flare_model, lora
from two_streams import rows, tokenizer

import flare
from flare.training import graphed_step

# --- the Trainer ------------------------------------------------------------------------------------------------------


class Recorders(list[CpuRecorder]):
    """Recorders created by the trainers of a test. ``model`` is the model that they train."""

    model = nn.Module()

    def recorder_for(self, device: torch.device) -> CpuRecorder:
        self.append(CpuRecorder(self.model))
        return self[-1]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Recorders:
    """Make trainers record their steps on the CPU."""
    recorders = Recorders()
    monkeypatch.setattr(graphed_step, "recorder_for", recorders.recorder_for)
    return recorders


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {}),
        ("bert", {"label_smoothing_factor": 0.1}),
        ("bert", {"bf16": True}),
        ("bert-spans", {}),
        ("llama", {"include_num_input_tokens_seen": "non_padding"}),
        ("mt5", {}),
    ],
    ids=str,
)
def test_the_trainer_gives_the_same_parameters(
    family: str, options: dict[str, Any], tmp_path: Path, recorders: Recorders
) -> None:
    """Training accumulates (with fewer batches in the last step), clips and evaluates; the number of labels varies."""
    data = rows(family, 11)
    logs, models = [], []
    for captured in (False, True):
        model = flare_model(family)
        trainer = flare.FlareTrainer(
            model=model,
            args=arguments(
                tmp_path,
                num_train_epochs=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                max_grad_norm=0.5,
                eval_strategy="epoch",
                logging_strategy="steps",
                logging_steps=1,
                **options,
            ),
            train_dataset=data,
            eval_dataset=data[:3],
            data_collator=flare.FlareDataCollator(tokenizer(), "max_length", 16, layout=trainer_layout(family)),
            cuda_graphs=captured,
        )
        if captured:
            recorders.model = model
        trainer.train()
        logs.append(
            [{k: v for k, v in log.items() if k.endswith(("loss", "tokens_seen"))} for log in trainer.state.log_history]
        )
        models.append(model)
    (recorder,) = recorders
    # Three graphs: two rows per batch in steps of four batches; two rows and one row in the last step of two batches.
    # mt5 has more graphs, because the width of its labels varies.
    assert recorder.captures == 3 or family == "mt5"
    assert recorder.replays > recorder.captures > 1
    assert logs[0] == logs[1]
    for (name, actual), expected in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(actual, expected), name


def trainer_layout(family: str) -> str:
    return {"llama": "causal", "mt5": "seq2seq"}.get(family, "encoder")


def test_training_batches_of_captured_steps_stay_on_the_host(tmp_path: Path, recorders: Recorders) -> None:
    """GraphedStep reads masks on the host, so accelerate must not move these batches to the device. It moves others."""
    for captured in (False, True):
        trainer = flare.FlareTrainer(
            model=flare_model("bert"),
            args=arguments(tmp_path),
            train_dataset=rows("bert", 4),
            processing_class=tokenizer(),
            cuda_graphs=captured,
        )
        assert (trainer.get_train_dataloader().device is None) == captured
        assert trainer.get_eval_dataloader(rows("bert", 2)).device is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "the model is on cpu"), ({"torch_empty_cache_steps": 2}, "torch_empty_cache_steps frees memory")],
    ids=str,
)
def test_a_trainer_that_cannot_capture_warns_once(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    models = []
    for captured in (False, True):
        model = lora("bert")
        trainer = flare.FlareTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, **options),
            train_dataset=rows("bert", 8, source=False),
            processing_class=tokenizer(),
            cuda_graphs=captured,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        messages = [str(one.message) for one in caught if "cuda_graphs" in str(one.message)]
        assert len(messages) == captured and all(reason in message for message in messages)
        models.append(model)
    for actual, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(actual, expected)
