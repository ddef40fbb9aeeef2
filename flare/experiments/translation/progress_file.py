"""The file a translation in progress is kept in: a line for every batch, forced to disk before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tasks.digest import digest_of
from ..utils.json_files import parsed
from .model import TranslationError
from .pieces import Plan
from .translator import Translated


class ProgressFile:
    """Batches done so far, on disk.

    The first line names the plan, every other one holds a batch: {"batch": n, "translations": [[text, cut, unfinished],
    ...]}. What a kill left of a last line is cut off.

    Args:
        path: made where it is not there.
        plan: has to be that of the file.

    Attributes:
        done: batch -> its translations.

    Raises:
        TranslationError: the file was written for another plan.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.done = path, dict[int, list[Translated]]()
        header = {"plan": digest_of([plan.pieces, plan.batches])}
        whole = self._read(plan, header) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write(header)

    def add(self, batch: int, translations: Sequence[Translated]) -> None:
        """Keep a batch; it is on disk when this returns."""
        self._write({"batch": batch, "translations": [[t.text, t.source_cut, t.unfinished] for t in translations]})
        self.done[batch] = list(translations)

    def close(self) -> None:
        """Close the file; it stays where it is."""
        self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, plan: Plan, header: Any) -> int:
        """Read what is whole; return how many bytes that is."""
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    content = parsed(line)
                except ValueError:  # a block that the disk never got, after a power cut
                    break
                if whole == 0:
                    self._check(content == header)
                else:
                    try:
                        made = [Translated(*one) for one in content["translations"]]
                        self._check(len(made) == len(plan.batches[content["batch"]]))
                    except (KeyError, TypeError, IndexError):
                        self._check(False)
                    self.done[content["batch"]] = made
                whole += len(line)
        return whole

    def _check(self, fits: bool) -> None:
        if not fits:
            raise TranslationError(
                f"{self.path} was begun with other batches of text, as by another version of the tokenizer or of this "
                "package; move it away to start anew, or name another folder with --output"
            )
