"""Checks of SourceStateCache's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIERS = ("device", "host", "disk")


def check_arguments(budget: Any, tiers: Any, directory: Any) -> tuple[list[str], int | None]:
    """Return the tiers to use, fastest first, and their total budget in bytes (None if each tier has its own).

    Raises:
        TypeError, ValueError: a value that is not accepted; the message names the argument.
    """
    per_tier = isinstance(budget, Mapping)
    values = list(budget.values()) if per_tier else [budget]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise TypeError(f"budget={budget!r} must be bytes (an integer), or a dictionary from tier to bytes")
    if any(value < 0 for value in values) or not values:
        raise ValueError(f"budget={budget!r} must be bytes, 0 or more (in a dictionary, for one tier or more)")
    unknown = sorted(set(budget) - set(TIERS)) if per_tier else []
    if unknown:
        raise ValueError(f"budget names {unknown[0]!r}; accepted: {', '.join(map(repr, TIERS))}")
    names = list(TIERS) if isinstance(tiers, str) and tiers == "auto" else tiers
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
    if not is_list or any(name not in TIERS for name in names):
        raise ValueError(f"tiers={tiers!r} is not accepted; pass 'auto', or a list of {', '.join(map(repr, TIERS))}")
    if directory is not None and not isinstance(directory, str | Path):
        raise TypeError(f"directory={directory!r} must be a path or None")
    all_tiers = tiers == "auto" or tuple(names) == TIERS
    if directory is not None and "disk" not in names:
        raise ValueError(
            f"directory={str(directory)!r} is for the tier 'disk', which is missing in tiers={tiers!r}; add 'disk' to "
            "tiers, or leave directory out"
        )
    if directory is None and ((per_tier and budget.get("disk")) or ("disk" in names and not all_tiers)):
        raise ValueError("the tier 'disk' needs a directory=, the folder for its files; pass it, or leave 'disk' out")
    used = [name for name in TIERS if name in names and (name != "disk" or directory is not None)]
    if per_tier:
        extra = sorted(set(budget) - set(names))
        if extra:
            raise ValueError(
                f"budget names {extra[0]!r}, which is missing in tiers={tiers!r}; add it to tiers, or remove it from "
                "budget"
            )
        used = [name for name in used if name in budget]
    return used, None if per_tier else budget


def make_directory(directory: Path) -> None:
    """Create a directory if it is missing; raise ValueError if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory={str(directory)!r} cannot be created ({error}); pass another folder") from error
