"""Collect the settings that affect a result, as run.json records them."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...tuner.config import FlareConfig
from ..tasks import TASKS
from ..tasks.parallel_table import ParallelColumns
from ..utils.errors import UserError
from ..utils.processes import process_count
from .run_settings import Settings
from .setup import Data, Setup

# Field of FlareConfig -> the command-line flag that sets it.
_FLAGS = {
    "r": "--r",
    "lora_alpha": "--alpha",
    "lora_dropout": "--dropout",
    "target_modules": "--target-modules",
    "fusion": "--fusion",
    "latent_dim": "--mt-model",
}


def adapter_fields(
    setup: Setup,
    r: int | None,
    alpha: float | None,
    dropout: float | None,
    target_modules: tuple[str, ...] | None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return name -> value of FlareConfig's fields: the recipe's values, overridden by the user's.

    alpha defaults to 2 r, because the paper uses alpha = 128 with r = 64.

    Raises:
        UserError: a name in `more` (the user's --adapter) is not a field of FlareConfig, or has its own flag.
    """
    known = {one.name for one in fields(FlareConfig)}
    for name in more or {}:
        if name in _FLAGS:
            raise UserError(f"--adapter {name}: use {_FLAGS[name]}, the flag of this field")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"--adapter {name}: FlareConfig has no such field" + (f"; did you mean {near[0]}?" if near else "")
            )
    values: dict[str, Any] = dict(setup.recipe.adapter)
    values["r"] = r if r is not None else values["r"]
    values["lora_alpha"] = alpha if alpha is not None else 2 * values["r"]
    if dropout is not None:
        values["lora_dropout"] = dropout
    if target_modules is not None:
        values["target_modules"] = target_modules[0] if len(target_modules) == 1 else list(target_modules)
    return {**values, **(more or {})}


def common_settings(settings: Settings, data: Data, setup: Setup) -> dict[str, Any]:
    """Return the settings that run.json records for every kind of run, without the training arguments."""
    recipe = setup.recipe
    columns: dict[str, Any] = {}
    if isinstance(data.folder, ParallelColumns):
        columns = {"source_column": data.folder.source_columns, "target_column": data.folder.target_columns}
    if data.task.id_columns != TASKS[data.task.name].id_columns:
        columns["id_column"] = list(data.task.id_columns)
    if settings.prompt is not None:
        columns["task_prompt"] = settings.prompt
    if settings.verbalizer:
        columns["verbalizer"] = settings.verbalizer
    return {
        "data": location(str(data.folder or data.task.hub_id or "")),
        **columns,
        "text_columns": list(data.task.text_columns),
        **({"choice_columns": list(data.task.choice_columns)} if data.task.choice_columns else {}),
        "label_column": data.task.label_column,
        "labels": list(data.task.labels or ()) or None,
        "metric": data.task.metrics[0],
        "rows": settings.rows,
        "family": setup.family,
        "max_length": setup.max_length,
        "padding": setup.batches["padding"],
        "dtype": recipe.dtype,
        "quantization": recipe.quantization,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "processes": process_count(),
    }


def location(name: str) -> str:
    """Return the absolute path of an existing file or folder, or a hub id unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
