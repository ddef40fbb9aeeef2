"""Helpers for the tests of `flare report`: they write folders of runs and check figures."""

from __future__ import annotations

from pathlib import Path

from flare.experiments.report.collect import collect
from flare.experiments.runs.records import (
    Metrics,
    RunRecord,
    write_metrics,
    write_record,
)

ENVIRONMENT = {"commit": "c0ffee", "device": "cpu", "cpu": "some", "threads": 1, "versions": {"torch": "2.13.0"}}


def make_run(
    root: Path,
    language: str | None,
    method: str,
    seed: int,
    score: float | None,
    *,
    variant: str | None = None,
    status: str = "done",
    task: str = "nusax",
    source: str = "english",
    settings: dict | None = None,
    setting: str | None = None,
    measured: dict | None = None,
    **record,
) -> Path:
    """Write run.json and metrics.json of one run into the folder where the `flare` commands would write them.

    Args:
        root: folder of all runs.
        language: target language, or None for a fine-tuned base.
        method: adapter method, "finetune" or "zero-shot".
        seed: seed of the run.
        score: macro F1 on the test rows, in percent, or None for a run without test scores.
        variant: the method with its options, such as "flare-r8", or a name that a user gave; None: the method.
        status: status in run.json.
        task: name of the task.
        source: the source language.
        settings: settings in run.json.
        setting: the evaluation that gave the score, a key of `Metrics.test`. None: "source-language" for a fine-tuned
            base, "zero-shot" for zero-shot, and "translate-train" for all other methods.
        measured: further fields of `Metrics`.
        record: further fields of `RunRecord`.

    Returns:
        The folder of the run.
    """
    variant = variant or method
    kind = {"finetune": "finetune", "zero-shot": "evaluate"}.get(method, "train")
    folder = root / (language or "base") / (variant if language else "") / f"seed-{seed}"
    run_record = RunRecord(
        kind=kind,
        status=status,
        task=task,
        source_language=source,
        target_language=language,
        method=method,
        variant=variant,
        seed=seed,
        settings=settings or {},
        base="tiny-bert" if kind == "finetune" else str(root / "base" / f"seed-{seed}"),
        environment=ENVIRONMENT,
        date="2026-11-21T10:00:00",
        data={"train": 10, "test": 5},
        **record,
    )
    write_record(folder, run_record)
    name = setting or {"finetune": "source-language", "zero-shot": "zero-shot"}.get(method, "translate-train")
    test = {} if score is None else {name: {"macro_f1": score}}
    write_metrics(folder, Metrics(test=test, **(measured or {})))
    return folder


def group_of(root: Path):
    """Return the only group of runs below a folder. Its runs have the same task, source language and base model."""
    (group,) = collect([root]).groups
    return group


def is_drawn(path: Path) -> bool:
    """Return whether an image has more than 300 pixels per side, and more than 1 % of its pixels are not white."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return min(pixels.shape[:2]) > 300 and ((pixels < 0.95).any(-1).mean() > 0.01)
