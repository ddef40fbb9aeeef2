"""run.json and metrics.json: what a run is and what came out of it.

Both are written whole or not at all, so that a killed process leaves the older file. This module knows nothing of
models or data: the report reads runs through it alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json
from ..utils.errors import UserError
from ..utils.json_files import parsed, read_object
from ..utils.result_folders import EARLIER

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
LOG_FILE = "log.jsonl"
DIVERGED = "diverged"
#: In a note: the score of a finished run is not of the data that are there now.
STALE = "its results are of other data:"


class RecordError(UserError):
    """A run.json or metrics.json that cannot be read."""


@dataclass
class RunRecord:
    """run.json.

    kind: "finetune" (base/seed-N), "train" (an adapter) or "evaluate" (the base in a setting without training).
    status: "running" until everything is written, then "done"; "diverged" where weights or logits were not finite.
    task: name of the task ("nusax", "xnli", "tydiqa", "classification", "qa").
    source_language, target_language: the user's names; target_language is None for a finetuned base.
    method: "finetune", "lora", "input-fusion", "x-mixup", "flare", "flare-mt", "zero-shot" or "translate-test".
    variant: name of the run's folder: the method with what departs from the defaults.
    fusion: name of the fusion function (flare and flare-mt), else None.
    r: rank of the adapters; None where nothing was adapted.
    source_text: "gold", "mt", or None where no source text is read.
    target_text: text the adapters are trained on: "gold" or "mt".
    seed: of initialisation, shuffling and dropout.
    settings: everything that decides about the result, by name.
    training_arguments: the TrainingArguments that were given or come from the defaults of the paper, by name.
    base: folder or hub id of the model the run begins with.
    trainable_parameters: how many numbers were trained.
    environment: versions, commit, device (`flare.experiments.utils.environment.environment`).
    date: when it began, ISO 8601.
    data: {"train": rows, "valid": rows, "test": rows, "notes": [...], "translation": provenance or None, "digest":
        {split: SHA-256 of the target's rows, "split/gold" or "split/mt": of the source's}, "source_cache": {"mode",
        "on", "rows", "bytes_needed", "bytes_free", "budget", "reason"} of a fusing run}.
    """

    kind: str
    status: str
    task: str
    source_language: str
    target_language: str | None
    method: str
    variant: str
    seed: int
    fusion: str | None = None
    r: int | None = None
    source_text: str | None = None
    target_text: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    training_arguments: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    trainable_parameters: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the run was finished."""
        return self.status == "done"

    @property
    def processes(self) -> int:
        """How many processes shared the work; of a training that another number resumed, the last one."""
        return int(self.settings.get("processes") or 1)


@dataclass
class Metrics:
    """metrics.json; what a run did not measure is None or empty.

    valid: metric -> percent on the validation split, of the checkpoint that was chosen.
    test: setting -> metric -> percent. Settings: "translate-train" (adapters; source text as in training),
        "translate-train/gold" or "/mt" (with the other source text), "zero-shot", "translate-test",
        "source-language" (a finetuned base on its own language).
    train_seconds: of the training, evaluation and checkpoints included, over all sittings.
    seconds_per_step: median of forward, backward and optimizer step.
    steps: optimizer steps.
    peak_bytes: of one training step in one process, weights and optimizer state included.
    peak_kind: "cuda peak" or "live tensors".
    bottleneck: {"S": [mean |S| per layer], "T": [mean |T|], "layers": [names]} over the test rows; fusing runs only.
    best_checkpoint: step of the checkpoint that was chosen.
    source_cache: {"bytes", "rows", "hits", "hit_rate", "seconds_saved"} of the last sitting where source states were
        kept between epochs; run.json says with what budget, or why they were not.
    """

    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, dict[str, float]] = field(default_factory=dict)
    train_seconds: float | None = None
    seconds_per_step: float | None = None
    steps: int | None = None
    peak_bytes: int | None = None
    peak_kind: str | None = None
    bottleneck: dict[str, list[Any]] | None = None
    best_checkpoint: int | None = None
    source_cache: dict[str, Any] | None = None


