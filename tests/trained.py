"""Models with random adapters, and arguments for a short run of a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import TrainingArguments
from two_streams import task_model

from flare import fast_lora

TASKS = {
    "bert": TaskType.SEQ_CLS,
    "bert-tokens": TaskType.TOKEN_CLS,
    "bert-spans": TaskType.QUESTION_ANS,
    "xlmr": TaskType.SEQ_CLS,
    "llama": TaskType.CAUSAL_LM,
    "llama-text": TaskType.CAUSAL_LM,
    "llama-classes": TaskType.SEQ_CLS,
    "mt5": TaskType.SEQ_2_SEQ_LM,
}


def lora(family: str) -> Any:
    """Return PEFT's LoRA model with a random B, so that every adapter weight has a gradient."""
    model = get_peft_model(task_model(family), LoraConfig(r=4, task_type=TASKS[family]))
    return randomised(model)


def flare_model(family: str, **options: Any) -> Any:
    """Return a FLARE model with a random B."""
    return randomised(fast_lora(task_model(family), r=4, **options))


def randomised(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    common = {"learning_rate": 1e-3, "max_grad_norm": 0.0, "use_cpu": True, "seed": 3}
    return TrainingArguments(output_dir=str(folder), **{**quiet, **common, **options})
