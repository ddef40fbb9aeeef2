"""Check a model's folder or hub id before anything is loaded, so that a mistyped path fails early."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError, reason
from .names import checked_text

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_SECONDS = 10


def find_model(name: str, option: str) -> str:
    """Return a folder's path, or the hub id of a model in the cache or on the hub.

    Args:
        name: folder or hub id, as given by the user.
        option: the option that the name was given with, such as "--model", for the message.

    Raises:
        UserError: the name is empty, is not valid text or is the path of a file, or no folder and no model has this
            name. The message says where the name was searched.
    """
    checked_text(name, option)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # "~user" with an unknown home folder
        path = Path(name)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UserError(f"{option} {name}: this is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{option} {name}: no such folder, and not a hub id (a hub id looks like owner/name)")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    try:
        # this sends one request, while loading would retry for half a minute
        HfApi().model_info(name, timeout=_SECONDS)
    except Exception as error:  # the hub and the network raise many classes
        raise UserError(
            f"{option} {name}: there is no such folder here, it is not in the hub's cache, and it was not found on the "
            f"hub ({reason(error)})"
        ) from error
    return name