@dataclass
class Run:
    """A run's folder with what stands in it; `metrics` is empty as long as nothing was measured."""

    folder: Path
    record: RunRecord
    metrics: Metrics = field(default_factory=Metrics)


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """The run.json of a folder.

    Raises:
        RecordError: it is missing, damaged, or lacks a field.
    """
    return _read(Path(folder) / RUN_FILE, RunRecord)


def write_record(folder: str | os.PathLike[str], record: RunRecord) -> None:
    """Write run.json, whole or not at all; the folder is made where it is missing."""
    write_json(Path(folder) / RUN_FILE, asdict(record))


def read_metrics(folder: str | os.PathLike[str]) -> Metrics:
    """The metrics.json of a folder; empty where there is none yet.

    Raises:
        RecordError: it is damaged.
    """
    path = Path(folder) / METRICS_FILE
    return _read(path, Metrics) if path.is_file() else Metrics()


def write_metrics(folder: str | os.PathLike[str], metrics: Metrics) -> None:
    """Write metrics.json, whole or not at all."""
    write_json(Path(folder) / METRICS_FILE, asdict(metrics))


def diverged(run: Run) -> str | None:
    """Return what of a run is not finite, from its status, its log and its bottleneck; None where nothing is."""
    if run.record.status == DIVERGED:
        return "its weights or logits are not finite"
    sizes = run.metrics.bottleneck or {}
    if any(isinstance(one, float) and not math.isfinite(one) for name in ("S", "T") for one in sizes.get(name, [])):
        return "its bottleneck is not finite"
    lines = []
    path = run.folder / LOG_FILE
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # torn by a kill
            lines.append(parsed(line))
    losses = [line["loss"] for line in lines if isinstance(line, dict) and isinstance(line.get("loss"), float)]
    norms = [line["grad_norm"] for line in lines if isinstance(line, dict) and isinstance(line.get("grad_norm"), float)]
    if not all(map(math.isfinite, losses)):
        return "its loss is not finite"
    if norms and math.isnan(norms[-1]) and not run.record.training_arguments.get("fp16"):  # a scaler skips such steps
        return "its gradient is not finite"
    return None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """run.json and metrics.json of a folder.

    Raises:
        RecordError: as `read_record` and `read_metrics`.
    """
    return Run(Path(folder), read_record(folder), read_metrics(folder))


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Every run in a folder and below it, finished or not, sorted by path.

    What was kept beside a run that started anew (earlier-N) and a run's own sub-folders are left out.

    Raises:
        RecordError: the folder is missing, or a run.json or metrics.json in it is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RecordError(f"{root}: no such folder; runs are written by flare finetune, train and evaluate")
    return [read_run(found) for found in sorted(_run_folders(root))]


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / RUN_FILE).is_file():
        yield folder
        return
    for below in folder.iterdir():
        if below.is_dir() and not below.is_symlink() and not below.name.startswith((EARLIER, ".")):
            yield from _run_folders(below)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        content = read_object(path)
    except FileNotFoundError:
        raise RecordError(f"{path} is missing: {path.parent} holds no run") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}; move it away or run the command again") from error
    known = {one.name for one in fields(kind)}
    for one in fields(kind):
        if one.name in content and not _fits(content[one.name], str(one.type)):
            shown = json.dumps(content[one.name])[:60]
            raise RecordError(f"{path}: {one.name} must be {one.type}; got {shown}. It was not written by flare")
    try:
        # Keys of a later version are left out, so that older reports read newer runs.
        return kind(**{key: value for key, value in content.items() if key in known})
    except TypeError as error:
        raise RecordError(f"{path} lacks something: {error}; it was not written by flare") from error


_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict}


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value of a JSON file is what a field holds: a kind, or None where the annotation has it."""
    if value is None:
        return annotation.endswith("None")
    return isinstance(value, _KINDS[annotation.partition("[")[0].partition(" ")[0]]) and not isinstance(value, bool)
