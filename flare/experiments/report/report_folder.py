"""The report's folder: made by this command or left alone; an earlier report is kept unless told otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.json_files import read_object
from ..utils.result_folders import check_writable, move_earlier
from .collect import ReportError

REPORT, TEXT, RAW, TABLES, PICTURES = "report.json", "report.md", "runs.csv", "tables", "pictures"
_OURS = (REPORT, TEXT, RAW, TABLES, PICTURES)
MADE_BY = "flare report"
_SCRATCH = ".flare-report-unfinished"


def check(folder: Path) -> None:
    """See that a report may be written here, before any work is done.

    Raises:
        ReportError: the path is a file, cannot be written to, or holds something that is no report.
    """
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"--output {folder} is a file; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_report(folder):
        raise ReportError(
            f"--output {folder} holds files that flare report did not write; name another folder (nothing was touched)"
        )
    try:
        check_writable(folder)
    except OSError as error:
        raise ReportError(f"--output {folder}: cannot be written to ({error}); name another folder") from error


@contextmanager
def replacing(folder: Path, overwrite: bool, say: Callable[[str], None]) -> Iterator[Path]:
    """A scratch folder whose content takes the place of the report in `folder` once all of it is written.

    Without `overwrite` the report that is there moves to earlier-N in the folder. A failure leaves it as it was.
    """
    scratch = folder / _SCRATCH
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir()
    try:
        yield scratch
        _make_room(folder, overwrite, say)
        for path in scratch.iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_room(folder: Path, overwrite: bool, say: Callable[[str], None]) -> None:
    there = [folder / name for name in _OURS if (folder / name).exists()]
    if not there:
        return
    if overwrite:
        files = read_object(folder / REPORT)["files"]
        for name in [*files, REPORT]:
            if isinstance(name, str) and Path(name).parts[:1] and Path(name).parts[0] in _OURS and ".." not in name:
                (folder / name).unlink(missing_ok=True)
        for name in (TABLES, PICTURES):
            # What somebody put beside our files stays.
            if (folder / name).is_dir() and not any((folder / name).iterdir()):
                (folder / name).rmdir()
        there = [path for path in there if path.exists()]
        if not there:
            return
    earlier = move_earlier(there, folder)
    kept = "files of yours beside it" if overwrite else "the report that was there"
    say(f"{folder}: {kept} moved to {earlier}" + ("" if overwrite else " (--overwrite drops it)"))


def _is_report(folder: Path) -> bool:
    """Whether a report is what the folder holds; one that never got finished counts too."""
    names = {path.name for path in folder.iterdir()}
    if names <= {_SCRATCH}:
        return True
    try:
        made = read_object(folder / REPORT)
    except (OSError, ValueError):
        return False
    return made.get("made_by") == MADE_BY and isinstance(made.get("files"), list)
