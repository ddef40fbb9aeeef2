"""Build the tables of a group, and format tables as Markdown, LaTeX (booktabs), text and CSV.

A group holds the runs of one task, source language and base model. `collect` explains groups, lines, variants and
settings.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..utils.escape import csv_cell, latex, markdown, one_line
from ..utils.progress import duration
from .collect import RunGroup
from .display import language_name, language_names, metric_name
from .summary import RANGED, Cell, Cost, Line, Quality, costs

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first `left` columns are left-aligned; the (row, column) pairs in `best` are bold."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def markdown(self) -> str:
        """Return the table in Markdown, without title and notes."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rule = "|" + "---|" * self.left + "---:|" * (len(self.head) - self.left)
        return "\n".join([line([*map(markdown, self.head)]), rule, *map(line, self._rows("**{}**".format, markdown))])

    def text(self) -> str:
        """Return the table for a terminal."""
        head, *rows = ([*map(one_line, cells)] for cells in (self.head, *self.rows))
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            pairs = list(zip(cells, widths, strict=True))
            return "  ".join(c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()

        return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])

    def latex(self) -> str:
        r"""Return a LaTeX table environment, which needs \usepackage{booktabs}."""
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        body = [
            *("% " + one_line(note) for note in self.notes),
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex, self.head)) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in self._rows(r"\textbf{{{}}}".format, latex)),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{latex(self.title)}.}}",
            r"\end{table}",
        ]
        return "\n".join(body) + "\n"

    def _rows(self, bold: Callable[[str], str], escape: Callable[[str], str]) -> list[list[str]]:
        return [
            [bold(escape(cell)) if (i, j) in self.best else escape(cell) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return CSV with a header. None becomes an empty field; texts that a spreadsheet would evaluate are escaped."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([*map(csv_cell, row)] for row in (head, *rows))
    return out.getvalue()


# --- quality ----------------------------------------------------------------------------------------------------------


def quality_table(group: RunGroup, table: Quality) -> Table:
    """Return the quality table: one row per line, with columns for languages, average, rank and number of seeds."""
    partial = bool(table.common) and len(table.common) < len(table.languages)
    several = len(table.languages) > 1
    shown = language_names(table.languages)
    head = ["method", *shown.values()]
    if several:
        head.append("average")
        if partial:
            head.append(f"average over {len(table.common)}")
        head.append("rank")
    head.append("seeds")
    rows = []
    for line in table.lines:
        row = [line.name, *(show(line.cells[language]) for language in table.languages)]
        if several:
            marked = line.average is not None and line.average.languages < len(table.languages)
            of = f" ({line.average.languages} of {len(table.languages)})" if marked and line.average else ""
            row.append(show(line.average) + of)
            if partial:
                row.append(show(line.common))
            row.append(MISSING if line.rank is None else f"{line.rank:.2f}")
        rows.append((*row, line.seeds))
    name, source = metric_name(table.metric), language_name(group.source)
    return Table(
        f"{name[:1].upper()}{name[1:]} in percent, {group.shown_task}, {source} as the source language"
        + (f", {group.rows}" if group.rows else ""),
        tuple(head),
        tuple(rows),
        tuple(_notes(table, partial)),
        best=_best(table, partial),
    )


def _notes(table: Quality, partial: bool) -> list[str]:
    notes = []
    if any(cell and cell.spread is not None for line in table.lines for cell in line.cells.values()):
        notes.append("mean ± sample standard deviation (n - 1) over seeds; for averages, over each seed's average")
    if any(cell and cell.spread is None for line in table.lines for cell in line.cells.values()):
        notes.append("a cell without ± is the score of one seed")
    if len(table.languages) > 1:
        if len(table.complete) < len(table.lines):
            notes.append("an average marked (n of N) covers fewer languages: do not compare it with the other averages")
        if partial:
            notes.append(
                f"average over {len(table.common)}: average over the languages that every line has "
                f"({_listed(table.common)})"
            )
        notes.append(
            f"rank: mean rank over the {len(table.languages)} languages (1 is the best), among the "
            f"{len(table.complete)} lines that have all these languages"
        )
    return notes


def _listed(languages: Sequence[str]) -> str:
    return ", ".join(map(language_name, languages))


def _best(table: Quality, partial: bool) -> frozenset[tuple[int, int]]:
    """Return the (row, column) of the best mean of every column, after rounding.

    If several cells have the best mean, all of them are returned, but none if all means of the column are equal. In
    the column "average", a line that lacks a language is not compared.
    """
    columns: list[list[float | None]] = [
        [cell.mean if (cell := line.cells[language]) else None for line in table.lines] for language in table.languages
    ]
    if len(table.languages) > 1:
        columns.append([_full_average(line, table) for line in table.lines])
        if partial:
            columns.append([line.common.mean if line.common else None for line in table.lines])
    best = set()
    for column, values in enumerate(columns, start=1):
        shown = [None if value is None else round(value, 1) for value in values]
        known = [value for value in shown if value is not None]
        if known and min(known) < max(known):  # none is best if all are equal
            best |= {(row, column) for row, value in enumerate(shown) if value == max(known)}
    return frozenset(best)


def _full_average(line: Line, table: Quality) -> float | None:
    return line.average.mean if line.average and line.average.languages == len(table.languages) else None


def show(cell: Cell | None) -> str:
    """Return a cell as text: "71.0 ± 1.2", "71.0" for one seed, "-" if there is no cell."""
    if cell is None:
        return MISSING
    return f"{cell.mean:.1f}" + ("" if cell.spread is None else f" ± {cell.spread:.1f}")


def quality_csv(table: Quality) -> str:
    """Return the quality table as CSV, with columns for mean, standard deviation and number of seeds of every cell."""
    head = ["variant", "name", "metric"]
    for one in (*table.languages, "average", "average_common"):
        head += [f"{one}_mean", f"{one}_std", f"{one}_n"]
    head += ["average_languages", "average_common_languages", "rank"]
    rows = []
    for line in table.lines:
        row: list[object] = [line.label, line.name, table.metric]
        for cell in (*(line.cells[one] for one in table.languages), line.average, line.common):
            row += [cell.mean, cell.spread, len(cell.values)] if cell else [None, None, 0]
        rows.append([*row, line.average.languages if line.average else 0, len(table.common), line.rank])
    return csv_text(head, rows)


# --- costs ------------------------------------------------------------------------------------------------------------


def cost_table(group: RunGroup) -> Table | None:
    """Return the table of time, memory, steps and trained parameters; None if no run measured a cost."""
    lines = costs(group)
    if not lines:
        return None
    head = ("method", "ms/step", "peak memory", "training time", "steps", "trained parameters", "runs")
    rows = tuple(
        (
            line.name,
            _ranged(line, "seconds_per_step", lambda seconds: f"{1000 * seconds:.1f}"),
            _ranged(line, "peak_bytes", size),
            _ranged(line, "train_seconds", duration),
            MISSING if line.steps is None else f"{line.steps:g}",
            MISSING if line.trainable_parameters is None else f"{line.trainable_parameters:,.0f}",
            str(line.runs),
        )
        for line in lines
    )
    kinds = sorted({kind for e in group.entries if (kind := e.run.metrics.peak_kind)})
    notes = [
        "medians over a line's runs, with the smallest and largest value in brackets; training time includes "
        "evaluation and checkpoints"
    ]
    if kinds:
        notes.append(f"peak memory: {' or '.join(kinds)} of one training step, with weights and optimizer state")
    cached = {name: count for name, count in _cached_bytes(group).items() if count}
    if cached:
        notes.append(
            "source states were cached between epochs: steps read them from the second epoch on, and ms/step is the "
            "median of all steps. Host memory for the cache, which is not part of the peak memory above: "
            + ", ".join(f"{size(count)} ({name})" for name, count in cached.items())
        )
    if any(line.processes != "1" for line in lines):
        shares = "; ".join(f"{line.name}: {line.processes}" for line in lines)
        notes.append(f"processes that share a step: {shares}; peak memory is for one process")
    title = f"Costs, {group.shown_task}, {language_name(group.source)} as the source language"
    return Table(title, head, rows, tuple(notes))


def _cached_bytes(group: RunGroup) -> dict[str, int]:
    """Return the largest source cache, in bytes, among the runs of each line."""
    largest: dict[str, int] = {}
    for entry in group.entries:
        facts = entry.run.metrics.source_cache or {}
        largest[entry.name] = max(largest.get(entry.name, 0), int(facts.get("bytes", 0)))
    return largest


def _ranged(line: Cost, name: str, text: Callable[[float], str]) -> str:
    """Return the median, with the range in brackets if runs differ, for example "1391.5 (949.0 to 1834.0)"."""
    value, ends = getattr(line, name), [text(end) for end in line.ranges.get(name, ())]
    if value is None:
        return MISSING
    return text(value) + (f" ({' to '.join(ends)})" if len(set(ends)) > 1 else "")


def cost_csv(lines: Sequence[Cost]) -> str:
    """Return the cost table as CSV, in seconds and bytes."""
    head = ("variant", "name", "seconds_per_step", "peak_bytes", "train_seconds", "steps", "trainable_parameters")
    ends = [f"{name}_{end}" for name in RANGED for end in ("min", "max")]
    rows = [
        [
            *(getattr(line, name, None) for name in ("label", *head[1:])),
            line.runs,
            *(end for name in RANGED for end in line.ranges.get(name, (None, None))),
            line.processes,
        ]
        for line in lines
    ]
    return csv_text((*head, "runs", *ends, "processes"), rows)


def size(count: float) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# --- all runs ---------------------------------------------------------------------------------------------------------

_RAW = (
    *("task", "source_language", "target_language", "method", "variant", "setting", "seed", "metric", "percent"),
    *("fusion", "r", "source_text", "target_text", "model", "seconds_per_step", "train_seconds", "peak_bytes"),
    *("peak_kind", "steps", "trainable_parameters", "device", "processes", "commit", "date", "folder"),
)


def raw_csv(groups: Sequence[RunGroup]) -> str:
    """Return CSV with one row for every run, setting and metric."""
    rows = []
    for group in groups:
        for entry in sorted(group.entries, key=lambda e: (e.language, list(group.labels).index(e.label), e.seed)):
            record, metrics = entry.run.record, entry.run.metrics
            for metric, percent in entry.scores.items():
                values: dict[str, object] = {
                    **{name: getattr(record, name) for name in _RAW if hasattr(record, name)},
                    **{name: getattr(metrics, name) for name in _RAW if hasattr(metrics, name)},
                    "setting": entry.setting,
                    "metric": metric,
                    "percent": percent,
                    "model": group.model,
                    "device": record.environment.get("device"),
                    "commit": record.environment.get("commit"),
                    "folder": str(entry.run.folder),
                }
                rows.append([values[name] for name in _RAW])
    return csv_text(_RAW, rows)
