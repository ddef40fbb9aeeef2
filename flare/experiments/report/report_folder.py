"""Prepare the folder of a report.

Only a new or empty folder, or a folder that `flare report` wrote, is changed. An earlier report is kept by default.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.json_files import read_object
from ..utils.result_folders import check_writable, move_earlier
from .collect import ReportError

REPORT, TEXT, RAW, TABLES, FIGURES = "report.json", "report.md", "runs.csv", "tables", "pictures"
_CONTENTS = (REPORT, TEXT, RAW, TABLES, FIGURES)
MADE_BY = "flare report"
_TEMPORARY = ".flare-report-unfinished"


def check(folder: Path) -> None:
    """Check that a report can be written to the folder, before any work is done.

    Raises:
        ReportError: the path is a file, is not writable, or holds files that are not a report.
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
def replacing(folder: Path, overwrite: bool, print_fn: Callable[[str], None]) -> Iterator[Path]:
    """Yield a temporary folder whose contents replace the report in `folder` once they are complete.

    Without `overwrite`, an existing report moves to earlier-N in the folder. With `overwrite`, the files of the report
    are deleted, and only the user's own files in its folders move to earlier-N. After an error, the existing report is
    unchanged.
    """
    temporary = folder / _TEMPORARY
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _remove_existing(folder, overwrite, print_fn)
        for path in temporary.iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_existing(folder: Path, overwrite: bool, print_fn: Callable[[str], None]) -> None:
    existing = [folder / name for name in _CONTENTS if (folder / name).exists()]
    if not existing:
        return
    if overwrite:
        files = read_object(folder / REPORT)["files"]
        for name in [*files, REPORT]:
            if isinstance(name, str) and Path(name).parts[:1] and Path(name).parts[0] in _CONTENTS and ".." not in name:
                (folder / name).unlink(missing_ok=True)
        for name in (TABLES, FIGURES):
            # a folder that still holds files of the user is not deleted but moved below
            if (folder / name).is_dir() and not any((folder / name).iterdir()):
                (folder / name).rmdir()
        existing = [path for path in existing if path.exists()]
        if not existing:
            return
    earlier = move_earlier(existing, folder)
    moved = "your own files in the report's folders" if overwrite else "the earlier report"
    print_fn(f"{folder}: {moved} moved to {earlier}" + ("" if overwrite else " (--overwrite deletes it instead)"))


def _is_report(folder: Path) -> bool:
    """Return whether the folder is empty or holds a report, finished or not."""
    names = {path.name for path in folder.iterdir()}
    if names <= {_TEMPORARY}:
        return True
    try:
        report = read_object(folder / REPORT)
    except (OSError, ValueError):
        return False
    return report.get("made_by") == MADE_BY and isinstance(report.get("files"), list)
