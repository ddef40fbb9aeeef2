"""Compute the metrics of each kind of task, in percent.

scikit-learn computes the F1 scores of labels, with ``zero_division=0``, and SciPy computes the correlations.

seqeval computes `entity_scores`, in its default mode. Like the script of CoNLL-2003, it also starts an entity at an I-
tag that does not follow a tag of the same type.

`exact_match` and `f1` compare answers as the script of SQuAD v1.1 does, which TyDiQA-GoldP uses: lower case, no ASCII
punctuation, no English articles (in every language), words split at white space, and the best score over all accepted
answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..utils.errors import UserError
from ..utils.extra import installed
from .data_error import DataError
from .examples import Example
from .registry import Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
#: Kind of task -> the module that computes its metrics and the package to install. Other kinds need no package.
_PACKAGES = {
    "classification": ("sklearn", "scikit-learn"),
    "multi-label": ("sklearn", "scikit-learn"),
    "regression": ("scipy", "scipy"),
    "token-classification": ("seqeval", "seqeval"),
}


def check_metric_packages(task: Task) -> None:
    """Raise UserError if the package that computes the task's metrics is not installed."""
    module, package = _PACKAGES.get(task.kind, (None, None))
    if module is not None and not installed(module):
        raise UserError(
            f"task {task.name}: {', '.join(task.metrics)} are computed by the package {package}, which is not "
            f"installed: pip install {package} (or 'flare-kernels[experiments]')"
        )


def score(task: Task, predictions: Sequence[Any], truth: Sequence[Example]) -> dict[str, float]:
    """Return the task's metrics in percent. The metric that selects checkpoints comes first.

    Rows without a label, and questions without an accepted answer, are left out.

    Args:
        task: the task.
        predictions: one per row, as returned by `Form.predictions`.
        truth: the rows with their labels or answers, in the order of the predictions.

    Raises:
        DataError: no row has a label or answer.
        UserError: the package that computes the metrics is not installed.
        ValueError: the numbers of predictions and rows differ.
    """
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions were given for {len(truth)} rows")
    check_metric_packages(task)
    if task.kind == "qa":
        targets = [[answer.text for answer in row.answers] or None for row in truth]
    else:
        targets = [None if row.label == "" else row.label for row in truth]  # () is a label: no class applies
    scored = [index for index, target in enumerate(targets) if target is not None]
    if not scored:
        raise DataError(f"task {task.name}: none of {len(truth)} rows has a label or answer to compare with")
    scores = metrics_of(
        task.kind, [predictions[index] for index in scored], [targets[index] for index in scored], task.labels
    )
    return {name: scores[name] for name in task.metrics}


def metrics_of(
    kind: str, predictions: Sequence[Any], truth: Sequence[Any], labels: Sequence[str] | None
) -> dict[str, float]:
    """Return every metric of a kind of task.

    Args:
        kind: a key of `flare.experiments.tasks.registry.METRICS`.
        predictions: one per row, in the form of `Example.label`; for "qa", a text.
        truth: the correct values, one per row, in the form of `Example.label`; for "qa", each row's accepted answers.
        labels: the task's labels; None: the labels that occur in `truth` (for "multi-label", also in `predictions`).
    """
    if kind == "qa":
        return {"exact_match": exact_match(predictions, truth), "f1": f1(predictions, truth)}
    if kind == "token-classification":
        return entity_scores(predictions, truth)
    if kind == "regression":
        return {"pearson": pearson(predictions, truth), "spearman": spearman(predictions, truth)}
    if kind == "multi-label":
        names = labels or sorted({label for row in (*truth, *predictions) for label in row})
        return {
            "micro_f1": micro_f1(predictions, truth, names),
            "macro_f1": macro_f1_of_sets(predictions, truth, names),
        }
    scores = {"accuracy": accuracy(predictions, truth)}
    if kind == "classification":
        scores["macro_f1"] = macro_f1(predictions, truth, labels or sorted(set(truth)))
    return scores


def accuracy(predictions: Sequence[str], truth: Sequence[str]) -> float:
    """Return the share of correct predictions, in percent."""
    return _percent([float(p == t) for p, t in zip(predictions, truth, strict=True)])


def macro_f1(predictions: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> float:
    """Return the unweighted mean of the F1 of every label; a label that is neither predicted nor true counts as 0.

    A prediction that is not one of the labels is a miss for the true label and does not affect the other labels.
    """
    from sklearn.metrics import f1_score  # type: ignore[import-not-found,import-untyped,unused-ignore]

    indices = {label: index for index, label in enumerate(labels)}
    true, predicted = ([indices.get(name, -1) for name in names] for names in (truth, predictions))
    return 100 * float(f1_score(true, predicted, labels=list(indices.values()), average="macro", zero_division=0))


def micro_f1(predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], labels: Sequence[str]) -> float:
    """Return the F1 over all yes/no decisions, one for each label in each row. Each row is a set of labels."""
    from sklearn.metrics import f1_score

    true, predicted = ([int(label in row) for row in rows for label in labels] for rows in (truth, predictions))
    return 100 * float(f1_score(true, predicted, zero_division=0))


def macro_f1_of_sets(
    predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], labels: Sequence[str]
) -> float:
    """Return the unweighted mean of the F1 of every label, where each row is a set of labels.

    A label that is neither predicted nor true counts as 0.
    """
    return sum(micro_f1(predictions, truth, [label]) for label in labels) / len(labels)


def entity_scores(predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall of the entities in IOB2 tags.

    An entity is correct if its type, its first word and its last word are correct.
    """
    from seqeval import metrics  # type: ignore[import-not-found,import-untyped,unused-ignore]

    tags = [list(map(list, truth)), list(map(list, predictions))]
    return {
        "entity_f1": 100 * float(metrics.f1_score(*tags, zero_division=0)),
        "entity_precision": 100 * float(metrics.precision_score(*tags, zero_division=0)),
        "entity_recall": 100 * float(metrics.recall_score(*tags, zero_division=0)),
    }


def pearson(predictions: Sequence[float], truth: Sequence[float]) -> float:
    """Return the linear correlation times 100; 0 if all predictions or all true values are equal."""
    from scipy.stats import pearsonr  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return _correlation(pearsonr, predictions, truth)


def spearman(predictions: Sequence[float], truth: Sequence[float]) -> float:
    """Return the rank correlation times 100, with mean ranks for ties; 0 if all values of an argument are equal."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, truth)


def _correlation(function: Callable[..., Any], predictions: Sequence[float], truth: Sequence[float]) -> float:
    if len(set(predictions)) < 2 or len(set(truth)) < 2:
        return 0.0
    return 100 * float(function(predictions, truth).statistic)


def normalize_answer(text: str) -> str:
    """Normalize an answer as SQuAD v1.1 does: lower case, without punctuation, articles or extra white space."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(predictions: Sequence[str], truth: Sequence[Sequence[str]]) -> float:
    """Return the share of predictions that equal an accepted answer after normalization, in percent."""
    return _percent([_best(_equal, p, answers) for p, answers in zip(predictions, truth, strict=True)])


def f1(predictions: Sequence[str], truth: Sequence[Sequence[str]]) -> float:
    """Return the mean word overlap (F1) of each prediction with its best-matching accepted answer, in percent."""
    return _percent([_best(_overlap, p, answers) for p, answers in zip(predictions, truth, strict=True)])


def _best(similarity: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max((similarity(prediction, answer) for answer in answers), default=0.0)


def _equal(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def _overlap(prediction: str, answer: str) -> float:
    predicted, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0
