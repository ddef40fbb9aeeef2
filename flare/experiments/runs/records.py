"""Read and write run.json (the settings of a run) and metrics.json (its results).

Both files are written atomically, so that a killed process leaves the older file intact. The report reads these files
only through this module, which therefore imports no code for models or data.
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
#: Words in every note about rows that have changed since a finished run was scored.
STALE = "its results are of other data:"


class RecordError(UserError):
    """A file of a run cannot be read, or a folder of runs is missing."""


@dataclass
class RunRecord:
    """Contents of run.json.

    kind: "finetune" (fine-tuning of a base), "train" (training of an adapter) or "evaluate" (the base, scored without
        further training).
    status: "running" until everything is written, then "done"; "diverged" if weights, losses or logits were not
        finite.
    task: name of the task, for example "nusax" or "classification".
    source_language, target_language: names of the languages, as the user wrote them; target_language is None for the
        fine-tuning of a base.
    method: "finetune", "lora", "input-fusion", "x-mixup", "flare", "flare-mt", "zero-shot" or "translate-test".
    variant: name of the folder that holds the run's folder seed-N: the method and each setting that is not the default,
        the name that the user gave with --name, or "base" for a fine-tuning.
    fusion: name of the fusion function (flare and flare-mt), else None.
    r: rank of the adapters; None if the run has no adapters.
    source_text: source text that the run reads, "gold" (written by people) or "mt" (machine-translated); None if it
        reads none.
    target_text: target text that the adapters are trained on, "gold" or "mt"; None if the run trains no adapters.
    seed: random seed of initialisation, shuffling and dropout.
    settings: name -> value of every setting that affects the result and is not a training argument, and the number of
        processes.
    training_arguments: name -> value of the TrainingArguments fields that the user or the paper's recipe sets.
    base: folder or hub id of the model that the run starts from.
    trainable_parameters: number of trained parameters.
    environment: versions, commit, device (`flare.experiments.utils.environment.environment`).
    date: start of the run, ISO 8601.
    data: facts about the data. "train", "valid" and "test" hold the number of rows of each split, "notes" the notes
        printed for the user, and "translation" the provenance of machine-translated text or None. "digest" maps a
        split to the SHA-256 of its target rows, and "<split>/gold" or "<split>/mt" to the SHA-256 of its source rows;
        "test-gold" or "test-mt" are the test rows of the score with the other source text than in training.
        A run of method "flare" also has "source_cache": {"mode", "on", "rows", "bytes_needed", "bytes_free",
        "budget", "reason"} (`flare.experiments.runs.caching`).
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
        """Whether the run is finished."""
        return self.status == "done"

    @property
    def processes(self) -> int:
        """Number of processes that shared the work. If a resume changed the number, this is the newest number."""
        return int(self.settings.get("processes") or 1)


