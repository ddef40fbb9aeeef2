"""Token classification: a tag for each word of the target's sentence, by its first token.

The sentence is the words with spaces between them, read as any text is; a word's tag stands at the first token that
holds a character of it, and -100 everywhere else. The source is read as a sentence and has no tags: its tokens are
others, and the target's count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError
from .encoder_form import ClassificationForm
from .errors import DataError, some_ids
from .examples import Example, Pair
from .form import IGNORED, Row, as_array
from .metrics import check_entity_metrics
from .registry import Task

OUTSIDE = "O"


class TokenForm(ClassificationForm):
    """Logits (N, m, tags) of a token classification head. Rows: input_ids, labels (one a token), source_input_ids."""

    auto_class = "AutoModelForTokenClassification"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        check_entity_metrics()
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands for, which "
                "tags of words need; load the model's fast tokenizer (tokenizer.json)"
            )
        self.column = task.text_columns[0]

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        self._check_words(pairs)
        rows, notes, firsts = self._tagged(pairs, with_source)
        for row, pair, first in zip(rows, pairs, firsts, strict=True):
            for tag, at in zip(pair.target.label or (), first, strict=True):
                if at is not None:
                    row["labels"][at] = self._label_index(tag)
        return rows, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to predict from; their ``labels`` are 0 at each word's first token, whatever its tag is."""
        self._check_words(pairs)
        rows, notes, firsts = self._tagged(pairs, with_source)
        for row, first in zip(rows, firsts, strict=True):
            for at in first:
                if at is not None:
                    row["labels"][at] = 0
        lost = [pair.target.id for pair, first in zip(pairs, firsts, strict=True) if None in first]
        if lost:
            notes.append(
                f"{len(lost)} of {len(pairs)} texts have words without a token (cut off, or nothing that the tokenizer "
                f"reads), which are predicted as {OUTSIDE} {some_ids(lost)}"
            )
        return rows, notes

    def predictions(self, output: Any, pairs: Sequence[Pair], marks: Any = None) -> list[tuple[str, ...]]:
        """The likeliest tag of each word.

        Args:
            output: logits (N, m, tags); of a tuple, the first entry.
            pairs: the pairs of `eval_rows`.
            marks: the batch's ``labels`` (N, m), made of those of `eval_rows`, which say where each word's first token
                stands. None: where it does in the row, as in batches that are padded on the right.
        """
        best = self._logits(output, pairs).argmax(-1)
        _, _, firsts = self._tagged(pairs, with_source=False)
        found = []
        for index, first in enumerate(firsts):
            read = [at for at in first if at is not None]
            places = np.array(read, dtype=int)
            if marks is not None:
                places = np.flatnonzero(as_array(marks[index]) != IGNORED)
            if len(places) != len(read):
                raise ValueError(
                    f"row {index} has {len(read)} words with a token and {len(places)} are marked: the batch is not "
                    "of eval_rows with these pairs"
                )
            tags = iter(self._names(best[index][places]))
            found.append(tuple(OUTSIDE if at is None else next(tags) for at in first))
        return found

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the words that the tags of `predictions` belong to."""
        return [{"words": list(pair.target.words)} for pair in pairs]

    def _names(self, indices: np.ndarray) -> list[str]:
        assert self.task.labels is not None
        return [self.task.labels[int(index)] for index in indices]

    def _check_words(self, pairs: Sequence[Pair]) -> None:
        lost = [pair.target.id for pair in pairs if not pair.target.words]
        if lost:
            raise DataError(
                f"task {self.task.name}: {len(lost)} of {len(pairs)} rows have no words with tags {some_ids(lost)}. A "
                "translated sentence has none, so the target's text must be its own (--target-text gold)"
            )

    def _tagged(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str], list[list[int | None]]]:
        """Rows whose ``labels`` are -100 throughout, notes, and each word's first token (None: it has none)."""
        rows, notes = self._encoded_rows(pairs, with_source)
        firsts = self._first_tokens([pair.target for pair in pairs])
        for row in rows:
            row["labels"] = [IGNORED] * len(row["input_ids"])
        return rows, notes, firsts

    def _first_tokens(self, examples: Sequence[Example]) -> list[list[int | None]]:
        encoded = self.tokenizer(
            [row.texts[self.column] for row in examples],
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            first_tokens(row.words, offsets) for row, offsets in zip(examples, encoded["offset_mapping"], strict=True)
        ]


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the first token of each word of a sentence, None for a word without one; no token is two words' first.

    Args:
        words: with one space between them they are the sentence.
        offsets: characters [begin, end) of each token; an empty range is a special token.
    """
    found: list[int | None] = []
    begin = at = 0
    for word in words:
        end = begin + len(word)
        while at < len(offsets) and (offsets[at][0] == offsets[at][1] or offsets[at][1] <= begin):
            at += 1
        held = at < len(offsets) and offsets[at][0] < end
        found.append(at if held else None)
        at += held
        begin = end + 1
    return found
