"""Plan a translation: split texts into pieces that fit the model, and group pieces of similar length into batches.

A plan depends only on the texts and the limits, so a resumed run makes the same batches as the interrupted run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Three boundaries between sentences: an end of sentence with the white space after it; an end of sentence in scripts
# that write no space after it; a line break with the white space around it.
_BOUNDARY = re.compile(r"(?<=[.!?…।॥۔؟።])[\"'”’»)\]}]*(\s+)|(?<=[。！？])(\s*)|(\s*\n\s*)")


@dataclass(frozen=True)
class Plan:
    """Pieces and batches to translate, and how to join the translated pieces.

    Attributes:
        pieces: distinct pieces of text; each is translated once.
        batches: indices of pieces that are translated together; every piece is in exactly one batch.
        texts: for every text, its pieces in order, as (index of the piece, white space after it); empty for a blank
            text.
        original: the texts before translation.
    """

    pieces: tuple[str, ...]
    batches: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[tuple[int, str], ...], ...]
    original: tuple[str, ...]

    def join(self, translations: Sequence[str]) -> list[str]:
        """Return the translated texts from the translated pieces; blank texts are unchanged."""
        return [
            "".join(translations[piece] + space for piece, space in parts) if parts else text
            for parts, text in zip(self.texts, self.original, strict=True)
        ]


def make_plan(
    texts: Sequence[str],
    measure: Callable[[Sequence[str]], Sequence[int]],
    *,
    limit: int | None,
    batch_tokens: int,
    batch_size: int | None = None,
) -> Plan:
    """Plan the translation of texts.

    Args:
        texts: the texts, in any order; blank ones are not translated.
        measure: function that returns the number of tokens of each text in a list, including language tags.
        limit: maximum tokens of a piece; longer texts are split at sentence ends. None: texts are not split.
        batch_tokens: maximum tokens of a batch, counted as the number of pieces times the tokens of the longest piece.
            A piece with more tokens gets a batch of its own.
        batch_size: maximum number of pieces in a batch; None: no maximum.
    """
    distinct = list(dict.fromkeys(text for text in texts if text.strip()))
    lengths = dict(zip(distinct, measure(distinct), strict=True))
    parts = {text: [(text, "")] for text in distinct}
    if limit is not None:
        parts.update({text: _split(text, measure, limit) for text in distinct if lengths[text] > limit})
    index: dict[str, int] = {}
    for text in distinct:
        for piece, _ in parts[text]:
            index.setdefault(piece, len(index))
    unmeasured = [piece for piece in index if piece not in lengths]
    lengths.update(zip(unmeasured, measure(unmeasured), strict=True))
    pieces = tuple(index)
    truncated = [min(lengths[piece], limit or lengths[piece]) for piece in pieces]
    return Plan(
        pieces=pieces,
        batches=_batches(truncated, batch_tokens, batch_size),
        texts=tuple(
            tuple((index[piece], space) for piece, space in parts[text]) if text in parts else () for text in texts
        ),
        original=tuple(texts),
    )


def sentences(text: str) -> list[tuple[str, str]]:
    """Split a text into sentences by a simple rule; return each sentence with the white space after it.

    >>> sentences("It rains. Stay in!")
    [('It rains.', ' '), ('Stay in!', '')]
    """
    result, start = [], 0
    for boundary in _BOUNDARY.finditer(text):
        space = next(group for group in boundary.groups() if group is not None)
        end = boundary.end() - len(space)
        if text[start:end].strip() and boundary.end() < len(text):
            result.append((text[start:end], space))
            start = boundary.end()
    return [*result, (text[start:], "")] if text[start:].strip() else result


def _split(text: str, measure: Callable[[Sequence[str]], Sequence[int]], limit: int) -> list[tuple[str, str]]:
    """Split a text into runs of consecutive sentences, and return each run with the white space after it.

    A run has at most `limit` tokens. A sentence with more tokens is a run by itself.
    """
    parts = sentences(text)
    runs: list[tuple[str, str]] = []
    used = 0  # upper bound of the run's tokens, because the count of every sentence includes language tags
    for (sentence, space), tokens in zip(parts, measure([sentence for sentence, _ in parts]), strict=True):
        if runs and used + tokens <= limit:
            previous, between = runs[-1]
            runs[-1] = (previous + between + sentence, space)
            used += tokens
        else:
            runs.append((sentence, space))
            used = tokens
    # add missing spaces between runs: the translation may be in a script that separates sentences by spaces
    return [(run, space or " ") for run, space in runs[:-1]] + [(runs[-1][0], "")]


def _batches(lengths: Sequence[int], batch_tokens: int, batch_size: int | None) -> tuple[tuple[int, ...], ...]:
    """Group pieces by length, longest first, so that a batch that does not fit into memory fails at the start."""
    order = sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece))
    batches: list[list[int]] = []
    for piece in order:
        full = (
            not batches
            or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens
            or len(batches[-1]) == batch_size
        )
        if full:
            batches.append([piece])
        else:
            batches[-1].append(piece)
    return tuple(map(tuple, batches))
