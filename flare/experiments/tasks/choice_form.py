"""Multiple choice with a head that scores each choice: a row is as many texts as there are choices.

A text is the context and a choice, as the tokenizer's pair: of one context column that column and the choice, of more
the first ones, and the last (a question) with the choice. The source's text with the same choice is read next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..utils.errors import UserError
from .encoder_form import ClassificationForm
from .errors import some_ids
from .examples import Example, Pair
from .form import Form, Row
from .registry import Task


class ChoiceForm(ClassificationForm):
    """Logits (N, choices). Rows: input_ids and source_input_ids, each a list of one text a choice, and labels."""

    auto_class = "AutoModelForMultipleChoice"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        Form.__init__(self, task, tokenizer, max_length)
        if tokenizer.cls_token_id is None and tokenizer.bos_token_id is None:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) has no opening token, which a multiple choice head reads"
            )

    def _encoded_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        n = len(self.task.choice_columns)
        for prefix, examples in self._texts(pairs, with_source).items():
            encoded, long = self._encode_texts([self._pair(row, choice) for row in examples for choice in range(n)])
            for index, row in enumerate(rows):
                texts = encoded[n * index : n * (index + 1)]
                row.update({prefix + name: [text[name] for text in texts] for name in texts[0]})
            if long:
                what = "source texts" if prefix else "texts"
                ids = list(dict.fromkeys(examples[at // n].id for at in long))
                notes.append(
                    f"{len(ids)} of {len(pairs)} {what} cut to {self.max_length} tokens with a choice {some_ids(ids)}"
                )
        return rows, notes

    def _pair(self, example: Example, choice: int) -> tuple[str, str]:
        *first, last = (example.texts[column] for column in self.task.context_columns)
        text = example.texts[self.task.choice_columns[choice]]
        return (" ".join(first), f"{last} {text}") if first else (last, text)
