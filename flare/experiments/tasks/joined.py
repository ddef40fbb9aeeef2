"""Input-level fusion for models that write: one prompt with both texts and one instruction.

    Text: <source>
    Text: <target>
    Sentiment:

A joined form is the ordinary form of a task with twice the text columns and twice the tokens, the source's first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .examples import Pair
from .form import Row
from .forms import make_form
from .registry import Task
from .written_form import WrittenForm

_PREFIX = "source:"


def joined_task(task: Task) -> Task:
    """Return the task with the source's text columns in front of the target's, under one instruction.

    >>> from flare.experiments.tasks.registry import get_task
    >>> joined_task(get_task("nusax")).prompt
    'Text: {source:text}\\nText: {text}\\nSentiment:'
    """
    places = [found for column in task.text_columns for found in re.finditer(re.escape(f"{{{column}}}"), task.prompt)]
    first, end = min(found.start() for found in places), max(found.end() for found in places)
    begin = task.prompt.rfind("\n", 0, first) + 1  # an instruction in front stands once as well
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
    """A form whose rows hold source and target in one prompt; otherwise the form that it is made from.

    Args:
        form: of a model that writes; its ``max_length`` m is the limit of each text, and rows have up to 2m tokens.
    """

    def __init__(self, form: WrittenForm) -> None:
        assert form.max_new_tokens is not None
        task = replace(form.task, max_length=form.max_length)
        made = make_form(joined_task(task), form.tokenizer, form.layout)
        assert isinstance(made, WrittenForm)
        # answers have the room that they have in every other method, and prompts twice theirs
        made.max_new_tokens, made.longest_prompt = form.max_new_tokens, 2 * form.longest_prompt
        self._form = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    @property
    def prompt(self) -> str:
        """The template with both texts."""
        return self._form.task.prompt

    def train_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to train on: ``input_ids`` and ``labels``, without ``source_*`` columns.

        Raises:
            ValueError: ``with_source=False``, or a pair without a source.
        """
        return self._form.train_rows(_joined(pairs, with_source), with_source=False)

    def eval_rows(self, pairs: Sequence[Pair], with_source: bool) -> tuple[list[Row], list[str]]:
        """Rows to predict from; otherwise as :meth:`train_rows`."""
        return self._form.eval_rows(_joined(pairs, with_source), with_source=False)


def _joined(pairs: Sequence[Pair], with_source: bool) -> list[Pair]:
    """The pairs with both texts in the target: id, label and answers stay the target's."""
    made = []
    for pair in pairs:
        if pair.source is None or not with_source:
            raise ValueError("one prompt of both texts needs the source of every pair; load them with source_text")
        source = {_PREFIX + column: text for column, text in pair.source.texts.items()}
        made.append(Pair(replace(pair.target, texts={**source, **pair.target.texts})))
    return made
