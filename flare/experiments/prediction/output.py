"""Write the output file of `flare predict` after the last batch.

Until then, finished batches are saved in a second file, so that an interrupted command can resume.
"""

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


class FinishedBatches:
    """Finished batches on disk, in OUTPUT.partial: one header line, then one line per batch.

    Args:
        output: the file that is written at the end.
        header: the inputs and options that determine the predictions, as JSON values. A call resumes only if this
            header equals the header in OUTPUT.partial.

    Attributes:
        done: the finished batches, in order. A batch is the list of its predictions.
        translations: path of the file for finished translations.

    Raises:
        UserError: OUTPUT.partial belongs to other rows or settings, or another process is writing it.
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
                f"{self.path}: another process is writing this file; wait until it has ended, or name another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        header = json.loads(json.dumps(header))
        size = self._read(header)
        self._file.truncate(size)
        if not size:
            self._write(header)

    def add(self, batch: list[Prediction]) -> None:
        """Append the predictions of the next batch. They are on disk when this method returns."""
        self._write(batch)
        self.done.append(batch)

    def remove(self) -> None:
        """Remove the files of finished batches and translations, after the output is written."""
        self.path.unlink(missing_ok=True)
        self.translations.unlink(missing_ok=True)

    def __enter__(self) -> FinishedBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.done and not self.translations.exists():
            self.path.unlink(missing_ok=True)  # nothing to resume
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, header: dict[str, Any]) -> int:
        """Compare the header and read the finished batches into `done`.

        Returns:
            The size of the complete lines in bytes; 0 if there is nothing to resume.

        Raises:
            UserError: the header of the file differs, or flare predict did not write the file.
        """
        size = 0
        self._file.seek(0)
        for line in self._file:
            try:  # if a line has no newline, the process was killed while it wrote the line
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # a damaged line
                content = None
            if size == 0 and not isinstance(content, dict) and (line.endswith(b"\n") or not line.startswith(b"{")):
                raise UserError(
                    f"{self.path} was not written by flare predict; name another --output, or remove this file"
                )
            if content is None:
                break
            if size == 0:
                differing = differences(content, header)
                if differing and not any(self._file) and not self.translations.exists():
                    return 0  # the earlier call ended before its first batch
                if differing:
                    raise UserError(
                        f"{self.path} belongs to a command with other settings: {'; '.join(differing)}. Repeat that "
                        "command, name another --output, or remove this file"
                    )
            else:
                self.done.append(content)
            size += len(line)
        return size


def check_output(name: str, overwrite: bool) -> Path | None:
    """Return the file to write, or None for standard output.

    Raises:
        UserError: the file exists and `overwrite` is False, the path is a folder, or the file's name ends in neither
            .jsonl nor .csv.
    """
    if name == "-":
        return None
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {name}: its name must end in {' or '.join(SUFFIXES)}; - writes to standard output")
    if path.is_dir():
        raise UserError(f"--output {name} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"--output {name} already exists and was not changed; name another file, or add --overwrite")
    return path


def write_lines(rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to standard output as JSON lines."""
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write_file(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV if the path ends in .csv, otherwise as JSON lines. An error leaves no partial file."""
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
    """Return a row for CSV, with one column per label's probability, and lists and objects as JSON."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities" and isinstance(value, dict):
            cells |= {f"probability_{label}": share for label, share in value.items()}
        else:
            cells[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value
    return cells
