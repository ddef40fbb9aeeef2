"""Encoder-decoders: the prompt goes into the encoder, the label or the answer is written by the decoder.

The source's rows hold the English text in the same prompt and, in training, the English label or answer as
``source_labels``, so that the decoder fuses as well. In `eval_rows` these hold nothing but an end token: generate only
asks whether they are there, and lets the source's decoder write its own text.
"""

from __future__ import annotations

from collections.abc import Sequence

from .examples import Pair
from .form import Row
from .written_form import WrittenForm


class Seq2SeqForm(WrittenForm):
    """Rows: input_ids, labels, source_input_ids and source_labels."""

    layout = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"

    def answer_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text_target=text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end in ids else [*ids, end]

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        streams = self._texts(pairs, with_source)
        kept, targets, sources, news = self._answers(pairs, with_source)
        rows: list[Row] = [{} for _ in kept]
        notes = [*self.notes, *news]
        for prefix, answers in (("", targets), ("source_", sources)):
            if prefix not in streams:
                continue
            prompts, cut = self._prompts(
                [streams[prefix][index] for index in kept], self.max_length, "source texts" if prefix else "texts"
            )
            notes += cut
            for row, prompt, answer in zip(rows, prompts, answers, strict=True):
                row[f"{prefix}input_ids"], row[f"{prefix}labels"] = prompt, answer
        return rows, notes

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        rows: list[Row] = [{} for _ in pairs]
        notes = list(self.notes)
        for prefix, examples in self._texts(pairs, with_source).items():
            prompts, cut = self._prompts(examples, self.max_length, "source texts" if prefix else "texts")
            notes += cut
            for row, prompt in zip(rows, prompts, strict=True):
                row[f"{prefix}input_ids"] = prompt
                if prefix:
                    row["source_labels"] = [self.tokenizer.eos_token_id]
        return rows, [*notes, *self._unanswered(pairs)]
