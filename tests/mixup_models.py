"""Tiny X-Mixup models and their batches."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor
from two_streams import rows, task_model, tokenizer

from flare.baselines import x_mixup
from flare.training.collator import FlareDataCollator

LAYER = 1


def mixup_model(task: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Return a tiny X-Mixup model of a task, with random A and B, and with X-Mixup's w and b changed to constants."""
    return randomised(x_mixup(task_model(task).to(dtype), r=4, layer=LAYER, **options))


def randomised(model: Any) -> Any:
    """Set A and B to random values, and X-Mixup's parameters w and b to constants."""
    tiny.randomize_lora(model)
    for name, parameter in model.named_parameters():
        if "x_mixup" in name:
            torch.nn.init.constant_(parameter, 0.7 if "weight" in name else -0.9)
    return model


def batch(task: str, count: int = 3, seed: int = 5, **options: Any) -> dict[str, Tensor]:
    inputs = FlareDataCollator(tokenizer(), layout="seq2seq" if task == "mt5" else "auto", **options)(
        with_source_labels(task, rows(task, count, seed))
    )
    return dict(inputs)


def with_source_labels(task: str, task_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add labels of the source text to the rows, if the task needs them. A causal source text also gets an answer."""
    for row in task_rows:
        ids = row["source_input_ids"]
        if task == "bert-spans":
            row |= {"source_start_positions": 1, "source_end_positions": len(ids) - 2}
        if task == "llama":
            row["source_labels"] = [-100] * len(ids) + [9, 8]
            row["source_input_ids"] = [*ids, 9, 8]
    return task_rows
