"""Result files: one JSON object with the run's conditions and one row per case, complete after every case."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
#: What a measured number depends on; how it is summed up and drawn afterwards does not.
_SOURCES = ("flare_kernels/**/*.py", "flare/**/*.py", "benchmarks/*.py")
_AFTERWARDS = {"summary.py", "costs.py", "tables.py", "plot.py", "results.py"}


def fingerprint(root: Path = ROOT) -> str:
    """Twelve digits of a hash of the sources. Unlike the commit it does not change when results are committed, and it
    can be told on a machine that has the files and no repository.
    """
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            if not (path.parent.name == "benchmarks" and path.name in _AFTERWARDS):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_conditions(**more: Any) -> dict[str, Any]:
    """Device, versions, commit, sources and date of this process."""
    from flare.experiments.utils.environment import (  # brings torch along, which reading results does not need
        environment,
        now,
    )

    return {**environment(), "sources": fingerprint(), "date": now(), **more}


class Recorder:
    """Rows of one run, written to a file after each case (to none where the path is None)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.run: dict[str, Any] = {}
        self.cases: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Go on with the file of an earlier run of the same sources, where there is one."""
        if self.path is not None and self.path.exists() and is_result(self.path):
            earlier = load(self.path)
            if earlier["run"].get("sources") == fingerprint():
                self.cases = earlier["cases"]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep the rows of a case, in place of earlier ones."""
        rows = list(rows)
        new = {key_of(row) for row in rows}
        self.cases = [old for old in self.cases if key_of(old) not in new] + rows
        if self.path is None:
            return
        if not self.run:
            self.run = run_conditions()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(dumps({"schema": SCHEMA, "run": self.run, "cases": self.cases}))
        beside.replace(self.path)


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    """What tells a row from others: its case and its variant."""
    return row["case"], row["variant"]


def dumps(result: dict[str, Any]) -> str:
    """JSON with one line per case, so that a change of one is a change of one line."""
    rows = ",\n  ".join(json.dumps(_rounded(row)) for row in result["cases"])
    head = json.dumps({k: v for k, v in result.items() if k != "cases"}, indent=1).removesuffix("\n}")
    return f'{head},\n "cases": [\n  {rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    """Floats to six digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: not a result file, or one of another schema.
    """
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or "cases" not in result:
        raise ValueError(f"{path} is no benchmark result of schema {SCHEMA}")
    return result


def is_result(path: Path) -> bool:
    """Whether a file is one of ours; other JSON may lie beside it."""
    try:
        load(path)
    except (ValueError, OSError):
        return False
    return True


def done(folders: Iterable[Path]) -> set[str]:
    """Cases whose every variant was timed, or skipped with a reason, with these very sources."""
    now = fingerprint()
    finished: set[str] = set()
    for folder in folders:
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            if not is_result(path):
                continue
            result = load(path)
            if result["run"].get("sources") == now:
                rows = result["cases"]
                unfinished = {row["case"] for row in rows if row["status"] not in ("timed", "skipped")}
                finished |= {row["case"] for row in rows} - unfinished
    return finished
