"""Translate one split from one language into another.

An interrupted translation can be resumed. provenance.json records how the files in its folder were made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..tasks import Example, Task
from ..tasks.digest import digest_of_rows, digest_of_texts
from ..tasks.files import find_file, write_split
from ..utils.environment import environment, now
from ..utils.names import folder_name
from ..utils.processes import on_main, shared
from ..utils.progress import counter
from .batch_plan import Plan
from .model import TranslationError
from .progress_file import ProgressFile
from .provenance import FORMAT, differences, digest_of_file, read_provenance, write_provenance
from .row_texts import POLICIES, PreparedRows, prepare_rows, restore_rows
from .translator import Translated


class TranslatorLike(Protocol):
    """The interface of `Translator` that a job uses."""

    def settings(self) -> dict[str, Any]: ...
    def plan(self, texts: Sequence[str]) -> Plan: ...
    def translate_batch(self, pieces: Sequence[str]) -> list[Translated]: ...


@dataclass(frozen=True)
class Job:
    """The translation of one split.

    Attributes:
        task: determines which columns are translated.
        source_language, target_language: names of the languages to translate from and into.
        split: "train", "valid" or "test".
        rows: the rows of the split in the source language.
        output: folder of translations; the split becomes output/<source_language>-<target_language>/<split>.jsonl.
        lost_marks: what to do with a QA row whose answer cannot be marked or is not found in the translation: "drop"
            the row, or "keep" the row without answers.
        data: origin of the rows, for provenance.
    """

    task: Task
    source_language: str
    target_language: str
    split: str
    rows: Sequence[Example]
    output: Path
    lost_marks: str = "drop"
    data: str | None = None

    def __post_init__(self) -> None:
        for language in (self.source_language, self.target_language):
            folder_name(language, "the language")

    @property
    def name(self) -> str:
        """Name for messages: "english-acehnese/train"."""
        return f"{self.source_language}-{self.target_language}/{self.split}"

    @property
    def folder(self) -> Path:
        return self.output / f"{self.source_language}-{self.target_language}"

    @property
    def path(self) -> Path:
        """File of the finished split."""
        return self.folder / f"{self.split}.jsonl"

    @property
    def partial(self) -> Path:
        """File of the split in progress."""
        return self.folder / f"{self.split}.partial.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Result of a job.

    Attributes:
        counts: the numbers of written, dropped and truncated rows and texts, as in provenance.json.
        resumed: number of batches that were finished by earlier runs.
        already: whether the split was already finished, so nothing was done.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    resumed: int = 0
    already: bool = False


def translate_split(
    job: Job, translator: TranslatorLike, *, progress: bool = False, print_fn: Callable[[str], None] = print
) -> Outcome:
    """Translate a split, resume its translation, or do nothing if it is finished.

    Ids, labels and order are kept. Answers are found in the translation by marks around them (`.answer_marks`). A
    killed run that is started again writes the same bytes as an uninterrupted run and translates no finished batch
    twice. Several processes share the batches, and the main process writes. The bytes do not depend on the number of
    processes, even if the number changes between a kill and the next start.

    Args:
        job: what to translate.
        translator: translates the batches.
        progress: whether to show a progress bar in the main process.
        print_fn: called with messages for the user in the main process.

    Raises:
        TranslationError: `job.lost_marks` is unknown; the folder cannot be written to, is used by another process, or
            holds translations with other settings or of other rows, or files that this command did not write; or no row
            is left to write.
    """
    if job.lost_marks not in POLICIES:
        raise TranslationError(f"--lost-marks must be one of {', '.join(POLICIES)}; got {job.lost_marks!r}")
    with contextlib.ExitStack() as stack:
        state = on_main(lambda: _start(job, translator.settings(), stack, print_fn))
        if isinstance(state, Outcome):
            return state
        provenance, entry = state
        prepared = prepare_rows(job.rows, job.task, job.lost_marks)
        plan = translator.plan(prepared.texts)

        def open_progress_file() -> dict[int, list[Translated]]:
            provenance["splits"][job.split] = entry
            write_provenance(job.folder, provenance)
            files.append(stack.enter_context(contextlib.closing(ProgressFile(job.partial, plan))))
            if files[0].done:
                print_fn(f"{job.name}: resuming after {len(files[0].done)} of {len(plan.batches)} batches")
            return dict(files[0].done)

        files: list[ProgressFile] = []  # only filled in the main process
        done = on_main(open_progress_file)
        resumed = len(done)
        for batch, translations in _translate(plan, translator, done, job.name if progress else None):
            done[batch] = translations
            if files:
                files[0].add(batch, translations)
        return Outcome(on_main(lambda: _finish(job, prepared, plan, done, provenance, entry)), resumed)


def _start(
    job: Job, settings: dict[str, Any], stack: contextlib.ExitStack, print_fn: Callable[[str], None]
) -> Outcome | tuple[dict[str, Any], dict[str, Any]]:
    """Lock the folder. Return its provenance and a new entry for the split, or the outcome if the split is finished."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TranslationError(
            f"{job.folder} cannot be written to ({error}); choose another folder with --output"
        ) from error
    stack.enter_context(_locked(job.folder, print_fn))
    entry = {
        "status": "running",
        "input_sha256": digest_of_rows(job.rows),
        "texts_sha256": digest_of_texts(job.rows),  # compared when rows without ids are paired
        "data": job.data,
        **({"lost_marks": job.lost_marks} if job.task.kind == "qa" else {}),
    }
    provenance = _provenance_of_folder(job, settings)
    previous = provenance["splits"].get(job.split)
    if previous is not None:
        _check_same(job, previous, entry)
    if previous is not None and previous["status"] == "done" and job.path.exists():
        if digest_of_file(job.path) != previous["output_sha256"]:
            print_fn(f"{job.name}: {job.path} was changed after it was translated; the changed file is kept.")
        job.partial.unlink(missing_ok=True)
        return Outcome(previous["counts"], already=True)
    if previous is None and (other := find_file(job.output, job.folder.name, job.split)) is not None:
        raise TranslationError(
            f"{other} exists, but the folder has no record that this command wrote it; move it away, or choose another "
            "folder with --output"
        )
    return provenance, entry


