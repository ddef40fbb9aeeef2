"""From texts to what a model translates at once: pieces that fit, in batches of about one length.

A plan depends on the texts and the limits only, so that a run that was interrupted forms the same batches again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The end of a sentence with the white space behind it; marks of scripts that set no space behind them; a new line.
_BOUNDARY = re.compile(r"(?<=[.!?…।॥۔؟።])[\"'”’»)\]}]*(\s+)|(?<=[。！？])(\s*)|(\s*\n\s*)")


@dataclass(frozen=True)
class Plan:
    """What is translated, and how the texts are put together again.

    pieces: different pieces of text, each translated once.
    batches: indices of pieces that are translated together; every piece stands in one batch.
    texts: for every text, its pieces in order, each with what stands behind it; none for a text without letters.
    original: the texts as they came.
    """

    pieces: tuple[str, ...]
    batches: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[tuple[int, str], ...], ...]
    original: tuple[str, ...]

    def join(self, translations: Sequence[str]) -> list[str]:
        """The translated texts from the translated pieces; a text without letters stays as it is."""
        return [
            "".join(translations[piece] + behind for piece, behind in parts) if parts else text
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
        texts: any number, in any order; empty ones are left alone.
        measure: tokens of each of some texts, tags included.
        limit: a longer text is divided at the ends of its sentences; None: nothing is divided.
        batch_tokens: rows times longest row of a batch; a row that is longer than that has a batch to itself.
        batch_size: rows of a batch at most.
    """
    whole = list(dict.fromkeys(text for text in texts if text.strip()))
    lengths = dict(zip(whole, measure(whole), strict=True))
    parts = {text: [(text, "")] for text in whole}
    if limit is not None:
        parts.update({text: _divide(text, measure, limit) for text in whole if lengths[text] > limit})
    index: dict[str, int] = {}
    for text in whole:
        for piece, _ in parts[text]:
            index.setdefault(piece, len(index))
    unmeasured = [piece for piece in index if piece not in lengths]
    lengths.update(zip(unmeasured, measure(unmeasured), strict=True))
    pieces = tuple(index)
    cut = [min(lengths[piece], limit or lengths[piece]) for piece in pieces]
    return Plan(
        pieces=pieces,
        batches=_batches(cut, batch_tokens, batch_size),
        texts=tuple(
            tuple((index[piece], behind) for piece, behind in parts[text]) if text in parts else () for text in texts
        ),
        original=tuple(texts),
    )


def sentences(text: str) -> list[tuple[str, str]]:
    """Sentences of a text, each with the white space behind it; a simple rule, for texts that are too long whole.

    >>> sentences("It rains. Stay in!")
    [('It rains.', ' '), ('Stay in!', '')]
    """
    found, start = [], 0
    for boundary in _BOUNDARY.finditer(text):
        space = next(group for group in boundary.groups() if group is not None)
        end = boundary.end() - len(space)
        if text[start:end].strip() and boundary.end() < len(text):
            found.append((text[start:end], space))
            start = boundary.end()
    return [*found, (text[start:], "")] if text[start:].strip() else found


def _divide(text: str, measure: Callable[[Sequence[str]], Sequence[int]], limit: int) -> list[tuple[str, str]]:
    """Runs of whole sentences of up to `limit` tokens; a sentence that is longer stands alone."""
    parts = sentences(text)
    runs: list[tuple[str, str]] = []
    # tokens of a run are at most the sum of its sentences', each of which counts the tags too
    used = 0
    for (sentence, space), tokens in zip(parts, measure([sentence for sentence, _ in parts]), strict=True):
        if runs and used + tokens <= limit:
            before, between = runs[-1]
            runs[-1] = (before + between + sentence, space)
            used += tokens
        else:
            runs.append((sentence, space))
            used = tokens
    # scripts without spaces are often translated into those that have them
    return [(run, space or " ") for run, space in runs[:-1]] + [(runs[-1][0], "")]


def _batches(lengths: Sequence[int], batch_tokens: int, batch_size: int | None) -> tuple[tuple[int, ...], ...]:
    """The longest first, so that a batch that does not fit into memory comes at once."""
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
