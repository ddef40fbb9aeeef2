"""Launch tables: the tuned launches of one GPU model, written by ``flare bench --tune``, and their lookup.

A table is optional. A launch without an entry follows the general rule of ``triton_ops/config.py``, on any GPU. The
table is read once per process, from the first of these files that is a launch table for this GPU:

1. the file named by the environment variable FLARE_LAUNCH_TABLE. If the variable is set, the files below are not read.
   An empty value disables all tables.
2. ``~/.cache/flare-kernels/launch/<gpu>.json``, which the tuner writes.
3. ``flare_kernels/tables/<gpu>.json``, part of the package.

An entry gives the form (implementation) and the tiles of a step (operation) for a range of sizes. ``FORMS`` in
``triton_ops/config.py`` lists the steps and forms. A file that is not a launch table or is for another GPU is ignored
with one warning.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .triton_ops.config import FORMS

#: Version of the file format.
FORMAT = 1
ENVIRONMENT_VARIABLE = "FLARE_LAUNCH_TABLE"

#: Upper bounds (inclusive) of the buckets of sizes that share an entry. Sizes above the last bound form another bucket.
ROW_BOUNDS = (64, 256, 1024, 4096, 16384)
WIDTH_BOUNDS = (1024, 2048, 3584, 4096)


def bucket(size: int, bounds: tuple[int, ...]) -> int:
    """Return the index of the bucket that contains a size."""
    return bisect.bisect_left(bounds, size)


@dataclass(frozen=True)
class Key:
    """Key of an entry: a step, its operand class, the rank, and the indices of the buckets of rows (tokens) and width.

    The rank is rounded up to one of ``RANK_BUCKETS`` in ``triton_ops/config.py``, where ``OPERAND_CLASSES`` explains
    operand classes.

    The width is the input's width (K) for shrink, grad_weight, grad_input and decode, and the widest output's width (N)
    for the other steps. The rank is the rank of one adapter (r) for expand, grad_bottleneck, decode and order, and the
    sum of the ranks of all stacked adapters (R) for the other steps.
    """

    step: str
    operands: str
    rank: int
    rows: int
    width: int


@dataclass(frozen=True)
class Entry:
    """The tuned launch of a step.

    Attributes:
        form: one of the step's forms.
        tiles: kernel -> fields of its TileConfig. A kernel that is not listed uses the general rule's tiles.
        us: name -> microseconds. The names are forms (the time of the form's best tiles), "<form>, general rule" (the
            time of the general rule's tiles), and "floor" (the lower bound of the step).
    """

    form: str
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    us: Mapping[str, float] = field(default_factory=dict)


@dataclass
class LaunchTable:
    """The entries of one GPU model. ``about`` records versions, commit, date and conditions of the measurement."""

    gpu: str
    entries: dict[Key, Entry] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        rows = [asdict(key) | asdict(entry) for key, entry in self.entries.items()]
        document = {"format": FORMAT, "gpu": self.gpu, "about": self.about, "entries": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False
        ) as scratch:
            scratch.write(json.dumps(document, indent=1) + "\n")
        try:
            os.chmod(scratch.name, 0o644)
            os.replace(scratch.name, path)
        except OSError:
            os.unlink(scratch.name)
            raise

    @classmethod
    def read(cls, path: Path) -> LaunchTable:
        """Return the table in a file.

        Raises:
            ValueError: the file is not a launch table or has another format version; the message says what is wrong.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"the file has format {document['format']!r}, this version reads format {FORMAT}")
            entries = dict(_parse(row) for row in document["entries"])
            return cls(str(document["gpu"]), entries, dict(document["about"]), path)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a launch table: {type(error).__name__}: {error}") from error


