"""Form of question answering with a start logit and an end logit for every token of the context.

A row is one window: the question (at most half of max_length), then as much of the context as fits. The rest of the
context is cut off, and a note counts the rows whose question or context was cut. A training row is left out if it has
no answer, or if its answer is cut off or not in its context. Evaluation keeps every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ..data_error import some_ids
from ..examples import Answer, Example, Pair
from ..registry import Task
from .base import Form, Row, as_array

#: Maximum tokens of a predicted answer.
MAX_ANSWER_TOKENS = 30

#: Window of an example: token ids; for each token, whether it belongs to the context; and each token's characters
#: [begin, end) in the question or context.
Window = tuple[list[int], np.ndarray, list[tuple[int, int]]]


class SpanForm(Form):
    """Form of a question answering head, which returns start logits and end logits, each (rows, tokens).

    A training row has the columns input_ids, start_positions (the answer's first token), end_positions (its last token)
    and, with a source, source_input_ids. If the model reads token types, the row also has token_type_ids
    (and source_token_type_ids).
    """

    layout = "encoder"
    auto_class = "AutoModelForQuestionAnswering"
    detail_names = ("start", "end", "probability")

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) cannot map tokens to characters, which answers as spans "
                "need; load the model's fast tokenizer (tokenizer.json)"
            )
        self.question, self.context = task.text_columns
        self.model_options["num_labels"] = 2  # start and end; overrides the checkpoint's configuration

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, windows = self._rows(pairs, with_source)
        spans, span_notes = self._spans(pairs, windows)
        labelled = [
            {**row, "start_positions": span[0], "end_positions": span[1]}
            for row, span in zip(rows, spans, strict=True)
            if span is not None
        ]
        return labelled, [*notes, *span_notes]

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        spans, _ = self._spans(pairs, self._windows([pair.target for pair in pairs])[0])
        return [pair for pair, span in zip(pairs, spans, strict=True) if span is not None]

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows, notes, _ = self._rows(pairs, with_source)
        return rows, [*notes, *self.unanswered(pairs)]

    def predictions(self, output: Any, pairs: Sequence[Pair], starts: Sequence[int] | None = None) -> list[str]:
        """Return the text of the best span of at most `MAX_ANSWER_TOKENS` tokens in each context.

        Args:
            output: start and end logits, each (rows, tokens).
            pairs: the pairs given to `eval_rows`.
            starts: position of each row's first token in the batch; None: 0, as in batches padded on the right. Left
                padding and input-level fusion put other tokens before the row. To get the positions, collate the rows
                with a column ``start_positions`` of 0, which the collator shifts to the row's first token.
        """
        contexts = [pair.target.texts[self.context] for pair in pairs]
        return [
            "" if span is None else text[span[0] : span[1]]
            for text, span in zip(contexts, self._best(output, pairs, starts), strict=True)
        ]

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return start and end of each span, in characters of the context, and its probability.

        The probability is the product of the start token's and the end token's probability (softmax of the logits over
        the tokens of the context). All three values are None if the window holds no context.
        """
        return [
            dict(zip(self.detail_names, span or (None,) * 3, strict=True)) for span in self._best(output, pairs, *more)
        ]

    def _best(
        self, output: Any, pairs: Sequence[Pair], starts: Sequence[int] | None = None
    ) -> list[tuple[int, int, float] | None]:
        """Return the characters [begin, end) and the probability of each pair's best span.

        A pair without context in its window gets None.
        """
        start, end = as_array(output[0]), as_array(output[1])
        if len(start) != len(pairs):
            raise ValueError(f"{len(start)} rows of logits were given for {len(pairs)} pairs")
        best: list[tuple[int, int, float] | None] = []
        for index, (ids, inside, offsets) in enumerate(self._windows([pair.target for pair in pairs])[0]):
            first = int(starts[index]) if starts is not None else 0
            if first + len(ids) > start.shape[1]:
                raise ValueError(
                    f"row {index} has {len(ids)} tokens from position {first} on, but the logits are {start.shape[1]} "
                    "wide: the output does not belong to eval_rows of these pairs, or starts is missing"
                )
            # input-level fusion may drop the target's opening token, but never a token of its context
            tokens = np.flatnonzero(inside)
            start_logits, end_logits = start[index, first + tokens], end[index, first + tokens]
            span = best_span(start_logits, end_logits, MAX_ANSWER_TOKENS)
            if span is None:
                best.append(None)
                continue
            begin, after = offsets[tokens[span[0]]][0], offsets[tokens[span[1]]][1]
            text = pairs[index].target.texts[self.context][begin:after]
            begin += len(text) - len(text.lstrip())
            probability = _softmax_at(start_logits, span[0]) * _softmax_at(end_logits, span[1])
            best.append((begin, begin + len(text.strip()), probability))
        return best

    def _spans(
        self, pairs: Sequence[Pair], windows: Sequence[Window]
    ) -> tuple[list[tuple[int, int] | None], list[str]]:
        """Return first and last token of each answer (None if the row cannot be trained on), and notes."""
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
        reasons = (
            (absent, "left out because they have no answer or their context does not contain it"),
            (cut, f"left out because their answer is not within the first {self.max_length} tokens"),
            (moved, "have no answer at answer_start: the nearest occurrence is used"),
        )
        return spans, [f"{len(ids)} of {len(pairs)} rows {reason} {some_ids(ids)}" for ids, reason in reasons if ids]

    def _rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str], list[Window]]:
        """Return rows without answer positions, notes, and the windows of the targets."""
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        target_windows: list[Window] = []
        for prefix, examples in self._texts(pairs, with_source).items():
            windows, types, cut = self._windows(examples)
            target_windows = target_windows or windows
            for index, row in enumerate(rows):
                row[f"{prefix}input_ids"] = windows[index][0]
                if types is not None:
                    row[f"{prefix}token_type_ids"] = types[index]
            if cut:
                what = "source contexts" if prefix else "contexts"
                notes.append(
                    f"{len(cut)} of {len(pairs)} {what} cut to {self.max_length} tokens with the question "
                    f"{some_ids(cut)}"
                )
        return rows, notes, target_windows

    def _windows(self, examples: Sequence[Example]) -> tuple[list[Window], list[list[int]] | None, list[str]]:
        """Return the windows and the token types of all examples, and the ids of truncated examples.

        The token types are None if the model reads none.
        """
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
            types = [list(row) for row in encoded["token_type_ids"]]
        return windows, types, [examples[index].id for index in sorted({*cut, *shortened})]

    def _short_questions(self, questions: list[str]) -> tuple[list[str], list[int]]:
        """Return the questions, cut to at most half of max_length, and the indices of the questions that were cut."""
        limit = max(1, self.max_length // 2)
        options = {"return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, **options)
        long = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) > limit]
        short = list(questions)
        for index in long:
            short[index] = questions[index][: encoded["offset_mapping"][index][limit - 1][1]]
        return short, long


