"""Prepare folders for results: check that they are writable, and move earlier results aside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

#: Earlier results are moved to earlier-1, earlier-2, ...
EARLIER = "earlier-"


def check_writable(folder: Path) -> None:
    """Create a folder and check that files can be written in it.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def move_earlier(paths: Iterable[Path], below: Path) -> Path:
    """Move files and folders to a new folder earlier-N in the folder ``below``; return the new folder."""
    number = 1
    while (below / f"{EARLIER}{number}").exists():
        number += 1
    earlier = below / f"{EARLIER}{number}"
    earlier.mkdir()
    for path in paths:
        path.rename(earlier / path.name)
    return earlier
