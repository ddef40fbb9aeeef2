"""The sentence in which an error ends that no command foresaw; the traceback of a defect goes to a file."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

from ..utils.errors import reason

_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What safetensors and torch.save say of a full disk: they raise exceptions of their own.
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "file write failed")


def explained(error: Exception) -> tuple[str, int]:
    """Return what happened with what to do, and the exit status: 2, or 1 for a defect, whose traceback is kept."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or any(text in str(error) for text in _FULL_TEXTS):
        return (
            f"the disk is full ({reason(error)}). Free some space and give the command again: what is finished is "
            "kept, and what was being written is not used"
        ), 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}. See that it is there and that you may use it", 2
    if type(error).__name__ == "OutOfMemoryError":
        return f"the device's memory is full ({reason(error)}). Use a smaller --batch-size or --max-length", 2
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"the memory is full ({reason(error)}). Use a smaller --batch-size, a smaller model, or fewer rows", 2
    if isinstance(error, ImportError):
        return f"a package is missing ({reason(error)}). Install it, or leave out the option that needs it", 2
    return f"an unforeseen {reason(error)}. This is a defect: please report it, with {_kept(error)}", 1


def _kept(error: Exception) -> str:
    """The file that the traceback was written to, or its last line where none can be written."""
    lines = traceback.format_exception(error)
    try:
        handle, path = tempfile.mkstemp(prefix="flare-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"the place: {frame.filename}, line {frame.lineno}"
    return f"the traceback in {path}"
