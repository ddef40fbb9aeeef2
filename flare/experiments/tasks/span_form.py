"""Question answering with a start and an end logit for every token of the context.

A row is one window: the question, then as much of the context as max_length leaves room for (a question may take half
of it). What does not fit is cut and counted. A training row whose answer is cut off, or not in its context, is left
out; at evaluation every row stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import UserError
from .errors import some_ids
from .examples import Example, Pair
from .form import Form, Row, as_array
from .registry import Task
from .spans import best_span, token_span, usable_answer

#: The longest answer that is predicted, in tokens.
MOST_TOKENS = 30

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
        self.model_options["num_labels"] = 2  # start and end, whatever head the checkpoint's configuration speaks of

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, windows = self._rows(pairs, with_source)
        spans, news = self._spans(pairs, windows)
        kept = [
            {**row, "start_positions": span[0], "end_positions": span[1]}
            for row, span in zip(rows, spans, strict=True)
            if span is not None
        ]
        return kept, [*notes, *news]

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        spans, _ = self._spans(pairs, self._windows([pair.target for pair in pairs])[0])
        return [pair for pair, span in zip(pairs, spans, strict=True) if span is not None]

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, _ = self._rows(pairs, with_source)
        return rows, [*notes, *self.unanswered(pairs)]

    def predictions(self, output: Any, pairs: Sequence[Pair], starts: Sequence[int] | None = None) -> list[str]:
        """The best span of at most `MOST_TOKENS` tokens inside each context, as its characters.

        Args:
            output: start and end logits, each (N, m).
            pairs: the pairs of `eval_rows`.
            starts: where each row's first token stands; None: at 0, as in batches that are padded on the right. Left
                padding and input-level fusion put something in front: a ``start_positions`` of 0 that goes through
                their collator comes out as this number.
        """
        contexts = [pair.target.texts[self.context] for pair in pairs]
        return [
            "" if found is None else text[found[0] : found[1]]
            for text, found in zip(contexts, self._best(output, pairs, starts), strict=True)
        ]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return where each span begins and ends, in characters of the context, and its probability.

        The probability is that of its first token among all of the context as the start times that of its last token
        as the end. All three are None where there is no context.
        """
        names = ("start", "end", "probability")
        return [dict(zip(names, found or (None,) * 3, strict=True)) for found in self._best(output, pairs, *more)]

    def _best(
        self, output: Any, pairs: Sequence[Pair], starts: Sequence[int] | None = None
    ) -> list[tuple[int, int, float] | None]:
        """First character, character behind the last, and probability of the best span; None without a context."""
        start, end = as_array(output[0]), as_array(output[1])
        if len(start) != len(pairs):
            raise ValueError(f"{len(start)} rows of logits were given for {len(pairs)} pairs")
        best: list[tuple[int, int, float] | None] = []
        for index, (ids, inside, offsets) in enumerate(self._windows([pair.target for pair in pairs])[0]):
            first = int(starts[index]) if starts is not None else 0
            if first + len(ids) > start.shape[1]:
                raise ValueError(
                    f"row {index} has {len(ids)} tokens from {first} on and the logits are {start.shape[1]} wide: they "
                    "are not of eval_rows with these pairs, or starts is missing"
                )
            places = np.flatnonzero(inside)  # a joined target may have lost its opening token, never its context
            one, other = start[index, first + places], end[index, first + places]
            span = best_span(one, other, MOST_TOKENS)
            if span is None:
                best.append(None)
                continue
            begin, after = offsets[places[span[0]]][0], offsets[places[span[1]]][1]
            text = pairs[index].target.texts[self.context][begin:after]
            begin += len(text) - len(text.lstrip())
            best.append((begin, begin + len(text.strip()), _share(one, span[0]) * _share(other, span[1])))
        return best

    def _spans(
        self, pairs: Sequence[Pair], windows: Sequence[Window]
    ) -> tuple[list[tuple[int, int] | None], list[str]]:
        """First and last token of each answer, None where a row cannot be trained on; what has to be said."""
        spans: list[tuple[int, int] | None] = []
        absent, cut, moved = [], [], []
        for pair, (_, inside, offsets) in zip(pairs, windows, strict=True):
            answer = usable_answer(pair.target, pair.target.texts[self.context])
            spans.append(None if answer is None else token_span(offsets, list(inside), *answer[:2]))
            if answer is None:
                absent.append(pair.target.id)
            elif spans[-1] is None:
                cut.append(pair.target.id)
            elif answer[2]:
                moved.append(pair.target.id)
        told = (
            (absent, "left out, they have no answer or it is not in the context"),
            (cut, f"left out, their answer is not among the {self.max_length} tokens that are read"),
            (moved, "whose answer is not at its answer_start: the nearest place is taken"),
        )
        return spans, [f"{len(ids)} of {len(pairs)} rows {what} {some_ids(ids)}" for ids, what in told if ids]

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


def _share(logits: np.ndarray, place: int) -> float:
    """The softmax of logits (n,) at a place."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return float(powers[place] / powers.sum())
