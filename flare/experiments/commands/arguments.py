"""Add options to commands whose settings class holds the default values."""

from __future__ import annotations

from typing import Any


def add_option(group: Any, flag: str, text: str, kind: type = str, metavar: str | None = None, **more: Any) -> None:
    """Add an option to an argument group.

    The parser must have ``argument_default=argparse.SUPPRESS``. Options that the user omits are then missing in the
    parsed result, so that the settings class uses its defaults.
    """
    group.add_argument(flag, type=kind, metavar=metavar, help=text, **more)
