"""One process or several (accelerate launch): who writes, and how the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")


def process_count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Wait for the other processes."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def on_main(call: Callable[[], T]) -> T:
    """Call in the main process and hand the result (which pickle must take) to all.

    Raises:
        UserError: in every process, where the call raises one.
    """
    if process_count() == 1:
        return call()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    found: list[Any] = [None, None]
    if is_main():
        try:
            found = [call(), None]
        except UserError as error:
            found = [None, str(error)]
    broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]  # type: ignore[no-any-return]
