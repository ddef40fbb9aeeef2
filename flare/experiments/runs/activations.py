"""Write and read activations.npz: the activations of one bottleneck at each token position.

The bottleneck is the output of A in the first query projection, r numbers for each token. It is called S for the
source text and T for the target text. The file holds the averages of S and T over many rows, and S and T of a few
single rows. The report draws both. This module imports no code for models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .records import RecordError

ACTIVATIONS_FILE = "activations.npz"
#: Maximum number of single rows in the file.
INSTANCES = 3


@dataclass(frozen=True)
class Averages:
    """Averages over rows of one stream (source or target); m is the number of tokens of the longest row.

    counts: (m,) number of rows that have a token at each position.
    before, after: (m, r) mean activation of these rows, before and after ReLU.
    before_spread, after_spread: (m,) standard deviation over these rows. Each row counts with one number, the mean of
        its r activations, before and after ReLU.
    """

    counts: np.ndarray
    before: np.ndarray
    after: np.ndarray
    before_spread: np.ndarray
    after_spread: np.ndarray


@dataclass(frozen=True)
class Instance:
    """A single row: its id, its tokens, and its activations S and T before ReLU, each (tokens of the stream, r)."""

    id: str
    source_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    S: np.ndarray
    T: np.ndarray


@dataclass(frozen=True)
class Activations:
    """Activations in the bottleneck of one layer over some test rows.

    layer: name of the projection in the base model; fusion: fusion function of the adapter.
    """

    layer: str
    fusion: str
    S: Averages
    T: Averages
    instances: tuple[Instance, ...]


@dataclass
class RowCollector:
    """Collect the rows of one stream, and average them at each position in float64."""

    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """Add one row (tokens, r), whose first token is at position 0."""
        self.rows.append(values)

    def averages(self) -> Averages:
        """Return the averages of all rows that were added; there must be at least one."""
        longest, r = max(len(row) for row in self.rows), self.rows[0].shape[1]
        counts = np.zeros(longest)
        sums = {name: np.zeros((longest, r)) for name in ("before", "after")}
        # sum of the rows' means over the r units, and sum of the squares of these means
        units = {name: np.zeros((2, longest)) for name in ("before", "after")}
        for row in self.rows:
            counts[: len(row)] += 1
            for name, values in (("before", row.astype(np.float64)), ("after", np.maximum(row, 0).astype(np.float64))):
                mean = values.mean(axis=1)
                sums[name][: len(row)] += values
                units[name][:, : len(row)] += (mean, mean**2)
        means = {name: total / counts[:, None] for name, total in sums.items()}
        spreads = {
            name: np.sqrt(np.maximum(squares / counts - (total / counts) ** 2, 0))
            for name, (total, squares) in units.items()
        }
        return Averages(counts, means["before"], means["after"], spreads["before"], spreads["after"])


def write_activations(folder: Path, activations: Activations) -> None:
    """Write a run's activations.npz atomically (float32 numbers, no pickle)."""
    arrays: dict[str, Any] = {"layer": activations.layer, "fusion": activations.fusion}
    for stream in ("S", "T"):
        for one in fields(Averages):
            arrays[f"{stream}_{one.name}"] = getattr(getattr(activations, stream), one.name).astype(np.float32)
    for number, row in enumerate(activations.instances):
        for name, value in vars(row).items():
            arrays[f"instance_{number}_{name}"] = np.asarray(value, np.float32 if name in ("S", "T") else np.str_)
    temporary = folder / f".{ACTIVATIONS_FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(folder / ACTIVATIONS_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def read_activations(folder: Path) -> Activations | None:
    """Return the activations in a run's folder; None if it has no activations.npz.

    Raises:
        RecordError: the file is damaged.
    """
    path = folder / ACTIVATIONS_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _parsed(arrays)
    except Exception as error:  # zipfile, zlib and numpy raise various errors
        raise RecordError(
            f"{path} cannot be read: {error}; move the file away, or train again with flare train --no-resume"
        ) from error


def _parsed(arrays: Mapping[str, np.ndarray]) -> Activations:
    averages = {
        stream: Averages(**{one.name: arrays[f"{stream}_{one.name}"] for one in fields(Averages)}) for stream in "ST"
    }
    rows: list[Instance] = []
    while f"instance_{len(rows)}_id" in arrays:
        values = {one.name: arrays[f"instance_{len(rows)}_{one.name}"] for one in fields(Instance)}
        tokens = {name: tuple(map(str, values[name])) for name in ("source_tokens", "target_tokens")}
        rows.append(Instance(str(values["id"]), **tokens, S=values["S"], T=values["T"]))
    return Activations(str(arrays["layer"]), str(arrays["fusion"]), averages["S"], averages["T"], tuple(rows))
