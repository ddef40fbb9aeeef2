"""Encoder-decoders: the prompt goes into the encoder, the label or the answer is written by the decoder.

The source's rows hold the English text in the same prompt and, in training, the English label or answer as
``source_labels``, so that the decoder fuses as well. In `eval_rows` these hold nothing but an end token: generate only
asks whether they are there, and lets the source's decoder write its own text.
"""

from __future__ import annotations

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

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        return {"input_ids": prompt, "labels": answer}

    def source_columns(self) -> Row:
        return {"source_labels": [self.tokenizer.eos_token_id]}
