"""Find the source text of every row: the user gives it, or it is translated from the row's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..tasks import Task
from ..translation import Translated, TranslateSettings, Translator
from ..translation.progress_file import ProgressFile
from ..translation.run import translator_to_source
from ..utils.errors import UserError
from ..utils.processes import on_main, shared
from .loading import TrainedAdapter
from .predict_settings import PipelineSettings

#: The texts of a row: a dict from the task's text column to the text.
Texts = dict[str, str]


def make_translator(settings: PipelineSettings, trained: TrainedAdapter, print_fn: Callable[[str], None]) -> Translator:
    """Return the translator from the language of the texts into the source language.

    Raises:
        UserError: the language of the texts is not known, or the model cannot be used.
    """
    assert settings.translator is not None
    target = trained.record.target_language or settings.target_code
    if target is None:
        raise UserError("--translator needs the language of the texts: name it with --target or --target-code")
    return translator_to_source(
        TranslateSettings(
            task=trained.record.task,
            source=trained.record.source_language,
            target=[target],
            model=settings.translator,
            splits=("test",),
            direction="to-source",
            source_code=settings.source_code,
            target_code=None if settings.target_code is None else [settings.target_code],
            prefix=settings.prefix,
            beams=settings.beams,
            batch_tokens=settings.batch_tokens,
            device=settings.device,
        ),
        print_fn,
    )


def translate(
    translator: Translator,
    rows: Sequence[Texts],
    progress_file: Path | None = None,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
    share: bool = False,
) -> tuple[list[Texts], list[str]]:
    """Translate all texts of the rows, in batches of texts of similar length. Equal texts are translated once.

    Args:
        translator: the translator into the source language.
        rows: the texts of each row.
        progress_file: file that saves finished batches, so that a later call skips them. None: batches are not saved.
            If several processes run, only the main process may pass a file.
        on_progress: called with the number of translated pieces and of all pieces. The translator splits texts into
            pieces that fit the model, usually sentences.
        share: whether the processes of this run divide the batches among themselves. Every process must pass the same
            rows.

    Returns:
        The translated texts of each row, and notes on how many pieces and how many translations were cut.
    """
    plan = translator.plan([text for row in rows for text in row.values()])
    file = None if progress_file is None else ProgressFile(progress_file, plan)

    def translate_batch(number: int) -> list[Translated]:
        return translator.translate_batch([plan.pieces[piece] for piece in plan.batches[number]])

    try:
        finished = {} if file is None else dict(file.done)
        if share:
            finished = on_main(lambda: finished)
        count = sum(len(plan.batches[number]) for number in finished)
        on_progress(count, len(plan.pieces))
        remaining = [number for number in range(len(plan.batches)) if number not in finished]
        alone = ((number, translate_batch(number)) for number in remaining)
        for number, batch in shared(remaining, translate_batch) if share else alone:
            finished[number] = batch
            if file is not None:
                file.add(number, batch)
            count += len(batch)
            on_progress(count, len(plan.pieces))
    finally:
        if file is not None:
            file.close()
    pieces = [Translated("")] * len(plan.pieces)
    for number, members in enumerate(plan.batches):
        for piece, one in zip(members, finished[number], strict=True):
            pieces[piece] = one
    texts = iter(plan.join([one.text for one in pieces]))
    notes = [
        f"{number} of {len(pieces)} {what}"
        for number, what in (
            (
                sum(one.source_cut for one in pieces),
                f"sentences were cut to the translator's {translator.max_length} tokens",
            ),
            (sum(one.unfinished for one in pieces), f"translations were cut at {translator.max_new_tokens} tokens"),
        )
        if number
    ]
    return [{column: next(texts) for column in row} for row in rows], notes


def describe_source(trained: TrainedAdapter, settings: PipelineSettings, given: int, total: int, where: str) -> str:
    """Return a line that says what is read as the source.

    Args:
        trained: the adapter.
        settings: the options.
        given: number of rows whose source the user gave.
        total: number of rows that have a text.
        where: the file or the columns that the given sources come from.

    Raises:
        UserError: the adapter reads source texts, some rows have none, and neither --translator nor --no-source is
            given; or --no-source is given for an input-fusion adapter.
    """
    record, missing = trained.record, total - given
    if trained.reads == "states":
        name = settings.mt_model or record.settings["mt_model"]
        return f"source: states of the MT encoder {name}, computed from the texts themselves"
    if trained.reads == "nothing":
        ignored = f" ({where} is not read)" if given else ""
        method = "flare train --train-only-fusion" if record.fusion else record.method
        return f"source: none, {method} reads only the text{ignored}"
    if settings.no_source:
        if record.method == "input-fusion":
            raise UserError("--no-source: an input-fusion adapter reads both texts as one input; give the source texts")
        return "source: left out (--no-source): the adapter is plain LoRA and predicts worse than with a source"
    trained_on = " (in training, the source was machine-translated)" if record.source_text == "mt" else ""
    if not missing:
        return f"source: {where} for all {total} texts{trained_on}"
    if settings.translator is None:
        trained_with = _translator_of(record.data)
        raise UserError(
            f"{missing} of {total} texts have no source, and this adapter ({record.method}) was trained with source "
            f"texts: give texts in {record.source_language} (--source-input or columns source_<column>; in Python "
            f"source_texts), translate them (--translator{f' {trained_with}' if trained_with else ''}), or predict "
            "without a source (--no-source)"
        )
    first = f"{where} for {given} of {total} texts, " if given else ""
    return f"source: {first}translated with {settings.translator} for {missing} of {total}{trained_on}"


def by_column(task: Task, texts: Any, what: str) -> Texts:
    """Return a dict from the task's text columns to the texts of one row.

    Args:
        task: the task.
        texts: one text, or a dict of column -> text.
        what: name of the row, for messages.

    Raises:
        TypeError: ``texts`` is neither a text nor a dict.
        ValueError: a column is missing in the dict, or its value is not a text.
    """
    columns = task.text_columns
    if isinstance(texts, str) and len(columns) == 1:
        return {columns[0]: texts}
    if not isinstance(texts, dict):
        shape = "a text" if len(columns) == 1 else f"a dict with {', '.join(columns)}"
        raise TypeError(f"{what} must be {shape}; got {type(texts).__name__}")
    missing = [column for column in columns if not isinstance(texts.get(column), str)]
    if missing:
        raise ValueError(
            f"{what} lacks {', '.join(missing)} (a text); it has {', '.join(map(str, texts)) or 'nothing'}"
        )
    return {column: texts[column] for column in columns}


def _translator_of(data: dict[str, Any]) -> str | None:
    """Return the model that translated the source texts of the run, or None if the record names no model."""
    for provenance in (data.get("translation") or {}).values():
        name = ((provenance.get("settings") or {}).get("model") or {}).get("name")
        if name:
            return str(name)
    return None
