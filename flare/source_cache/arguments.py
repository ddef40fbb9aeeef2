"""Checks of SourceStateCache's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIERS = ("device", "host", "disk")


def checked(budget: Any, tiers: Any, directory: Any) -> tuple[list[str], int | None]:
    """The tiers to use, fastest first, and the bytes over all of them (None where each has its own)."""
    each = isinstance(budget, Mapping)
    values = list(budget.values()) if each else [budget]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise TypeError(f"budget={budget!r} must be bytes (an integer), or a tier's bytes by its name")
    if any(value < 0 for value in values) or not values:
        raise ValueError(f"budget={budget!r} must be bytes, none below 0")
    unknown = sorted(set(budget) - set(TIERS)) if each else []
    if unknown:
        raise ValueError(f"budget names {unknown[0]!r}; accepted: {', '.join(map(repr, TIERS))}")
    named = list(TIERS) if isinstance(tiers, str) and tiers == "auto" else tiers
    listed = isinstance(named, Sequence) and not isinstance(named, str) and len(named) > 0
    if not listed or any(name not in TIERS for name in named):
        raise ValueError(f"tiers={tiers!r} is not accepted: 'auto', or some of {', '.join(map(repr, TIERS))}")
    if directory is not None and not isinstance(directory, str | Path):
        raise TypeError(f"directory={directory!r} must be a path or None")
    by_default = tiers == "auto" or tuple(named) == TIERS
    if directory is not None and "disk" not in named:
        raise ValueError(f"directory={str(directory)!r} is for the tier 'disk', which tiers={tiers!r} does not name")
    if directory is None and ((each and budget.get("disk")) or ("disk" in named and not by_default)):
        raise ValueError("the tier 'disk' needs a directory=, a folder for its files; or name other tiers")
    used = [name for name in TIERS if name in named and (name != "disk" or directory is not None)]
    if each:
        beside = sorted(set(budget) - set(named))
        if beside:
            raise ValueError(f"budget names {beside[0]!r}, which tiers={tiers!r} does not")
        used = [name for name in used if name in budget]
    return used, None if each else budget


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory={str(directory)!r} cannot be made ({error}); give a folder") from error
