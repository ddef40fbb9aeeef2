"""Read the provenance files that `flare translate` writes next to its translations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.json_files import read_object

FILE = "provenance.json"


def read_provenance(translations: Path | None, source: str, target: str, texts: tuple[str | None, ...]) -> Any:
    """Return the provenance of the translations that a run reads: direction -> contents of the direction's file.

    The directions are "<source>-<target>" and "<target>-<source>". A direction without a readable file is left out.
    Return None if the run reads no translations, or if neither direction has a readable file.

    Args:
        translations: output folder of flare translate.
        source, target: source language and target language of the run.
        texts: kinds of the run's source text and target text, each "gold", "mt" or None.
    """
    if translations is None or "mt" not in texts:
        return None
    by_direction: dict[str, Any] = {}
    for name in (f"{source}-{target}", f"{target}-{source}"):
        path = translations / name / FILE
        try:
            by_direction[name] = read_object(path)
        except (OSError, ValueError):
            continue
    return by_direction or None
