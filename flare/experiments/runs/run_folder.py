"""Open the folder of one run: start or resume the run, skip a finished run, or refuse the folder.

Results and checkpoints are never overwritten. A folder that holds another run or unrelated files is an error.
Restarting a run first moves the files of the earlier run into the folder earlier-N next to its folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..utils.errors import DivergedError, UserError
from ..utils.processes import on_main
from ..utils.result_folders import EARLIER
from .records import DIVERGED, LOG_FILE, METRICS_FILE, RUN_FILE, RunRecord, read_record, write_record

CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
_LOCK_SECONDS = 0.5  # retry for this long, because another process may just be deleting the lock file
# Settings that have no effect on the result.
_NO_EFFECT = {
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


def open_run(folder: Path, record: RunRecord, resume: bool, print_fn: Callable[[str], None]) -> str:
    """Return the state of a run's folder, and write its run.json if the run is new.

    Returns:
        "new" (also for a restarted run), "unfinished" (the same run, to be resumed) or "done".

    Raises:
        UserError: the folder is a file, holds files that do not belong to a run, or holds a run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if not (folder / RUN_FILE).is_file():
        allowed = (LOCK_FILE, f".{RUN_FILE}.")
        foreign = (
            sorted(path.name for path in folder.iterdir() if not path.name.startswith(allowed))
            if folder.is_dir()
            else []
        )
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise UserError(
                f"{folder} holds {shown} and no run.json, so it is not the folder of a run; none of its files was "
                "changed. Choose another --output, or move the folder away"
            )
        write_record(folder, record)
        return "new"
    if not resume:
        return _restarted(folder, record, print_fn)
    saved = read_record(folder)
    differing = differences(saved, record)
    if differing and not saved.done and nothing_to_resume(folder):
        evaluates = record.kind == "evaluate"
        what = "evaluation was not finished" if evaluates else "run ended before its first checkpoint"
        print_fn(f"{folder}: the earlier {what}; it is restarted with the current settings")
        write_record(folder, record)
        return "new"
    if differing:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(differing)}. Give this run "
            f"{'another name (--name) or folder (--output)' if record.kind == 'train' else 'another folder (--output)'}"
            ", or restart the old run with --no-resume, which keeps its files in earlier-N"
        )
    if saved.done:
        return "done"
    if saved.status == DIVERGED and (folder / METRICS_FILE).is_file():  # flare evaluate found it after the training
        return _restarted(folder, record, print_fn)
    if saved.processes != record.processes and record.kind != "evaluate":
        print_fn(
            f"{folder}: the run was started with {saved.processes} processes and is resumed with {record.processes}. "
            "Each step still has the same rows, but dropout draws other masks, and seconds per step are measured anew"
        )
    if saved.status == DIVERGED:
        saved.status = record.status
        write_record(folder, saved)
    return "unfinished"


def _restarted(folder: Path, record: RunRecord, print_fn: Callable[[str], None]) -> str:
    earlier = move_aside(folder)
    print_fn(f"{folder}: restarted; the earlier run is in {earlier}")
    write_record(folder, record)
    return "new"


def nothing_to_resume(folder: Path) -> bool:
    """Return whether an unfinished run left nothing to resume from, for instance after an error in its data."""
    allowed = (LOCK_FILE, RUN_FILE, f".{RUN_FILE}.", LOG_FILE, CHECKPOINTS)
    only_ours = all(path.name.startswith(allowed) for path in folder.iterdir())
    return only_ours and not any(_checkpoints(folder))


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run. Other files next to them, such as TensorBoard's events, are kept."""
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty, or missing
        (folder / CHECKPOINTS).rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, also the damaged ones."""
    return list((folder / CHECKPOINTS).glob("*checkpoint-*"))


def differences(saved: RunRecord, current: RunRecord) -> list[str]:
    """Return a line for each setting that affects the result and differs between two records."""
    lines = []
    # convert to JSON types (a tuple becomes a list), because the saved record was read from JSON
    current = RunRecord(**json.loads(json.dumps(vars(current), default=str)))
    for name in (*_IDENTITY, *_IDENTITY_TEXT):
        if getattr(saved, name) != getattr(current, name):
            lines.append(f"{name} was {_shown(getattr(saved, name))} and is now {_shown(getattr(current, name))}")
    for part in ("settings", "training_arguments"):
        before, now = getattr(saved, part), getattr(current, part)
        for name in sorted({*before, *now} - _NO_EFFECT):
            if before.get(name) != now.get(name):
                lines.append(f"{name} was {_shown(before.get(name))} and is now {_shown(now.get(name))}")
    return lines


def move_aside(folder: Path) -> Path:
    """Move the files of a run into the folder earlier-N next to its folder, and return their new folder.

    The run's folder stays, with its lock. run.json is moved last, so that an interrupted move can be repeated.
    """
    number = 1
    while (folder.parent / f"{EARLIER}{number}" / folder.name).exists():
        number += 1
    target = folder.parent / f"{EARLIER}{number}" / folder.name
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if path.name != LOCK_FILE:
            path.rename(target / path.name)
    return target


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder; the main process takes the lock for all processes of the run.

    The operating system frees the lock when the process that holds it ends.

    Raises:
        UserError: another command works in the folder, or the folder cannot be written to. Every process of the run
            raises it.
    """
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(_locked_here(folder)))
        yield


@contextlib.contextmanager
def _locked_here(folder: Path) -> Iterator[None]:
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=_LOCK_SECONDS)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is working on this run; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written to or locked ({error}); choose another --output") from error
    try:
        yield
    except DivergedError as error:
        _record_failure(folder, error)
        raise DivergedError(f"{folder}: {error}") from error
    except UserError as error:
        _record_failure(folder, error)
        raise
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _record_failure(folder: Path, error: UserError) -> None:
    """Mark a diverged run in its run.json; after another error, delete the files of a run with nothing to resume.

    If its run.json were kept, a run that failed to start (for instance because of its data) would look like a run in
    progress.
    """
    if not (folder / RUN_FILE).is_file():
        return
    record = read_record(folder)
    if isinstance(error, DivergedError):
        record.status = DIVERGED
        write_record(folder, record)
    elif not record.done and nothing_to_resume(folder):
        for name in (LOG_FILE, RUN_FILE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else "not given" if value is None else json.dumps(value)
