"""Question answering with a start and an end logit for every token of the context.

A row is one window: the question, then as much of the context as max_length leaves room for (a question may take half
of it). What does not fit is cut and counted. A training row whose answer is cut off, or not in its context, is left
out; at evaluation every row stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .errors import some_ids
from .examples import Example, Pair
from .form import Form, Row, as_array
from .registry import Task
from .spans import best_span, token_span, usable_answer

#: The longest answer that is predicted, in tokens.
MOST_TOKENS = 30
_UNUSED = -100.0  # what Trainer fills logits of narrower batches up with

# token ids, which of them are the context's, and their characters
Window = tuple[list[int], np.ndarray, list[tuple[int, int]]]


class SpanForm(Form):
    """Start and end logits (N, m) of a question answering head. Rows: input_ids, start_positions, end_positions, ..."""

    layout = "encoder"
    auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands for, which "
                "answers as spans need; load the model's fast tokenizer (tokenizer.json)"
            )
        self.question, self.context = task.text_columns

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, windows = self._rows(pairs, with_source)
        kept: list[Row] = []
        absent, cut, moved = [], [], []
        for pair, row, (_, inside, offsets) in zip(pairs, rows, windows, strict=True):
            answer = usable_answer(pair.target, pair.target.texts[self.context])
            if answer is None:
                absent.append(pair.target.id)
                continue
            begin, end, elsewhere = answer
            span = token_span(offsets, list(inside), begin, end)
            if span is None:
                cut.append(pair.target.id)
                continue
            if elsewhere:
                moved.append(pair.target.id)
            kept.append({**row, "start_positions": span[0], "end_positions": span[1]})
        for ids, what in (
            (absent, "left out, they have no answer or it is not in the context"),
            (cut, f"left out, their answer is not among the {self.max_length} tokens that are read"),
            (moved, "whose answer is not at its answer_start: the nearest place is taken"),
        ):
            if ids:
                notes.append(f"{len(ids)} of {len(pairs)} rows {what} {some_ids(ids)}")
        return kept, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, _ = self._rows(pairs, with_source)
        return rows, [*notes, *self._unanswered(pairs)]

    def predictions(self, output: Any, pairs: Sequence[Pair], joined: bool = False) -> list[str]:
        """The best span of at most `MOST_TOKENS` tokens inside each context, as its characters.

        Args:
            output: start and end logits, each (N, m).
            pairs: the pairs of `eval_rows`.
            joined: the batches were input-level fusion's, in which each target stands behind its source.
        """
        start, end = as_array(output[0]), as_array(output[1])
        if len(start) != len(pairs):
            raise ValueError(f"{len(start)} rows of logits were given for {len(pairs)} pairs")
        windows = self._windows([pair.target for pair in pairs])[0]
        sources = self._windows(self._texts(pairs, True)["source_"])[0] if joined else None
        found = []
        for index, (pair, (ids, inside, offsets)) in enumerate(zip(pairs, windows, strict=True)):
            before = self._before(sources[index][0], ids) if sources else 0
            length = before + len(ids)
            width = int(np.flatnonzero(start[index] != _UNUSED).max(initial=-1)) + 1
            shift = before + (width - length if self.tokenizer.padding_side == "left" else 0)
            if shift + len(ids) > start.shape[1]:
                raise ValueError(
                    f"the logits are {start.shape[1]} wide and row {index} has {length} tokens: they are not of "
                    f"eval_rows{' as input-level fusion joins them' if joined else ''} with these pairs"
                )
            # the first token of a joined target may be gone; it is none of the context
            own = slice(max(shift, 0), shift + len(ids))
            skip = max(-shift, 0)
            span = best_span(start[index, own], end[index, own], inside[skip:], MOST_TOKENS)
            text = pair.target.texts[self.context]
            found.append("" if span is None else text[offsets[span[0] + skip][0] : offsets[span[1] + skip][1]].strip())
        return found

    def _before(self, source: list[int], target: list[int]) -> int:
        """How far input-level fusion moves a target: behind its source, less an opening token that both have."""
        openings = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
        return len(source) - int(source[:1] == target[:1] and source[0] in openings)

    def _rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str], list[Window]]:
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        windows: list[Window] = []
        for prefix, examples in self._texts(pairs, with_source).items():
            own, types, cut = self._windows(examples)
            windows = windows or own
            for index, row in enumerate(rows):
                row[f"{prefix}input_ids"] = own[index][0]
                if types is not None:
                    row[f"{prefix}token_type_ids"] = types[index]
            if cut:
                what = "source contexts" if prefix else "contexts"
                notes.append(
                    f"{len(cut)} of {len(pairs)} {what} cut to {self.max_length} tokens with the question "
                    f"{some_ids(cut)}"
                )
        return rows, notes, windows

    def _windows(self, examples: Sequence[Example]) -> tuple[list[Window], list[list[int]] | None, list[str]]:
        """The window and the token types of every example, and the ids of those that were cut."""
        if not examples:
            return [], None, []
        options = {"return_attention_mask": False, "verbose": False}
        questions, shortened = self._short_questions([row.texts[self.question] for row in examples])
        contexts = [row.texts[self.context] for row in examples]
        whole = self.tokenizer(questions, contexts, **options)
        cut = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > self.max_length]
        encoded = self.tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            return_offsets_mapping=True,
            **options,
        )
        windows = [
            (
                list(ids),
                np.array([part == 1 for part in encoded.sequence_ids(index)]),
                [(int(a), int(b)) for a, b in encoded["offset_mapping"][index]],
            )
            for index, ids in enumerate(encoded["input_ids"])
        ]
        types = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = [list(one) for one in encoded["token_type_ids"]]
        return windows, types, [examples[index].id for index in sorted({*cut, *shortened})]

    def _short_questions(self, questions: list[str]) -> tuple[list[str], list[int]]:
        """Questions of at most half the tokens, and which ones were cut."""
        most = max(1, self.max_length // 2)
        options = {"return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, **options)
        long = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) > most]
        short = list(questions)
        for index in long:
            short[index] = questions[index][: encoded["offset_mapping"][index][most - 1][1]]
        return short, long