def locate(context: str, answer: Answer) -> int | None:
    """Return the index in the context at which an answer begins; None if the context does not contain the answer.

    If the answer's text occurs several times, the occurrence nearest to `answer.start` counts, or the first occurrence
    if no start is given.
    """
    text = answer.text
    if answer.start >= 0 and context.startswith(text, answer.start):
        return answer.start
    places = []
    place = context.find(text) if text else -1
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda place: abs(place - max(answer.start, 0)), default=None)


def usable_answer(example: Example, context: str) -> tuple[int, int, bool] | None:
    """Return the characters [begin, end) of an answer in the context, and whether the data gives a wrong start for it.

    The answer is the first item of `example.answers` that the context contains. Return None if the context contains
    none of the answers.
    """
    for answer in example.answers:
        begin = locate(context, answer)
        if begin is not None:
            return begin, begin + len(answer.text), answer.start not in (-1, begin)
    return None


def token_span(
    offsets: Sequence[tuple[int, int]], inside: Sequence[bool], begin: int, end: int
) -> tuple[int, int] | None:
    """Return the first and last token of the characters [begin, end); None if some of these characters are cut off.

    Args:
        offsets: characters [begin, end) of each token.
        inside: whether a token belongs to the context.
        begin, end: characters of the answer.
    """
    in_context = [index for index, is_inside in enumerate(inside) if is_inside]
    covering = [index for index in in_context if offsets[index][0] < end and offsets[index][1] > begin]
    if not covering or offsets[in_context[-1]][1] < end:
        return None
    return covering[0], covering[-1]


def best_span(start: np.ndarray, end: np.ndarray, max_tokens: int) -> tuple[int, int] | None:
    """Return the span with the highest sum of start and end logit.

    Args:
        start, end: logits (n,) of the tokens of a context.
        max_tokens: maximum length of the span.

    Returns:
        First and last token; None if n is 0. Ties go to the shortest span, then to the first.
    """
    best: tuple[float, int, int] | None = None
    for length in range(min(max_tokens, len(start))):
        sums = start[: len(start) - length] + end[length:]
        first = int(sums.argmax())
        if best is None or sums[first] > best[0]:
            best = float(sums[first]), first, first + length
    return None if best is None else best[1:]


def _softmax_at(logits: np.ndarray, index: int) -> float:
    """Return the softmax of logits (n,) at an index."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return float(exponentials[index] / exponentials.sum())
