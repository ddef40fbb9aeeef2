"""Errors about a task's data, and how rows are named in messages."""

from __future__ import annotations

from collections.abc import Sequence

from ..utils.errors import UserError

SHOWN = 3


class DataError(UserError):
    """The data cannot be used as they are; the message says which rows and what to do."""


def some_ids(ids: Sequence[str]) -> str:
    """The first few ids in brackets: "(ids 1, 2, 3, ...)".

    >>> some_ids(["7"])
    '(id 7)'
    """
    shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
    return f"({'id' if len(ids) == 1 else 'ids'} {shown})"
