"""Registry of tasks: the paper's three tasks, tasks of further data sets, and one task of each kind for your own data.

The kind of a task determines its metrics, how a model reads its rows (`.forms`), and the columns of its rows. Rows
may have an ``id`` (see `Task.id_columns`). They have these columns:

    classification        text_columns; label_column: the name of a class, or its index in `labels`
    qa                    text_columns (question, context); a column ``answers``, or the columns ``answer`` and
                          ``answer_start``
    token-classification  text_columns (one column, tokens): a list of words; label_column: a list of equally many IOB2
                          tags, as names, indices in `labels`, or the hub's ClassLabel numbers. A row that is only read
                          as a source may have ``text``, the sentence, instead of tokens and tags
    multiple-choice       text_columns (context columns, then choice_columns); one column ``choices`` with a list may
                          replace choice_columns; label_column: a letter, or a number counted from first_choice
    multi-label           text_columns; label_column: a list of label names, a list of indices in `labels`, or a list
                          with one 0 or 1 for each of `labels`. Instead of label_column, there may be one column for
                          each of `labels`, named like the label, with the value 0 or 1
    regression            text_columns; label_column: a number

In a file format without lists (CSV), a list is written as JSON, or separated by spaces (tokens, tags) or semicolons
(labels, choices).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..utils.errors import UserError

#: Kind of task -> the names of its metrics. All metrics are in percent.
METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "qa": ("exact_match", "f1"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall"),
    "multiple-choice": ("accuracy",),
    "multi-label": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearman"),
}
#: Kinds of task with named labels. If no labels are given, they are taken from the training rows.
NAMED = ("classification", "token-classification", "multi-label")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Task:
    """Definition of a task, without its data.

    Attributes:
        name: value of --task.
        kind: a key of `METRICS`; see the module's docstring.
        text_columns: columns of the text, in the order in which an encoder reads them; choices come last. The order in
            `prompt` may differ.
        labels: names of the classes, in the order of their indices; the letters of a multiple-choice task; None if
            they are not known yet (see `resolve_labels`) or the kind has none.
        metrics: reported metrics, in percent; the first one selects checkpoints.
        hub_id: data set on the hub, used if no data is given.
        prompt: template that a decoder or encoder-decoder reads; {column} is replaced by the text of that column.
        verbalizer: label -> text that a generative model writes for the label. A label that is not listed is written
            unchanged.
        max_length: maximum tokens of one text (or pair of texts), including prompt and answer.
        label_column: column of the class, the tags, the choice or the number.
        id_columns: columns of the id by which rows of two languages are matched. The values of several columns are
            joined. If the default column ``id`` is missing, rows are matched by position. Columns with other names must
            exist.
        choice_columns: columns of the choices (multiple choice).
        first_choice: number of the first choice in the data: 0 or 1.
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
    id_columns: tuple[str, ...] = ("id",)
    choice_columns: tuple[str, ...] = ()
    first_choice: int = 0

    @property
    def context_columns(self) -> tuple[str, ...]:
        """The text columns that are not choices."""
        return tuple(column for column in self.text_columns if column not in self.choice_columns)

    def verbalized(self, label: str) -> str:
        """Return the text that a model generates for a label."""
        return self.verbalizer.get(label, label)

    def with_labels(self, labels: Sequence[str]) -> Task:
        """Return a copy of the task with these classes.

        Raises:
            UserError: there are fewer than two classes, a class occurs twice, the verbalizer has an unknown class or
                the same text for two classes, or token-classification tags are not IOB2 tags, lack O, or lack the
                B- tag of a type.
        """
        names = tuple(labels)
        if self.kind == "token-classification":
            self._check_tags(names)
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"task {self.name}: two or more different labels are needed; got {_quoted(names)}")
        unknown = [label for label in self.verbalizer if label not in names]
        if unknown:
            raise UserError(
                f"task {self.name}: the verbalizer names {_quoted(unknown)}, which is not among the labels "
                f"{_quoted(names)}"
            )
        texts = [self.verbalized(label) for label in names]
        if len(set(texts)) < len(texts):
            raise UserError(
                f"task {self.name}: the verbalizer must give every label a different text; it gives {_quoted(texts)}"
            )
        return replace(self, labels=names)

    def _check_tags(self, tags: Sequence[str]) -> None:
        types = {tag[2:] for tag in tags if tag[:2] in ("B-", "I-")}
        wrong = [tag for tag in tags if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3)]
        missing = [tag for tag in ("O", *(f"B-{name}" for name in sorted(types))) if tag not in tags]
        if wrong or missing:
            problem = f"got {_quoted(wrong[:5])}" if wrong else f"{_quoted(missing)} is missing"
            raise UserError(f"task {self.name}: tags must be O, B-TYPE and I-TYPE (IOB2); {problem}")