def _parse(row: Mapping[str, Any]) -> tuple[Key, Entry]:
    key = Key(str(row["step"]), str(row["operands"]), int(row["rank"]), int(row["rows"]), int(row["width"]))
    if key.step not in FORMS:
        raise ValueError(f"step {key.step!r} is not one of {', '.join(FORMS)}")
    forms = FORMS[key.step]
    if row["form"] not in forms:
        raise ValueError(f"form {row['form']!r} of step {key.step!r} is not one of {', '.join(forms)}")
    tiles = {str(kernel): {str(k): int(v) for k, v in fields.items()} for kernel, fields in row["tiles"].items()}
    for kernel, fields in tiles.items():
        if kernel not in forms[row["form"]]:
            raise ValueError(f"form {row['form']!r} of step {key.step!r} has no kernel {kernel!r}")
        _check_tiles(key, kernel, fields)
    return key, Entry(row["form"], tiles, {str(k): float(v) for k, v in row.get("us", {}).items()})


#: The axes that each kernel tiles.
_AXES = {
    "shrink": "MKR",
    "expand": "MNR",
    "grad_bottleneck": "MKNR",
    "grad_weight": "MKR",
    "shrink_tma": "MKR",
    "shrink_last_adds": "MKR",
    "grad_weight_last_adds": "MKR",
    "grad_weight_tma": "MKR",
    "grad_input": "MKR",
    "shrink_decode": "MKR",
    "expand_decode": "MNR",
}
_OPTIONS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9), "programs": range(1, 1 << 20)}


def _check_tiles(key: Key, kernel: str, tiles: Mapping[str, int]) -> None:
    """Raise ValueError if a field is missing or unknown, or if the kernel cannot run correctly with a field's value."""
    expected = {f"BLOCK_{axis}" for axis in "MKNR"} | set(_OPTIONS)
    if set(tiles) != expected:
        raise ValueError(f"tiles of {kernel} have the fields {sorted(tiles)}, expected {sorted(expected)}")
    for axis in _AXES[kernel]:
        size = tiles[f"BLOCK_{axis}"]
        if not 16 <= size <= 512 or size & (size - 1):
            raise ValueError(f"tiles of {kernel}: BLOCK_{axis}={size} is not a power of two from 16 to 512")
    for name, accepted in _OPTIONS.items():
        if tiles[name] not in accepted:
            raise ValueError(f"tiles of {kernel}: {name}={tiles[name]} cannot be launched")
    if kernel.endswith("_decode") and tiles["BLOCK_R"] < key.rank:
        raise ValueError(f"tiles of {kernel}: BLOCK_R={tiles['BLOCK_R']} is less than the rank bucket, {key.rank}")


def file_name(gpu: str) -> str:
    """Return the file name for a GPU's name: nvidia-h200.json for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_path(gpu: str) -> Path:
    """Return the path where the tuner writes by default."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "flare-kernels" / "launch" / file_name(gpu)


def package_path(gpu: str) -> Path:
    """Return the path of the table that the package contains for this GPU, if it contains one."""
    return Path(__file__).parent / "tables" / file_name(gpu)


def _default_paths(gpu: str) -> list[Path]:
    try:
        return [user_path(gpu), package_path(gpu)]
    except RuntimeError:  # this user has no home directory
        return [package_path(gpu)]


@functools.cache
def table_for(gpu: str) -> LaunchTable:
    """Return the table that this process uses for a GPU; an empty table if there is none.

    The entries of the user's table take precedence over those of the package's table.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named == "":
        return LaunchTable(gpu)
    found: list[LaunchTable] = []
    for path in [Path(named)] if named is not None else _default_paths(gpu):
        try:
            if named is None and not path.exists():
                continue
            table = LaunchTable.read(path)
        except OSError:  # a home directory that this user may not read
            continue
        except ValueError as error:
            warnings.warn(f"{error}; the file is ignored", RuntimeWarning, stacklevel=2)
            continue
        if table.gpu != gpu:
            message = f"{path} is for {table.gpu}, but this GPU is {gpu}; the file is ignored"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            continue
        found.append(table)
    if not found:
        return LaunchTable(gpu)
    for packaged in found[1:]:
        found[0].entries = packaged.entries | found[0].entries
    return found[0]
