"""Folders that results go into: seen to be writable before any work is done, and what is there already kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

#: What was there before moves to earlier-1, earlier-2, ...
EARLIER = "earlier-"


def check_writable(folder: Path) -> None:
    """Make a folder and see that files can be written there.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def move_earlier(paths: Iterable[Path], below: Path) -> Path:
    """Move files and folders to a new earlier-N in the folder ``below``; returns that."""
    number = 1
    while (below / f"{EARLIER}{number}").exists():
        number += 1
    earlier = below / f"{EARLIER}{number}"
    earlier.mkdir()
    for path in paths:
        path.rename(earlier / path.name)
    return earlier
