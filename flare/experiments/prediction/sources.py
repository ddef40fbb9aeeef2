"""The source text of every row: its own, or translated from it."""

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
from .loading import Trained
from .predict_settings import PipelineSettings

#: A row's texts by column; None: it has no source.
Texts = dict[str, str]


def make_translator(settings: PipelineSettings, trained: Trained, say: Callable[[str], None]) -> Translator:
    """Return the translator from the texts' language into the source's.

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
        say,
    )


def translated(
    translator: Translator,
    rows: Sequence[Texts],
    kept: Path | None = None,
    done: Callable[[int, int], Any] = lambda now, total: None,
    share: bool = False,
) -> tuple[list[Texts], list[str]]:
    """Translate all texts of some rows, equal texts once, in batches of about one length.

    Args:
        kept: file in which finished batches are kept, so that they are not translated again; the main process's.
        done: is told how many texts of how many are translated.
        share: whether several processes, all with these rows, share the batches.

    Returns:
        The rows' translations, and notes on what was cut.
    """
    plan = translator.plan([text for row in rows for text in row.values()])
    file = None if kept is None else ProgressFile(kept, plan)

    def made(number: int) -> list[Translated]:
        return translator.translate_batch([plan.pieces[piece] for piece in plan.batches[number]])

    try:
        finished = {} if file is None else dict(file.done)
        if share:
            finished = on_main(lambda: finished)
        count = sum(len(plan.batches[number]) for number in finished)
        done(count, len(plan.pieces))
        left = [number for number in range(len(plan.batches)) if number not in finished]
        for number, batch in shared(left, made) if share else ((number, made(number)) for number in left):
            finished[number] = batch
            if file is not None:
                file.add(number, batch)
            count += len(batch)
            done(count, len(plan.pieces))
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


def source_line(trained: Trained, settings: PipelineSettings, given: int, total: int, where: str) -> str:
    """Return the line that says what is read as the source.

    Args:
        given: rows that have a source of their own.
        total: rows.
        where: where the given ones come from.

    Raises:
        UserError: the adapter was trained with sources, and rows have none.
    """
    record, lacking = trained.record, total - given
    if trained.reads == "states":
        name = settings.mt_model or record.settings["mt_model"]
        return f"source: states of the MT encoder {name} on the texts themselves"
    if trained.reads == "nothing":
        ignored = f" ({where} is not read)" if given else ""
        what = "flare train --train-only-fusion" if record.fusion else record.method
        return f"source: none, {what} reads the text alone{ignored}"
    if settings.no_source:
        if record.method == "input-fusion":
            raise UserError("--no-source: an input-fusion adapter reads both texts as one; give it the source texts")
        return "source: left out (--no-source): the adapter predicts as plain LoRA, worse than it was trained to"
    trained_on = " (machine-translated in training)" if record.source_text == "mt" else ""
    if not lacking:
        return f"source: {where} for all {total} texts{trained_on}"
    if settings.translator is None:
        made = _translator_of(record.data)
        raise UserError(
            f"{lacking} of {total} texts have no source, and this adapter ({record.method}) was trained with one: give "
            f"texts in {record.source_language} (--source-input or columns source_<column>; in Python source_texts), "
            f"have them translated (--translator{f' {made}' if made else ''}), or predict without (--no-source)"
        )
    own = f"{where} for {given} of {total} texts, " if given else ""
    return f"source: {own}translated with {settings.translator} for {lacking} of {total}{trained_on}"


def with_columns(task: Task, texts: Any, what: str) -> Texts:
    """Return the texts of one row by the task's columns.

    Args:
        texts: one text, or a mapping of column to text.

    Raises:
        TypeError, ValueError: something else, or a column that is missing.
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
    """The model that translated the run's own sources, where its record says so."""
    for provenance in (data.get("translation") or {}).values():
        name = ((provenance.get("settings") or {}).get("model") or {}).get("name")
        if name:
            return str(name)
    return None
