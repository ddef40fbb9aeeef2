"""A trained adapter for predictions: the base it began with, the settings it was trained with, and where it runs."""

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


def base_of(record: RunRecord, output: Path) -> Base:
    """Return the base that a run began with; one inside the experiment's folder is named relative to it.

    Raises:
        UserError: it was fine-tuned again since, or its fine-tuning was not finished.
    """
    inside = output / record.base
    if not (inside / "config.json").is_file():
        return Base(record.base, record.base, None)
    base = find_base(output, str(inside), record.seed)
    if base.made != record.settings.get("base_date"):
        raise UserError(
            f"{inside} was fine-tuned again after the adapter {record.target_language}/{record.variant} was trained on "
            "it; train the adapter anew (flare train --no-resume)"
        )
    return base


def as_trained(
    settings: EvaluateSettings, record: RunRecord | None, columns: Mapping[str, Any] | None = None
) -> EvaluateSettings:
    """Return the settings with those of a run where they are not given.

    columns: the columns of both languages in one table, where the data are one.
    """
    there = {} if record is None else record.settings
    known: dict[str, Any] = {
        "max_length": there.get("max_length"),
        "padding": there.get("padding"),
        "form": there.get("family"),
        "metric": there.get("metric"),
        "rows": there.get("rows"),
        "label_column": there.get("label_column"),
        "prompt": there.get("task_prompt"),
        "id_column": tuple(there["id_column"]) if there.get("id_column") else None,
        "text_columns": tuple(there["text_columns"]) if there.get("text_columns") else None,
        "choice_columns": tuple(there["choice_columns"]) if there.get("choice_columns") else None,
        **(columns or {}),
    }
    if record is not None and record.kind == "train":
        known["quantization"] = _quantization(there.get("quantization"))
    merged = replace(settings, **{name: value for name, value in known.items() if getattr(settings, name) is None})
    return replace(merged, verbalizer=settings.verbalizer or there.get("verbalizer") or {})


def batch_and_autocast(
    record: RunRecord, setup: Setup, batch_size: int | None, device: torch.device
) -> tuple[int, torch.dtype | None]:
    """Return rows per batch (twice the training's by default), and the dtype of mixed precision or None.

    Mixed precision is the training's on a GPU; what a GPU trained can be scored without one.
    """
    values = training_values({**setup.recipe.training, **record.training_arguments}, {})
    half = autocast_of(values) if device.type == "cuda" or values.get("use_cpu") else None
    return batch_size or 2 * int(values["per_device_train_batch_size"]), half


def placed(model: Any, setup: Setup, device: torch.device) -> Any:
    """Return the model on a device; a quantised one is there since it was loaded."""
    return model if setup.recipe.quantization is not None else model.to(device)


def _quantization(there: dict[str, Any] | None) -> str:
    if not there:
        return "none"
    return "nf4" if there.get("load_in_4bit") else "int8"