@dataclass
class Metrics:
    """Contents of metrics.json; values that a run did not measure are None or empty.

    valid: metric -> percent on the validation split, for the selected checkpoint.
    test: evaluation -> metric -> percent on the test split. The evaluations of an adapter are "translate-train" (with
        the source text of its training) and "translate-train/gold" or "translate-train/mt" (with the other source
        text). The evaluations of a base are "zero-shot", "translate-test" and "source-language" (the language that it
        was fine-tuned on).
    train_seconds: training time, including evaluation and checkpoints, and including the time before a resume.
    seconds_per_step: median time of a step (forward, backward and optimizer).
    steps: number of optimizer steps.
    peak_bytes: peak memory of one training step in one process, including weights and optimizer state.
    peak_kind: how peak_bytes was measured, "cuda peak" or "live tensors".
    bottleneck: sizes of the rank-r bottlenecks S (source) and T (target) over the first 256 test rows: {"S": [mean |S|
        of each layer], "T": [mean |T| of each layer], "layers": [names of the layers]}. None if no test rows were
        fused.
    best_checkpoint: step of the selected checkpoint.
    source_cache: {"bytes", "rows", "hits", "hit_rate", "seconds_saved"} if the source states were cached between
        epochs, counted since the start or the last resume. run.json has the budget, or the reason for no cache.
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
    """A run's folder with its run.json and metrics.json; `metrics` is empty until something is measured."""

    folder: Path
    record: RunRecord
    metrics: Metrics = field(default_factory=Metrics)


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Return the contents of a folder's run.json.

    Raises:
        RecordError: the file is missing, damaged, or lacks a field.
    """
    return _read(Path(folder) / RUN_FILE, RunRecord)


def write_record(folder: str | os.PathLike[str], record: RunRecord) -> None:
    """Write run.json atomically; create the folder if it is missing."""
    write_json(Path(folder) / RUN_FILE, asdict(record))


def read_metrics(folder: str | os.PathLike[str]) -> Metrics:
    """Return the contents of a folder's metrics.json; empty `Metrics` if the file does not exist.

    Raises:
        RecordError: the file is damaged.
    """
    path = Path(folder) / METRICS_FILE
    return _read(path, Metrics) if path.is_file() else Metrics()


def write_metrics(folder: str | os.PathLike[str], metrics: Metrics) -> None:
    """Write metrics.json atomically."""
    write_json(Path(folder) / METRICS_FILE, asdict(metrics))


def result_line(scores: dict[str, float], metrics: Metrics) -> str:
    """Return the scores and costs of a finished run in one line."""
    parts = [f"{name} {value:.1f}" for name, value in scores.items()]
    if metrics.seconds_per_step is not None:
        parts.append(f"{1000 * metrics.seconds_per_step:.0f} ms/step")
    if metrics.train_seconds is not None:
        parts.append(f"{metrics.train_seconds:.0f} s")
    return ", ".join(parts)


def diverged(run: Run) -> str | None:
    """Return which value of a run is not finite, as text, or None if the run did not diverge."""
    if run.record.status == DIVERGED:
        return "its weights, losses or logits are not finite"
    bottleneck = run.metrics.bottleneck or {}
    means = [*bottleneck.get("S", []), *bottleneck.get("T", [])]
    if any(isinstance(mean, float) and not math.isfinite(mean) for mean in means):
        return "its bottleneck is not finite"
    lines = []
    path = run.folder / LOG_FILE
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # the process was killed while it wrote this line
            lines.append(parsed(line))
    losses = [line["loss"] for line in lines if isinstance(line, dict) and isinstance(line.get("loss"), float)]
    norms = [line["grad_norm"] for line in lines if isinstance(line, dict) and isinstance(line.get("grad_norm"), float)]
    if not all(map(math.isfinite, losses)):
        return "its loss is not finite"
    # with fp16, the loss scaler skips steps whose gradient is not finite
    if norms and math.isnan(norms[-1]) and not run.record.training_arguments.get("fp16"):
        return "its gradient is not finite"
    return None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Return a folder's run.json and metrics.json.

    Raises:
        RecordError: see `read_record` and `read_metrics`.
    """
    return Run(Path(folder), read_record(folder), read_metrics(folder))


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Return every run in a folder and below it, finished or not, sorted by path.

    Sub-folders of a run, symbolic links and hidden folders are skipped, and so are the folders earlier-N, which hold
    the runs that a restart replaced.

    Raises:
        RecordError: the folder is missing, or a run.json or metrics.json in it is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RecordError(
            f"{root}: this folder does not exist; name the output folder of flare finetune, train or evaluate"
        )
    return [read_run(run_folder) for run_folder in sorted(_run_folders(root))]


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
        raise RecordError(f"{path} is missing, so {path.parent} is not the folder of a run") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}; move the file away or run the command again") from error
    known = {one.name for one in fields(kind)}
    for one in fields(kind):
        if one.name in content and not _fits(content[one.name], str(one.type)):
            shown = json.dumps(content[one.name])[:60]
            raise RecordError(f"{path}: {one.name} must be {one.type}; got {shown}. flare did not write this file")
    try:
        # unknown keys are skipped, so that an older version can read the runs of a newer version
        return kind(**{key: value for key, value in content.items() if key in known})
    except TypeError as error:
        raise RecordError(f"{path} is incomplete ({error}); flare did not write this file") from error


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict}


def _fits(value: Any, annotation: str) -> bool:
    """Return whether a JSON value has the type of a field's annotation."""
    if value is None:
        return annotation.endswith("None")
    return isinstance(value, _TYPES[annotation.partition("[")[0].partition(" ")[0]]) and not isinstance(value, bool)
