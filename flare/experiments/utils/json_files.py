"""Reading JSON that a kill, another program or an editor may have left in any state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parsed(text: str | bytes, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the content of a JSON text; ``object_of`` makes what an object becomes of its pairs.

    Raises:
        ValueError: it is not JSON in UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a file (a FIFO would block), not JSON in UTF-8, or holds something else.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    content = parsed(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it does not hold a JSON object")
    return content
