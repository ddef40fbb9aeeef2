"""From a task's rows to the texts that are translated, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..tasks import Answer, Example, Task
from .marks import NO_ANSWER, Marked, MarksLost, mark, recover, remove

POLICIES = ("drop", "keep")


@dataclass(frozen=True)
class Prepared:
    """Rows ready to be translated.

    rows: those that have not been dropped.
    marked: of QA, each row's context with marks; None where it goes without.
    texts: what is translated: every row's texts in the order of its columns.
    columns: the text columns, the context last.
    policy: what happens to a row whose span is lost: "drop" or "keep".
    counts: rows, rows dropped and rows kept without a span so far, the latter two by reason.
    """

    rows: tuple[Example, ...]
    marked: tuple[Marked | None, ...]
    texts: tuple[str, ...]
    columns: tuple[str, ...]
    policy: str
    counts: dict[str, Any]


def prepare(rows: Sequence[Example], task: Task, policy: str) -> Prepared:
    """Texts to translate; a QA row's context has marks around its answer.

    Of several answers the first that can be marked goes along; the others are counted.
    """
    kept: list[Example] = []
    marks: list[Marked | None] = []
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    without: Counter[str] = Counter()
    others = 0
    for row in rows:
        marked = None
        if task.kind == "qa":
            context = row.texts[task.text_columns[-1]]
            marked, reason = _mark(context, row.answers)
            if reason is not None and policy == "drop":
                dropped[reason] += 1
                continue
            if reason is not None and row.answers:  # a row that never had an answer lost none
                without[reason] += 1
            others += max(0, len(row.answers) - 1)
        kept.append(row)
        marks.append(marked)
        own = dict(row.texts)
        if marked is not None:
            own[task.text_columns[-1]] = marked.text
        texts += [own[column] for column in task.text_columns]
    counts = {"rows": len(rows), "dropped": dropped, "without_span": without, "other_answers": others}
    return Prepared(tuple(kept), tuple(marks), tuple(texts), task.text_columns, policy, counts)


def finish(prepared: Prepared, translations: Sequence[str]) -> tuple[list[Example], dict[str, Any]]:
    """Rows with translated texts and the answers found again, and the counts for provenance.

    Args:
        translations: of `prepared.texts`.
    """
    counts = prepared.counts
    dropped, without = Counter(counts["dropped"]), Counter(counts["without_span"])
    found: list[Example] = []
    empty = 0
    rest = iter(translations)
    for row, marked in zip(prepared.rows, prepared.marked, strict=True):
        texts = {column: next(rest) for column in prepared.columns}
        answers: tuple[Answer, ...] = ()
        if marked is not None:
            column = prepared.columns[-1]
            try:
                texts[column], answer = recover(texts[column], marked.pair)
                answers = (answer,)
            except MarksLost as lost:
                if prepared.policy == "drop":
                    dropped[str(lost)] += 1
                    continue
                without[str(lost)] += 1
                texts[column] = remove(texts[column], marked.pair)
        empty += sum(bool(row.texts[column].strip()) and not text.strip() for column, text in texts.items())
        found.append(replace(row, texts=texts, answers=answers))
    return found, {
        **counts,
        "written": len(found),
        "dropped": dict(sorted(dropped.items())),
        "without_span": dict(sorted(without.items())),
        "empty": empty,
    }


def _mark(context: str, answers: Sequence[Answer]) -> tuple[Marked | None, str | None]:
    """The marked context, or the reason why there is none."""
    reason = NO_ANSWER
    for answer in answers:
        try:
            return mark(context, answer), None
        except MarksLost as lost:
            reason = str(lost)
    return None, reason