def _finish(
    job: Job,
    prepared: PreparedRows,
    plan: Plan,
    done: Mapping[int, Sequence[Translated]],
    provenance: dict[str, Any],
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Write the split and its provenance; return the counts."""
    pieces = [Translated("")] * len(plan.pieces)
    for batch, translations in done.items():
        for index, translated in zip(plan.batches[batch], translations, strict=True):
            pieces[index] = translated
    rows, counts = restore_rows(prepared, plan.join([piece.text for piece in pieces]))
    counts |= {
        "different_pieces": len(pieces),
        "cut": sum(piece.source_cut for piece in pieces),
        "unfinished": sum(piece.unfinished for piece in pieces),
    }
    if not rows:
        raise TranslationError(f"{job.name}: no rows are left to write; dropped: {_reasons(counts['dropped'])}")
    write_split(job.path, rows, job.task)
    provenance["splits"][job.split] = {
        **entry,
        "status": "done",
        "counts": counts,
        "output_sha256": digest_of_file(job.path),
        "date": now(),
        "environment": environment(),
    }
    write_provenance(job.folder, provenance)
    job.partial.unlink()  # last, so that a kill before this line loses no translations
    return counts


def _translate(
    plan: Plan, translator: TranslatorLike, done: Mapping[int, Sequence[Translated]], label: str | None
) -> Iterator[tuple[int, list[Translated]]]:
    """Yield the index of every unfinished batch with the batch's translations. The processes share the batches."""
    finished = sum(len(plan.batches[batch]) for batch in done)
    unfinished = [batch for batch in range(len(plan.batches)) if batch not in done]
    with counter(label, len(plan.pieces), "text", finished) as bar:
        for batch, translations in shared(
            unfinished, lambda batch: translator.translate_batch([plan.pieces[piece] for piece in plan.batches[batch]])
        ):
            yield batch, translations
            bar.update(len(translations))


def summary(job: Job, outcome: Outcome) -> str:
    """Return one line for the user: what was written, and what was lost."""
    counts = outcome.counts
    parts = [f"{counts['written']} of {counts['rows']} rows in {job.path}"]
    if counts["dropped"]:
        parts.append(f"dropped: {_reasons(counts['dropped'])}")
    if counts["without_span"]:
        parts.append(f"kept without a span: {_reasons(counts['without_span'])}")
    for key, text in (
        ("cut", "sentences longer than --max-length, cut"),
        ("unfinished", "translations cut at --max-new-tokens"),
        ("empty", "texts whose translation is empty"),
    ):
        if counts[key]:
            parts.append(f"{text}: {counts[key]}")
    return f"{job.name}: {'already finished: ' if outcome.already else ''}{'; '.join(parts)}"


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in counts.items())


def _provenance_of_folder(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's provenance, or new provenance if the folder has none.

    Raises:
        TranslationError: the translations in the folder were made with another task, other text columns, other
            languages or other settings of the translator, or the provenance cannot be read.
    """
    current = {
        "format": FORMAT,
        "task": job.task.name,
        "text_columns": list(job.task.text_columns),
        "from": job.source_language,
        "to": job.target_language,
        "settings": settings,
    }
    previous = read_provenance(job.folder)
    if previous is None:
        return {**current, "splits": {}}
    differing = differences({key: previous.get(key) for key in current}, current)
    if differing:
        raise TranslationError(
            f"{job.folder} holds translations made with other settings: {'; '.join(differing)}. Use the previous "
            "settings, or choose another folder with --output"
        )
    return previous


def _check_same(job: Job, previous: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise TranslationError if a split was started with other rows or another --lost-marks."""
    state = "finished" if previous["status"] == "done" else "started"
    if previous["input_sha256"] != current["input_sha256"]:
        raise TranslationError(
            f"{job.name} was {state} with other rows (another --limit, or {job.source_language}/{job.split} has "
            "changed); restore the previous rows, or choose another folder with --output"
        )
    if previous.get("lost_marks") != current.get("lost_marks"):
        raise TranslationError(
            f"{job.name} was {state} with --lost-marks {previous.get('lost_marks')}, now it is "
            f"{current.get('lost_marks')}; use the same value, or choose another folder with --output"
        )


@contextlib.contextmanager
def _locked(folder: Path, print_fn: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder against a second process until the context ends or this process is killed.

    If the file system has no locks, print a message and continue without a lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TranslationError(
                f"{folder} is in use by another flare translate; wait for it, or choose another folder with --output"
            ) from error
        except OSError as error:
            print_fn(f"{folder} cannot be locked ({error}): make sure that no second flare translate writes to it")
        yield
    finally:
        os.close(handle)