_NLI = {
    "kind": "classification",
    "text_columns": ("premise", "hypothesis"),
    "labels": ("entailment", "neutral", "contradiction"),
    "metrics": ("accuracy", "macro_f1"),
    "prompt": "Premise: {premise}\nHypothesis: {hypothesis}\nRelation (entailment, neutral or contradiction):",
}
_QA = {
    "kind": "qa",
    "text_columns": ("question", "context"),
    "labels": None,
    "metrics": ("exact_match", "f1"),
    "prompt": "Context: {context}\nQuestion: {question}\nAnswer:",
    "max_length": 512,
}


def _heading(column: str) -> str:
    return column.replace("_", " ").capitalize()


def choice_task(
    name: str,
    context_columns: Sequence[str],
    choice_columns: Sequence[str],
    *,
    label_column: str = "label",
    first_choice: int = 0,
    hub_id: str | None = None,
    max_length: int = 128,
) -> Task:
    """Return a multiple-choice task. A generative model reads the choices with letters and generates a letter."""
    letters = tuple(_LETTERS[: len(choice_columns)])
    return Task(
        name=name,
        kind="multiple-choice",
        text_columns=(*context_columns, *choice_columns),
        labels=letters,
        metrics=METRICS["multiple-choice"],
        hub_id=hub_id,
        prompt="\n".join(
            [
                *(f"{_heading(column)}: {{{column}}}" for column in context_columns),
                *(f"{letter}: {{{column}}}" for letter, column in zip(letters, choice_columns, strict=True)),
                "Answer:",
            ]
        ),
        max_length=max_length,
        label_column=label_column,
        choice_columns=tuple(choice_columns),
        first_choice=first_choice,
    )


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
        Task(name="xnli", hub_id="facebook/xnli", **_NLI),  # type: ignore[arg-type]
        Task(name="tydiqa", hub_id="google-research-datasets/tydiqa", **_QA),  # type: ignore[arg-type]
        Task(
            name="sib200",
            kind="classification",
            text_columns=("text",),
            labels=(
                *("science/technology", "travel", "politics", "sports"),
                *("health", "entertainment", "geography"),
            ),
            metrics=("accuracy", "macro_f1"),
            hub_id="Davlan/sib200",
            prompt="Text: {text}\nTopic:",
            label_column="category",
            id_columns=("index_id",),
        ),
        Task(
            name="masakhanews",
            kind="classification",
            text_columns=("headline", "text"),
            labels=("business", "entertainment", "health", "politics", "religion", "sports", "technology"),
            metrics=("macro_f1", "accuracy"),
            hub_id="masakhane/masakhanews",
            prompt="Headline: {headline}\nText: {text}\nTopic:",
            max_length=256,
        ),
        Task(name="afrixnli", hub_id="masakhane/afrixnli", **_NLI),  # type: ignore[arg-type]
        replace(
            choice_task(
                "belebele",
                ("flores_passage", "question"),
                ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4"),
                label_column="correct_answer_num",
                first_choice=1,
                hub_id="facebook/belebele",
                max_length=512,
            ),
            id_columns=("link", "question_number"),
        ),
        Task(
            name="masakhaner2",
            kind="token-classification",
            text_columns=("tokens",),
            labels=("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "DATE") for place in "BI")),
            metrics=METRICS["token-classification"],
            hub_id="masakhane/masakhaner2",
            prompt="Text: {tokens}\nEntities:",
            label_column="ner_tags",
        ),
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
        Task(
            name="token-classification",
            kind="token-classification",
            text_columns=("tokens",),
            labels=None,
            metrics=METRICS["token-classification"],
            hub_id=None,
            prompt="Text: {tokens}\nEntities:",
            label_column="ner_tags",
        ),
        choice_task("multiple-choice", ("question",), ("choice1", "choice2", "choice3", "choice4")),
        Task(
            name="multi-label",
            kind="multi-label",
            text_columns=("text",),
            labels=None,
            metrics=METRICS["multi-label"],
            hub_id=None,
            prompt="Text: {text}\nLabels:",
            label_column="labels",
        ),
        Task(
            name="regression",
            kind="regression",
            text_columns=("text",),
            labels=None,
            metrics=METRICS["regression"],
            hub_id=None,
            prompt="Text: {text}\nScore:",
        ),
    )
}
#: Tasks for your own data; each has the name of its kind.
OWN = tuple(kind for kind in METRICS if kind in TASKS)


