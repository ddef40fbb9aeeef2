"""The error for task data that cannot be used, and the format of row ids in messages."""

from __future__ import annotations

from collections.abc import Sequence

from ..utils.errors import UserError

_SHOWN_IDS = 3


class DataError(UserError):
    """Task data that cannot be used. The message names the rows and says what to do."""


def some_ids(ids: Sequence[str]) -> str:
    """Return the first few ids in parentheses: "(ids 1, 2, 3, ...)".

    >>> some_ids(["7"])
    '(id 7)'
    """
    shown = ", ".join(ids[:_SHOWN_IDS]) + (", ..." if len(ids) > _SHOWN_IDS else "")
    return f"({'id' if len(ids) == 1 else 'ids'} {shown})"
