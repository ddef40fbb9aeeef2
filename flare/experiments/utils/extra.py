"""Check that the packages that the commands need are installed (the extra `experiments`)."""

from __future__ import annotations

import importlib.util

from .errors import UserError

#: Required by every command except `flare info`. Other packages of the extra are needed for single features only.
REQUIRED = ("datasets", "tqdm")
INSTALL = "pip install 'flare-kernels[experiments]'"


def installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing() -> list[str]:
    """Return the required packages that are not installed."""
    return [name for name in REQUIRED if not installed(name)]


def require(command: str) -> None:
    """Raise UserError if a required package is not installed."""
    if absent := missing():
        raise UserError(
            f"flare {command} needs {' and '.join(REQUIRED)}, and {' and '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not installed. Install the extra: {INSTALL}"
        )
