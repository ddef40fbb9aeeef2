"""Names that become one folder or part of a file's name: languages, runs, variants."""

from __future__ import annotations

import unicodedata

from .errors import UserError

_LONGEST = 100  # bytes; two names are joined to one folder's, of which file systems take 255


def folder_name(name: str, what: str) -> str:
    """Return the name where it can be the name of one folder.

    Args:
        name: as a user or a run.json gave it.
        what: the option or field, for the message.

    Raises:
        UserError: it is a path, hidden, empty, too long, or holds characters that no file's name can hold everywhere.
    """
    wrong = _wrong(name)
    if wrong:
        raise UserError(
            f"{what} {name!r} {wrong}; give the name of one folder: no path, no line break, no dot in front, up to "
            f"{_LONGEST} bytes"
        )
    return name


def checked_text(text: str, what: str) -> str:
    r"""Return the text where it can be written to a file and passed to the system.

    Raises:
        UserError: it is empty, or holds a NUL character or half a character (a lone surrogate such as "\ud800").
    """
    if not text.strip():
        raise UserError(f"{what} is empty; give a value, or leave it out")
    if "\0" in text:
        raise UserError(f"{what} {text!r} holds a NUL character; remove it")
    if any(unicodedata.category(letter) == "Cs" for letter in text):
        raise UserError(f"{what} {text!r} is not valid Unicode text (it holds a lone surrogate); write it in UTF-8")
    return text


def _wrong(name: str) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return "is empty"
    if "/" in name or "\\" in name:
        return "is a path"
    if name.startswith("."):
        return "begins with a dot"
    if name != name.strip():
        return "begins or ends with a space"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "holds a control character, a line break or half a character"
    if len(name.encode()) > _LONGEST:
        return f"has {len(name.encode())} bytes"
    return None
