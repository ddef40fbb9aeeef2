"""Read and write provenance.json, which records how the translations in a folder were made and what was lost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tasks.pairs import PROVENANCE
from ..utils.atomic_files import write_json
from ..utils.json_files import read_object
from .model import TranslationError

FILE = PROVENANCE
FORMAT = 1


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return the provenance of a folder's translations, or None if there is no file.

    Raises:
        TranslationError: the file exists but cannot be read.
    """
    path = folder / FILE
    try:
        content = read_object(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TranslationError(
            f"{path} cannot be read ({error}). It records how the files in its folder were made, so no translations "
            "can be added to them: choose another folder with --output"
        ) from error
    return content


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the provenance of a folder, atomically."""
    write_json(folder / FILE, content)


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Compare recorded settings with current settings, and return one text for each value that differs.

    A text has the form "model.name: 'a' then, 'b' now".
    """
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*then, *now])
        return [
            line for key in keys for line in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if then == now else [f"{name}: {then!r} then, {now!r} now"]


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
