"""Prepare a trained adapter for predictions: its base, its training settings, and its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Base, find_base
from .fitting import autocast_of, training_values
from .records import RunRecord
from .run_settings import EvaluateSettings
from .setup import Setup

ADAPTER = "adapter"


def base_of_run(record: RunRecord, output: Path) -> Base:
    """Return the base that a run was trained on; run.json may name it relative to the experiment's folder `output`.

    Raises:
        UserError: the base was fine-tuned again after the run, or its fine-tuning is not finished.
    """
    inside = output / record.base
    if not (inside / "config.json").is_file():
        return Base(record.base, record.base, None)
    base = find_base(output, str(inside), record.seed)
    if base.date != record.settings.get("base_date"):
        raise UserError(
            f"{inside} was fine-tuned again after the adapter {record.target_language}/{record.variant} was trained on "
            "it; train the adapter again (flare train --no-resume)"
        )
    return base


def with_run_settings(
    settings: EvaluateSettings, record: RunRecord | None, columns: Mapping[str, Any] | None = None
) -> EvaluateSettings:
    """Return the user's settings; settings that the user did not give are taken from a run.

    Args:
        settings: the user's settings.
        record: run.json of the run, or None.
        columns: {"source_column": ..., "target_column": ...} if the data are one table with both languages.
    """
    saved = {} if record is None else record.settings
    known: dict[str, Any] = {
        "max_length": saved.get("max_length"),
        "padding": saved.get("padding"),
        "form": saved.get("family"),
        "metric": saved.get("metric"),
        "rows": saved.get("rows"),
        "label_column": saved.get("label_column"),
        "prompt": saved.get("task_prompt"),
        "id_column": tuple(saved["id_column"]) if saved.get("id_column") else None,
        "text_columns": tuple(saved["text_columns"]) if saved.get("text_columns") else None,
        "choice_columns": tuple(saved["choice_columns"]) if saved.get("choice_columns") else None,
        **(columns or {}),
    }
    if record is not None and record.kind == "train":
        known["quantization"] = _quantization(saved.get("quantization"))
    merged = replace(settings, **{name: value for name, value in known.items() if getattr(settings, name) is None})
    return replace(merged, verbalizer=settings.verbalizer or saved.get("verbalizer") or {})


def batch_and_autocast(
    record: RunRecord, setup: Setup, batch_size: int | None, device: torch.device
) -> tuple[int, torch.dtype | None]:
    """Return the rows per batch (default: twice the training batch) and the mixed-precision dtype, or None.

    A GPU uses the mixed precision of the training. A CPU uses it only if the training was set to run on a CPU
    (use_cpu), so that adapters trained on a GPU can be scored on a CPU.
    """
    values = training_values({**setup.recipe.training, **record.training_arguments}, {})
    half = autocast_of(values) if device.type == "cuda" or values.get("use_cpu") else None
    return batch_size or 2 * int(values["per_device_train_batch_size"]), half


def to_device(model: Any, setup: Setup, device: torch.device) -> Any:
    """Return the model on a device; a quantised model is returned unchanged, because loading has placed it."""
    return model if setup.recipe.quantization is not None else model.to(device)


def _quantization(saved: dict[str, Any] | None) -> str:
    if not saved:
        return "none"
    return "nf4" if saved.get("load_in_4bit") else "int8"
