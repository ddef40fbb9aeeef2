"""Choose the message and the exit status of an error that ends a command."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

from ..utils.errors import UserError, reason

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
#: If the disk is full, safetensors and torch.save raise exceptions that are not OSErrors. Their messages contain one
#: of these texts.
_DISK_FULL_TEXTS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "file write failed",
)


def explain(error: Exception) -> tuple[str, int]:
    """Return a message that says what happened and what to do, and the exit status of the command.

    The status is 2 for an error that the user can fix. It is 1 for a defect of this package, whose traceback is written
    to a file.
    """
    if isinstance(error, UserError):
        return str(error), 2
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL or any(text in str(error) for text in _DISK_FULL_TEXTS):
        return (
            f"the disk is full ({reason(error)}). Free some space and repeat the command: finished work is kept, and "
            "the file that was being written is discarded"
        ), 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}. Check that it exists and that you may access it", 2
    if type(error).__name__ == "OutOfMemoryError":
        return f"the device is out of memory ({reason(error)}). Use a smaller --batch-size or --max-length", 2
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({reason(error)}). Use a smaller --batch-size, a smaller model, or fewer rows", 2
    if isinstance(error, ImportError):
        return f"a package is missing ({reason(error)}). Install it, or omit the option that needs it", 2
    return f"unexpected {reason(error)}. This is a defect: please report it, with {_write_traceback(error)}", 1


def _write_traceback(error: Exception) -> str:
    """Write the traceback to a file, and return words that name the file.

    If no file can be written, return words that name the line of code that raised the error.
    """
    lines = traceback.format_exception(error)
    try:
        handle, path = tempfile.mkstemp(prefix="flare-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"the location of the error: {frame.filename}, line {frame.lineno}"
    return f"the traceback in {path}"
