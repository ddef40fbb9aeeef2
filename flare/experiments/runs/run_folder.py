"""The folder of one run: begun anew, gone on with, skipped because it is finished, or refused.

Nothing that is there is ever written over: a folder that holds another run or somebody's files is an error, and a run
that is started anew moves to earlier-N beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..utils.errors import DivergedError, UserError
from ..utils.result_folders import EARLIER
from .records import DIVERGED, LOG_FILE, RUN_FILE, RunRecord, read_record, write_record

CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
# These change nothing about what comes out.
_FREE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "processes",
    "report_to",
    "run_name",
    "save_total_limit",
}
_IDENTITY = ("kind", "task", "source_language", "target_language", "method", "seed", "fusion", "r", "base")
_IDENTITY_TEXT = ("source_text", "target_text")


def open_run(folder: Path, record: RunRecord, resume: bool, say: Callable[[str], None]) -> str:
    """Claim a folder for a run: "new" (its run.json is written), "unfinished" (the same run, to go on with) or "done".

    Raises:
        UserError: the folder holds a run with other settings, or files that are no run's.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if not (folder / RUN_FILE).is_file():
        ours = (LOCK_FILE, f".{RUN_FILE}.")
        foreign = (
            sorted(one.name for one in folder.iterdir() if not one.name.startswith(ours)) if folder.is_dir() else []
        )
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise UserError(
                f"{folder} holds {shown} and no run.json, so it is no run of flare; nothing there was touched: choose "
                "another --output, or move it away"
            )
        write_record(folder, record)
        return "new"
    if not resume:
        kept = make_room(folder)
        say(f"{folder}: started anew, the earlier run is in {kept}")
        write_record(folder, record)
        return "new"
    there = read_record(folder)
    differing = differences(there, record)
    if differing and not there.done and nothing_came_of_it(folder):
        say(f"{folder}: the run there ended before its first checkpoint; it begins anew, with the settings of now")
        write_record(folder, record)
        return "new"
    if differing:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(differing)}. Give this run "
            f"{'another name (--name) or folder (--output)' if record.kind == 'train' else 'another folder (--output)'}"
            ", or start it anew with --no-resume, which keeps the old one beside it"
        )
    if there.done:
        return "done"
    if there.processes != record.processes and record.kind != "evaluate":
        say(
            f"{folder}: begun with {there.processes} processes and resumed with {record.processes}: the rows of a step "
            "are the same, dropout draws other masks, and seconds per step are measured anew"
        )
    return "unfinished"


def nothing_came_of_it(folder: Path) -> bool:
    """Whether an unfinished run left nothing to go on from, as after an error in its data: there is nothing to lose."""
    ours = (LOCK_FILE, RUN_FILE, f".{RUN_FILE}.", LOG_FILE, CHECKPOINTS)
    return all(one.name.startswith(ours) for one in folder.iterdir()) and not any((folder / CHECKPOINTS).glob("*"))


def differences(there: RunRecord, now: RunRecord) -> list[str]:
    """What decides about a result and differs, in words."""
    found = []
    # through JSON, as what is read from the file was
    now = RunRecord(**json.loads(json.dumps(vars(now), default=str)))
    for name in (*_IDENTITY, *_IDENTITY_TEXT):
        if getattr(there, name) != getattr(now, name):
            found.append(f"{name} is {_shown(getattr(there, name))} there and {_shown(getattr(now, name))} now")
    for part in ("settings", "training_arguments"):
        one, other = getattr(there, part), getattr(now, part)
        for name in sorted({*one, *other} - _FREE):
            if one.get(name) != other.get(name):
                found.append(f"{name} is {_shown(one.get(name))} there and {_shown(other.get(name))} now")
    return found


def make_room(folder: Path) -> Path:
    """Move a run's folder to earlier-N/<its name> beside it; returns where it is now."""
    number = 1
    while (folder.parent / f"{EARLIER}{number}" / folder.name).exists():
        number += 1
    kept = folder.parent / f"{EARLIER}{number}" / folder.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(kept)
    return kept


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run's folder; the lock dies with the process.

    Raises:
        UserError: another process works in it, or it cannot be written to.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _held(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}); choose another --output") from error
    with lock:
        try:
            yield
        except DivergedError as error:
            _mark(folder, error)
            raise DivergedError(f"{folder}: {error}") from error
        except UserError as error:
            _mark(folder, error)
            raise
        finally:
            path.unlink(missing_ok=True)


def _mark(folder: Path, error: UserError) -> None:
    """Remove the record of a run that its data or options kept from beginning: it would look like one under way.

    A run that diverged keeps it, marked as such: none of its scores counts.
    """
    if not (folder / RUN_FILE).is_file():
        return
    record = read_record(folder)
    if isinstance(error, DivergedError):
        record.status = DIVERGED
        write_record(folder, record)
    if not record.done and nothing_came_of_it(folder):
        for name in (LOG_FILE, RUN_FILE):
            (folder / name).unlink(missing_ok=True)
        if (folder / CHECKPOINTS).is_dir():
            (folder / CHECKPOINTS).rmdir()


def _held(path: Path) -> IO[str]:
    """A lock file, open and locked."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
        except FileNotFoundError:  # its holder was done, and removed it, since it was opened: it locks nobody out
            file.close()
        except BlockingIOError:
            file.close()
            raise UserError(f"{path.parent}: another process is working on this run; wait for it or stop it") from None
        except OSError as error:
            file.close()
            raise UserError(
                f"{path.parent} cannot be locked ({error}); choose an --output on another file system"
            ) from error


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else "not given" if value is None else json.dumps(value)
