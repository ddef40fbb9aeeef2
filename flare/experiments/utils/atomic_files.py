"""Text files that are there whole or not at all: written aside, synced, renamed.

The file aside is locked while it is written, so what a killed process has left can be told from what is being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

#: Seconds after which a file aside that no process has locked counts as abandoned: it is locked just after it is made.
_ABANDONED = 60


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file that takes the place of ``path`` when the block ends; after an error ``path`` is as it was.

    If the process is killed, ``.<name>.<its id>`` is left behind; a later write of ``path`` removes it.
    Missing folders are made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there either
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left beside a file."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not aside.suffix[1:].isdigit() or not aside.is_file():  # a FIFO would block
            continue
        with contextlib.suppress(OSError), aside.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                aside.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; what JSON has no form for is written as text."""
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
