"""Read JSON files that may be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parsed(text: str | bytes, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse a JSON text.

    Args:
        text: JSON, as text or as UTF-8 bytes.
        object_of: function that returns the value of a JSON object from its (key, value) pairs. Default: a dict.

    Raises:
        ValueError: the text is not JSON in UTF-8, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the path is not a regular file (a FIFO would block), or its content is not a JSON object in UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    content = parsed(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it does not hold a JSON object")
    return content