def get_task(
    name: str,
    *,
    text_columns: Sequence[str] | None = None,
    choice_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    id_columns: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    metric: str | None = None,
    prompt: str | None = None,
    verbalizer: Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> Task:
    """Return a task by its name, adapted to the columns of your data.

    Args:
        name: a key of `TASKS`; the tasks in `OWN` are for your own data.
        text_columns: for QA: question and context; for token classification: the words; for multiple choice: the
            context without the choices (choice columns in the list are ignored); for other kinds: one or more columns.
        choice_columns: two or more columns of a multiple-choice task.
        label_column: column of the class, tags, choice or number.
        id_columns: columns of the id.
        labels: the classes, in the order of their indices.
        metric: the metric that selects checkpoints; the task's other metrics are reported too.
        prompt: template with every text column in braces.
        verbalizer: label -> text that a generative model writes for the label.
        max_length: maximum tokens of one text.

    Raises:
        UserError: an unknown name, or an option that does not fit the task; the message lists accepted values.
    """
    if name not in TASKS:
        raise UserError(
            f"--task {name!r} is not known; the tasks are {', '.join(TASKS)} ({', '.join(OWN)} are for your own data)"
        )
    task = TASKS[name]
    if choice_columns is not None:
        task = _with_choices(task, tuple(choice_columns))
    if text_columns is not None:
        task = _with_columns(task, tuple(text_columns))
    if task.kind == "qa" and (
        label_column not in (None, task.label_column) or labels is not None or verbalizer is not None
    ):
        raise UserError(f"task {name} has answers, not labels: remove --label-column, --labels and the verbalizer")
    if labels is not None and task.kind == "multiple-choice" and tuple(labels) == task.labels:
        labels = None
    if task.kind not in NAMED and labels is not None:
        raise UserError(f"task {name} has no labels to name ({task.kind}): remove --labels")
    if task.kind != "classification" and verbalizer is not None:
        raise UserError(f"task {name}: a verbalizer needs a classification task; this is a {task.kind} task")
    if label_column is not None:
        task = replace(task, label_column=label_column)
    if id_columns is not None:
        task = replace(task, id_columns=tuple(id_columns))
    if verbalizer is not None:
        task = replace(task, verbalizer=dict(verbalizer))
    if labels is not None or (verbalizer is not None and task.labels is not None):
        task = task.with_labels(labels if labels is not None else task.labels or ())
    if metric is not None:
        metrics = METRICS[task.kind]
        if metric not in metrics:
            raise UserError(f"--metric {metric!r} is not a metric of task {name}; accepted: {', '.join(metrics)}")
        task = replace(task, metrics=(metric, *(other for other in metrics if other != metric)))
    if prompt is not None:
        task = replace(task, prompt=prompt)
    missing = [f"{{{column}}}" for column in task.text_columns if f"{{{column}}}" not in task.prompt]
    if missing:
        raise UserError(f"task {name}: the prompt lacks {_quoted(missing)}; got {task.prompt!r}")
    if max_length is not None:
        if max_length < 4:
            raise UserError(f"--max-length must be 4 or more; got {max_length}")
        task = replace(task, max_length=max_length)
    return task


def _with_columns(task: Task, columns: tuple[str, ...]) -> Task:
    """Return the task with other text columns and a prompt that names them."""
    if columns == task.text_columns:
        return task
    if not columns or len(set(columns)) < len(columns):
        raise UserError(f"--text-columns must name different columns; got {_quoted(columns)}")
    if task.kind == "token-classification":
        if len(columns) != 1:
            raise UserError(
                f"--text-columns of a token classification must be the column of the words; got {_quoted(columns)}"
            )
        return replace(task, text_columns=columns, prompt=f"Text: {{{columns[0]}}}\nEntities:")
    if task.choice_columns:
        context = tuple(column for column in columns if column not in task.choice_columns)
        return _with_choices(replace(task, text_columns=(*context, *task.choice_columns)), task.choice_columns)
    if task.kind == "qa":
        if len(columns) != 2:
            raise UserError(f"--text-columns of a QA task must be question and context; got {_quoted(columns)}")
        return replace(
            task, text_columns=columns, prompt=f"Context: {{{columns[1]}}}\nQuestion: {{{columns[0]}}}\nAnswer:"
        )
    lines = [f"{_heading(column)}: {{{column}}}" for column in columns]
    return replace(task, text_columns=columns, prompt="\n".join([*lines, task.prompt.rpartition("\n")[2]]))


def _with_choices(task: Task, columns: tuple[str, ...]) -> Task:
    """Return the task with other choice columns."""
    if task.kind != "multiple-choice":
        raise UserError(f"--choice-columns is for multiple choice; task {task.name} is a {task.kind} task")
    text_columns = (*task.context_columns, *columns)
    distinct = len(set(text_columns)) == len(text_columns)
    if not 2 <= len(columns) <= len(_LETTERS) or not distinct or not task.context_columns:
        raise UserError(
            f"a multiple-choice task needs one or more text columns and 2 to {len(_LETTERS)} choice columns, all with "
            f"different names; got --text-columns {' '.join(task.context_columns)} --choice-columns {' '.join(columns)}"
        )
    new = choice_task(task.name, task.context_columns, columns)
    return replace(task, text_columns=text_columns, choice_columns=columns, labels=new.labels, prompt=new.prompt)


def _quoted(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items)) or "none"
