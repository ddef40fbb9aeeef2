"""Fill the texts into a prompt template, and truncate them to fit a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ..registry import Task


def fill(task: Task, texts: Mapping[str, str]) -> str:
    """Return the prompt of one example. Braces inside the texts are not placeholders.

    >>> from flare.experiments.tasks.registry import get_task
    >>> fill(get_task("nusax"), {"text": "{a}"})
    'Text: {a}\\nSentiment:'
    """
    names = "|".join(re.escape(column) for column in task.text_columns)
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], task.prompt)


def cut_to_fit(task: Task, texts: Mapping[str, str], fits: Callable[[str], bool]) -> str | None:
    """Return the longest prompt that fits, with its texts truncated at the end.

    The instruction is never truncated. In a QA task, only the contexts can be truncated, not the questions. In other
    tasks, all text columns except the choices can be truncated. The texts that can be truncated get the same maximum
    number of characters, so the longest text is truncated first.

    Args:
        task: the task.
        texts: column -> text.
        fits: function that returns whether a prompt fits.

    Returns:
        The prompt, or None if it does not fit even without the texts that may be truncated.
    """
    # a joined task (input-level fusion) of QA has two contexts, each after its question
    cuttable = task.text_columns[1::2] if task.kind == "qa" else task.context_columns

    def cut(limit: int) -> str:
        return fill(task, {**texts, **{column: texts[column][:limit].rstrip() for column in cuttable}})

    if not fits(cut(0)):
        return None
    good, bad = 0, max(len(texts[column]) for column in cuttable) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(cut(middle)) else (good, middle)
    return cut(good)
