"""activations.npz: the bottleneck of the first query projection by position, averaged over rows and of single rows.

The report draws it; this module knows nothing of models.
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
#: Single rows that are kept.
INSTANCES = 3


@dataclass(frozen=True)
class Averages:
    """One stream, averaged over rows; m is the longest row's number of tokens.

    counts: (m,) rows that have a token at a position.
    before, after: (m, r) mean over these rows before and after ReLU.
    before_spread, after_spread: (m,) standard deviation over these rows of a position's mean over the r units.
    """

    counts: np.ndarray
    before: np.ndarray
    after: np.ndarray
    before_spread: np.ndarray
    after_spread: np.ndarray


@dataclass(frozen=True)
class Instance:
    """One row before ReLU: its id, the tokens of both streams, and S and T, (tokens of the stream, r)."""

    id: str
    source_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    S: np.ndarray
    T: np.ndarray


@dataclass(frozen=True)
class Activations:
    """What one layer's bottleneck held over some test rows.

    layer: name of the projection in the base model; fusion: of the adapter.
    """

    layer: str
    fusion: str
    S: Averages
    T: Averages
    instances: tuple[Instance, ...]


@dataclass
class Sums:
    """Adds up one stream position by position: float64, one row after the other."""

    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """Count one row (tokens, r), its first token at position 0."""
        self.rows.append(values)

    def averages(self) -> Averages:
        """The averages of all rows so far; one row at least."""
        longest, r = max(len(row) for row in self.rows), self.rows[0].shape[1]
        counts = np.zeros(longest)
        sums = {name: np.zeros((longest, r)) for name in ("before", "after")}
        units = {name: np.zeros((2, longest)) for name in ("before", "after")}  # sum and squares of a row's mean
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


def write_activations(folder: Path, found: Activations) -> None:
    """Write a run's activations.npz (float32 numbers, no pickle), whole or not at all."""
    arrays: dict[str, Any] = {"layer": found.layer, "fusion": found.fusion}
    for stream in ("S", "T"):
        for one in fields(Averages):
            arrays[f"{stream}_{one.name}"] = getattr(getattr(found, stream), one.name).astype(np.float32)
    for number, row in enumerate(found.instances):
        for name, value in vars(row).items():
            arrays[f"instance_{number}_{name}"] = np.asarray(value, np.float32 if name in ("S", "T") else np.str_)
    aside = folder / f".{ACTIVATIONS_FILE}.{os.getpid()}"
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        aside.replace(folder / ACTIVATIONS_FILE)
    finally:
        aside.unlink(missing_ok=True)


def read_activations(folder: Path) -> Activations | None:
    """The activations.npz of a run's folder; None where there is none.

    Raises:
        RecordError: it is damaged.
    """
    path = folder / ACTIVATIONS_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as there:
            return _parsed(there)
    except Exception as error:  # zipfile, zlib and numpy raise kinds of their own
        raise RecordError(f"{path} cannot be read: {error}; move it away or run flare train again") from error


def _parsed(there: Mapping[str, np.ndarray]) -> Activations:
    averages = {
        stream: Averages(**{one.name: there[f"{stream}_{one.name}"] for one in fields(Averages)}) for stream in "ST"
    }
    rows: list[Instance] = []
    while f"instance_{len(rows)}_id" in there:
        given = {one.name: there[f"instance_{len(rows)}_{one.name}"] for one in fields(Instance)}
        tokens = {name: tuple(map(str, given[name])) for name in ("source_tokens", "target_tokens")}
        rows.append(Instance(str(given["id"]), **tokens, S=given["S"], T=given["T"]))
    return Activations(str(there["layer"]), str(there["fusion"]), averages["S"], averages["T"], tuple(rows))
