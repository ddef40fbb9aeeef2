"""The metrics of each kind of task, in percent.

`accuracy` and `macro_f1` compare labels, `exact_match` and `f1` answers. The latter two are those of SQuAD v1.1's
script, which is TyDiQA-GoldP's: lower case, no ASCII punctuation, no English articles (in every language), words split
at white space, and the best of several accepted answers.

`entity_scores` are those of the package seqeval in its default mode, as in CoNLL-2003's script: an I- without its B-
begins an entity too. `micro_f1` and `macro_f1_of_sets` are scikit-learn's with ``zero_division=0``. A correlation with
numbers that are all equal counts as 0.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def of_kind(
    kind: str, predictions: Sequence[Any], truth: Sequence[Any], labels: Sequence[str] | None
) -> dict[str, float]:
    """Return every metric of a kind of task.

    Args:
        kind: a key of `flare.experiments.tasks.registry.METRICS`.
        predictions, truth: of equal number, as `Example.label`; truth of "qa": the accepted answers of each row.
        labels: the task's.
    """
    if kind == "qa":
        return {"exact_match": exact_match(predictions, truth), "f1": f1(predictions, truth)}
    if kind == "token-classification":
        return entity_scores(predictions, truth)
    if kind == "regression":
        return {"pearson": pearson(predictions, truth), "spearman": spearman(predictions, truth)}
    if kind == "multi-label":
        names = labels or sorted({label for row in truth for label in row})
        return {"micro_f1": micro_f1(predictions, truth), "macro_f1": macro_f1_of_sets(predictions, truth, names)}
    found = {"accuracy": accuracy(predictions, truth)}
    if kind == "classification":
        found["macro_f1"] = macro_f1(predictions, truth, labels or sorted(set(truth)))
    return found


def accuracy(predictions: Sequence[str], truth: Sequence[str]) -> float:
    """Share of predictions that are right."""
    return _mean([float(p == t) for p, t in zip(predictions, truth, strict=True)])


def macro_f1(predictions: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> float:
    """Unweighted mean, over all the labels, of each one's F1; a label neither predicted nor true counts 0.

    A prediction that is no label is wrong: it counts as missed for the true label and as nothing else.
    """
    scores = []
    for label in labels:
        hits = sum(p == label and t == label for p, t in zip(predictions, truth, strict=True))
        said = sum(p == label for p in predictions)
        true = sum(t == label for t in truth)
        scores.append(2 * hits / (said + true) if said + true else 0.0)
    return _mean(scores)


def micro_f1(predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """F1 of all labels of all rows together; each row is a set of labels."""
    hits = sum(len(set(p) & set(t)) for p, t in zip(predictions, truth, strict=True))
    count = sum(len(set(p)) + len(set(t)) for p, t in zip(predictions, truth, strict=True))
    return 100 * 2 * hits / count if count else 0.0


def macro_f1_of_sets(
    predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], labels: Sequence[str]
) -> float:
    """Unweighted mean, over all the labels, of each one's F1; a label neither predicted nor true counts 0."""
    only = [[[{label} & set(row) for row in rows] for rows in (predictions, truth)] for label in labels]
    return _mean([micro_f1(p, t) / 100 for p, t in only])  # type: ignore[arg-type]


def check_entity_metrics() -> None:
    """Raise UserError where the package seqeval is not installed, before a model is trained for its metric."""
    if importlib.util.find_spec("seqeval") is None:
        raise UserError(
            "entity F1 is computed by the package seqeval, which is not installed: pip install seqeval "
            "(or flare-kernels[experiments])"
        )


def entity_scores(predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of entities: type, first and last word must all be right; tags are IOB2."""
    check_entity_metrics()
    from seqeval import metrics  # type: ignore[import-not-found,import-untyped,unused-ignore]

    both = [list(map(list, truth)), list(map(list, predictions))]
    return {
        "entity_f1": 100 * float(metrics.f1_score(*both, zero_division=0)),
        "entity_precision": 100 * float(metrics.precision_score(*both, zero_division=0)),
        "entity_recall": 100 * float(metrics.recall_score(*both, zero_division=0)),
    }


def pearson(predictions: Sequence[float], truth: Sequence[float]) -> float:
    """Linear correlation times 100; 0 where either side is constant."""
    p, t = (np.asarray(side, dtype=np.float64) for side in (predictions, truth))
    p, t = p - p.mean(), t - t.mean()
    scale = float(np.sqrt((p @ p) * (t @ t)))
    return 100 * float(p @ t) / scale if scale else 0.0


def spearman(predictions: Sequence[float], truth: Sequence[float]) -> float:
    """Correlation of ranks times 100; equal numbers share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(truth))


def _ranks(values: Sequence[float]) -> list[float]:
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return [float(rank) for rank in (last - (counts - 1) / 2)[group.reshape(-1)]]


def normalize_answer(text: str) -> str:
    """SQuAD v1.1's: lower case, punctuation and articles removed, white space squeezed."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(predictions: Sequence[str], truth: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal an accepted answer after normalisation."""
    return _mean([_best(_equal, p, accepted) for p, accepted in zip(predictions, truth, strict=True)])


def f1(predictions: Sequence[str], truth: Sequence[Sequence[str]]) -> float:
    """Mean overlap of words between prediction and the accepted answer that fits best."""
    return _mean([_best(_overlap, p, accepted) for p, accepted in zip(predictions, truth, strict=True)])


def _best(score: object, prediction: str, accepted: Sequence[str]) -> float:
    assert callable(score)
    return max((score(prediction, answer) for answer in accepted), default=0.0)


def _equal(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def _overlap(prediction: str, answer: str) -> float:
    said, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0
