"""What causal and encoder-decoder forms have in common: a prompt is read, a label or an answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..utils.errors import UserError
from .errors import DataError, some_ids
from .examples import Example, Pair
from .form import IGNORED, Form, Row, as_array
from .prompts import cut_to_fit, fill
from .registry import Task

#: Tokens that a QA answer may have, its end token included (less where max_length is short).
ANSWER_TOKENS = 64


class WrittenForm(Form):
    """Predictions are decoded new tokens. The same prompt, in English, is used for both streams."""

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) has no end token, with which an answer ends; set "
                "tokenizer.eos_token"
            )
        if task.labels is not None and task.kind != "qa":
            task.with_labels(task.labels)  # written alike, two labels could not be told apart
            self.max_new_tokens = max(len(self.answer_ids(task.verbalized(label))) for label in task.labels)
        else:
            self.max_new_tokens = min(ANSWER_TOKENS, self.max_length // 4)
        self.longest_prompt = self.max_length  # tokens

    def next_tokens(self, written: Sequence[int]) -> list[int] | None:
        """Token ids that may follow what a model has written of its answer; None: all of them.

        A multiple choice is answered with one of its letters, the likeliest: where each is one token, as in nearly all
        vocabularies, that is the letter of the highest likelihood, as lm-evaluation-harness scores Belebele.
        """
        if self.task.kind != "multiple-choice":
            return None
        answers = [self.answer_ids(letter) for letter in self.task.labels or ()]
        n = len(written)
        going_on = {ids[n] for ids in answers if len(ids) > n and ids[:n] == list(written)}
        return sorted(going_on) or [self.tokenizer.eos_token_id]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer, its end token included."""
        raise NotImplementedError

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts, with the special tokens the model expects."""
        raise NotImplementedError

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        """``input_ids`` and ``labels`` of one stream of a row to train on."""
        raise NotImplementedError

    def source_columns(self) -> Row:
        """What a row to predict from holds beside the source's prompt."""
        return {}

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        streams = self._texts(pairs, with_source)
        kept, targets, sources, news = self._answers(pairs, with_source)
        rows: list[Row] = [{} for _ in kept]
        notes = [*self.notes, *news]
        for prefix, answers in (("", targets), ("source_", sources)):
            if prefix not in streams:
                continue
            prompts, cut = self._prompts([streams[prefix][index] for index in kept], prefix)
            notes += cut
            for row, prompt, answer in zip(rows, prompts, answers, strict=True):
                row |= {f"{prefix}{name}": ids for name, ids in self.train_columns(prompt, answer).items()}
        return rows, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Prompts alone. FlareDataCollator pads those of the layout "causal" on the left, as generate wants them."""
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            prompts, cut = self._prompts(examples, prefix)
            notes += cut
            for row, prompt in zip(rows, prompts, strict=True):
                row[f"{prefix}input_ids"] = prompt
                if prefix:
                    row |= self.source_columns()
        return rows, [*notes, *self.unanswered(pairs)]

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [pairs[index] for index in self._answers(pairs, with_source=False)[0]]

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[str]:
        """Labels or answers from generated token ids.

        A text is the label that it is, in any case of letters, written as the verbalizer has it or as it is named; else
        the longest one that it begins with; else it stays as it is and counts as wrong (see `prediction_notes`).

        Args:
            output: the new tokens (N, n), without the prompt; also lists of unequal lengths. -100 is padding.
            pairs: the pairs of `eval_rows`.
        """
        texts = self._generated(output, pairs)
        return [self._label_of(text) for text in texts] if self.task.labels is not None else texts

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the generated text of each row, as it is."""
        return [{"generated": text} for text in self._generated(output, pairs)]

    def _generated(self, output: Any, pairs: Sequence[Pair]) -> list[str]:
        """The text of each row of new tokens, up to its end token."""
        if len(output) != len(pairs):
            raise ValueError(f"{len(output)} generated rows were given for {len(pairs)} pairs")
        texts = []
        for row in output:
            ids = [int(token) for token in as_array(row).reshape(-1) if token != IGNORED]
            if self.tokenizer.eos_token_id in ids[1:]:  # an encoder-decoder's start token may be its end token
                ids = ids[: 1 + ids[1:].index(self.tokenizer.eos_token_id)]
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts

    def _label_of(self, text: str) -> str:
        labels = self.task.labels or ()
        written = {self.task.verbalized(label).strip().casefold(): label for label in labels}
        known = {**{label.casefold(): label for label in labels}, **written}
        said = text.casefold()
        begun = max((word for word in written if word and said.startswith(word)), key=len, default=None)
        return known.get(said) or (text if begun is None else written[begun])

    def _answer_of(self, example: Example, fallback: str | None = None) -> str | None:
        if self.task.kind != "qa":
            label = example.label if example.label is not None else fallback
            self._label_index(label)
            return self.task.verbalized(label or "")
        return example.answers[0].text.strip() if example.answers else None

    def _prompts(self, examples: Sequence[Example], prefix: str) -> tuple[list[list[int]], list[str]]:
        """Token ids of every prompt of a stream (by its prefix, "" or "source_"), and a note on those that were cut.

        Raises:
            DataError: prompts that are too long whatever is cut.
        """
        if not examples:
            return [], []
        most, what = self.longest_prompt, "source texts" if prefix else "texts"
        found = self.prompt_ids([fill(self.task, row.texts) for row in examples])
        cut: list[str] = []
        hopeless: list[str] = []
        for index, row in enumerate(examples):
            if len(found[index]) <= most:
                continue
            prompt = cut_to_fit(self.task, row.texts, lambda text: len(self.prompt_ids([text])[0]) <= most)
            (hopeless if prompt is None else cut).append(row.id)
            found[index] = self.prompt_ids([prompt or ""])[0]
        if hopeless:
            keeps = {"qa": " and the question", "multiple-choice": " and the choices"}.get(self.task.kind, "")
            raise DataError(
                f"{len(hopeless)} {what} have more than {most} tokens in the instruction{keeps} alone, which are not "
                f"cut {some_ids(hopeless)}; raise --max-length (now {self.max_length}) or shorten them"
            )
        note = f"{len(cut)} of {len(examples)} {what} cut to prompts of {most} tokens {some_ids(cut)}"
        return found, [note] if cut else []

    def _answers(
        self, pairs: Sequence[Pair], with_source: bool
    ) -> tuple[list[int], list[list[int]], list[list[int]], list[str]]:
        """Which pairs can be trained on, token ids of their answers in both streams, and what has to be said.

        A source without an answer writes its end token at once.
        """
        assert self.max_new_tokens is not None
        kept, targets, sources = [], [], []
        absent: list[str] = []
        long: list[str] = []
        silent: list[str] = []
        shortened: list[str] = []
        for index, pair in enumerate(pairs):
            answer = self._answer_of(pair.target)
            ids = self.answer_ids(answer) if answer is not None else []
            if answer is None or len(ids) > self.max_new_tokens:
                (absent if answer is None else long).append(pair.target.id)
                continue
            kept.append(index)
            targets.append(ids)
            if with_source and pair.source is not None:
                theirs = self._answer_of(pair.source, pair.target.label)
                if theirs is None:
                    silent.append(pair.target.id)
                sources.append(self.answer_ids(theirs or ""))
                if len(sources[-1]) > self.max_new_tokens:
                    shortened.append(pair.target.id)
                    sources[-1] = [*sources[-1][: self.max_new_tokens - 1], sources[-1][-1]]
        notes = []
        for one, text in (
            (absent, "left out, they have no answer"),
            (long, f"left out, their answer has more than {self.max_new_tokens} tokens"),
            (silent, "without an answer in the source, which ends at once there"),
            (shortened, f"with an answer of more than {self.max_new_tokens} tokens in the source, which is cut there"),
        ):
            if one:
                notes.append(f"{len(one)} of {len(pairs)} rows {text} {some_ids(one)}")
        return kept, targets, sources, notes
