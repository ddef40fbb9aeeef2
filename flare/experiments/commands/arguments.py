"""Options of commands whose settings class holds the defaults."""

from __future__ import annotations

from typing import Any


def add_option(group: Any, flag: str, text: str, kind: type = str, metavar: str | None = None, **more: Any) -> None:
    """Add an option to an argument group.

    The parser must have ``argument_default=argparse.SUPPRESS``: an option that is not given is then not passed on, and
    the settings class's default holds.
    """
    group.add_argument(flag, type=kind, metavar=metavar, help=text, **more)
