"""Form of token classification: one tag per word of the target, read at the word's first token.

The sentence is the words joined with spaces, tokenized like any text. A word's tag is the label of the first token that
contains one of its characters; all other tokens have the label -100. The source is read as a sentence without tags,
because its words differ from the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ..data_error import DataError, some_ids
from ..examples import Pair
from ..registry import Task
from .base import IGNORED, Row, as_array
from .classification import ClassificationForm

#: Tag of words that belong to no entity.
OUTSIDE = "O"


class TokenForm(ClassificationForm):
    """Form of a token classification head, which returns logits (rows, tokens, number of tags).

    A row has the columns input_ids, labels (one per token) and, with a source, source_input_ids.
    """

    auto_class = "AutoModelForTokenClassification"
    detail_names = ("words",)

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) cannot map tokens to characters, which tags of words "
                "need; load the model's fast tokenizer (tokenizer.json)"
            )
        self.column = task.text_columns[0]

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        self._check_words(pairs)
        rows, notes, first_tokens = self._unlabelled_rows(pairs, with_source)
        for row, pair, firsts in zip(rows, pairs, first_tokens, strict=True):
            for tag, first in zip(pair.target.label or (), firsts, strict=True):
                if first is not None:
                    row["labels"][first] = self._label_index(tag)
        return rows, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to predict from, and notes.

        ``labels`` only marks the first tokens of words: it is 0 there, whatever the tag, and -100 elsewhere.
        """
        self._check_words(pairs)
        rows, notes, first_tokens = self._unlabelled_rows(pairs, with_source)
        for row, firsts in zip(rows, first_tokens, strict=True):
            for first in firsts:
                if first is not None:
                    row["labels"][first] = 0
        ids = [pair.target.id for pair, firsts in zip(pairs, first_tokens, strict=True) if None in firsts]
        if ids:
            notes.append(
                f"{len(ids)} of {len(pairs)} texts have words without a token (truncated, or dropped by the "
                f"tokenizer), which are predicted as {OUTSIDE} {some_ids(ids)}"
            )
        return rows, notes

    def predictions(self, output: Any, pairs: Sequence[Pair], labels: Any = None) -> list[tuple[str, ...]]:
        """Return the most likely tag of each word, and `OUTSIDE` for a word without a token.

        Args:
            output: logits (rows, tokens, number of tags), or a tuple whose first item holds the logits.
            pairs: the pairs given to `eval_rows`.
            labels: ``labels`` (rows, tokens) of the batch collated from `eval_rows`, which mark each word's first
                token. None: tokens have the same positions in the batch as in their row, as in batches padded on the
                right.
        """
        best = self._logits(output, pairs).argmax(-1)
        _, _, first_tokens = self._unlabelled_rows(pairs, with_source=False)
        predicted = []
        for index, firsts in enumerate(first_tokens):
            in_row = [first for first in firsts if first is not None]
            positions = np.array(in_row, dtype=int)
            if labels is not None:
                positions = np.flatnonzero(as_array(labels[index]) != IGNORED)
            if len(positions) != len(in_row):
                raise ValueError(
                    f"row {index} has {len(in_row)} words with a token, but {len(positions)} are marked: the batch was "
                    "not collated from eval_rows of these pairs"
                )
            tags = iter(self._names(best[index][positions]))
            predicted.append(tuple(OUTSIDE if first is None else next(tags) for first in firsts))
        return predicted

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the words to which the tags of `predictions` belong."""
        return [{"words": list(pair.target.words)} for pair in pairs]

    def _names(self, indices: np.ndarray) -> list[str]:
        assert self.task.labels is not None
        return [self.task.labels[int(index)] for index in indices]

    def _check_words(self, pairs: Sequence[Pair]) -> None:
        ids = [pair.target.id for pair in pairs if not pair.target.words]
        if ids:
            raise DataError(
                f"task {self.task.name}: {len(ids)} of {len(pairs)} rows have no words with tags {some_ids(ids)}. A "
                "translated sentence has no tags, so the target text must be human text (--target-text gold)"
            )

    def _unlabelled_rows(
        self, pairs: Sequence[Pair], with_source: bool
    ) -> tuple[list[Row], list[str], list[list[int | None]]]:
        """Return rows whose ``labels`` are all -100, notes, and each word's first token (None: no token)."""
        rows, notes = self._encoded_rows(pairs, with_source)
        encoded = self.tokenizer(
            [pair.target.texts[self.column] for pair in pairs],
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for row in rows:
            row["labels"] = [IGNORED] * len(row["input_ids"])
        offsets = zip(pairs, encoded["offset_mapping"], strict=True)
        return rows, notes, [first_tokens_of(pair.target.words, row_offsets) for pair, row_offsets in offsets]


def first_tokens_of(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the first token of each word, or None for a word without a token.

    Two words never have the same first token: a token that covers parts of two words counts only for the first word.

    Args:
        words: the words; joined with single spaces, they are the sentence.
        offsets: characters [begin, end) of each token; an empty range is a special token.
    """
    first_tokens: list[int | None] = []
    begin = token = 0
    for word in words:
        end = begin + len(word)
        while token < len(offsets) and (offsets[token][0] == offsets[token][1] or offsets[token][1] <= begin):
            token += 1
        has_token = token < len(offsets) and offsets[token][0] < end
        first_tokens.append(token if has_token else None)
        token += has_token
        begin = end + 1
    return first_tokens
