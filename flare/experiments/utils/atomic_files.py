"""Write text files completely or not at all: write a temporary file, sync it, and rename it.

The temporary file is locked while it is written. This distinguishes it from a file that a killed process left behind.
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

#: An unlocked temporary file that is older than this many seconds counts as abandoned. A younger one may belong to a
#: process that has not locked it yet.
_ABANDONED = 60


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file that replaces ``path`` when the block ends. After an error, ``path`` is unchanged.

    Missing folders are created. If the process is killed, the temporary file ``.<name>.<process id>`` is left behind. A
    write of ``path`` that starts more than a minute later removes this file.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            # a file system without locks raises here and in _remove_abandoned, which then removes nothing
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of a path that killed processes left behind."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not temporary.suffix[1:].isdigit() or not temporary.is_file():  # a FIFO would block
            continue
        with contextlib.suppress(OSError), temporary.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; values that JSON cannot represent are written as text."""
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
