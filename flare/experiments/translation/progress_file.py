"""Progress file of a translation: one line per finished batch, synced to disk as soon as it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tasks.digest import digest_of
from ..utils.json_files import parsed
from .batch_plan import Plan
from .model import TranslationError
from .translator import Translated


class ProgressFile:
    """File with the finished batches of a translation.

    The first line identifies the plan. Every other line is a batch: {"batch": n, "translations": [[text, source_cut,
    unfinished], ...]} (see `Translated`). An incomplete or unreadable line, left by a killed process or a power cut, is
    removed together with all lines after it.

    Args:
        path: the file; created if it does not exist.
        plan: the plan that the file must belong to.

    Attributes:
        done: index of a finished batch -> its translations.

    Raises:
        TranslationError: the file belongs to another plan.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.done = path, dict[int, list[Translated]]()
        header = {"plan": digest_of([plan.pieces, plan.batches])}
        complete = self._read(plan, header) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(complete)
        if not complete:
            self._write(header)

    def add(self, batch: int, translations: Sequence[Translated]) -> None:
        """Append a batch. The batch is on disk when this method returns."""
        self._write({"batch": batch, "translations": [[t.text, t.source_cut, t.unfinished] for t in translations]})
        self.done[batch] = list(translations)

    def close(self) -> None:
        """Close the file without removing it."""
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, plan: Plan, header: Any) -> int:
        """Read the complete lines; return their size in bytes."""
        complete = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    content = parsed(line)
                except ValueError:  # after a power cut, a block may not have reached the disk
                    break
                if complete == 0:
                    self._check(content == header)
                else:
                    try:
                        translations = [Translated(*fields) for fields in content["translations"]]
                        self._check(len(translations) == len(plan.batches[content["batch"]]))
                    except (KeyError, TypeError, IndexError):
                        self._check(False)
                    self.done[content["batch"]] = translations
                complete += len(line)
        return complete

    def _check(self, fits: bool) -> None:
        if not fits:
            raise TranslationError(
                f"{self.path} was written for other batches of text, for example by another version of the tokenizer "
                "or of this package; move it away to start again, or choose another folder with --output"
            )
