"""Forms for models that generate the label or answer: decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...utils.errors import UserError
from ..data_error import DataError, some_ids
from ..examples import Example, Pair
from ..registry import Task
from .base import IGNORED, Form, Row, as_array
from .prompts import cut_to_fit, fill

#: Maximum tokens of a QA answer, including its end token. The limit is max_length // 4 if that is less.
ANSWER_TOKENS = 64


class GenerativeForm(Form):
    """Base class of the generative forms. It encodes prompts and answers, and turns generated tokens into predictions.

    The target text and the source text (the two streams) are filled into the same prompt template. The
    default templates are in English.

    Attributes:
        longest_prompt: maximum tokens of a prompt.
    """

    detail_names = ("generated",)

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(task, tokenizer, max_length)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) has no end token to end an answer with; set "
                "tokenizer.eos_token"
            )
        self._label_ids: dict[str, list[int]] = {}  # verbalization of a label -> token ids of the answer
        if task.labels is not None and task.kind != "qa":
            task.with_labels(task.labels)  # raises if two labels have the same verbalization
            self._label_ids = {text: self.answer_ids(text) for text in map(task.verbalized, task.labels)}
            self.max_new_tokens = max(map(len, self._label_ids.values()))
        else:
            self.max_new_tokens = min(ANSWER_TOKENS, self.max_length // 4)
        self.longest_prompt = self.max_length

    # --- implemented by each form ---------------------------------------------------------------------------------

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids of an answer, including its end token."""
        raise NotImplementedError

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts, including the special tokens that the model expects."""
        raise NotImplementedError

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        """Return ``input_ids`` and ``labels`` of a training row, either for the target or for the source."""
        raise NotImplementedError

    def source_columns(self) -> Row:
        """Return the columns that an evaluation row with a source has in addition to ``source_input_ids``."""
        return {}

    # --- rows -----------------------------------------------------------------------------------------------------

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        streams = self._texts(pairs, with_source)
        usable, targets, sources, answer_notes = self._answers(pairs, with_source)
        rows: list[Row] = [{} for _ in usable]
        notes = [*self.notes, *answer_notes]
        for prefix, answers in (("", targets), ("source_", sources)):
            if prefix not in streams:
                continue
            prompts, cut_note = self._prompts([streams[prefix][index] for index in usable], prefix)
            notes += cut_note
            for row, prompt, answer in zip(rows, prompts, answers, strict=True):
                row |= {f"{prefix}{name}": ids for name, ids in self.train_columns(prompt, answer).items()}
        return rows, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return prompts without answers, and notes.

        FlareDataCollator pads the layout "causal" on the left, as generate() requires.
        """
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            prompts, cut_note = self._prompts(examples, prefix)
            notes += cut_note
            for row, prompt in zip(rows, prompts, strict=True):
                row[f"{prefix}input_ids"] = prompt
                if prefix:
                    row |= self.source_columns()
        return rows, [*notes, *self.unanswered(pairs)]

    def trainable(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [pairs[index] for index in self._answers(pairs, with_source=False)[0]]

    # --- generated text -------------------------------------------------------------------------------------------

    def next_tokens(self, generated: Sequence[int]) -> list[int] | None:
        """Return the token ids that may follow the generated part of an answer; None: every token may follow.

        A multiple-choice answer is restricted to the letters. If each letter is one token, as in nearly all
        vocabularies, generation returns the letter with the highest likelihood. lm-evaluation-harness scores Belebele
        in the same way.
        """
        if self.task.kind != "multiple-choice":
            return None
        n = len(generated)
        allowed = {ids[n] for ids in self._label_ids.values() if len(ids) > n and ids[:n] == list(generated)}
        return sorted(allowed) or [self.tokenizer.eos_token_id]

    def predictions(self, output: Any, pairs: Sequence[Pair]) -> list[str]:
        """Return labels or answers from generated token ids.

        In QA, the generated text is the answer. In other tasks, a text becomes a label if it equals the label's
        verbalization or name, ignoring case. If it only starts with one or more verbalizations, it becomes the label
        of the longest verbalization. A text that gives no label is returned unchanged and counts as wrong (see
        `prediction_notes`).

        Args:
            output: the new token ids (rows, tokens) without the prompt, or lists of unequal lengths. -100 is padding.
            pairs: the pairs given to `eval_rows`.
        """
        texts = self._generated(output, pairs)
        return [self._label_of(text) for text in texts] if self.task.labels is not None else texts

    def details(self, output: Any, pairs: Sequence[Pair], *more: Any) -> list[dict[str, Any]]:
        """Return the generated text of each row."""
        return [{"generated": text} for text in self._generated(output, pairs)]

    def _generated(self, output: Any, pairs: Sequence[Pair]) -> list[str]:
        """Return the text of each row of new tokens, up to its end token."""
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
        verbalized = {self.task.verbalized(label).strip().casefold(): label for label in labels}
        exact = {**{label.casefold(): label for label in labels}, **verbalized}
        folded = text.casefold()
        prefix = max((word for word in verbalized if word and folded.startswith(word)), key=len, default=None)
        return exact.get(folded) or (text if prefix is None else verbalized[prefix])

    # --- prompts and answers --------------------------------------------------------------------------------------

    def _answer_of(self, example: Example, fallback: str | None = None) -> str | None:
        if self.task.kind != "qa":
            label = example.label if example.label is not None else fallback
            self._label_index(label)
            return self.task.verbalized(label or "")
        return example.answers[0].text.strip() if example.answers else None

    def _ids_of(self, answer: str) -> list[int]:
        """Return `answer_ids` of an answer. Labels are tokenized only once."""
        return [*self._label_ids[answer]] if answer in self._label_ids else self.answer_ids(answer)

    def _prompts(self, examples: Sequence[Example], prefix: str) -> tuple[list[list[int]], list[str]]:
        """Return the token ids of the prompts of the target or the source, and a note on truncated prompts.

        Args:
            examples: the rows.
            prefix: "" for the target, "source_" for the source.

        Raises:
            DataError: a prompt is too long even with its texts removed.
        """
        if not examples:
            return [], []
        limit, what = self.longest_prompt, "source texts" if prefix else "texts"
        prompts = self.prompt_ids([fill(self.task, row.texts) for row in examples])
        cut: list[str] = []
        too_long: list[str] = []
        for index, row in enumerate(examples):
            if len(prompts[index]) <= limit:
                continue
            prompt = cut_to_fit(self.task, row.texts, lambda text: len(self.prompt_ids([text])[0]) <= limit)
            (too_long if prompt is None else cut).append(row.id)
            prompts[index] = self.prompt_ids([prompt or ""])[0]
        if too_long:
            uncut = {"qa": " and the question", "multiple-choice": " and the choices"}.get(self.task.kind, "")
            raise DataError(
                f"{len(too_long)} {what} do not fit into prompts of {limit} tokens, because the parts that are never "
                f"cut (the instruction{uncut}) have more tokens {some_ids(too_long)}; raise --max-length (now "
                f"{self.max_length})"
            )
        note = f"{len(cut)} of {len(examples)} {what} cut to prompts of {limit} tokens {some_ids(cut)}"
        return prompts, [note] if cut else []

    def _answers(
        self, pairs: Sequence[Pair], with_source: bool
    ) -> tuple[list[int], list[list[int]], list[list[int]], list[str]]:
        """Return the indices of the trainable pairs, the token ids of target and source answers, and notes.

        If a source has no answer, its token ids are only the end token.
        """
        assert self.max_new_tokens is not None
        usable, targets, sources = [], [], []
        absent: list[str] = []
        long: list[str] = []
        source_absent: list[str] = []
        source_cut: list[str] = []
        for index, pair in enumerate(pairs):
            answer = self._answer_of(pair.target)
            ids = self._ids_of(answer) if answer is not None else []
            if answer is None or len(ids) > self.max_new_tokens:
                (absent if answer is None else long).append(pair.target.id)
                continue
            usable.append(index)
            targets.append(ids)
            if with_source and pair.source is not None:
                source_answer = self._answer_of(pair.source, pair.target.label)
                if source_answer is None:
                    source_absent.append(pair.target.id)
                source_ids = self._ids_of(source_answer or "")
                if len(source_ids) > self.max_new_tokens:
                    source_cut.append(pair.target.id)
                    source_ids = [*source_ids[: self.max_new_tokens - 1], source_ids[-1]]
                sources.append(source_ids)
        reasons = (
            (absent, "left out because they have no answer"),
            (long, f"left out because their answer has more than {self.max_new_tokens} tokens"),
            (source_absent, "have no answer in the source; an end token takes its place"),
            (source_cut, f"have a source answer of more than {self.max_new_tokens} tokens, which is cut"),
        )
        notes = [f"{len(ids)} of {len(pairs)} rows {reason} {some_ids(ids)}" for ids, reason in reasons if ids]
        return usable, targets, sources, notes


class CausalForm(GenerativeForm):
    """Form of decoders: a prompt, followed by the label or answer and the end token.

    A training row has the columns input_ids, labels (-100 on the prompt) and, with a source, source_input_ids and
    source_labels. Prompt and answer are tokenized separately, so no token spans both, and the answer starts with a
    space. Prompts leave room for the longest possible answer, so a batch is never wider than max_length.

    The source's prompt is the template of the target's prompt, filled with the source text. In training, the source's
    label or answer follows it (``source_labels``), and the collator aligns the first tokens of both answers. Training
    thereby matches generation, in which the frozen model continues the source's prompt: token t of the target's answer
    is fused with token t of the source's answer, which is the correct answer in training and the model's own answer in
    generation. No position of the target is fused with a state that has read a later token of either answer, and the
    rows of `eval_rows` contain no answer.
    (If training left out the source's answer, answer positions would have no source, and generation would give the
    adapters source states that they were never trained on.)
    """

    layout = "causal"
    auto_class = "AutoModelForCausalLM"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        first = tokenizer("a")["input_ids"][:1]
        self._opening = first if first and first[0] == tokenizer.bos_token_id else []
        super().__init__(task, tokenizer, max_length)
        assert self.max_new_tokens is not None
        self.longest_prompt -= self.max_new_tokens
        if self.longest_prompt < 1:
            raise UserError(
                f"--max-length {self.max_length} leaves no room for a prompt: an answer may have {self.max_new_tokens} "
                "tokens; raise --max-length"
            )

    def answer_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(f" {text}", add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return [*ids, self.tokenizer.eos_token_id]

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*self._opening, *ids] for ids in encoded]

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


class Seq2SeqForm(GenerativeForm):
    """Form of encoder-decoders: the encoder reads the prompt, the decoder generates the label or answer.

    A training row has the columns input_ids, labels and, with a source, source_input_ids and source_labels. The
    source's prompt is the template of the target's prompt, filled with the source text. In training, ``source_labels``
    holds the source's label or answer, so that the decoder fuses as well. In `eval_rows`, ``source_labels`` holds only
    an end token: generate() fuses in the decoder if the column is present, but does not use an end token.
    """

    layout = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"

    def answer_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text_target=text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end in ids else [*ids, end]

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        return {"input_ids": prompt, "labels": answer}

    def source_columns(self) -> Row:
        return {"source_labels": [self.tokenizer.eos_token_id]}
