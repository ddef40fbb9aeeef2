"""A model's folder or hub id, looked at before anything is loaded: a mistyped path is said at once."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError, reason
from .names import checked_text

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_SECONDS = 10


def find_model(name: str, option: str) -> str:
    """Return the path of a folder, or the hub id of a model that is in the cache or on the hub.

    Args:
        name: as the user gave it.
        option: for the message, such as "--model".

    Raises:
        UserError: neither; the message says where it was looked for.
    """
    checked_text(name, option)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # "~somebody" whose home is not known
        path = Path(name)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UserError(f"{option} {name}: this is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{option} {name}: no such folder, and not a hub id (those look like owner/name)")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    try:
        HfApi().model_info(name, timeout=_SECONDS)  # one request, where loading would try for half a minute
    except Exception as error:  # the hub and the network raise kinds of their own
        raise UserError(
            f"{option} {name}: there is no such folder here, it is not in the hub's cache, and the hub did not give it "
            f"({reason(error)})"
        ) from error
    return name
