"""Where translated text comes from: what `flare translate` wrote beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.json_files import read_object

FILE = "provenance.json"


def read_provenance(translations: Path | None, source: str, target: str, texts: tuple[str | None, ...]) -> Any:
    """Provenance of the translations a run reads, by direction; None where it reads none.

    Args:
        translations: folder of flare translate.
        source, target: the languages.
        texts: the run's (source_text, target_text).
    """
    if translations is None or "mt" not in texts:
        return None
    found: dict[str, Any] = {}
    for name in (f"{source}-{target}", f"{target}-{source}"):
        path = translations / name / FILE
        try:
            found[name] = read_object(path)
        except (OSError, ValueError):
            continue
    return found or None
