"""Prepare what a command needs before it loads a model: task, recipe, tokenizer, form and data.

A *recipe* (`flare.recipes`) holds the paper's settings. A *form* (`flare.experiments.tasks.forms`) converts a task's
examples to model rows, and a model's output to predictions. A *pair* is a target row with its source row, if any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...recipes import Recipe
from ...training.row_checks import broken_by, vocabulary_of, wrong_tokenizer
from ..tasks import TASKS, Pair, Task, get_task, has_split, load_pairs, make_form, read_split
from ..tasks.metrics import check_metric_packages
from ..tasks.parallel_table import ParallelColumns, check_targets
from ..tasks.reading import all_targets
from ..utils.errors import UserError, library_errors
from ..utils.model_names import find_model
from .defaults import adapt_to_machine, kind_of, paper_recipe, with_auto_class
from .run_settings import Settings

PrintFn = Callable[[str], None]


class Notes:
    """Printer of notes that prints each note once."""

    def __init__(self, print_fn: PrintFn) -> None:
        self.print_fn = print_fn
        self._printed: set[str] = set()

    def __call__(self, notes: Sequence[str], where: str = "") -> list[str]:
        """Print the notes that are new, and return all of them with `where` in front."""
        full = [f"{where}: {note}" if where else note for note in notes]
        for note in full:
            if note not in self._printed:
                self._printed.add(note)
                self.print_fn(note)
        return full


@dataclass
class Data:
    """Rows of a task. The pairs of the most recent target language are cached.

    task: the task.
    folder: location of the rows, as `load_pairs` accepts it; None: the task's data set on the hub.
    source: source language.
    translations: output folder of flare translate; None: there are no translations.
    rows: maximum number of rows of a split; None: all.
    """

    task: Task
    folder: str | ParallelColumns | None
    source: str
    translations: Path | None = None
    rows: int | None = None
    _cached: dict[tuple[Any, ...], tuple[list[Pair], list[str]]] = field(default_factory=dict)

    def pairs(
        self, target: str, split: str, *, target_text: str = "gold", source_text: str | None = None
    ) -> tuple[list[Pair], list[str]]:
        """Return the pairs of a split and notes about them.

        Raises:
            UserError: the split is missing, empty or damaged, or its rows do not match the source rows.
        """
        key = (target, split, target_text, source_text)
        if key not in self._cached:
            if any(other[0] != target for other in self._cached):
                self._cached.clear()
            self._cached[key] = load_pairs(
                self.task,
                self.folder,
                self.source,
                target,
                split,
                translations=self.translations,
                target_text=target_text,
                source_text=source_text,
                limit=self.rows,
            )
        return self._cached[key]

    def has(self, language: str, split: str) -> bool:
        """Return whether a language has a split."""
        return has_split(self.task, self.folder, language, split)

    def check_languages(self, targets: Sequence[str]) -> None:
        """Raise UserError if a target lacks training or test rows, before anything is trained."""
        if isinstance(self.folder, ParallelColumns):
            check_targets(self.folder, targets)
        for target in targets:
            for split in ("train", "test"):
                if not self.has(target, split):
                    read_split(self.task, self.folder, target, split)  # raises an error that lists the existing files


@dataclass
class Setup:
    """A model's family, its recipe and tokenizer, and its form of the task.

    model: folder or hub id.
    family: "encoder", "causal" or "seq2seq".
    recipe: the paper's recipe, adapted to this machine.
    tokenizer: the model's tokenizer.
    form: form of the task for this family.
    max_length: maximum tokens per text.
    notes: notes for the user.
    misfit: why the tokenizer seems to belong to another model, or None; set by :meth:`load_model`.
    untrained: modules of the backbone whose weights are missing in the checkpoint; set by :meth:`load_model`.
    """

    model: str
    family: str
    recipe: Recipe
    tokenizer: Any
    form: Any
    max_length: int
    notes: list[str]
    misfit: str | None = None
    untrained: list[str] = field(default_factory=list)

    @property
    def batches(self) -> dict[str, Any]:
        """Options of FlareDataCollator."""
        return {"layout": self.form.layout, "padding": self.recipe.batches["padding"], "max_length": self.max_length}

    def load_model(self, quantized: bool = True) -> Any:
        """Return the base model, ready for adapters.

        ``quantized=False`` leaves the weights in 16 or 32 bits and gradient checkpointing off.

        Raises:
            UserError: the model cannot be loaded, or its tokenizer does not fit it.
        """
        recipe = self.recipe if quantized else replace(self.recipe, quantization=None, gradient_checkpointing=False)
        missing: list[str] = []
        with library_errors(f"model {self.model} cannot be loaded as {self.form.auto_class}"):
            model = recipe.base_model(self.model, self.tokenizer, missing)
        size, highest = vocabulary_of(model), max(self.tokenizer.get_vocab().values(), default=0)
        if size is not None and highest >= size:
            raise UserError(
                f"model {self.model}: its tokenizer has ids up to {highest} and the model has {size} embeddings, so it "
                "belongs to another model; put the model's own tokenizer into the folder"
            )
        if broken := broken_by(self.tokenizer, model):
            raise UserError(
                f"model {self.model}: {broken}. Put the model's own tokenizer into the folder, or correct the ids "
                "in its config.json and generation_config.json"
            )
        self.misfit = wrong_tokenizer(self.tokenizer, model)
        # only modules of the backbone count, because the head is trained
        prefix = f"{model.base_model_prefix}."
        self.untrained = sorted({name.rpartition(".")[0] for name in missing if name.startswith(prefix)})
        return model

    @property
    def model_notes(self) -> list[str]:
        """Notes about the model of the last :meth:`load_model`: missing weights, or a tokenizer that does not fit."""
        misfit = [f"{self.model}: {self.misfit}"] if self.misfit else []
        if not self.untrained:
            return misfit
        names = ", ".join(self.untrained)
        return [
            *misfit,
            f"{self.model} has no weights for {names}: they are initialised from the seed, and not trained",
        ]


def task_of(settings: Settings, name: str | None = None, labels: Sequence[str] | None = None) -> Task:
    """Return the task that the settings describe.

    Args:
        settings: the user's settings.
        name: name of the task if the settings do not name one.
        labels: labels of the task if the settings give none.

    Raises:
        UserError: no task is named, or a setting does not fit the task.
    """
    task = settings.task or name
    if task is None:
        raise UserError(f"--task is missing; name one of {', '.join(TASKS)}")
    resolved = get_task(
        task,
        text_columns=settings.text_columns,
        choice_columns=settings.choice_columns,
        label_column=settings.label_column,
        id_columns=settings.id_column,
        labels=settings.labels or labels,
        metric=settings.metric,
        prompt=settings.prompt,
        verbalizer={label: str(text) for label, text in settings.verbalizer.items()} or None,
        max_length=settings.max_length,
    )
    check_metric_packages(resolved)
    return resolved


def place_of(settings: Settings, data: str | None, source: str) -> str | ParallelColumns | None:
    """Return the location of the rows in the form that `load_pairs` accepts.

    Args:
        settings: the user's settings, which may name the columns of both languages.
        data: folder, table or hub id; None: the task's data set on the hub.
        source: the source language.
    """
    if data is None or not (settings.source_column or settings.target_column):
        return data
    return ParallelColumns(Path(data).expanduser(), source, settings.source_column, settings.target_column)


def with_targets(settings: Any, data: Data, notes: Notes) -> Any:
    """Return the settings with ``--target all`` replaced by all target languages."""
    if settings.target != ("all",):
        return settings
    targets, messages = all_targets(data.task, data.folder, data.source)
    notes(messages)
    return replace(settings, target=tuple(targets))


def prepare(settings: Settings, task: Task, model: str, given: dict[str, Any] | None = None) -> Setup:
    """Return the recipe, tokenizer and form for a model.

    Args:
        settings: the user's settings.
        task: the task.
        model: folder or hub id.
        given: name -> value of the TrainingArguments fields that the user set.

    Raises:
        UserError: the model or its tokenizer cannot be used.
    """
    model = find_model(model, "model")
    kind = kind_of(model, settings.form)
    recipe, notes = adapt_to_machine(paper_recipe(kind, task.name), settings.quantization, given or {})
    padding = settings.padding or ("longest" if kind.family == "causal" else recipe.batches["padding"])
    recipe = replace(recipe, batches={**recipe.batches, "padding": padding})
    with library_errors(f"model {model}: its tokenizer cannot be loaded"):
        tokenizer = recipe.tokenizer_of(model)
    form = make_form(task, tokenizer, kind.family, task.max_length)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(
            f"texts are padded with the end token {tokenizer.eos_token!r}, because the tokenizer has no pad token"
        )
    recipe = with_auto_class(recipe, form.auto_class, form.model_options)
    return Setup(model, kind.family, recipe, tokenizer, form, task.max_length, notes)
