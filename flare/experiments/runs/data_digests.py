"""Record digests of the rows that a run is trained and scored on, to detect later that the rows have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..utils.errors import UserError
from .records import STALE, read_record, write_record
from .run_folder import nothing_to_resume


def record_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the digests of a run's data into its run.json, before training.

    Raises:
        UserError: the run would resume from a checkpoint, and its rows have changed since the run began.
    """
    record = read_record(folder)
    changed = _changed(record.data.get("digest") or {}, digests)
    if changed and not nothing_to_resume(folder):
        raise UserError(
            f"{folder}: the {', '.join(changed)} rows have changed since this run began, so it cannot be resumed; "
            "restore the rows, or restart the run with --no-resume, which keeps the old run in earlier-N"
        )
    record.data = {**record.data, "digest": dict(digests)}
    write_record(folder, record)


def note_changed_rows(folder: Path, name: str, digests: Mapping[str, str]) -> list[str]:
    """Write into a finished run's run.json which rows have changed since the run was trained or scored.

    Args:
        folder: folder of the run.
        name: name of the run, for the notes.
        digests: rows ("train", "train/gold", "test", ...) -> digest of the current version of these rows.

    Returns:
        One note for each digest that has changed.
    """
    record = read_record(folder)
    changed = _changed(record.data.get("digest") or {}, digests)
    lines = {split: f"{name}: {STALE} the {split} rows have changed since" for split in digests}
    before = record.data.get("notes") or []
    notes = [note for note in before if note not in lines.values()] + [lines[split] for split in changed]
    if notes != before:
        record.data["notes"] = notes
        write_record(folder, record)
    return [lines[split] for split in changed]


def _changed(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    return [split for split in current if split in saved and saved[split] != current[split]]
