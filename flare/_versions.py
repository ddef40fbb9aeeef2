"""The versions of PyTorch, Triton, transformers and PEFT that this package is tested with."""

from __future__ import annotations

import importlib.metadata
import warnings

from packaging.version import Version

#: Package -> the oldest tested version, and the oldest version that is too new to be tested.
TESTED = {
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.10"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.23"),
}


def check_versions() -> None:
    """Compare the installed versions with the tested ones. A package that is not installed is skipped.

    Warns:
        UserWarning: A package is newer than the newest tested version.

    Raises:
        ImportError: A package is older than the oldest tested version.
    """
    for package, (oldest, untested) in TESTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed) < Version(oldest):
            raise ImportError(
                f"flare needs {package}>={oldest}, found {installed}: pip install -U '{package}>={oldest}'"
            )
        if Version(installed) >= Version(untested):
            warnings.warn(
                f"flare is tested with {package}>={oldest},<{untested}, found {installed}. If something fails, install "
                f"a tested version: pip install '{package}>={oldest},<{untested}'",
                stacklevel=2,
            )
