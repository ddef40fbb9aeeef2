"""Check texts of the user: names of languages and runs, which become folders or parts of file names, and others."""

from __future__ import annotations

import unicodedata

from .errors import UserError

_LONGEST = 100  # bytes; file systems accept 255 bytes, and some file names join two names


def folder_name(name: str, what: str) -> str:
    """Return the name if it is a valid name of one folder.

    Args:
        name: the name, as given by the user or read from a run.json.
        what: the option or field that holds the name, for the message.

    Raises:
        UserError: the name is a path, empty or too long, starts with a dot, starts or ends with a space, or contains
            a control character, a line break or a lone surrogate.
    """
    fault = _fault(name)
    if fault:
        raise UserError(
            f"{what} {name!r} {fault}; give the name of one folder: no path, no line break, no leading dot, up to "
            f"{_LONGEST} bytes"
        )
    return name


def checked_text(text: str, what: str) -> str:
    r"""Return the text if it can be written to a file and passed to the operating system.

    Raises:
        UserError: the text is empty, or contains a NUL character or a lone surrogate such as "\ud800".
    """
    if not text.strip():
        raise UserError(f"{what} is empty; give a value, or omit it")
    if "\0" in text:
        raise UserError(f"{what} {text!r} contains a NUL character; remove it")
    if any(unicodedata.category(letter) == "Cs" for letter in text):
        raise UserError(f"{what} {text!r} is not valid Unicode text (it contains a lone surrogate); write it in UTF-8")
    return text


def _fault(name: str) -> str | None:
    if not isinstance(name, str):
        return "is not text"
    if not name.strip():
        return "is empty"
    if "/" in name or "\\" in name:
        return "is a path"
    if name.startswith("."):
        return "starts with a dot"
    if name != name.strip():
        return "starts or ends with a space"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "contains a control character, a line break or a lone surrogate"
    if len(name.encode()) > _LONGEST:
        return f"has {len(name.encode())} bytes"
    return None
