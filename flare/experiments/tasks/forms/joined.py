"""Form of input-level fusion for generative models: one prompt with both texts and a single instruction.

    Text: <source>
    Text: <target>
    Sentiment:

A joined task has the source's text columns before the target's text columns, and twice the maximum number of tokens.
The joined form is the form of this task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..examples import Pair
from ..registry import Task
from .base import Row
from .factory import make_form
from .generative import GenerativeForm

_PREFIX = "source:"


def joined_task(task: Task) -> Task:
    """Return the task whose prompt has the source's texts, the target's texts, and one instruction.

    >>> from flare.experiments.tasks.registry import get_task
    >>> joined_task(get_task("nusax")).prompt
    'Text: {source:text}\\nText: {text}\\nSentiment:'
    """
    places = [match for column in task.text_columns for match in re.finditer(re.escape(f"{{{column}}}"), task.prompt)]
    first, end = min(match.start() for match in places), max(match.end() for match in places)
    begin = task.prompt.rfind("\n", 0, first) + 1  # lines before the first text column are not repeated
    head, texts, instruction = task.prompt[:begin], task.prompt[begin:end], task.prompt[end:]
    names = "|".join(map(re.escape, task.text_columns))
    source = re.sub(rf"\{{({names})\}}", rf"{{{_PREFIX}\1}}", texts)
    return replace(
        task,
        choice_columns=(*(_PREFIX + column for column in task.choice_columns), *task.choice_columns),
        text_columns=(*(_PREFIX + column for column in task.text_columns), *task.text_columns),
        prompt=f"{head}{source}\n{texts}{instruction}",
        max_length=2 * task.max_length,
    )


class JoinedForm:
    """Form whose rows hold the source text and the target text in one prompt.

    Attributes that this class does not define are read from the form of the joined task.

    Args:
        form: form of a generative model. Rows have up to twice its ``max_length`` tokens.
    """

    def __init__(self, form: GenerativeForm) -> None:
        assert form.max_new_tokens is not None
        task = replace(form.task, max_length=form.max_length)
        joined = make_form(joined_task(task), form.tokenizer, form.layout)
        assert isinstance(joined, GenerativeForm)
        # the limit for answers is the same as in every other method, and the limit for prompts is twice as large
        joined.max_new_tokens, joined.longest_prompt = form.max_new_tokens, 2 * form.longest_prompt
        self._form = joined

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    @property
    def prompt(self) -> str:
        """The template with both texts."""
        return self._form.task.prompt

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to train on: ``input_ids`` and ``labels``, without ``source_*`` columns.

        Raises:
            ValueError: ``with_source=False``, or a pair without a source.
        """
        return self._form.train_rows(_joined(pairs, with_source), with_source=False)

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Return rows to predict from; see :meth:`train_rows`."""
        return self._form.eval_rows(_joined(pairs, with_source), with_source=False)


def _joined(pairs: Sequence[Pair], with_source: bool) -> list[Pair]:
    """Return pairs whose target holds the texts of both languages, with the target's id, label and answers."""
    joined = []
    for pair in pairs:
        if pair.source is None or not with_source:
            raise ValueError("a prompt with both texts needs the source of every pair; load the pairs with source_text")
        source = {_PREFIX + column: text for column, text in pair.source.texts.items()}
        joined.append(Pair(replace(pair.target, texts={**source, **pair.target.texts})))
    return joined
