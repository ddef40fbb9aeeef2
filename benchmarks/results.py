"""Write and read result files.

A file has one JSON object with the conditions of the run, and one row (dict) per case and variant. It is valid JSON
after every case of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
#: Patterns of the files that a measurement depends on. The matching files of benchmarks/ that only process results do
#: not count (`_AFTERWARDS`).
_SOURCES = ("flare_kernels/**/*.py", "flare/**/*.py", "benchmarks/*.py")
_AFTERWARDS = {"summary.py", "costs.py", "tables.py", "plot.py", "results.py"}


def fingerprint(root: Path = ROOT) -> str:
    """Return twelve hexadecimal digits of a hash of the source files that a measurement depends on.

    Unlike the commit, it does not change when results are committed, and it needs no git repository.
    """
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            if not (path.parent.name == "benchmarks" and path.name in _AFTERWARDS):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_conditions(**more: Any) -> dict[str, Any]:
    """Return device, versions, commit, fingerprint of the source files, and date."""
    # imported here, because this import needs torch, and result files can be read without torch
    from flare.experiments.utils.environment import environment, now

    return {**environment(), "sources": fingerprint(), "date": now(), **more}


class Recorder:
    """Collects the rows of one run and writes them to a file after each case. Without a path, they stay in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.run: dict[str, Any] = {}
        self.cases: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Load the rows of an earlier run from the file, if they were measured with the current source files."""
        if self.path is not None and self.path.exists() and is_result(self.path):
            earlier = load(self.path)
            if earlier["run"].get("sources") == fingerprint():
                self.cases = earlier["cases"]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the rows of a case, replacing earlier rows of the same case and variant."""
        rows = list(rows)
        new = {key_of(row) for row in rows}
        self.cases = [old for old in self.cases if key_of(old) not in new] + rows
        if self.path is None:
            return
        if not self.run:
            self.run = run_conditions()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(dumps({"schema": SCHEMA, "run": self.run, "cases": self.cases}))
        part.replace(self.path)


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return what identifies a row: its case and its variant."""
    return row["case"], row["variant"]


def dumps(result: dict[str, Any]) -> str:
    """Return JSON with one line per row, so that changing a row changes one line."""
    rows = ",\n  ".join(json.dumps(_rounded(row)) for row in result["cases"])
    head = json.dumps({k: v for k, v in result.items() if k != "cases"}, indent=1).removesuffix("\n}")
    return f'{head},\n "cases": [\n  {rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    """Return the value with floats rounded to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def load(path: Path) -> dict[str, Any]:
    """Return the contents of a result file.

    Raises:
        ValueError: the file is not a result file of this schema.
    """
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or "cases" not in result:
        raise ValueError(f"{path} is not a benchmark result of schema {SCHEMA}")
    return result


def is_result(path: Path) -> bool:
    """Return whether a file is a result file of this schema. Folders of results also hold other JSON files."""
    try:
        load(path)
    except (ValueError, OSError):
        return False
    return True


def finished_cases(folders: Iterable[Path]) -> set[str]:
    """Return the cases whose variants were all timed or skipped with the current source files.

    Args:
        folders: folders with result files; a folder may be missing.
    """
    current = fingerprint()
    finished: set[str] = set()
    for folder in folders:
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            if not is_result(path):
                continue
            result = load(path)
            if result["run"].get("sources") == current:
                rows = result["cases"]
                unfinished = {row["case"] for row in rows if row["status"] not in ("timed", "skipped")}
                finished |= {row["case"] for row in rows} - unfinished
    return finished
