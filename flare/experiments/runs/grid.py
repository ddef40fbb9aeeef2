"""The grid of `flare train`: one run for each target language, seed, method, fusion and rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..tasks.reading import shown_labels
from ..utils.errors import UserError
from .base import Base
from .methods import READS_SOURCE, variant_name
from .run_settings import TrainSettings
from .setup import Data, Notes, place_of, task_of, with_targets


@dataclass(frozen=True)
class Plan:
    """One run of the grid.

    fusion: name of the fusion function; None for a method without one.
    r: rank; None: the default rank.
    variant: name of the folder that holds the run's folder seed-N.
    source_text: source text that the method reads, "gold" (written by people) or "mt" (machine-translated); None if it
        reads none.
    target_text: target text of the training, "gold" or "mt".
    """

    target: str
    method: str
    fusion: str | None
    r: int | None
    seed: int
    variant: str
    source_text: str | None
    target_text: str

    @property
    def name(self) -> str:
        return f"{self.target} {self.variant} seed {self.seed}"

    @property
    def train_source(self) -> str | None:
        """Source text in training; None if the method reads none.

        An "mt" target text was translated from the gold source text, so its source text in training is "gold".
        """
        return "gold" if self.source_text is not None and self.target_text == "mt" else self.source_text


def plans(settings: TrainSettings) -> list[Plan]:
    """Return every run of the grid, ordered by target language, then seed, then method, fusion and rank."""
    runs = []
    for target in settings.target or ():
        for seed in settings.seeds:
            for method, fusion, r in settings.variants():
                source = settings.source_text if method in READS_SOURCE else None
                name = settings.name or variant_name(
                    method,
                    fusion,
                    r if r != 64 else None,
                    source_text=source,
                    target_text=settings.target_text,
                    train_only=settings.train_only_fusion,
                )
                runs.append(Plan(target, method, fusion, r, seed, name, source, settings.target_text))
    return runs


def read_grid(settings: Any, bases: dict[int, Base], notes: Notes) -> tuple[Any, Data, list[Plan]]:
    """Return the settings with form and targets filled in, the data with their task, and the runs of the grid.

    Raises:
        UserError: the bases or the data do not fit the settings.
    """
    labels = check_bases(settings, bases)
    settings = replace(settings, form=form_of(settings, bases))
    place = place_of(settings, settings.data, settings.source_language)
    task, table = shown_labels(task_of(settings, labels=labels), place, settings.source_language)
    data = Data(task, place, settings.source_language, settings.translations, settings.rows)
    notes(table)
    settings = with_targets(settings, data, notes)
    grid = plans(settings)
    data.check_languages([plan.target for plan in grid if plan.target_text == "gold"])
    return settings, data, grid


def check_bases(settings: TrainSettings, bases: dict[int, Base]) -> tuple[str, ...] | None:
    """Return the labels that the bases were fine-tuned on, or None if no run.json records labels.

    Raises:
        UserError: a base was fine-tuned on another task, source language or list of labels than the settings or another
            base.
    """
    labels: tuple[str, ...] | None = None
    first = ""
    for base in bases.values():
        record = base.record
        if record is None:
            continue
        for name, trained, given in (
            ("task", record.task, settings.task),
            ("source", record.source_language, settings.source_language),
        ):
            if trained != given:
                raise UserError(
                    f"the base {base.model} was fine-tuned with --{name} {trained}; --{name} {given} needs its own "
                    "base (flare finetune with another --output)"
                )
        trained_labels = tuple(record.settings.get("labels") or ()) or None
        if trained_labels is None:
            continue
        if settings.labels is not None and settings.labels != trained_labels:
            raise UserError(
                f"--labels: the base {base.model} was fine-tuned on the labels "
                f"{', '.join(trained_labels)}, in this order; remove --labels"
            )
        if labels is not None and labels != trained_labels:
            raise UserError(
                f"the base {base.model} was fine-tuned on the labels {', '.join(trained_labels)}, and the base {first} "
                f"on {', '.join(labels)}; train their seeds in separate commands (--seeds), or fine-tune one of the "
                "bases again with the --labels of the other"
            )
        labels, first = trained_labels, base.model
    return labels


def form_of(settings: TrainSettings, bases: dict[int, Base]) -> str | None:
    """Return the form (kind of model) that the bases were fine-tuned with. If none is recorded, return the user's form.

    Raises:
        UserError: the user's form differs from the recorded form, so the base would get an untrained head.
    """
    for base in bases.values():
        trained = None if base.record is None else base.record.settings.get("family")
        if trained is not None and settings.form not in (None, trained):
            raise UserError(
                f"--form {settings.form}: the base {base.model} was fine-tuned with --form {trained}; remove the "
                "option, or fine-tune another base (flare finetune with another --output)"
            )
        if trained is not None:
            return str(trained)
    return settings.form
