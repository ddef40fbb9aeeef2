"""Prompts: a template with the texts filled in, as many of their characters as a number of tokens has room for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .registry import Task


def fill(task: Task, texts: Mapping[str, str]) -> str:
    """The prompt of one example. Braces inside the texts are text.

    >>> from flare.experiments.tasks.registry import get_task
    >>> fill(get_task("nusax"), {"text": "{a}"})
    'Text: {a}\\nSentiment:'
    """
    names = "|".join(re.escape(column) for column in task.text_columns)
    return re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], task.prompt)


def cut_to_fit(task: Task, texts: Mapping[str, str], fits: Callable[[str], bool]) -> str | None:
    """The longest prompt that fits, its texts cut at their ends; the instruction and a question stay whole.

    Args:
        task: every context of a QA task is cut; of several texts of another task the longest one; a choice never.
        texts: column -> text.
        fits: whether a prompt fits.

    Returns:
        The prompt, or None where not even the rest fits.
    """
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
