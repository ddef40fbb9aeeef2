"""One split from one language into another: resumable, with provenance."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..tasks import Example, Task
from ..tasks.digest import digest_of_rows
from ..tasks.files import find_file, write_split
from ..utils.environment import environment, now
from ..utils.names import folder_name
from ..utils.processes import on_main, shared
from ..utils.progress import counter
from .model import TranslationError
from .pieces import Plan
from .progress_file import ProgressFile
from .provenance import FORMAT, differences, digest_of_file, read_provenance, write_provenance
from .task_texts import POLICIES, Prepared, finish, prepare
from .translator import Translated


class TranslatorLike(Protocol):
    """What a job needs of a `Translator`."""

    def settings(self) -> dict[str, Any]: ...
    def plan(self, texts: Sequence[str]) -> Plan: ...
    def translate_batch(self, pieces: Sequence[str]) -> list[Translated]: ...


@dataclass(frozen=True)
class Job:
    """What is translated, and where it goes.

    task: says which columns are text.
    source_language, target_language: from and into which; names of folders.
    split: "train", "valid" or "test".
    rows: the split in the source language.
    output: folder of translations; the split becomes output/<source_language>-<target_language>/<split>.jsonl.
    lost_marks: of QA, what happens to a row without a span: "drop" leaves it out, "keep" keeps it without answers.
    data: where the rows came from, for provenance.
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
        for one in (self.source_language, self.target_language):
            folder_name(one, "the language")

    @property
    def name(self) -> str:
        """As messages name it: "english-acehnese/train"."""
        return f"{self.source_language}-{self.target_language}/{self.split}"

    @property
    def folder(self) -> Path:
        return self.output / f"{self.source_language}-{self.target_language}"

    @property
    def path(self) -> Path:
        """The finished split."""
        return self.folder / f"{self.split}.jsonl"

    @property
    def partial(self) -> Path:
        """The split in progress."""
        return self.folder / f"{self.split}.partial.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What came of a job: counts as provenance.json has them; resumed: batches that were there already.

    already: whether the split had been finished before, so that nothing was done.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    resumed: int = 0
    already: bool = False


def translate_split(
    job: Job, translator: TranslatorLike, *, progress: bool = False, say: Callable[[str], None] = print
) -> Outcome:
    """Translate a split, resume it, or do nothing where it is finished.

    Ids, labels and order stay; answers go along by marks. Killed at any point and started again, it ends with the same
    bytes, and no finished batch is translated again. Several processes share the batches, and the main one writes: the
    bytes are the same for any number of processes, also where it changes between a kill and the next start.

    Args:
        progress: show a bar, in the main process.
        say: is told what is resumed, and what a user should know; in the main process.

    Raises:
        TranslationError: the folder holds translations made by other settings or of other rows, files that are not
            ours, or is in use by another process.
    """
    if job.lost_marks not in POLICIES:
        raise TranslationError(f"--lost-marks must be one of {', '.join(POLICIES)}; got {job.lost_marks!r}")
    with contextlib.ExitStack() as held:
        found = on_main(lambda: _begin(job, translator.settings(), held, say))
        if isinstance(found, Outcome):
            return found
        written, entry = found
        prepared = prepare(job.rows, job.task, job.lost_marks)
        plan = translator.plan(prepared.texts)

        def opened() -> dict[int, list[Translated]]:
            written["splits"][job.split] = entry
            write_provenance(job.folder, written)
            files.append(held.enter_context(contextlib.closing(ProgressFile(job.partial, plan))))
            if files[0].done:
                say(f"{job.name}: going on after {len(files[0].done)} of {len(plan.batches)} batches")
            return dict(files[0].done)

        files: list[ProgressFile] = []  # of the main process
        done = on_main(opened)
        resumed = len(done)
        for batch, translations in _translate(plan, translator, done, job.name if progress else None):
            done[batch] = translations
            if files:
                files[0].add(batch, translations)
        return Outcome(on_main(lambda: _finish(job, prepared, plan, done, written, entry)), resumed)


