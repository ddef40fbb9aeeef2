"""Run `flare translate`: check languages, tags and data, then translate split by split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..tasks import Example, get_task, language, nllb_code, read_split
from ..tasks.reading import all_targets
from ..utils.environment import use_threads
from ..utils.processes import is_main, only_main
from .job import Job, Outcome, summary, translate_split
from .model import TranslationError, TranslationModel, check_tag, writes_tags
from .translate_settings import TranslateSettings
from .translator import Translator


@dataclass(frozen=True)
class Direction:
    """One direction of translation.

    Attributes:
        source, target: names of the languages to translate from and into.
        source_tag, target_tag: tags of these languages. For a model without tags, the codes that the user gave for the
            prefix; None if the user gave no code.
        splits: the splits that are translated in this direction.
    """

    source: str
    target: str
    source_tag: str | None
    target_tag: str | None
    splits: tuple[str, ...]


def run_translate(settings: TranslateSettings, print_fn: Callable[[str], None] = print) -> list[tuple[Job, Outcome]]:
    """Translate all splits of the settings. Languages, tags and data are checked before the weights are loaded.

    Args:
        settings: options of the command.
        print_fn: called with one line per split and with notes for the user.

    Returns:
        Every job with its outcome.

    Raises:
        UserError: an error that the user can fix.
    """
    if settings.threads is not None:
        use_threads(settings.threads)
    print_fn, progress = only_main(print_fn), settings.progress and is_main()
    task = get_task(
        settings.task,
        text_columns=settings.text_columns,
        choice_columns=settings.choice_columns,
        label_column=settings.label_column,
        id_columns=settings.id_column,
        labels=settings.labels,
    )
    if task.kind == "token-classification" and any(map(settings.to_target, settings.splits)):
        raise TranslationError(
            f"task {task.name}: the tags belong to the words of one language and cannot be translated; translate the "
            "target's sentences into the source language (--direction to-source), and use flare train --source-text mt"
        )
    if settings.data is not None and os.path.isfile(os.path.expanduser(settings.data)):
        raise TranslationError(
            f"--data {settings.data}: this is one file; give a folder with one sub-folder per language, or a hub id"
        )
    if tuple(settings.target) == ("all",):
        targets, notes = all_targets(task, settings.data, settings.source)
        settings = replace(settings, target=targets)
        for note in notes:
            print_fn(note)
    model = TranslationModel(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    directions = _directions(settings, model, print_fn)

    @cache
    def rows(name: str, split: str) -> tuple[Example, ...]:
        return tuple(read_split(task, settings.data, name, split))[: settings.limit]

    jobs = [
        (
            direction,
            Job(
                task=task,
                source_language=direction.source,
                target_language=direction.target,
                split=split,
                rows=rows(direction.source, split),
                output=Path(settings.output).expanduser(),
                lost_marks=settings.policy(split),
                data=settings.data or task.hub_id,
            ),
        )
        for direction in directions
        for split in direction.splits
    ]
    translators = {direction: _translator(settings, model, direction, print_fn) for direction in directions}
    outcomes = []
    for direction, job in jobs:
        outcome = translate_split(job, translators[direction], progress=progress, print_fn=print_fn)
        print_fn(summary(job, outcome))
        outcomes.append((job, outcome))
    return outcomes


def translator_to_source(settings: TranslateSettings, print_fn: Callable[[str], None] = print) -> Translator:
    """Return a translator from the first target language into the source language, without reading or writing data.

    The settings must have the direction "to-source".

    Raises:
        TranslationError: the model, a tag or a limit cannot be used.
    """
    model = TranslationModel(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    return _translator(settings, model, _directions(settings, model, print_fn)[0], print_fn)


def _directions(
    settings: TranslateSettings, model: TranslationModel, print_fn: Callable[[str], None]
) -> Sequence[Direction]:
    """Return, for every target language, the one or two directions in which splits are translated."""
    to_target = tuple(split for split in settings.splits if settings.to_target(split))
    to_source = tuple(split for split in settings.splits if not settings.to_target(split))
    tagged = writes_tags(model.tokenizer)
    if not tagged and "{target}" not in settings.prefix and (len(settings.target) > 1 or (to_target and to_source)):
        raise TranslationError(
            f"--model {settings.model} writes no language tag, so it translates into one language only. Give one "
            "--target and one direction (--direction to-target --splits train valid, then --direction to-source "
            "--splits test with another model). If the model reads its target language from the text, give a --prefix "
            "with {target}"
        )
    source = _tag(settings.source, settings.source_code, "--source", tagged, model, print_fn)
    codes: Sequence[str | None] = settings.target_code or [None] * len(settings.target)
    targets = [
        _tag(name, code, "--target", tagged, model, print_fn) for name, code in zip(settings.target, codes, strict=True)
    ]
    directions = []
    for name, tag in zip(settings.target, targets, strict=True):
        if to_target:
            directions.append(Direction(settings.source, name, source, tag, to_target))
        if to_source:
            directions.append(Direction(name, settings.source, tag, source, to_source))
    return directions


def _tag(
    name: str, code: str | None, side: str, tagged: bool, model: TranslationModel, print_fn: Callable[[str], None]
) -> str | None:
    """Return the tag of a language after checking it. For a model without tags, return `code` for use in the prefix."""
    if not tagged:
        return code
    if code is not None:
        check_tag(model.tokenizer, code, f"{side}-code")
        return code
    tag = nllb_code(name)
    check_tag(model.tokenizer, tag, f"{side} {name}: {side}-code")
    if note := language(name).note:
        print_fn(f"{name}: {note}")
    return tag


def _translator(
    settings: TranslateSettings, model: TranslationModel, direction: Direction, print_fn: Callable[[str], None]
) -> Translator:
    tagged = writes_tags(model.tokenizer)
    prefix = settings.prefix.replace("{source}", direction.source_tag or direction.source)
    prefix = prefix.replace("{target}", direction.target_tag or direction.target)
    return Translator(
        model,
        direction.source_tag if tagged else None,
        direction.target_tag if tagged else None,
        prefix=prefix,
        max_length=settings.max_length,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
        batch_size=settings.batch_size,
        num_beams=settings.beams,
        print_fn=print_fn,
    )
