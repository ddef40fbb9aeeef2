"""The output of `flare predict`: written whole at the end; batches that are done wait in a file beside it."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..translation.provenance import differences
from ..utils.atomic_files import replacing
from ..utils.errors import UserError

SUFFIXES = (".jsonl", ".csv")
Prediction = dict[str, Any]


class Progress:
    """Batches that are done, on disk: OUTPUT.partial, whose first line says of what, and a line for each batch.

    Args:
        output: the file that will be written in the end.
        header: everything that decides about the predictions; JSON.

    Attributes:
        done: the predictions of the batches, in order.
        translations: the file in which translations may be kept meanwhile.

    Raises:
        UserError: the file beside the output is of other rows or settings, or another process is writing it.
    """

    def __init__(self, output: Path, header: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self.translations = output.with_name(f"{output.name}.translations.partial")
        self.done: list[list[Prediction]] = []
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self.path}: another process is writing it; wait for it, or name another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        header = json.loads(json.dumps(header))
        whole = self._read(header)
        self._file.truncate(whole)
        if not whole:
            self._write(header)

    def add(self, batch: list[Prediction]) -> None:
        """Keep the predictions of the next batch; they are on disk when this returns."""
        self._write(batch)
        self.done.append(batch)

    def remove(self) -> None:
        """Remove the files beside the output, which is written."""
        self.path.unlink(missing_ok=True)
        self.translations.unlink(missing_ok=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.done and not self.translations.exists():
            self.path.unlink(missing_ok=True)  # nothing to go on from
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, header: dict[str, Any]) -> int:
        """Read what is whole; return how many bytes that is."""
        whole = 0
        self._file.seek(0)
        for line in self._file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # torn by a kill
                content = None
            if content is None:
                break
            if whole == 0:
                differing = differences(content, header) if isinstance(content, dict) else ["it is not ours"]
                if differing and not any(self._file) and not self.translations.exists():
                    return 0  # a call that ended before its first batch
                if differing:
                    raise UserError(
                        f"{self.path} holds predictions that were begun otherwise: {'; '.join(differing)}. Give the "
                        "command of then, name another --output, or remove this file"
                    )
            else:
                self.done.append(content)
            whole += len(line)
        return whole


def check_output(name: str, overwrite: bool) -> Path | None:
    """Return the file to write; None for standard output.

    Raises:
        UserError: it is there already, or its name ends otherwise.
    """
    if name == "-":
        return None
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {name}: its name must end in {' or '.join(SUFFIXES)}; - writes to standard output")
    if path.is_dir():
        raise UserError(f"--output {name} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"--output {name} is there already and was not touched; name another, or add --overwrite")
    return path


def write_lines(rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to standard output as JSON lines."""
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write_file(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines or, by the file's name, as CSV; the file is there whole or not at all."""
    with replacing(path) as file:
        if path.suffix == ".csv":
            flat = [_flat(row) for row in rows]
            writer = csv.DictWriter(
                file, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(flat)
            return
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for CSV: a column for each label's probability, JSON for what is a list or an object."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities" and isinstance(value, dict):
            found |= {f"probability_{label}": share for label, share in value.items()}
        else:
            found[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    return found
