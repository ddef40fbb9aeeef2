"""provenance.json beside translated splits: by what they were made, of what, and what was lost on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json
from ..utils.json_files import read_object
from .model import TranslationError

FILE = "provenance.json"
FORMAT = 1


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its translations; None where it says nothing.

    Raises:
        TranslationError: the file is there and cannot be read.
    """
    path = folder / FILE
    try:
        found = read_object(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TranslationError(
            f"{path} cannot be read ({error}); it says how the files beside it were made, so nothing can be added to "
            "them: name another folder with --output"
        ) from error
    return found


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    write_json(folder / FILE, content)


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Where two settings differ, a line for each value: "model.name: 'a' then, 'b' now"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*then, *now])
        return [
            line for key in keys for line in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if then == now else [f"{name}: {then!r} then, {now!r} now"]


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
