"""Data known by content: what a run was trained and scored on, and whether that has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..utils.errors import UserError
from .records import STALE, read_record, write_record
from .run_folder import nothing_came_of_it


def remember(folder: Path, digests: Mapping[str, str]) -> str:
    """Write the digests of a run's data into its run.json, before it is trained.

    Raises:
        UserError: the run goes on from a checkpoint, and its rows have changed since.
    """
    record = read_record(folder)
    changed = _changed(record.data.get("digest") or {}, digests)
    if changed and not nothing_came_of_it(folder):
        raise UserError(
            f"{folder}: the {', '.join(changed)} rows have changed since this run began, so it cannot go on; "
            "restore them, or start it anew with --no-resume, which keeps the old one beside it"
        )
    record.data = {**record.data, "digest": dict(digests)}
    write_record(folder, record)
    return ""


def mark(folder: Path, name: str, digests: Mapping[str, str]) -> list[str]:
    """Note in a finished run's run.json which rows have changed since it was trained or scored; returns the notes."""
    record = read_record(folder)
    there = record.data.get("digest") or {}
    changed = _changed(there, digests)
    lines = {one: f"{name}: {STALE} the {one} rows have changed since" for one in digests}
    before = record.data.get("notes") or []
    notes = [note for note in before if note not in lines.values()] + [lines[one] for one in changed]
    if notes != before:
        record.data["notes"] = notes
        write_record(folder, record)
    return [lines[one] for one in changed]


def _changed(there: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [one for one in now if one in there and there[one] != now[one]]
