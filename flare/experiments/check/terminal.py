"""Format the terminal output of `flare check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .costs import Cost, Score
from .data import DataCheck

_TEXT = 100  # maximum number of characters shown of a text
_GAP = "  "


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table with a title. The first column is left-aligned, all other columns right-aligned."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        _GAP + _GAP.join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in one)
        for one in (list(enumerate(zip(row, widths, strict=True))) for row in cells)
    ]
    return ["", title, *(line.rstrip() for line in lines)]


def headline(about: dict[str, Any]) -> str:
    """Return a line about the checked task, languages and model."""
    texts = f"{about['target_text']} target text, {about['source_text']} source text"
    tuned = "fine-tuned" if about["fine-tuned"] else "not fine-tuned"
    return (
        f"{about['task']}: {about['source']} -> {', '.join(about['targets'])} ({texts}); {about['model']} "
        f"({about['family']}, {tuned}), {about['max_length']} tokens per text"
    )


def data(check: DataCheck, source: str) -> list[str]:
    """Return the lines about the data of one target language."""
    pairs = ", ".join(f"{count} {split}" for split, count in check.pairs.items())
    lines = ["", f"{check.target}: {pairs} rows", *(f"{_GAP}{line}" for line in check.left_out)]
    for row in check.examples:
        lines.append(f"{_GAP}id {row['id']}, {_cut(row['label'])}")
        for language, texts in ((check.target, row["target"]), (source, row["source"])):
            for text in (texts or {}).values():
                lines.append(f"{_GAP * 2}{language}: {_cut(text)}")
    lines += table(
        "Tokens per text",
        ("language", "split", "texts", "mean", "95 %", "longest", "limit", "cut"),
        [
            (*(one.language, one.split, one.texts, f"{one.mean:.1f}"), *(one.most_of, one.longest, one.limit), cut)
            for one in check.lengths
            for cut in (_share(one.cut, one.texts),)
        ],
    )
    if check.labels:
        names = list(next(iter(check.labels.values())))
        totals = {split: sum(counts.values()) for split, counts in check.labels.items()}
        lines += table(
            "Labels",
            ("label", *check.labels),
            [(name, *(_share(check.labels[split].get(name, 0), totals[split]) for split in totals)) for name in names],
        )
    lines += table(
        "Vocabulary",
        ("language", "words", "tokens", "tokens per word", "unknown tokens"),
        [
            (one.language, one.words, one.tokens, f"{one.per_word:.2f}", _share(one.unknown, one.tokens))
            for one in check.vocabulary
        ],
    )
    return lines


def score(base_score: Score, source: str) -> list[str]:
    """Return the lines about the base's score."""
    scores = ", ".join(f"{name} {value:.1f}" for name, value in base_score.scores.items())
    majority = base_score.majority
    chance = "" if majority is None else f" (accuracy of always predicting the most frequent label: {majority:.1f})"
    return ["", f"The base on {base_score.rows} {source} {base_score.split} rows: {scores}{chance}"]


def costs(methods: Sequence[Cost], runs: int, about: dict[str, Any]) -> list[str]:
    """Return the lines about time and memory.

    Args:
        methods: costs of one run of each method.
        runs: number of runs of each method.
        about: `Check.about`.
    """
    rows: list[tuple[Any, ...]] = []
    for one in methods:
        if one.step_seconds is None or one.peak_bytes is None:
            rows.append((one.method, *["-"] * 5))
            continue
        peak = f"{one.peak_bytes / 2**20:.0f} MiB"
        seconds = (one.train_seconds or 0.0, one.other_seconds or 0.0)
        rows.append((one.method, f"{1000 * one.step_seconds:.0f}", one.steps, *map(duration, seconds), peak))
    kind = next((one.peak_kind for one in methods if one.peak_kind), "")
    lines = table(
        f"One run on this machine ({about['device']}), estimated from a few steps",
        ("method", "ms/step", "steps", "training", "evaluation", f"peak memory ({kind})" if kind else "peak memory"),
        rows,
    )
    total = sum(one.seconds for one in methods) * runs
    failed = sum(one.error is not None for one in methods)
    unmeasured = f"; {failed} could not be measured" if failed else ""
    grid = f"{len(methods)} method{'s' * (len(methods) > 1)}, {runs} run{'s' * (runs > 1)} of each"
    return [*lines, f"{_GAP}{grid}: about {duration(total)} in total{unmeasured}"]


def warnings(messages: Sequence[str]) -> list[str]:
    """Return one line per warning."""
    if not messages:
        return ["", "No warnings."]
    return ["", f"Warnings ({len(messages)})", *(f"{_GAP}- {line}" for line in messages)]


def duration(seconds: float) -> str:
    """Return a duration such as "40 s", "12 min" or "3.4 h".

    >>> duration(5000)
    '1.4 h'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _share(part: int, whole: int) -> str:
    if not part:
        return "0"
    percent = 100 * part / max(whole, 1)
    return f"{part} ({percent:.{0 if percent >= 10 else 1}f} %)"


def _cut(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."
