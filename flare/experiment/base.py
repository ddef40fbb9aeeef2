"""The base that adapters begin with: what `flare finetune` made, or any other model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..json_files import parsed
from .common import location
from .records import RUN_FILE, RunRecord, diverged, read_record, read_run
from .settings import BASE

PREDICTIONS = "predictions-test.jsonl"


@dataclass(frozen=True)
class Base:
    """model: folder or hub id. shown: what run.json names it. record: of its fine-tuning, None for another model."""

    model: str
    shown: str
    record: RunRecord | None

    @property
    def made(self) -> str | None:
        """When it was fine-tuned: another fine-tuning in the same folder is another base."""
        return None if self.record is None else self.record.date


def find_base(output: Path, base: str | None, seed: int) -> Base:
    """The base for a seed: `base`/seed-N where flare finetune wrote it, `base` itself where it is a model.

    Raises:
        UserError: there is none for this seed, or its fine-tuning was not finished.
    """
    named = Path(base).expanduser() if base is not None else output / BASE
    of_seed = named / f"seed-{seed}"
    if (of_seed / RUN_FILE).is_file():
        return _finetuned(of_seed, output)
    if (named / RUN_FILE).is_file():
        return _finetuned(named, output)
    there = sorted(path.parent.name for path in named.glob(f"seed-*/{RUN_FILE}")) if named.is_dir() else []
    if there:
        raise UserError(
            f"{named} has no base for seed {seed}, only {', '.join(there)}; run flare finetune --seeds {seed}, or "
            f"begin every seed with one base: --base {named / there[0]}"
        )
    if base is None:
        raise UserError(
            f"{named} holds no fine-tuned base; run flare finetune --output {output} first, or name a model with --base"
        )
    return Base(base, location(base), None)


def seeds_of(output: Path, base: str | None) -> list[int]:
    """The seeds that there are bases of; [0] for a model that is no folder of seeds."""
    named = Path(base).expanduser() if base is not None else output / BASE
    found = [path.parent.name.removeprefix("seed-") for path in named.glob(f"seed-*/{RUN_FILE}")]
    return sorted(int(seed) for seed in found if seed.isdigit()) or [0]


def chance_notes(folder: Path) -> list[str]:
    """Return a note where a fine-tuned base is no better than chance on its own language.

    Chance is always answering the most frequent label, and one standard error above it still counts as chance. A base
    of questions is there where no answer matches and F1 is below 5.
    """
    run = read_run(folder)
    scores = run.metrics.test.get("source-language") or run.metrics.valid
    accuracy, matches = scores.get("accuracy"), scores.get("exact_match")
    advice = (
        "adapters on it learn the task anew, or not at all; run flare finetune --no-resume longer or with another --lr"
    )
    start = f"the base {folder} is at chance level on {run.record.source_language}"
    if matches is not None:
        low = matches == 0 and scores.get("f1", 0) < 5
        return [f"{start} (exact match {matches:.1f}, F1 {scores.get('f1', 0):.1f}): {advice}"] if low else []
    if accuracy is None:
        return []
    truths = (
        [str(row["truth"]) for row in read_predictions(folder / PREDICTIONS)]
        if "source-language" in run.metrics.test
        else []
    )
    rows = len(truths) or run.record.data.get("valid") or 0
    labels = len(run.record.settings.get("labels") or ()) or 2
    share = max(map(truths.count, truths)) / len(truths) if truths else 1 / labels
    error = math.sqrt(share * (1 - share) / rows) if rows else 0.0
    if accuracy > 100 * (share + error):
        return []
    return [f"{start} (accuracy {accuracy:.1f}; always the most frequent label: {100 * share:.1f}): {advice}"]


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a predictions file (id, truth, prediction); empty where there is none.

    Raises:
        UserError: a line is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = parsed(line)
            rows.append({name: row[name] for name in ("id", "truth", "prediction")})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a prediction ({reason(error)}); move the file away to go on without it"
            ) from error
    return rows


def _finetuned(folder: Path, output: Path) -> Base:
    record = read_record(folder)
    if what := diverged(read_run(folder)):
        raise UserError(
            f"{folder}: its fine-tuning diverged ({what}); run flare finetune --no-resume with a smaller --lr"
        )
    if not record.done:
        raise UserError(f"{folder}: its fine-tuning is not finished; run flare finetune again, it goes on")
    inside = folder.resolve().is_relative_to(output.resolve())
    # relative where it can be, so that the experiment's folder may move
    shown = folder.resolve().relative_to(output.resolve()).as_posix() if inside else str(folder.resolve())
    return Base(str(folder), shown, record)
