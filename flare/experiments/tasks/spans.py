"""Answers as spans: of characters in a context, of tokens in a text, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .examples import Answer, Example


def locate(context: str, answer: Answer) -> int | None:
    """Where an answer stands in its context: at its start, else the occurrence nearest to it, else None.

    An answer without a start is taken at its first occurrence.
    """
    text = answer.text
    if answer.start >= 0 and context.startswith(text, answer.start):
        return answer.start
    places = []
    at = context.find(text) if text else -1
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return min(places, key=lambda place: abs(place - max(answer.start, 0)), default=None)


def usable_answer(example: Example, context: str) -> tuple[int, int, bool] | None:
    """Characters [begin, end) of the first answer that is in the context, and whether it stood elsewhere than said."""
    for answer in example.answers:
        begin = locate(context, answer)
        if begin is not None:
            return begin, begin + len(answer.text), answer.start not in (-1, begin)
    return None


def token_span(
    offsets: Sequence[tuple[int, int]], inside: Sequence[bool], begin: int, end: int
) -> tuple[int, int] | None:
    """First and last token that hold characters [begin, end) of the context; None where some of it was cut off.

    Args:
        offsets: characters of each token.
        inside: whether a token is of the context.
        begin, end: characters of the answer.
    """
    held = [i for i, ((a, b), is_in) in enumerate(zip(offsets, inside, strict=True)) if is_in and a < end and b > begin]
    context = [pair for pair, is_in in zip(offsets, inside, strict=True) if is_in]
    if not held or context[-1][1] < end:
        return None
    return held[0], held[-1]


def best_span(start: np.ndarray, end: np.ndarray, most: int) -> tuple[int, int] | None:
    """The span of the highest start + end logit that has at most ``most`` tokens.

    Args:
        start, end: logits (n,) of the tokens of a context.
        most: tokens.

    Returns:
        First and last token; None where there is none. Of equal spans the shortest, then the first.
    """
    best: tuple[float, int, int] | None = None
    for length in range(min(most, len(start))):
        sums = start[: len(start) - length] + end[length:]
        at = int(sums.argmax())
        if best is None or sums[at] > best[0]:
            best = float(sums[at]), at, at + length
    return None if best is None else best[1:]
