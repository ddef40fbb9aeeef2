"""The tasks there are: the paper's three, and one of each kind for your own data.

A task is of one kind, which decides the columns of its rows (next to ``id``), its forms and its metrics:

    classification        text_columns; label_column: the name of a class, or its index in `labels`
    qa                    text_columns (question, context); answers, or answer and answer_start
    token-classification  text_columns (one column, tokens): a list of words; label_column: a list of as many IOB2 tags,
                          as names, indices in `labels`, or the hub's ClassLabel numbers. A row that is only read as a
                          source may have ``text``, the sentence, in place of tokens and tags
    multiple-choice       text_columns (the context's, and choice_columns last), or one column ``choices`` with a list
                          in place of choice_columns; label_column: a letter, or a number counted from first_choice
    multi-label           text_columns; label_column: a list of names, of indices in `labels`, or of one 0 or 1 for
                          each of `labels`; or one column of 0 and 1 named after each of `labels`
    regression            text_columns; label_column: a number

In a file without lists (CSV) a list is written as JSON, or as words with spaces (tokens, tags) or semicolons (labels,
choices) between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..utils.errors import UserError

#: Kind -> what is reported, in percent.
METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "qa": ("exact_match", "f1"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall"),
    "multiple-choice": ("accuracy",),
    "multi-label": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearman"),
}
#: Kinds whose labels are named: those of the training rows where none were given.
NAMED = ("classification", "token-classification", "multi-label")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Task:
    """What a task is, apart from its data.

    name: as --task names it.
    kind: a key of `METRICS`; see the module.
    text_columns: columns of the text, in the order in which a model reads them; choices are the last ones.
    labels: names of the classes, in the order of their indices; None: not known yet (see `resolve_labels`), or none.
        Of a multiple choice, its letters.
    metrics: what is reported, in percent; checkpoints are chosen by the first.
    hub_id: the data set on the hub where no folder is given.
    prompt: what a decoder or encoder-decoder reads; {column} stands for a text.
    verbalizer: label -> what is written for it; labels that are left out are written as they are named.
    max_length: tokens of one text (or pair of texts), prompt and answer included.
    label_column: column of the class, the tags, the choice or the number.
    id_columns: columns of the id that rows of two languages are matched by (of several, joined); where there is none,
        by their position.
    choice_columns: columns of the choices (multiple choice).
    first_choice: the number of the first choice in the data: 0 or 1.
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
        """What a model writes for a label."""
        return self.verbalizer.get(label, label)

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with these classes.

        Raises:
            UserError: fewer than two classes, a class twice, or two that are written alike.
        """
        named = tuple(labels)
        if self.kind == "token-classification":
            self._check_tags(named)
        if len(named) < 2 or len(set(named)) < len(named):
            raise UserError(f"task {self.name}: two or more different labels are needed; got {_listed(named)}")
        unknown = [label for label in self.verbalizer if label not in named]
        if unknown:
            raise UserError(
                f"task {self.name}: the verbalizer names {_listed(unknown)}; the labels are {_listed(named)}"
            )
        written = [self.verbalized(label) for label in named]
        if len(set(written)) < len(written):
            raise UserError(f"task {self.name}: two labels are written alike; the verbalizer gives {_listed(written)}")
        return replace(self, labels=named)

    def _check_tags(self, tags: Sequence[str]) -> None:
        types = {tag[2:] for tag in tags if tag[:2] in ("B-", "I-")}
        wrong = [tag for tag in tags if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3)]
        lacking = [tag for tag in ("O", *(f"B-{one}" for one in sorted(types))) if tag not in tags]
        if wrong or lacking:
            what = f"{_listed(wrong[:5])} are not" if wrong else f"{_listed(lacking)} is missing"
            raise UserError(f"task {self.name}: tags are O, B-TYPE and I-TYPE (IOB2); {what}")


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


def _shown(column: str) -> str:
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
    """Return a multiple-choice task. A model that writes reads the choices behind letters and writes a letter."""
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
                *(f"{_shown(column)}: {{{column}}}" for column in context_columns),
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
#: Tasks for data of your own; each has the name of its kind.
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
    """A task by its name, with what your data name otherwise.

    Args:
        name: a key of `TASKS`; those of `OWN` are for data of your own.
        text_columns: of a QA task: the question's and the context's; of a token classification: the words'; of a
            multiple choice: those of the context, without the choices (named once more they change nothing); of the
            others: one or more columns.
        choice_columns: of a multiple choice: two or more columns.
        label_column: column of the class, tags, choice or number.
        id_columns: columns of the id.
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
            f"--task {name!r} is not known; the tasks are {', '.join(TASKS)} ({', '.join(OWN)} are for data of your "
            "own)"
        )
    task = TASKS[name]
    if choice_columns is not None:
        task = _with_choices(task, tuple(choice_columns))
    if text_columns is not None:
        task = _with_columns(task, tuple(text_columns))
    if task.kind == "qa" and (
        label_column not in (None, task.label_column) or labels is not None or verbalizer is not None
    ):
        raise UserError(f"task {name} has answers, not labels: leave label column, labels and verbalizer out")
    if labels is not None and task.kind == "multiple-choice" and tuple(labels) == task.labels:
        labels = None
    if task.kind not in NAMED and labels is not None:
        raise UserError(f"task {name} has no labels to name ({task.kind}): leave --labels out")
    if task.kind != "classification" and verbalizer is not None:
        raise UserError(f"task {name}: a verbalizer is for a classification, and this is a {task.kind} task")
    if label_column is not None:
        task = replace(task, label_column=label_column)
    if id_columns is not None:
        task = replace(task, id_columns=tuple(id_columns))
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
    if task.kind == "token-classification":
        if len(columns) != 1:
            raise UserError(f"--text-columns of a token classification is the words' column; got {_listed(columns)}")
        return replace(task, text_columns=columns, prompt=f"Text: {{{columns[0]}}}\nEntities:")
    if task.choice_columns:
        context = tuple(column for column in columns if column not in task.choice_columns)
        return _with_choices(replace(task, text_columns=(*context, *task.choice_columns)), task.choice_columns)
    if task.kind == "qa":
        if len(columns) != 2:
            raise UserError(f"--text-columns of a QA task are the question's and the context's; got {_listed(columns)}")
        return replace(
            task, text_columns=columns, prompt=f"Context: {{{columns[1]}}}\nQuestion: {{{columns[0]}}}\nAnswer:"
        )
    lines = [f"{_shown(column)}: {{{column}}}" for column in columns]
    return replace(task, text_columns=columns, prompt="\n".join([*lines, task.prompt.rpartition("\n")[2]]))


def _with_choices(task: Task, columns: tuple[str, ...]) -> Task:
    """The task with other columns for its choices."""
    if task.kind != "multiple-choice":
        raise UserError(f"--choice-columns is for a multiple choice; task {task.name} is a {task.kind} task")
    every = (*task.context_columns, *columns)
    if not 2 <= len(columns) <= len(_LETTERS) or len(set(every)) < len(every) or not task.context_columns:
        raise UserError(
            f"a multiple choice needs one or more text columns and 2 to {len(_LETTERS)} choice columns, all of "
            f"different names; got --text-columns {' '.join(task.context_columns)} --choice-columns {' '.join(columns)}"
        )
    made = choice_task(task.name, task.context_columns, columns)
    return replace(task, text_columns=every, choice_columns=columns, labels=made.labels, prompt=made.prompt)


def _listed(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items)) or "none"
