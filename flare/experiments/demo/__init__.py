"""`flare demo`: cross-lingual transfer in a few minutes on a CPU.

The demo compares zero-shot transfer, plain LoRA, input-level fusion and FLARE. Its data are either the embedded corpus,
which `.corpus` generates, or real parallel data.

from flare.experiments.demo import DemoSettings, run_demo

rows = run_demo(DemoSettings(output="flare-demo", seeds=3))
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..utils.atomic_files import write_json
from ..utils.environment import environment, use_threads
from .demo_settings import DemoError, DemoSettings

__all__ = ["DemoError", "DemoSettings", "run_demo"]


def run_demo(settings: DemoSettings, print_fn: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Compare the methods, and write results.json, run.json, table.md and results.png into the output folder.

    If matplotlib is not installed, results.png is not written.

    Args:
        settings: options of the demo. See `DemoSettings` for fields that are None.
        print_fn: prints a line for the user.

    Returns:
        The rows of results.json: one dict for each seed, method and source, with the macro F1 and the costs.

    Raises:
        DemoError: an option or a file is wrong.
    """
    from . import experiment, report

    settings = replace(settings, output=Path(settings.output)).resolved()
    report.prepare_folder(settings.output)
    threads = torch.get_num_threads()
    if settings.threads is not None:
        use_threads(settings.threads)
    try:
        with experiment.quiet_libraries():
            return _run(settings, print_fn)
    finally:
        torch.set_num_threads(threads)


def _run(settings: DemoSettings, print_fn: Callable[[str], None]) -> list[dict[str, Any]]:
    from . import experiment, report

    start, date = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    task = (experiment.embedded_task if settings.embedded else experiment.real_task)(settings, print_fn)
    print_fn(
        f"Data: {len(task.finetune)} {task.source} sentences to fine-tune the base model, {len(task.train)} "
        f"{task.source}-{task.target} sentence pairs to train the adapters, and {len(task.test)} pairs to test them"
    )
    run = experiment.Experiment(task, settings, print_fn)
    rows: list[dict[str, Any]] = []
    for row in run.rows():
        if not rows:
            # Earlier results stay in place until the first new row exists.
            report.move_earlier_results(settings.output, settings.overwrite, print_fn)
        rows.append(row)
        write_json(settings.output / report.RESULTS, rows)
    run_info = {
        "settings": asdict(settings),
        "languages": {"source": task.source, "target": task.target},
        "sizes": {"finetune": len(task.finetune), "train": len(task.train), "test": len(task.test)},
        "notes": task.notes,
        "source_macro_f1": run.source_f1,
        "seeds": list(range(settings.seeds)),
        "units": {"macro_f1": "percent", "seconds_per_step": "s, median", "peak_bytes": "B", "saved_bytes": "B"},
        "environment": environment(),
        "date": date.isoformat(timespec="seconds"),
        "duration_s": round(time.perf_counter() - start, 1),
    }
    report.finish(settings.output, rows, run_info, print_fn)
    return rows