def _begin(
    job: Job, settings: dict[str, Any], held: contextlib.ExitStack, say: Callable[[str], None]
) -> Outcome | tuple[dict[str, Any], dict[str, Any]]:
    """Lock the folder; return its provenance and the split's entry, or the outcome of a split that is finished."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TranslationError(
            f"{job.folder} cannot be written to ({error}); name another folder with --output"
        ) from error
    held.enter_context(_locked(job.folder, say))
    entry = {
        "status": "running",
        "input_sha256": digest_of_rows(job.rows),
        "data": job.data,
        **({"lost_marks": job.lost_marks} if job.task.kind == "qa" else {}),
    }
    written = _joined(job, settings)
    before = written["splits"].get(job.split)
    if before is not None:
        _check_same(job, before, entry)
    if before is not None and before["status"] == "done" and job.path.exists():
        if digest_of_file(job.path) != before["output_sha256"]:
            say(f"{job.name}: {job.path} was changed after it was translated; it is left as it is.")
        job.partial.unlink(missing_ok=True)
        return Outcome(before["counts"], already=True)
    if before is None and (other := find_file(job.output, job.folder.name, job.split)) is not None:
        raise TranslationError(
            f"{other} is there, and nothing says that this command made it; move it away, or name another folder "
            "with --output"
        )
    return written, entry


def _finish(
    job: Job,
    prepared: Prepared,
    plan: Plan,
    done: Mapping[int, Sequence[Translated]],
    written: dict[str, Any],
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Write the split and its provenance; return the counts."""
    pieces = [Translated("")] * len(plan.pieces)
    for batch, translations in done.items():
        for piece, translated in zip(plan.batches[batch], translations, strict=True):
            pieces[piece] = translated
    rows, counts = finish(prepared, plan.join([one.text for one in pieces]))
    counts |= {
        "different_pieces": len(pieces),
        "cut": sum(one.source_cut for one in pieces),
        "unfinished": sum(one.unfinished for one in pieces),
    }
    if not rows:
        raise TranslationError(f"{job.name}: no row is left to write; dropped: {_reasons(counts['dropped'])}")
    write_split(job.path, rows, job.task)
    written["splits"][job.split] = {
        **entry,
        "status": "done",
        "counts": counts,
        "output_sha256": digest_of_file(job.path),
        "date": now(),
        "environment": environment(),
    }
    write_provenance(job.folder, written)
    # last: a kill before this line finds the translations again
    job.partial.unlink()
    return counts


def _translate(
    plan: Plan, translator: TranslatorLike, done: Mapping[int, Sequence[Translated]], label: str | None
) -> Iterator[tuple[int, list[Translated]]]:
    """Yield every batch that is not done with its translations; the processes share them."""
    before = sum(len(plan.batches[batch]) for batch in done)
    left = [batch for batch in range(len(plan.batches)) if batch not in done]
    with counter(label, len(plan.pieces), "text", before) as bar:
        for batch, translations in shared(
            left, lambda batch: translator.translate_batch([plan.pieces[piece] for piece in plan.batches[batch]])
        ):
            yield batch, translations
            bar.update(len(translations))


def summary(job: Job, outcome: Outcome) -> str:
    """A line for the user: what was written, and what was lost."""
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
    return f"{job.name}: {'was finished before: ' if outcome.already else ''}{'; '.join(parts)}"


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in counts.items())


def _joined(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's provenance, which has to be of these settings; a new one where there is none."""
    now = {
        "format": FORMAT,
        "task": job.task.name,
        "text_columns": list(job.task.text_columns),
        "from": job.source_language,
        "to": job.target_language,
        "settings": settings,
    }
    then = read_provenance(job.folder)
    if then is None:
        return {**now, "splits": {}}
    differing = differences({key: then.get(key) for key in now}, now)
    if differing:
        raise TranslationError(
            f"{job.folder} holds translations made with other settings: {'; '.join(differing)}. Give the settings of "
            "then, or name another folder with --output"
        )
    return then


def _check_same(job: Job, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    state = "finished" if then["status"] == "done" else "begun"
    if then["input_sha256"] != now["input_sha256"]:
        raise TranslationError(
            f"{job.name} was {state} with other rows than those there are now (another --limit, or "
            f"{job.source_language}/{job.split} has changed); give it the rows of then, or name another "
            "folder with --output"
        )
    if then.get("lost_marks") != now.get("lost_marks"):
        raise TranslationError(
            f"{job.name} was {state} with --lost-marks {then.get('lost_marks')}, now it is {now.get('lost_marks')}; "
            "name another folder with --output"
        )


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep a second process out of the folder; the lock ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TranslationError(
                f"{folder} is in use by another flare translate; wait for it, or name another folder with --output"
            ) from error
        except OSError as error:
            say(f"{folder} cannot be locked ({error}): see that no second flare translate writes there")
        yield
    finally:
        os.close(handle)
