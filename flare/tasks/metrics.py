"""The metrics of the paper, in percent.

`accuracy` and `macro_f1` compare labels, `exact_match` and `f1` answers. The latter two are those of SQuAD v1.1's
script, which is TyDiQA-GoldP's: lower case, no ASCII punctuation, no English articles (in every language), words split
at white space, and the best of several accepted answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


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
