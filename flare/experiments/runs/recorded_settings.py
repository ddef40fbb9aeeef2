"""What the runs of all commands share: a claimed folder, what decides about a result, and lines about it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...tuner.config import FlareConfig
from ..tasks import TASKS
from ..tasks.parallel_table import ParallelColumns
from ..utils.errors import UserError
from ..utils.processes import is_main, on_main, process_count
from .records import Metrics
from .run_folder import locked
from .run_settings import Settings
from .setup import Data, Setup

# FlareConfig's fields that have a flag of their own.
_FLAGS = {
    "r": "--r",
    "lora_alpha": "--alpha",
    "lora_dropout": "--dropout",
    "target_modules": "--target-modules",
    "fusion": "--fusion",
    "latent_dim": "--mt-model",
}


class claimed:
    """A run's folder, locked by the main process; inside, the object calls something there and tells all processes."""

    def __init__(self, folder: Path) -> None:
        self._lock = locked(folder) if is_main() else None

    def __enter__(self) -> Callable[[Callable[[], str]], str]:
        if process_count() == 1:
            assert self._lock is not None
            self._lock.__enter__()
        else:
            lock = self._lock
            on_main(lambda: lock.__enter__() if lock is not None else None)
        return on_main

    def __exit__(self, *error: Any) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)


def expect_no_source() -> None:
    """Silence the warnings of a fusing adapter without a source, where that is the setting (train_only_fusion)."""
    warnings.filterwarnings("ignore", "A fusing adapter (predicts|was trained) without a source")


def adapter_fields(
    setup: Setup,
    r: int | None,
    alpha: float | None,
    dropout: float | None,
    target_modules: tuple[str, ...] | None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """FlareConfig's fields: the recipe's, with what was given. alpha is 2 r unless given, as the paper's 128 for 64.

    Raises:
        UserError: a name that is no field of FlareConfig, or one with a flag of its own.
    """
    known = {one.name for one in fields(FlareConfig)}
    for name in more or {}:
        if name in _FLAGS:
            raise UserError(f"--adapter {name}: use {_FLAGS[name]}, by which runs are told apart")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"--adapter {name}: no field of FlareConfig" + (f"; did you mean {near[0]}?" if near else "")
            )
    made: dict[str, Any] = dict(setup.recipe.adapter)
    made["r"] = r if r is not None else made["r"]
    made["lora_alpha"] = alpha if alpha is not None else 2 * made["r"]
    if dropout is not None:
        made["lora_dropout"] = dropout
    if target_modules is not None:
        made["target_modules"] = target_modules[0] if len(target_modules) == 1 else list(target_modules)
    return {**made, **(more or {})}


def common_settings(settings: Settings, data: Data, setup: Setup) -> dict[str, Any]:
    """What decides about every kind of run and is no training argument."""
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
    """A folder's absolute path; a hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def summary(scores: dict[str, float], metrics: Metrics) -> str:
    """One line about a finished run."""
    words = [f"{name} {value:.1f}" for name, value in scores.items()]
    if metrics.seconds_per_step is not None:
        words.append(f"{1000 * metrics.seconds_per_step:.0f} ms/step")
    if metrics.train_seconds is not None:
        words.append(f"{metrics.train_seconds:.0f} s")
    return ", ".join(words)
