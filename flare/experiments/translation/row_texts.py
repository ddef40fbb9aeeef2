"""Extract the texts to translate from a task's rows, and put the translations back into the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..tasks import Answer, Example, Task
from .answer_marks import NO_ANSWER, Marked, MarksLost, mark, recover, remove

#: What to do with a QA row whose answer span is lost: drop the row, or keep the row without answers.
POLICIES = ("drop", "keep")


@dataclass(frozen=True)
class PreparedRows:
    """Rows that are ready for translation.

    Attributes:
        rows: the rows that were not dropped.
        marked: for each row, the context with marks around the answer (QA), or None if the row has no marks.
        texts: the texts to translate: the texts of every row, in the order of `columns`.
        columns: the text columns; for QA, the context is last.
        policy: what to do with a row whose answer span is lost in translation, one of `POLICIES`.
        counts: "rows": number of all rows; "dropped" and "without_span": reason -> number of rows that were dropped, or
            that lost their answer span but were kept; "other_answers": number of answers that are not translated,
            because their row has several answers.
    """

    rows: tuple[Example, ...]
    marked: tuple[Marked | None, ...]
    texts: tuple[str, ...]
    columns: tuple[str, ...]
    policy: str
    counts: dict[str, Any]


def prepare_rows(rows: Sequence[Example], task: Task, policy: str) -> PreparedRows:
    """Return the rows that are ready for translation. The context of a QA row has marks around its answer.

    If a row has several answers, the first answer that can be marked is translated, and the other answers are counted.
    If no answer can be marked, the row is dropped, or kept without marks if `policy` is "keep".
    """
    kept: list[Example] = []
    contexts: list[Marked | None] = []
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    without_span: Counter[str] = Counter()
    other_answers = 0
    for row in rows:
        marked = None
        if task.kind == "qa":
            context = row.texts[task.text_columns[-1]]
            marked, reason = _mark_first(context, row.answers)
            if reason is not None and policy == "drop":
                dropped[reason] += 1
                continue
            if reason is not None and row.answers:  # a row without answers in the data has lost no span
                without_span[reason] += 1
            other_answers += max(0, len(row.answers) - 1)
        kept.append(row)
        contexts.append(marked)
        row_texts = dict(row.texts)
        if marked is not None:
            row_texts[task.text_columns[-1]] = marked.text
        texts += [row_texts[column] for column in task.text_columns]
    counts = {"rows": len(rows), "dropped": dropped, "without_span": without_span, "other_answers": other_answers}
    return PreparedRows(tuple(kept), tuple(contexts), tuple(texts), task.text_columns, policy, counts)


def restore_rows(prepared: PreparedRows, translations: Sequence[str]) -> tuple[list[Example], dict[str, Any]]:
    """Return rows with translated texts and recovered answers, and the counts for provenance.

    Args:
        prepared: the result of `prepare_rows`.
        translations: translations of `prepared.texts`.
    """
    counts = prepared.counts
    dropped, without_span = Counter(counts["dropped"]), Counter(counts["without_span"])
    rows: list[Example] = []
    empty = 0
    remaining = iter(translations)
    for row, marked in zip(prepared.rows, prepared.marked, strict=True):
        texts = {column: next(remaining) for column in prepared.columns}
        answers: tuple[Answer, ...] = ()
        if marked is not None:
            column = prepared.columns[-1]
            try:
                texts[column], answer = recover(texts[column], marked.pair)
                answers = (answer,)
            except MarksLost as error:
                if prepared.policy == "drop":
                    dropped[str(error)] += 1
                    continue
                without_span[str(error)] += 1
                texts[column] = remove(texts[column], marked.pair)
        empty += sum(bool(row.texts[column].strip()) and not text.strip() for column, text in texts.items())
        rows.append(replace(row, texts=texts, answers=answers))
    return rows, {
        **counts,
        "written": len(rows),
        "dropped": dict(sorted(dropped.items())),
        "without_span": dict(sorted(without_span.items())),
        "empty": empty,
    }


def _mark_first(context: str, answers: Sequence[Answer]) -> tuple[Marked | None, str | None]:
    """Return the context with its first markable answer marked, or None and the reason why it cannot be marked."""
    reason = NO_ANSWER
    for answer in answers:
        try:
            return mark(context, answer), None
        except MarksLost as error:
            reason = str(error)
    return None, reason
