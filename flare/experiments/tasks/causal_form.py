"""Decoders: a prompt, and behind it the label or the answer and the end token.

The source's row is the English text in the same prompt and, in training, the English label or answer behind it
(``source_labels``), whose first token stands where the target's first one does. That is what generation does, where the
frozen model goes on writing behind the source's prompt: new token t of the target meets the source's token t, in
training the right one and in generation the model's own, just as the target itself is shown right tokens in training
and its own later on. No position of the target ever meets a state that has read a later token of either answer, and
no answer is shown in `eval_rows`. (A source row without its answer would be masked where answers stand, and the
adapters would meet states in generation that they had never seen.)
"""

from __future__ import annotations

from typing import Any

from ..utils.errors import UserError
from .form import IGNORED, Row
from .registry import Task
from .written_form import WrittenForm


class CausalForm(WrittenForm):
    """Rows: input_ids and labels (-100 on the prompt), source_input_ids and source_labels.

    Prompt and answer are tokenised apart, so that no token reaches over the seam, the answer with a space in front.
    Prompts leave room for the longest answer there may be, so a batch is never wider than max_length.
    """

    layout = "causal"
    auto_class = "AutoModelForCausalLM"

    def __init__(self, task: Task, tokenizer: Any, max_length: int | None = None) -> None:
        begun = tokenizer("a")["input_ids"][:1]
        self._opening = begun if begun and begun[0] == tokenizer.bos_token_id else []
        super().__init__(task, tokenizer, max_length)
        assert self.max_new_tokens is not None
        self.longest_prompt -= self.max_new_tokens
        if self.longest_prompt < 1:
            raise UserError(
                f"--max-length {self.max_length} leaves no room for a prompt: an answer may have {self.max_new_tokens} "
                "tokens; raise it"
            )

    def answer_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(f" {text}", add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return [*ids, self.tokenizer.eos_token_id]

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*self._opening, *ids] for ids in found]

    def train_columns(self, prompt: list[int], answer: list[int]) -> Row:
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
