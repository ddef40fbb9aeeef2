"""The tasks there are: the paper's three, and two forms for your own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import UserError

METRICS = {"classification": ("accuracy", "macro_f1"), "qa": ("exact_match", "f1")}


@dataclass(frozen=True)
class Task:
    """What a task is, apart from its data.

    name: as --task names it.
    kind: "classification", or "qa" (the answer is a span of the context).
    text_columns: columns of the text, in the order in which a model reads them.
    labels: names of the classes, in the order of their indices; None: not known yet (see `resolve_labels`).
    metrics: what is reported, in percent; checkpoints are chosen by the first.
    hub_id: the data set on the hub where no folder is given.
    prompt: what a decoder or encoder-decoder reads; {column} stands for a text.
    verbalizer: label -> what is written for it; labels that are left out are written as they are named.
    max_length: tokens of one text (or pair of texts), prompt and answer included.
    label_column: column of the class.
    """

    name: str
    kind: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    hub_id: str | None
    prompt: str
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 128
    label_column: str = "label"

    def verbalized(self, label: str) -> str:
        """What a model writes for a label."""
        return self.verbalizer.get(label, label)

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with these classes.

        Raises:
            UserError: fewer than two classes, a class twice, or two that are written alike.
        """
        named = tuple(labels)
        if len(named) < 2 or len(set(named)) < len(named):
            raise UserError(f"task {self.name}: two or more different labels are needed; got {_listed(named)}")
        written = [self.verbalized(label) for label in named]
        if len(set(written)) < len(written):
            raise UserError(f"task {self.name}: two labels are written alike; the verbalizer gives {_listed(written)}")
        return replace(self, labels=named)


_QA = {
    "kind": "qa",
    "text_columns": ("question", "context"),
    "labels": None,
    "metrics": ("exact_match", "f1"),
    "prompt": "Context: {context}\nQuestion: {question}\nAnswer:",
    "max_length": 512,
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="nusax",
            kind="classification",
            text_columns=("text",),
            labels=("negative", "neutral", "positive"),
            metrics=("macro_f1", "accuracy"),
            hub_id="indonlp/NusaX-senti",
            prompt="Text: {text}\nSentiment:",
        ),
        Task(
            name="xnli",
            kind="classification",
            text_columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy", "macro_f1"),
            hub_id="facebook/xnli",
            prompt="Premise: {premise}\nHypothesis: {hypothesis}\nRelation (entailment, neutral or contradiction):",
        ),
        Task(name="tydiqa", hub_id="google-research-datasets/tydiqa", **_QA),  # type: ignore[arg-type]
        Task(
            name="classification",
            kind="classification",
            text_columns=("text",),
            labels=None,
            metrics=("accuracy", "macro_f1"),
            hub_id=None,
            prompt="Text: {text}\nLabel:",
        ),
        Task(name="qa", hub_id=None, **_QA),  # type: ignore[arg-type]
    )
}


def get_task(
    name: str,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    metric: str | None = None,
    prompt: str | None = None,
    verbalizer: Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> Task:
    """A task by its name, with what your data name otherwise.

    Args:
        name: a key of `TASKS`: "nusax", "xnli", "tydiqa", or "classification" and "qa" for data of your own.
        text_columns: of a classification: one or more columns; of a QA task: the question's and the context's.
        label_column: column of the class.
        labels: the classes, in the order of their indices.
        metric: the metric that checkpoints are chosen by.
        prompt: names every text column in braces.
        verbalizer: label -> what a decoder writes for it.
        max_length: tokens of one text.

    Raises:
        UserError: a name, metric or prompt that does not fit; the message lists what does.
    """
    if name not in TASKS:
        raise UserError(
            f"--task {name!r} is not known; the tasks are {', '.join(TASKS)} (the last two are for data of your own)"
        )
    task = TASKS[name]
    if text_columns is not None:
        task = _with_columns(task, tuple(text_columns))
    if task.kind == "qa" and (label_column is not None or labels is not None or verbalizer is not None):
        raise UserError(f"task {name} has answers, not labels: leave label column, labels and verbalizer out")
    if label_column is not None:
        task = replace(task, label_column=label_column)
    if verbalizer is not None:
        task = replace(task, verbalizer=dict(verbalizer))
    if labels is not None or (verbalizer is not None and task.labels is not None):
        task = task.with_labels(labels if labels is not None else task.labels or ())
    if metric is not None:
        there = METRICS[task.kind]
        if metric not in there:
            raise UserError(f"--metric {metric!r} is not one of task {name}'s: {', '.join(there)}")
        task = replace(task, metrics=(metric, *(other for other in there if other != metric)))
    if prompt is not None:
        task = replace(task, prompt=prompt)
    lacking = [column for column in task.text_columns if f"{{{column}}}" not in task.prompt]
    if lacking:
        raise UserError(f"task {name}: the prompt lacks {_listed([f'{{{c}}}' for c in lacking])}; got {task.prompt!r}")
    if max_length is not None:
        if max_length < 4:
            raise UserError(f"--max-length must be 4 or more; got {max_length}")
        task = replace(task, max_length=max_length)
    return task


def _with_columns(task: Task, columns: tuple[str, ...]) -> Task:
    """The task with other text columns, and a prompt that names them."""
    if columns == task.text_columns:
        return task
    if not columns or len(set(columns)) < len(columns):
        raise UserError(f"--text-columns must name different columns; got {_listed(columns)}")
    if task.kind == "qa":
        if len(columns) != 2:
            raise UserError(f"--text-columns of a QA task are the question's and the context's; got {_listed(columns)}")
        return replace(
            task, text_columns=columns, prompt=f"Context: {{{columns[1]}}}\nQuestion: {{{columns[0]}}}\nAnswer:"
        )
    lines = [f"{column.replace('_', ' ').capitalize()}: {{{column}}}" for column in columns]
    return replace(task, text_columns=columns, prompt="\n".join([*lines, task.prompt.rpartition("\n")[2]]))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items)) or "none"
