"""Text files that are there whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file that takes the place of ``path`` when the block ends; after an error ``path`` is as it was.

    A process that is killed meanwhile leaves ``.<name>.<its id>`` beside it. Missing folders are made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; what JSON has no form for is written as text."""
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
